"""Train a Flax NNX module: only a function from its parameters and tokens to next-token scores is needed."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dpo_jax import make_train_step
from dpo_jax.batch import pad_pairs
from dpo_jax.config import LossConfig
from dpo_jax.logprobs import make_padded_logps_fn
from dpo_jax.step import init_state


class Recurrent(nnx.Module):
    """A gated recurrence over the tokens."""

    def __init__(self, vocabulary: int, width: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.mix = nnx.Linear(2 * width, 2 * width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids [n, T] to next-token scores [n, T, V]."""

        def step(state, x):
            gate, new = jnp.split(self.mix(jnp.concatenate([state, x], axis=-1)), 2, axis=-1)
            state += jax.nn.sigmoid(gate) * (jnp.tanh(new) - state)
            return state, state

        embedded = self.embed(tokens).swapaxes(0, 1)
        _, states = jax.lax.scan(step, jnp.zeros_like(embedded[0]), embedded)
        return self.head(states.swapaxes(0, 1))


def main() -> None:
    """Train on two pairs."""
    model = Recurrent(vocabulary=64, width=32, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    logps_fn = make_padded_logps_fn(lambda params, tokens: nnx.merge(graph, params)(tokens))
    optimizer = optax.adam(1e-2)
    step = make_train_step(logps_fn=logps_fn, loss=LossConfig(beta=0.5), optimizer=optimizer)
    reference = jax.tree.map(jnp.copy, params)  # a real copy: the step donates its state
    state = init_state(params, optimizer)
    batch = pad_pairs([[1, 7], [1, 8, 9]], [[20, 21, 2], [22, 2]], [[30, 2], [31, 32, 2]])  # prompts, chosen, rejected
    losses = []
    for _ in range(20):
        state, metrics = step(state, reference, batch)
        losses.append(float(metrics["loss"]))
    nnx.update(model, state.params)  # the module is the trained one now
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
