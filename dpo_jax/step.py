"""One DPO step: a pure function of state, frozen weights and batch that returns the next state and metrics.

Its two halves, `pair_gradient` and `apply_gradient`, can be reused separately by other training methods.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.balance import scaled_balance_loss
from dpo_jax.batch import Adapted, PairLogps, Params
from dpo_jax.config import LossConfig
from dpo_jax.logprobs import LogpsFn
from dpo_jax.losses import mean_loss, preference_loss, preference_metrics


@struct.dataclass
class TrainState:
    """State that a step updates; ``params`` are only the trained parameters: all weights or the adapters."""

    step: Int[Array, ""]  # number of updates made
    params: Params
    opt_state: optax.OptState
    healthy: Bool[Array, ""]  # False from the first non-finite loss or gradient on; the state is then frozen
    reference: Params | None = None  # weights of a reference that follows the policy


@struct.dataclass
class Frozen:
    """Read-only inputs of a step, which receive no gradient.

    With adapters, the base model without adapters is the default reference: it is run if the loss needs a reference
    and ``reference`` is None.
    """

    base: Params | None = None  # base weights, if adapters are trained
    reference: Params | PairLogps | None = None  # reference weights, or the reference log-probs of the batch


class Follow(NamedTuple):
    """TR-DPO (arXiv 2404.09656): once in ``every`` updates, mix a fraction ``mix`` of the policy into the reference."""

    every: int
    mix: float


def init_state(params: Params, optimizer: optax.GradientTransformation, reference: Params | None = None) -> TrainState:
    """Return the initial state; ``reference``: weights that will follow the policy and must not alias ``params``."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.ones((), bool), reference)


def pair_gradient(
    params: Params, frozen: Frozen, batch: Any, *, logps_fn: LogpsFn, loss: LossConfig, accumulation: int = 1
) -> tuple[Params, PairLogps, PairLogps | None]:
    """Return the gradient of a step's mean loss, and the log-probs of policy and reference.

    ``accumulation``: number of microbatches, computed sequentially; if above 1, the arrays of ``batch`` and of cached
    log-probs have a leading dim of that size. For every loss the result equals that of all pairs at once.
    """
    base = jax.lax.stop_gradient(frozen.base)
    cached_logps = frozen.reference if isinstance(frozen.reference, PairLogps) else None
    reference_weights = None if cached_logps is not None else frozen.reference
    if frozen.reference is None and base is not None and loss.needs_reference:
        reference_weights = Adapted(None, base)

    def policy_logps(params: Params, batch: Any) -> PairLogps:
        return logps_fn(params if base is None else Adapted(params, base), batch)

    def reference_logps(batch: Any, cached: PairLogps | None) -> PairLogps | None:
        if reference_weights is None:
            return cached
        return jax.lax.stop_gradient(logps_fn(jax.lax.stop_gradient(reference_weights), batch))

    gradient_fn = _whole_gradient
    if accumulation > 1:
        first_logps = lambda params, batch: policy_logps(params, jax.tree.map(lambda x: x[0], batch))  # noqa: E731
        is_coupled = loss.coupled or jax.eval_shape(first_logps, params, batch).balance_coef != 0
        gradient_fn = _two_pass_gradient if is_coupled else _one_pass_gradient
    return gradient_fn(params, (batch, cached_logps), policy_logps, reference_logps, loss)


def _whole_gradient(params, inputs, policy_logps, reference_logps, loss):
    def objective(params):
        policy = policy_logps(params, inputs[0])
        return mean_loss(preference_loss(policy, reference, loss), policy), policy

    reference = reference_logps(*inputs)
    (_, policy), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return grads, policy, reference


def _one_pass_gradient(params, inputs, policy_logps, reference_logps, loss):
    """Accumulate the gradient over microbatches if the loss of each pair depends on that pair alone."""

    def microbatch_gradient(microbatch):
        reference = reference_logps(*microbatch)

        def pulled_back(params):
            policy = policy_logps(params, microbatch[0])
            cotangents = jax.lax.stop_gradient(_loss_cotangents(jax.lax.stop_gradient(policy), reference, loss))
            return optax.tree.vdot(cotangents, _sums(policy)), policy

        (_, policy), grads = jax.value_and_grad(pulled_back, has_aux=True)(params)
        return grads, (policy, reference)

    grads, (policy, reference) = accumulate_gradient(microbatch_gradient, inputs, params)
    policy, reference = _join_microbatches(policy), _join_microbatches(reference)
    return _average(grads, policy), policy, reference


def _two_pass_gradient(params, inputs, policy_logps, reference_logps, loss):
    """Accumulate the gradient over microbatches if the loss couples pairs: d loss / d logps depends on all log-probs.

    The load-balancing loss of a mixture of experts couples pairs, too.

    By the chain rule, d loss / d params = sum over microbatches of (d loss / d logps) (d logps / d params). The first
    pass computes the log-probs without gradient; the second pulls d loss / d logps back through each microbatch.
    """

    def microbatch_logps(_, microbatch):
        return None, (policy_logps(params, microbatch[0]), reference_logps(*microbatch))

    def microbatch_gradient(microbatch):
        def pulled_back(params):
            policy = policy_logps(params, microbatch[0])
            return optax.tree.vdot(jax.lax.stop_gradient(microbatch[1]), _sums(policy)), policy

        (_, policy), grads = jax.value_and_grad(pulled_back, has_aux=True)(params)
        return grads, policy

    _, stacked_logps = jax.lax.scan(microbatch_logps, None, inputs)
    policy, reference = map(_join_microbatches, stacked_logps)
    cotangents = _split_microbatches(_loss_cotangents(policy, reference, loss), stacked_logps[0])
    grads, policy = accumulate_gradient(microbatch_gradient, (inputs[0], cotangents), params)
    policy = _join_microbatches(policy)
    return _average(grads, policy), policy, reference


def _loss_cotangents(policy: PairLogps, reference: PairLogps | None, loss: LossConfig) -> dict[str, Any]:
    """Return, by name, the gradient of (number of pairs) * loss with respect to each of `_sums`."""

    def total(sums):
        logps = replace(policy, **sums)
        pair_losses = (preference_loss(logps, reference, loss) * policy.weight).sum()
        return pair_losses + jnp.maximum(policy.valid.sum(), 1) * scaled_balance_loss(logps)

    return jax.grad(total)(_sums(policy))


def _sums(logps: PairLogps) -> dict[str, Any]:
    """Return the fields of `PairLogps` with respect to which the loss is differentiated, by name."""
    sums: dict[str, Any] = {"sum": logps.sum, "tail_sum": logps.tail_sum, "log_sum_sq": logps.log_sum_sq}
    if logps.balance_coef != 0:
        sums["balance"] = logps.balance
    return {name: values for name, values in sums.items() if values is not None}


def accumulate_gradient(
    fn: Callable[[Any], tuple[Params, Any]], microbatches: Any, params: Params
) -> tuple[Params, Any]:
    """Sum the gradients that ``fn`` returns for the microbatches, in float32, and stack its other outputs."""

    def add(grads, microbatch):
        microbatch_grads, aux = fn(microbatch)
        return jax.tree.map(jnp.add, grads, microbatch_grads), aux

    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params), microbatches)


def _join_microbatches(stacked: Any) -> Any:
    """Join the log-probs of microbatches, [microbatches, pairs, ...] -> [B, ...], and add up sums over tokens."""
    joined_logps = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)
    if stacked is None or stacked.balance is None:
        return joined_logps
    return replace(joined_logps, balance=jax.tree.map(lambda x: x.sum(0), stacked.balance))


def _split_microbatches(cotangents: dict[str, Any], stacked: PairLogps) -> dict[str, Any]:
    """Split cotangents of `_sums` by microbatch, as the transpose of `_join_microbatches`."""
    balance = cotangents.pop("balance", None)
    split_cotangents = jax.tree.map(lambda x: x.reshape(stacked.sum.shape), cotangents)
    if balance is not None:
        num_microbatches = len(stacked.sum)
        split_cotangents["balance"] = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_microbatches, *x.shape)), balance)
    return split_cotangents


def _average(grads: Params, policy: PairLogps) -> Params:
    return jax.tree.map(lambda x: x / jnp.maximum(policy.valid.sum(), 1), grads)


def apply_gradient(
    state: TrainState,
    grads: Params,
    loss: Float[Array, ""],
    optimizer: optax.GradientTransformation,
    follow: Follow | None = None,
) -> tuple[TrainState, Float[Array, ""]]:
    """Return the next state and the gradient norm before clipping.

    A non-finite loss or gradient leaves the state unchanged and clears ``healthy``, which blocks all further updates.
    ``follow``: mix the policy into ``state.reference``, in the reference's dtype.
    """
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)  # of bfloat16 weights, too
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    healthy = state.healthy & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params = optax.apply_updates(state.params, updates)
    new_state = TrainState(state.step + 1, params, opt_state, healthy, state.reference)
    old_state = replace(state, healthy=healthy)
    state = jax.tree.map(lambda new, old: jnp.where(healthy, new, old).astype(old.dtype), new_state, old_state)
    if follow is None:
        return state, grad_norm
    is_due = healthy & (state.step % follow.every == 0)
    reference = jax.lax.cond(is_due, partial(_mix, follow.mix), lambda old, _: old, state.reference, state.params)
    return replace(state, reference=reference), grad_norm


def recovered(state: TrainState) -> TrainState:
    """Return the state with ``healthy`` set again, the only field that a non-finite update changes."""
    return replace(state, healthy=jax.device_put(np.ones((), bool), state.healthy.sharding))


def _mix(fraction: float, reference: Params, policy: Params) -> Params:
    mix = lambda old, new: fraction * new.astype(jnp.float32) + (1 - fraction) * old.astype(jnp.float32)  # noqa: E731
    return jax.tree.map(lambda old, new: mix(old, new).astype(old.dtype), reference, policy)


def train_step(
    state: TrainState,
    frozen: Frozen | Params | PairLogps | None,
    batch: Any,
    *,
    logps_fn: LogpsFn,
    loss: LossConfig,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
    follow: Follow | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Make one update. This is a pure function and is not jitted.

    ``frozen``: a `Frozen`, or just the reference: a parameter tree of the same model, its ``PairLogps`` of the batch,
    or None. ``batch`` is passed to ``logps_fn(weights, batch) -> PairLogps``, where the weights are ``state.params`` or
    ``Adapted(state.params, frozen.base)``; ``accumulation`` as in `pair_gradient`. ``follow``: how ``state.reference``
    follows the policy.

    Metrics are float32 scalars with TRL's names: loss, rewards/*, logps/*, grad_norm (before clipping), and token
    statistics if ``logps_fn`` computes them.
    """
    frozen = frozen if isinstance(frozen, Frozen) else Frozen(reference=frozen)
    if state.reference is not None:
        frozen = replace(frozen, reference=state.reference)
    grads, policy, reference = pair_gradient(
        state.params, frozen, batch, logps_fn=logps_fn, loss=loss, accumulation=accumulation
    )
    metrics = preference_metrics(policy, reference, loss)
    state, grad_norm = apply_gradient(state, grads, metrics["loss"], optimizer, follow)
    return state, metrics | {"grad_norm": grad_norm}


def state_shardings(
    state: TrainState, param_shardings: Any, replicated: Any, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the state's shardings: moments and reference are sharded like their weights, all else is ``replicated``.

    ``state`` may be a tree of shapes (``jax.eval_shape``). A factored moment, whose shape differs from its weight's,
    is ``replicated``.
    """
    opt_state = optax.tree.map_params(
        optimizer.init,
        lambda moment, weight, sharding: sharding if moment.shape == weight.shape else replicated,
        state.opt_state,
        state.params,
        param_shardings,
        transform_non_params=lambda _: replicated,
    )
    reference = None if state.reference is None else param_shardings
    return TrainState(replicated, param_shardings, opt_state, replicated, reference)


TrainStep = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Array]]]  # compiled: (state, frozen, batch)


def make_train_step(
    *,
    logps_fn: LogpsFn,
    loss: LossConfig,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
    follow: Follow | None = None,
    shardings: TrainState | None = None,
    metrics_sharding: Any = None,
    compiler_options: Mapping[str, str] | None = None,
) -> TrainStep:
    """Return ``train_step`` jitted as ``step(state, frozen, batch) -> (state, metrics)``, which donates the old state.

    ``shardings``: of the state, from ``state_shardings``; the new state has the same ones.
    ``compiler_options``: XLA options by name.
    """
    step_fn = partial(
        train_step, logps_fn=logps_fn, loss=loss, optimizer=optimizer, accumulation=accumulation, follow=follow
    )
    compile_step = partial(jax.jit, step_fn, donate_argnums=0, compiler_options=dict(compiler_options or {}))
    return compile_step() if shardings is None else compile_step(out_shardings=(shardings, metrics_sharding))
