"""An objective of your own on the program's batches and log-probs."""

import jax
import jax.numpy as jnp
import optax

from dpo_jax.batch import CHOSEN, REJECTED, PaddedBatch, pad_pairs
from dpo_jax.logprobs import make_padded_logps_fn


def apply(params: dict, tokens: jax.Array) -> jax.Array:
    """Token ids [n, T] to next-token scores [n, T, V]."""
    return jnp.tanh(params["embed"][tokens]) @ params["head"]


logps_fn = make_padded_logps_fn(apply)


def loss_fn(params: dict, reference: dict, batch: PaddedBatch, beta: float = 0.5, target: float = 2.0) -> jax.Array:
    """Half the squared distance of beta times the margin from a target, over the pairs; scalar."""
    log_ratios = logps_fn(params, batch).sum - jax.lax.stop_gradient(logps_fn(reference, batch).sum)  # [B, 2]
    margins = beta * (log_ratios[:, CHOSEN] - log_ratios[:, REJECTED])
    return 0.5 * jnp.mean((margins - target) ** 2)


def main() -> None:
    """Train on two pairs."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"embed": jax.random.normal(keys[0], (64, 32)), "head": 0.1 * jax.random.normal(keys[1], (32, 64))}
    reference = jax.tree.map(jnp.copy, params)  # a real copy, as a step that donates its parameters needs
    optimizer = optax.adam(1e-2)
    batch = pad_pairs([[1, 7], [1, 8, 9]], [[20, 21, 2], [22, 2]], [[30, 2], [31, 32, 2]])  # prompts, chosen, rejected

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params, reference, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(20):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
