"""Policy gradients on sampled answers: PPO and RLOO, with the KL penalty in the reward.

The objective is E[score(x, y)] - kl_coef KL(policy || reference), whose optimum is that of DPO at beta = kl_coef. The
penalty is the log-ratio of each sampled token (k1), taken off its reward: the estimator whose gradient is that of
reverse KL. In the loss its gradient would have mean 0, and k3 in the reward would be the gradient of no divergence
(arXiv 2512.21852).

Shape letters: G microbatches, B prompts of one, K answers per prompt, N tokens per answer.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from dpo_jax.batch import Adapted, Params
from dpo_jax.config.online import PolicyGradientConfig
from dpo_jax.step import Frozen, TrainState, accumulate_gradient, apply_gradient

TokensFn = Callable[[Any, Any], Float[Array, "B K N"]]  # (weights, inputs of one microbatch) -> a number per token


class ActorCritic(NamedTuple):
    """Trained parameters: weights or adapters of the policy and, for GAE, of the value model or of its head alone."""

    policy: Params
    value: Params | None = None


OutputsFn = Callable[[ActorCritic, Any], tuple[Float[Array, "B K N"], Float[Array, "B K N"] | None]]
"""(weights of both models, inputs of one microbatch) -> each token's log-prob, and with GAE the value before it."""


def separate_outputs(logps_fn: TokensFn, values_fn: TokensFn | None) -> OutputsFn:
    """Return an `OutputsFn` for a policy and a value model with its own layers; ``values_fn`` None: no value model."""

    def outputs_fn(weights: ActorCritic, inputs: Any) -> tuple[Array, Array | None]:
        return logps_fn(weights.policy, inputs), None if values_fn is None else values_fn(weights.value, inputs)

    return outputs_fn


@struct.dataclass
class Rollout:
    """Answers sampled from the policy, and their scores."""

    inputs: Any  # of the models: a pytree with leading dim G
    mask: Bool[Array, "G B K N"]  # True: a token of the answer, its end token included
    ended: Bool[Array, "G B K"]  # the answer has an end token
    scores: Float[Array, "G B K"]
    sampled_logps: Float[Array, "G B K N"]  # as the sampler computed them


class ValueTargets(NamedTuple):
    """Values that the value model predicted before a step's updates, and the returns that it is trained to predict."""

    old_values: Float[Array, "*G B K N"]
    returns: Float[Array, "*G B K N"]


@struct.dataclass
class Targets:
    """Values that the losses of a step's updates treat as constants, computed before the first update."""

    logps: Float[Array, "*G B K N"]  # of the policy that sampled, recomputed by the training program
    advantages: Float[Array, "*a"]  # of each token [*G B K N] with GAE, of each answer [*G B K] with RLOO
    values: ValueTargets | None = None


def token_rewards(
    scores: Float[Array, "*R"], log_ratios: Float[Array, "*R N"], mask: Bool[Array, "*R N"], kl_coef: float
) -> Float[Array, "*R N"]:
    """r_t = -kl_coef log(pi(y_t) / ref(y_t)), plus the score at the last token of the answer."""
    is_last = mask & ~jnp.pad(mask[..., 1:], [(0, 0)] * (mask.ndim - 1) + [(0, 1)])
    return jnp.where(mask, is_last * scores[..., None] - kl_coef * log_ratios, 0.0)


def gae(
    rewards: Float[Array, "*R N"], values: Float[Array, "*R N"], mask: Bool[Array, "*R N"], gae_lambda: float
) -> Float[Array, "*R N"]:
    """A_t = d_t + lambda A_{t+1}, d_t = r_t + V_{t+1} - V_t, where A and V after the last token are 0; gamma is 1.

    Generalized advantage estimation: Schulman et al. 2016, arXiv 1506.02438, eq. 16. An answer that was cut off at the
    maximum length ends there too; otherwise length would cost nothing.
    """
    values = jnp.where(mask, values, 0.0)
    later_values = jnp.pad(values[..., 1:], [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    deltas = jnp.where(mask, rewards + later_values - values, 0.0)

    def previous_advantage(advantage: Array, delta: Array) -> tuple[Array, Array]:
        advantage = delta + gae_lambda * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(
        previous_advantage, jnp.zeros_like(deltas[..., 0]), jnp.moveaxis(deltas, -1, 0), reverse=True
    )
    return jnp.where(mask, jnp.moveaxis(advantages, 0, -1), 0.0)


def whiten(x: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Float[Array, "*n"]:
    """Shift and scale a step's values to mean 0 and variance 1 where ``mask`` is True; 0 elsewhere."""
    mean = jnp.mean(x, where=mask)
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(jnp.var(x, where=mask) + 1e-8), 0.0)


def leave_one_out(rewards: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """A_k = R_k - mean of the prompt's other R_j: RLOO, Ahmadian et al. 2024, arXiv 2402.14740, eq. 6."""
    num_others = rewards.shape[-1] - 1
    return rewards - (rewards.sum(-1, keepdims=True) - rewards) / num_others


def clipped_surrogate(ratio: Float[Array, "*n"], advantages: Float[Array, "*n"], clip: float) -> Float[Array, "*n"]:
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A): PPO, Schulman et al. 2017, arXiv 1707.06347, eq. 7."""
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)


def clipped_value_loss(
    values: Float[Array, "*n"], old_values: Float[Array, "*n"], returns: Float[Array, "*n"], clip: float
) -> Float[Array, "*n"]:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2, as in the code of Ouyang et al. 2022 and TRL."""
    clipped_values = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.maximum((values - returns) ** 2, (clipped_values - returns) ** 2)


def make_targets(
    rollout: Rollout,
    logps: Float[Array, "G B K N"],
    reference_logps: Float[Array, "G B K N"],
    values: Float[Array, "G B K N"] | None,
    options: PolicyGradientConfig,
) -> tuple[Targets, dict[str, Array]]:
    """Compute advantages and the other targets of a step's updates, and metrics of its answers.

    Score, KLs, reward, length and ``ended`` are means over answers. ``sampled_kl``: the sum of log(pi / ref) over an
    answer's tokens; ``sampled_kl_k3``: that of ref / pi - 1 - log(ref / pi), which has the same mean and is never
    negative (Schulman 2020); ``rlhf_reward``: the score minus kl_coef sampled_kl, and minus the penalty for a missing
    end token; ``sampler_error`` and ``mean_sampler_error``: the largest and the mean difference of a log-prob from the
    sampler's, relative to it.
    """
    mask = rollout.mask
    is_real = mask.any(-1)  # False: padding of a ragged last step
    answer_mean = partial(jnp.mean, where=is_real)
    log_ratios = jnp.where(mask, logps - reference_logps, 0.0)
    scores = rollout.scores - options.missing_eos_penalty * ~rollout.ended
    rewards = token_rewards(scores, log_ratios, mask, options.kl_coef)
    answer_rewards = rewards.sum(-1)
    sampler_errors = jnp.abs(logps - rollout.sampled_logps) / jnp.maximum(1.0, jnp.abs(logps))
    metrics = {
        "score": answer_mean(rollout.scores),
        "sampled_kl": answer_mean(log_ratios.sum(-1)),
        "sampled_kl_k3": answer_mean((jnp.expm1(-log_ratios) + log_ratios).sum(-1)),
        "rlhf_reward": answer_mean(answer_rewards),
        "length": answer_mean(mask.sum(-1).astype(jnp.float32)),
        "ended": answer_mean(rollout.ended.astype(jnp.float32)),
        "sampler_error": jnp.max(sampler_errors, where=mask, initial=0.0),
        "mean_sampler_error": jnp.mean(sampler_errors, where=mask),
    }
    if values is None:
        return Targets(logps, leave_one_out(answer_rewards)), metrics
    advantages = gae(rewards, values, mask, options.gae_lambda)
    returns = advantages + values
    metrics["explained_variance"] = 1 - jnp.var(advantages, where=mask) / jnp.var(returns, where=mask)
    return Targets(logps, whiten(advantages, mask), ValueTargets(values, returns)), metrics


def update_loss(
    logps: Float[Array, "B K N"],
    values: Float[Array, "B K N"] | None,
    targets: Targets,
    mask: Bool[Array, "B K N"],
    options: PolicyGradientConfig,
) -> dict[str, Array]:
    """Return the sums of a microbatch's losses: over tokens (GAE) or over answers (RLOO)."""
    log_ratios = jnp.where(mask, logps - targets.logps, 0.0)
    term_mask = mask
    if values is None:  # the ratio of whole answers, whose baseline is one number
        log_ratios, term_mask = log_ratios.sum(-1), mask.any(-1)
    ratio = jnp.exp(log_ratios)
    losses = clipped_surrogate(ratio, targets.advantages, options.clip)
    sums = {
        "policy_loss": jnp.sum(losses, where=term_mask),
        "clip_fraction": jnp.sum(jnp.abs(ratio - 1) > options.clip, where=term_mask).astype(jnp.float32),
    }
    if values is not None and targets.values is not None:
        value_losses = clipped_value_loss(values, *targets.values, options.value_clip)
        sums["value_loss"] = jnp.sum(value_losses, where=mask)
    old_logps = targets.logps if values is not None else targets.logps.sum(-1)
    ratio_errors = jnp.abs(log_ratios) / jnp.maximum(1.0, jnp.abs(old_logps))
    sums["mean_ratio_error"] = jnp.sum(ratio_errors, where=term_mask)
    return sums | {"ratio_error": jnp.max(ratio_errors, where=term_mask, initial=0.0)}


def policy_gradient_step(
    state: TrainState,
    frozen: Frozen,
    rollout: Rollout,
    *,
    outputs_fn: OutputsFn,
    logps_fn: TokensFn,
    options: PolicyGradientConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Array]]:
    """Make all updates on the answers of one rollout. This is a pure function and is not jitted.

    ``state.params``: an `ActorCritic`; ``frozen.reference``: the reference's weights, which may be None if the policy
    has adapters. ``outputs_fn`` gives what is trained and ``logps_fn`` the reference's log-probs, 0 outside the mask;
    the weights of ``outputs_fn`` are ``state.params``, or with adapters each field as ``Adapted(field, frozen.base)``.
    The gradient is averaged over the tokens (GAE) or answers (RLOO) of the whole step, however many microbatches it
    has.

    Metrics are float32 scalars: those of `make_targets`; loss, its parts, ``grad_norm`` before clipping and
    ``clip_fraction``, averaged over the updates; ``max_grad_norm``, the largest of these norms; and ``ratio_error``
    and ``mean_ratio_error``, the largest and the mean |log ratio| at the first update relative to the log-prob, which
    are 0 but for rounding. If any update is not finite, the state is unchanged but for ``healthy``.
    """
    base = frozen.base

    def weights_of(params: ActorCritic) -> ActorCritic:
        if base is None:
            return params
        return ActorCritic(*(None if part is None else Adapted(part, base) for part in params))

    reference = Adapted(None, base) if frozen.reference is None else frozen.reference
    logps, values = jax.lax.map(partial(outputs_fn, weights_of(state.params)), rollout.inputs)
    reference_logps = jax.lax.map(partial(logps_fn, reference), rollout.inputs)
    targets, metrics = make_targets(rollout, logps, reference_logps, values, options)
    targets = jax.lax.stop_gradient(targets)
    num_terms = rollout.mask.any(-1).sum() if values is None else rollout.mask.sum()

    def loss_fn(params: ActorCritic, inputs: Any, targets: Targets, mask: Array) -> tuple[Array, dict[str, Array]]:
        sums = update_loss(*outputs_fn(weights_of(params), inputs), targets, mask, options)
        return (sums["policy_loss"] + options.value_coef * sums.get("value_loss", 0.0)) / num_terms, sums

    def update(state: TrainState, _: None) -> tuple[TrainState, dict[str, Array]]:
        def microbatch_gradient(microbatch: Any) -> tuple[Params, Any]:
            (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *microbatch)
            return grads, (loss, sums)

        microbatches = rollout.inputs, targets, rollout.mask
        grads, (losses, sums) = accumulate_gradient(microbatch_gradient, microbatches, state.params)
        ratio_error = sums.pop("ratio_error").max()
        means = {name: x.sum() / num_terms for name, x in sums.items()} | {"loss": losses.sum()}
        state, grad_norm = apply_gradient(state, grads, means["loss"], optimizer)
        return state, means | {"grad_norm": grad_norm, "ratio_error": ratio_error}

    new_state, update_metrics = jax.lax.scan(update, state, length=options.epochs)
    first_errors = {name: update_metrics.pop(name)[0] for name in ("ratio_error", "mean_ratio_error")}
    metrics["max_grad_norm"] = update_metrics["grad_norm"].max()
    metrics |= {name: x.mean() for name, x in update_metrics.items()} | first_errors
    old_state = replace(state, healthy=new_state.healthy)
    return jax.tree.map(lambda new, old: jnp.where(new_state.healthy, new, old), new_state, old_state), metrics
