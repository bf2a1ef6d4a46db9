"""One decoder in Linen, in NNX and without either: how long its gradient takes to trace, and what it compiles to.

    python benchmarks/flax_apis.py

The layer is the same function in all three, the model the 15M-parameter Llama of vs_trl.py, on 2 rows of 256 tokens.
They are traced in turn, ``ROUNDS`` times; times are processor seconds of this process.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

ROUNDS = 15
VOCAB, HIDDEN, FFN, HEADS, HEAD, LAYERS = 32000, 288, 768, 6, 48, 6
SHAPES = {
    "attention_norm": (HIDDEN,), "query": (HIDDEN, HEADS, HEAD), "key": (HIDDEN, HEADS, HEAD),
    "value": (HIDDEN, HEADS, HEAD), "out": (HEADS, HEAD, HIDDEN), "ffn_norm": (HIDDEN,),
    "gate": (HIDDEN, FFN), "up": (HIDDEN, FFN), "down": (FFN, HIDDEN),
}  # fmt: skip
normal = nn.initializers.normal(0.02)


def norm(x: Array, weight: Array) -> Array:
    """Return x over its root mean square, times ``weight``."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight


def rotated(x: Array) -> Array:
    """Return heads with rotary position embeddings."""
    angles = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(0, HEAD, 2) / HEAD)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def layer(weight: Callable[[str], Array], x: Array) -> Array:
    """Return the output of one layer, whose weights ``weight`` gives by name."""
    h = norm(x, weight("attention_norm"))
    q, k, v = (jnp.einsum("btd,dnh->btnh", h, weight(name)) for name in ("query", "key", "value"))
    scores = jnp.einsum("btnh,bsnh->bnts", rotated(q), rotated(k)) / HEAD**0.5
    weights = jax.nn.softmax(scores, where=jnp.tril(jnp.ones(scores.shape[-2:], bool)))
    x += jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", weights, v), weight("out"))
    h = norm(x, weight("ffn_norm"))
    return x + (jax.nn.silu(h @ weight("gate")) * (h @ weight("up"))) @ weight("down")


class LinenLayer(nn.Module):
    """The layer in Linen, to be scanned."""

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        """Return the output, and nothing for each layer."""
        return layer(lambda name: self.param(name, normal, SHAPES[name]), x), None


class LinenDecoder(nn.Module):
    """The decoder in Linen."""

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Return logits."""
        embed = self.param("embed", normal, (VOCAB, HIDDEN))
        stack = nn.scan(
            nn.remat(LinenLayer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = stack(name="layers")(embed[tokens], None)
        return norm(x, self.param("norm", nn.initializers.ones, (HIDDEN,))) @ embed.T


class NnxLayer(nnx.Module):
    """The layer in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        for name, shape in SHAPES.items():
            setattr(self, name, nnx.Param(normal(rngs.params(), shape)))

    def __call__(self, x: Array) -> Array:
        """Return the output."""
        return layer(lambda name: getattr(self, name)[...], x)


class NnxDecoder(nnx.Module):
    """The decoder in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Param(normal(rngs.params(), (VOCAB, HIDDEN)))
        self.norm = nnx.Param(jnp.ones(HIDDEN))
        self.layers = nnx.split_rngs(splits=LAYERS)(nnx.vmap(NnxLayer))(rngs)

    def __call__(self, tokens: Array) -> Array:
        """Return logits."""
        run = nnx.remat(lambda x, layer: layer(x), prevent_cse=False)
        stack = nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        embed = self.embed[...]
        return norm(stack(embed[tokens], self.layers), self.norm[...]) @ embed.T


def plain_decoder(params: dict[str, Any], tokens: Array) -> Array:
    """Return logits by a function of a dict of arrays, named as Linen's are."""
    run = jax.checkpoint(lambda x, weights: (layer(weights.__getitem__, x), None), prevent_cse=False)
    x, _ = jax.lax.scan(run, params["embed"][tokens], params["layers"])
    return norm(x, params["norm"]) @ params["embed"].T


def loss(logits_fn: Callable[[Any, Array], Array], params: Any, tokens: Array) -> Array:
    """Return the mean negative log-prob of each token but the first."""
    logps = jax.nn.log_softmax(logits_fn(params, tokens)[:, :-1])
    return -jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1).mean()


def main() -> None:
    """Trace all three in turn, compile each once, and print a line for each."""
    tokens = jnp.ones((2, 256), jnp.int32)
    linen = LinenDecoder()
    linen_params = jax.eval_shape(linen.init, jax.random.key(0), tokens)["params"]
    graph, nnx_params = nnx.split(nnx.eval_shape(lambda: NnxDecoder(nnx.Rngs(0))))
    decoders: dict[str, tuple[Callable[..., Array], Any]] = {
        "linen": (lambda params, tokens: linen.apply({"params": params}, tokens), linen_params),
        "nnx": (lambda params, tokens: nnx.merge(graph, params)(tokens), nnx_params),
        "plain": (plain_decoder, linen_params),
    }
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(ROUNDS + 1):
        for name, (logits_fn, params) in decoders.items():
            gradient = jax.jit(jax.grad(partial(loss, logits_fn)))
            began = time.process_time()
            traced = gradient.trace(params, tokens)
            seconds[name].append(time.process_time() - began)
            if len(seconds[name]) > ROUNDS:
                compiled = traced.lower().compile()
                cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
                milliseconds = 1000 * statistics.median(seconds[name][1:])
                print(
                    f"{name}: traced in {milliseconds:.0f} ms, {cost['flops']:.0f} operations,"
                    f" {cost['bytes accessed']:.0f} bytes, {memory.temp_size_in_bytes} bytes of temporaries"
                )


if __name__ == "__main__":
    main()
