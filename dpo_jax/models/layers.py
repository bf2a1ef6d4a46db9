"""The layer of the decoder, and the modules that declare its parameters from the table in projections.py.

Shape letters: R rows, T tokens in a row, D model, F feed-forward, N query heads, K key/value heads, H head,
C = H / 2 rotated pairs of a head, V vocabulary, L layers, r rank.

A parameter tree is a plain nested dictionary. Matrices keep the orientation of the Hugging Face files, outputs first
([N, H, D] of a query projection), so that loading is stacking and exporting is slicing. Only `gate` and `up` are turned
([D, F]): their gradient then needs the transpose of its smaller factor. No layout of the program or of the mesh changes
the tree.

Adapters are a second Flax collection, `lora`, whose tree mirrors that of the parameters: next to a projection lie `a`
[r, inputs] and `b` [outputs, r], heads apart, e.g. [L, r, D] and [L, N, H, r] of the queries, whatever way the
projection itself lies.
"""

from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dpo_jax.models.options import DecoderConfig, LayerKind, LinearScaling, Llama3Scaling, Lora
from dpo_jax.models.projections import AXES, LAYER
from dpo_jax.ops.attention import AttentionInputs, Implementation, attend
from dpo_jax.parallel.sharding import constrain_rows

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


def rotary_frequencies(config: DecoderConfig) -> Float[np.ndarray, "C"]:
    """Radians a position of each rotated pair; see `options` for the scalings."""
    frequency = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    match config.rope_scaling:
        case LinearScaling(factor=factor):
            frequency = frequency / factor
        case Llama3Scaling() as scaling:
            turns = scaling.original_max_position_embeddings * frequency / (2 * np.pi)  # in the original context
            fast = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            fast = np.clip(fast, 0, 1)
            frequency = fast * frequency + (1 - fast) * frequency / scaling.factor
    return frequency.astype(np.float32)


def rotate(x: Float[Array, "R T N H"], angles: Float[Array, "R T C"]) -> Float[Array, "R T N H"]:
    """Rotary embedding in float32; the first half of a head is paired with its second half."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(x: Float[Array, "..."], matrix: Float[Array, "..."], spec: str, precision: str | None) -> Array:
    """``einsum(spec, x, matrix)`` in the type of x; the matrix's gradient is summed and reduced in float32.

    JAX's own rule would round a device's share of the gradient to the type of x before the shares are added.
    """
    return jnp.einsum(spec, x, matrix.astype(x.dtype), precision=precision)


def _project_backward(spec, precision, kept, g):
    x, matrix = kept
    operand, weights, result = spec.replace("->", ",").split(",")
    product = partial(jnp.einsum, precision=precision)
    by_x = product(f"{result},{weights}->{operand}", g, matrix.astype(x.dtype))
    # Compilers turn the first factor. That with the matrix's first dim is the narrow one, or needs no turning: else
    # this is the slowest part of a layer on a CPU.
    (first, a), (second, b) = sorted([(result, g), (operand, x)], key=lambda factor: weights[0] not in factor[0])
    by_matrix = product(f"{first},{second}->{weights}", a, b, preferred_element_type=jnp.float32)
    return by_x, by_matrix.astype(matrix.dtype)


project.defvjp(lambda x, matrix, spec, precision: (project(x, matrix, spec, precision), (x, matrix)), _project_backward)


class DecoderModule(nn.Module):
    """A module that declares each parameter by the letters of its dims, whose sizes the config knows."""

    config: DecoderConfig
    param_dtype: Any
    lora: Lora | None

    def _shape(self, letters: str) -> tuple[int, ...]:
        rank = 0 if self.lora is None else self.lora.rank
        return tuple(rank if letter == "r" else self.config.size(AXES[letter]) for letter in letters)

    def _boxed(self, init: Any, letters: str) -> Any:
        return nn.with_logical_partitioning(init, tuple(AXES[letter] for letter in letters))

    def weight(self, name: str, letters: str, init: nn.initializers.Initializer | None = None) -> Array:
        """The parameter ``name``; without ``init`` it is drawn from a normal distribution."""
        boxed = self._boxed(init or nn.initializers.normal(self.config.init_std), letters)
        return cast("Array", self.param(name, boxed, self._shape(letters), self.param_dtype))

    def linear(self, name: str, x: Array) -> Array:
        """The projection ``name`` of the table applied to x, with its bias and adapter where there are such."""
        row = LAYER[name]
        # the precision in force now is not in force when the backward pass is traced
        precision = jax.config.values["jax_default_matmul_precision"]
        y = checkpoint_name(project(x, self.weight(name, row.letters[1]), row.spec, precision), "projected")
        if getattr(self.config, row.bias):
            y += self.weight(f"{name}_bias", row.outputs, nn.initializers.zeros).astype(x.dtype)
        if self.lora is not None and name in self.lora.targets:
            y += self.lora.scale * self.adapter(name, x)
        return y

    def adapter(self, name: str, x: Array) -> Array:
        """(x A^T) B^T of the adapter next to a projection."""
        row = LAYER[name]
        operand, _, result = row.letters
        a, b = f"r{row.inputs}", f"{row.outputs}r"
        zeros = lambda letters: self._boxed(jnp.zeros, letters)(self._shape(letters), jnp.float32)  # noqa: E731
        # zeros for shapes and axes: what adapters start from is drawn in adapters.py
        pair = self.variable("lora", name, lambda: {"a": zeros(a), "b": zeros(b)}).value
        x = jnp.einsum(f"{operand},{a}->RTr", x, pair["a"].astype(x.dtype))
        return jnp.einsum(f"RTr,{b}->{result}", x, pair["b"].astype(x.dtype))

    def rms_norm(self, name: str, x: Array) -> Array:
        """Divide by sqrt(mean(x^2) + eps) over the last dim and scale, in float32 (arXiv 1910.07467)."""
        letter = "H" if x.ndim == 4 else "D"
        scale = self.weight(f"{name}_norm", letter, nn.initializers.ones).astype(jnp.float32)
        # one dim of tokens: under a leading dim of one row, XLA's gradient is 8 times slower on a CPU
        x32 = x.astype(jnp.float32).reshape(-1, *x.shape[2:])
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.rms_eps)
        return (x32 * scale).astype(x.dtype).reshape(x.shape)


class Layer(DecoderModule):
    """Attention, then feed-forward, each on the normalised residual stream."""

    kind: LayerKind
    attention: Implementation
    longest: int  # tokens

    @nn.compact
    def __call__(
        self, x: Float[Array, "R T D"], angles: Float[Array, "R T C"], inputs: AttentionInputs
    ) -> tuple[Float[Array, "R T D"], None]:
        """The residual stream after the layer; `nn.scan` asks for a second result."""
        c = self.config
        y = self.rms_norm("attention", x)
        q, k, v = self.linear("query", y), self.linear("key", y), self.linear("value", y)
        if c.qk_norm:
            q, k = self.rms_norm("query", q), self.rms_norm("key", k)
        q, k = rotate(q, angles), rotate(k, angles)
        options = {"scale": c.head_dim**-0.5, "longest": self.longest, "window": self.kind.window}
        x += self.linear("out", attend(q, k, v, inputs, implementation=self.attention, **options))

        y = self.rms_norm("ffn", x)
        gate, up = self.linear("gate", y), self.linear("up", y)
        x += self.linear("down", ACTIVATIONS[c.activation](gate) * up)
        return constrain_rows(x), None
