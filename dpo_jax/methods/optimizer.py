"""Optimizer and learning-rate schedule, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.config import OPTIMIZER_DEFAULTS, OptimizerConfig
from dpo_jax.errors import UserError


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of each update, counted from 0: a linear rise over ``warmup_steps``, then the schedule's shape.

    Raises:
        UserError: decay_steps do not fit in the run.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rest = max(num_steps - config.warmup_steps, 1)
    if (config.decay_steps or 0) > rest:
        remedy = f"{max(num_steps - config.warmup_steps, 0)} steps follow the warmup; lower it, or train for longer"
        raise UserError("optimizer.decay_steps", config.decay_steps, remedy)
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, end, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
        case "wsd":
            fall = config.decay_steps or min(max(num_steps // 10, 1), rest)
            after = optax.linear_schedule(peak, end, fall, transition_begin=rest - fall)
    if config.warmup_steps == 0:
        return after
    rise = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([rise, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the update at the scheduled rate."""
    rate = make_schedule(config, num_steps)
    settled = {
        name: default if getattr(config, name) is None else getattr(config, name)
        for name, default in OPTIMIZER_DEFAULTS[config.name].items()
    }
    mask = None if config.decay_mask == "all" else _matrices
    options: dict[str, Any] = settled | {"weight_decay": config.weight_decay, "mask": mask}
    moment = jnp.dtype(config.moment_dtype)
    match config.name:
        case "adamw":
            update = optax.adamw(rate, mu_dtype=moment, **options)
        case "lion":
            update = optax.lion(rate, mu_dtype=moment, **options)
        case "adafactor":
            # adafactor's own decay is not scaled by the rate, as the others' is
            decay = (lambda count: config.weight_decay * rate(count)) if config.weight_decay else None
            update = optax.adafactor(rate, weight_decay_rate=decay, weight_decay_mask=True if mask is None else mask)
        case "rmsprop":
            update = optax.chain(
                optax.scale_by_rms(decay=settled["b2"], eps=settled["eps"], eps_in_sqrt=False),
                optax.add_decayed_weights(config.weight_decay, mask),
                optax.scale_by_learning_rate(rate),
            )
    update = _in_float32(update)
    if config.max_grad_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), update)


def _in_float32(update: optax.GradientTransformation) -> optax.GradientTransformation:
    """The update of bfloat16 weights in float32, moments too: in bfloat16 a mean that moves by 0.1% never moves."""
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    return optax.GradientTransformation(
        lambda params: update.init(wide(params)),
        lambda updates, state, params=None: update.update(wide(updates), state, wide(params)),
    )


def _matrices(params):
    """True at matrices. Norms and biases are told by their names, as the dims of stacked layers do not tell them."""
    small = ("norm", "scale", "bias")
    name = lambda path: jax.tree_util.keystr(path[-1:], simple=True)  # noqa: E731
    return jax.tree.map_with_path(lambda path, _: not name(path).endswith(small), params)
