"""One DPO step: a pure function from state, reference and batch to the next state and the step's metrics."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Int

from dpo_jax.batch import AnyArray, PairLogps, stop_gradient
from dpo_jax.config import LossConfig
from dpo_jax.logprobs import LogpsFn, Params
from dpo_jax.losses import mean_loss, preference_loss, preference_metrics


@struct.dataclass
class TrainState:
    """What a step changes. ``params`` are the trainable parameters only."""

    step: Int[Array, ""]  # updates made
    params: Params
    opt_state: optax.OptState
    healthy: Bool[Array, ""]  # False from the first loss or gradient that is not finite; the state then stays as it was


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.ones((), bool))


@struct.dataclass
class Base:
    """The ``reference`` argument where ``params`` are adapters: the frozen weights that they are applied beside.

    The policy is base and adapters, ``logps_fn(params, batch, base)``; the reference is the base without adapters,
    ``logps_fn(None, batch, base)``, and is computed if the loss compares with one.
    """

    params: Params
    logps: PairLogps | None = None  # the reference's log-probs of the batch, where they are cached


class _Scorers(NamedTuple):
    """What gives a batch its log-probs."""

    policy: LogpsFn
    reference: Callable[[Any], PairLogps] | None  # None: cached, or there is no reference
    cached: PairLogps | None

    def reference_logps(self, batch: Any, cached: PairLogps | None) -> PairLogps | None:
        """The reference's log-probs, through which no gradient flows."""
        return cached if self.reference is None else stop_gradient(self.reference(batch))


def _scorers(reference: Params | PairLogps | Base | None, logps_fn: LogpsFn, loss: LossConfig) -> _Scorers:
    if isinstance(reference, Base):
        base = jax.lax.stop_gradient(reference.params)
        run = reference.logps is None and loss.needs_reference
        return _Scorers(
            lambda params, batch: logps_fn(params, batch, base),
            (lambda batch: logps_fn(None, batch, base)) if run else None,
            reference.logps,
        )
    if reference is None or isinstance(reference, PairLogps):
        return _Scorers(logps_fn, None, reference)
    return _Scorers(logps_fn, lambda batch: logps_fn(jax.lax.stop_gradient(reference), batch), None)


def _whole_step(params, batch, scorers: _Scorers, loss: LossConfig):
    """Gradient of the mean loss with all pairs at once."""

    def objective(params):
        policy = scorers.policy(params, batch)
        return mean_loss(preference_loss(policy, reference_logps, loss), policy), policy

    reference_logps = scorers.reference_logps(batch, scorers.cached)
    (_, policy), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return grads, policy, reference_logps


def _join(stacked: PairLogps) -> PairLogps:
    """[microbatches, pairs of a microbatch, ...] -> [B, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)


def _sums(logps: PairLogps) -> dict[str, AnyArray]:
    """What the loss is differentiated by."""
    sums = {"sum": logps.sum, "tail_sum": logps.tail_sum, "log_sum_sq": logps.log_sum_sq}
    return {name: values for name, values in sums.items() if values is not None}


def _accumulated_step(params, batch, scorers: _Scorers, loss: LossConfig):
    """The same gradient, the microbatches of the batch (its leading dim) one after another.

    The chain rule through the pair log-probs: d loss / d params = sum over microbatches of (d loss / d logps)
    (d logps / d params). Where the loss couples the pairs of a step, a first pass computes all log-probs without
    gradient, so that d loss / d logps is the whole step's; else each microbatch gives its own.
    """

    def cotangent(policy: PairLogps, reference_logps: PairLogps | None):
        def total(sums):
            here = replace(policy, **sums)
            return (preference_loss(here, reference_logps, loss) * here.weight).sum()

        return jax.grad(total)(_sums(policy))

    reference_of = lambda microbatch: scorers.reference_logps(microbatch["batch"], microbatch["cached"])  # noqa: E731
    microbatches = {"batch": batch, "cached": scorers.cached, "cotangent": None}
    reference_logps, coupled = None, loss.coupled
    if coupled:
        _, (policy, stacked_reference) = jax.lax.scan(
            lambda _, microbatch: (None, (scorers.policy(params, microbatch["batch"]), reference_of(microbatch))),
            None,
            microbatches,
        )
        reference_logps = None if stacked_reference is None else _join(stacked_reference)
        step_cotangent = cotangent(_join(policy), reference_logps)
        microbatches["cotangent"] = jax.tree.map(lambda x: x.reshape(policy.sum.shape), step_cotangent)

    def add_microbatch(grads, microbatch):
        microbatch_reference = None if coupled else reference_of(microbatch)

        def pulled(params):
            policy = scorers.policy(params, microbatch["batch"])
            pull = microbatch["cotangent"] if coupled else cotangent(stop_gradient(policy), microbatch_reference)
            return optax.tree.vdot(jax.lax.stop_gradient(pull), _sums(policy)), policy

        (_, policy), microbatch_grads = jax.value_and_grad(pulled, has_aux=True)(params)
        return jax.tree.map(jnp.add, grads, microbatch_grads), (policy, microbatch_reference)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    grads, (policy, uncoupled_reference) = jax.lax.scan(add_microbatch, zeros, microbatches)
    policy = _join(policy)
    if uncoupled_reference is not None:
        reference_logps = _join(uncoupled_reference)
    return jax.tree.map(lambda x: x / jnp.maximum(policy.valid.sum(), 1), grads), policy, reference_logps


def train_step(
    state: TrainState,
    reference: Params | PairLogps | Base | None,
    batch: Any,
    *,
    logps_fn: LogpsFn,
    loss: LossConfig,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """Make one update; pure, not jitted.

    ``batch`` is whatever ``logps_fn(params, batch) -> PairLogps`` takes; with ``accumulation`` > 1 its leaves (and
    those of a cached ``reference``) have a leading dim of that size, and the result is that of the whole batch.
    ``reference``: a parameter tree of the same model, its ``PairLogps`` of this batch, None, or the ``Base`` of
    adapters. No gradient reaches it.

    Metrics are float32 scalars named as TRL's: loss, rewards/*, logps/*, grad_norm (before clipping), and token
    statistics where ``logps_fn`` gives them. A loss or gradient that is not finite leaves the state as it was and
    clears ``state.healthy``, which then holds all further updates.
    """
    compute = _whole_step if accumulation == 1 else _accumulated_step
    grads, policy, reference_logps = compute(state.params, batch, _scorers(reference, logps_fn, loss), loss)
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)  # norm and moments of bfloat16 weights, too
    metrics = preference_metrics(policy, reference_logps, loss) | {"grad_norm": optax.tree.norm(grads)}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    healthy = state.healthy & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    after = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, healthy)
    before = replace(state, healthy=healthy)
    return jax.tree.map(lambda new, old: jnp.where(healthy, new, old).astype(old.dtype), after, before), metrics


def state_shardings(
    state: TrainState, param_shardings: Any, replicated: Any, optimizer: optax.GradientTransformation
) -> TrainState:
    """Sharding of every leaf of the state: moments lie as their weights do, the rest is ``replicated``.

    ``state`` may be shapes (``jax.eval_shape``). A factored moment, of another shape than its weight, is
    ``replicated``.
    """
    opt_state = optax.tree.map_params(
        optimizer.init,
        lambda moment, weight, sharding: sharding if moment.shape == weight.shape else replicated,
        state.opt_state,
        state.params,
        param_shardings,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, param_shardings, opt_state, replicated)


TrainStep = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Array]]]  # compiled: (state, reference, batch)


def make_train_step(
    *,
    logps_fn: LogpsFn,
    loss: LossConfig,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
    shardings: TrainState | None = None,
    metrics_sharding: Any = None,
    compiler_options: Mapping[str, str] | None = None,
) -> TrainStep:
    """``train_step`` compiled: ``step(state, reference, batch) -> (state, metrics)``, the old state donated.

    ``shardings``: of the state, from ``state_shardings``; the new state comes back in the very same ones.
    ``compiler_options``: for XLA, by name.
    """
    step = partial(train_step, logps_fn=logps_fn, loss=loss, optimizer=optimizer, accumulation=accumulation)
    compiled = partial(jax.jit, step, donate_argnums=0, compiler_options=dict(compiler_options or {}))
    return compiled() if shardings is None else compiled(out_shardings=(shardings, metrics_sharding))
