"""Optimizer and learning-rate schedule, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.config import OPTIMIZER_DEFAULTS, OptimizerConfig
from dpo_jax.errors import UserError


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, counted from 0: linear warmup, then the chosen schedule.

    Raises:
        UserError: ``decay_steps`` exceeds the number of steps after the warmup.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    decay_length = max(num_steps - config.warmup_steps, 1)
    if (config.decay_steps or 0) > decay_length:
        num_left = max(num_steps - config.warmup_steps, 0)
        remedy = f"{num_left} steps follow the warmup; lower decay_steps, or train longer"
        raise UserError("optimizer.decay_steps", config.decay_steps, remedy)
    match config.schedule:
        case "constant":
            after_warmup = optax.constant_schedule(peak)
        case "linear":
            after_warmup = optax.linear_schedule(peak, end, decay_length)
        case "cosine":
            after_warmup = optax.cosine_decay_schedule(peak, decay_length, config.final_fraction)
        case "wsd":
            final_decay = config.decay_steps or min(max(num_steps // 10, 1), decay_length)
            after_warmup = optax.linear_schedule(peak, end, final_decay, transition_begin=decay_length - final_decay)
    if config.warmup_steps == 0:
        return after_warmup
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after_warmup], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int, updates: int = 1) -> optax.GradientTransformation:
    """Build the optimizer, which clips the gradient by its global norm if ``max_grad_norm`` is set.

    ``updates``: number of updates in each step, at the step's learning rate.
    """
    schedule = make_schedule(config, num_steps)
    rate = lambda count: schedule(count // updates)  # noqa: E731
    hyperparameters = {
        name: default if getattr(config, name) is None else getattr(config, name)
        for name, default in OPTIMIZER_DEFAULTS[config.name].items()
    }
    mask = None if config.decay_mask == "all" else _matrices
    options: dict[str, Any] = hyperparameters | {"weight_decay": config.weight_decay, "mask": mask}
    moment_dtype = jnp.dtype(config.moment_dtype)
    match config.name:
        case "adamw":
            update = optax.adamw(rate, mu_dtype=moment_dtype, **options)
        case "lion":
            update = optax.lion(rate, mu_dtype=moment_dtype, **options)
        case "adafactor":
            # unlike the others, optax.adafactor does not scale weight decay by the learning rate
            decay = (lambda count: config.weight_decay * rate(count)) if config.weight_decay else None
            update = optax.adafactor(rate, weight_decay_rate=decay, weight_decay_mask=True if mask is None else mask)
        case "rmsprop":
            update = optax.chain(
                optax.scale_by_rms(decay=hyperparameters["b2"], eps=hyperparameters["eps"], eps_in_sqrt=False),
                optax.add_decayed_weights(config.weight_decay, mask),
                optax.scale_by_learning_rate(rate),
            )
    update = _in_float32(update)
    if config.max_grad_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), update)


def _in_float32(update: optax.GradientTransformation) -> optax.GradientTransformation:
    """Compute the update and its moments in float32, because bfloat16 averages lose changes of 0.1% to rounding."""
    to_float32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    return optax.GradientTransformation(
        lambda params: update.init(to_float32(params)),
        lambda updates, state, params=None: update.update(to_float32(updates), state, to_float32(params)),
    )


def _matrices(params):
    """Return a mask that is True for matrices, found by name because stacked norms and biases also have two axes."""
    undecayed_names = ("norm", "scale", "bias")
    name_of = lambda path: jax.tree_util.keystr(path[-1:], simple=True)  # noqa: E731
    return jax.tree.map_with_path(lambda path, _: not name_of(path).endswith(undecayed_names), params)
