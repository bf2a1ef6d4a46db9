"""The decoder of the Llama line: Llama, Mistral, Qwen2, Qwen3 by the options of one config.

Shape letters: R rows, T tokens in a row, D model, F feed-forward, N query heads, K key/value heads, H head,
C = H / 2 rotated pairs of a head, V vocabulary, L layers.

A parameter tree is a plain nested dictionary. Matrices keep the orientation of the Hugging Face files, outputs first
([N, H, D] of a query projection), so that loading is stacking and exporting is slicing. Only `gate` and `up` are turned
([D, F]): their gradient then needs the transpose of its smaller factor. No layout of the program or of the mesh changes
the tree.

Adapters are a second Flax collection, `lora`, whose tree mirrors that of the parameters: beside a projection lie `a`
[r, inputs] and `b` [outputs, r], heads apart, e.g. [L, r, D] and [L, N, H, r] of the queries, whatever way the
projection itself lies. Shape letter: r rank.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dpo_jax.batch import PreferenceBatch
from dpo_jax.batching.packing import BatchShape, empty_batch
from dpo_jax.models.families import DecoderConfig, LinearScaling, Llama3Scaling
from dpo_jax.ops.attention import Implementation, Layout, attend, choose, make_layout
from dpo_jax.parallel.sharding import constrain_rows

Params = dict[str, Any]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}

# What is kept of a layer's forward pass for its backward pass; None: no rematerialisation.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names("projected"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def plain_batch(tokens: Int[Array, "R T"], lengths: Int[Array, " R"]) -> PreferenceBatch:
    """Ordinary sequences, one a row, without targets; for ``attention="xla"``, since it lists no blocks or answers."""
    num_rows, length = tokens.shape
    shape = BatchShape(num_rows, length, targets=0, answers=0, blocks=0, longest=length, branch_length=length)
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    empty = empty_batch(shape, num_pairs=0, num_answers=1, zeros=jnp.zeros)
    return replace(empty, tokens=tokens, positions=positions, segments=segments)


def rotary_frequencies(config: DecoderConfig) -> Float[np.ndarray, "C"]:
    """Radians a position of each rotated pair; see `families` for the scalings."""
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


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters: y += scale * (x A^T) B^T beside every target (arXiv 2106.09685)."""

    rank: int
    scale: float
    targets: frozenset[str]  # parameters of a layer, such as query


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(x: Float[Array, "..."], matrix: Float[Array, "..."], spec: str, precision: str | None) -> Array:
    """``einsum(spec, x, matrix)`` in the type of x; the matrix's gradient is summed and reduced in float32.

    JAX's own rule would round a device's share of the gradient to the type of x before the shares are added.
    """
    return jnp.einsum(spec, x, matrix.astype(x.dtype), precision=precision)


def _project_backward(spec, precision, kept, g):
    x, matrix = kept
    operand, weights, result = spec.replace("->", ",").split(",")
    by_x = jnp.einsum(f"{result},{weights}->{operand}", g, matrix.astype(x.dtype), precision=precision)
    # Compilers turn the first factor. That with the matrix's first dim is the narrow one, or needs no turning: else
    # this is the slowest part of a layer on a CPU.
    factors = [(result, g), (operand, x)]
    (first, a), (second, b) = sorted(factors, key=lambda factor: weights[0] not in factor[0])
    by_matrix = jnp.einsum(
        f"{first},{second}->{weights}", a, b, precision=precision, preferred_element_type=jnp.float32
    )
    return by_x, by_matrix.astype(matrix.dtype)


project.defvjp(lambda x, matrix, spec, precision: (project(x, matrix, spec, precision), (x, matrix)), _project_backward)


class _Part(nn.Module):
    """A module whose parameters are declared by the names of their axes; the config knows each axis's size."""

    config: DecoderConfig
    param_dtype: Any
    lora: Lora | None

    def _shape(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        c = self.config
        sizes = {"vocab": c.vocab, "embed": c.hidden, "heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim,
                 "ffn": c.ffn, "rank": 0 if self.lora is None else self.lora.rank}  # fmt: skip
        return tuple(sizes[axis] for axis in axes)

    def weight(self, name: str, axes: tuple[str, ...], init: nn.initializers.Initializer) -> Array:
        """The parameter ``name``, each of whose dims is one of the axes."""
        shape = self._shape(axes)
        return cast("Array", self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype))

    def matrix(self, name: str, *axes: str) -> Array:
        """A matrix drawn from a normal distribution."""
        return self.weight(name, axes, nn.initializers.normal(self.config.init_std))

    def linear(self, name: str, spec: str, x: Array, axes: str, bias_axes: str, bias: bool) -> Array:
        """A matrix applied to x, and its bias where there is one; axes are names with spaces between."""
        # the precision in force now is not in force when the backward pass is traced
        precision = jax.config.values["jax_default_matmul_precision"]
        y = checkpoint_name(project(x, self.matrix(name, *axes.split()), spec, precision), "projected")
        if bias:
            y += self.weight(f"{name}_bias", tuple(bias_axes.split()), nn.initializers.zeros).astype(x.dtype)
        if self.lora is not None and name in self.lora.targets:
            y += self.lora.scale * self.adapter(name, spec, x, axes)
        return y

    def adapter(self, name: str, spec: str, x: Array, axes: str) -> Array:
        """(x A^T) B^T of the adapter beside a matrix; arguments as in ``linear``."""
        operand, matrix, result = spec.replace("->", ",").split(",")
        axis_of = dict(zip(matrix, axes.split(), strict=True))
        inputs = "".join(letter for letter in matrix if letter not in result)
        outputs = "".join(letter for letter in matrix if letter in result)
        axes_of: dict[str, tuple[str, ...]] = {
            "a": ("rank", *(axis_of[i] for i in inputs)),
            "b": (*(axis_of[o] for o in outputs), "rank"),
        }
        pair = cast("dict[str, Array]", self.variable("lora", name, partial(self._zeros, axes_of)).value)
        x = jnp.einsum(f"{operand},r{inputs}->RTr", x, pair["a"].astype(x.dtype))
        return jnp.einsum(f"RTr,{outputs}r->{result}", x, pair["b"].astype(x.dtype))

    def _zeros(self, axes_of: dict[str, tuple[str, ...]]) -> dict[str, Any]:
        """Shapes and axes of adapters; what they really start from is drawn in adapters.py."""
        box = lambda axes: nn.with_logical_partitioning(jnp.zeros, axes)(self._shape(axes), jnp.float32)  # noqa: E731
        return {part: box(axes) for part, axes in axes_of.items()}

    def rms_norm(self, name: str, x: Array, axis: str) -> Array:
        """Divide by sqrt(mean(x^2) + eps) over the last dim and scale, in float32 (arXiv 1910.07467)."""
        scale = self.weight(f"{name}_norm", (axis,), nn.initializers.ones).astype(jnp.float32)
        # one dim of tokens: under a leading dim of one row, XLA's gradient is 8 times slower on a CPU
        x32 = x.astype(jnp.float32).reshape(-1, *x.shape[2:])
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.rms_eps)
        return (x32 * scale).astype(x.dtype).reshape(x.shape)


class Layer(_Part):
    """Attention, then feed-forward, each on the normalised residual stream."""

    attention: Implementation
    longest: int  # tokens

    @nn.compact
    def __call__(
        self, x: Float[Array, "R T D"], angles: Float[Array, "R T C"], layout: Layout
    ) -> tuple[Float[Array, "R T D"], None]:
        """The residual stream after the layer; `nn.scan` asks for a second result."""
        c = self.config
        y = self.rms_norm("attention", x, "embed")
        q = self.linear("query", "RTD,NHD->RTNH", y, "heads head_dim embed", "heads head_dim", c.qkv_bias)
        k = self.linear("key", "RTD,KHD->RTKH", y, "kv_heads head_dim embed", "kv_heads head_dim", c.qkv_bias)
        v = self.linear("value", "RTD,KHD->RTKH", y, "kv_heads head_dim embed", "kv_heads head_dim", c.qkv_bias)
        if c.qk_norm:
            q, k = self.rms_norm("query", q, "head_dim"), self.rms_norm("key", k, "head_dim")
        q, k = rotate(q, angles), rotate(k, angles)
        y = attend(q, k, v, layout, implementation=self.attention, scale=c.head_dim**-0.5, longest=self.longest,
                   window=c.window)  # fmt: skip
        x += self.linear("out", "RTNH,DNH->RTD", y, "embed heads head_dim", "embed", c.out_bias)

        y = self.rms_norm("ffn", x, "embed")
        gate = self.linear("gate", "RTD,DF->RTF", y, "embed ffn", "ffn", c.mlp_bias)
        up = self.linear("up", "RTD,DF->RTF", y, "embed ffn", "ffn", c.mlp_bias)
        y = ACTIVATIONS[c.activation](gate) * up
        x += self.linear("down", "RTF,DF->RTD", y, "embed ffn", "embed", c.mlp_bias)
        return constrain_rows(x), None


class Decoder(_Part):
    """Token ids to normalised hidden states."""

    dtype: Any
    attention: Implementation
    remat: Literal["none", "dots", "full"]
    scan: bool

    @nn.compact
    def __call__(self, batch: PreferenceBatch) -> Float[Array, "R T D"]:
        """Hidden states after the final norm."""
        c = self.config
        if not c.tied:
            self.matrix("unembed", "vocab", "embed")
        x = self.matrix("embed", "vocab", "embed")[batch.tokens].astype(self.dtype)
        angles = jnp.asarray(batch.positions, jnp.float32)[..., None] * rotary_frequencies(c)
        layer = Layer
        if REMAT[self.remat] is not None:
            # a scan's own loop keeps XLA from merging the second forward pass with the first; unrolled, it might
            layer = nn.remat(Layer, policy=REMAT[self.remat], prevent_cse=not self.scan)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.layers,
            unroll=1 if self.scan else c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layout = make_layout(batch, self.attention)
        x = constrain_rows(x)
        x, _ = layers(c, self.param_dtype, self.lora, self.attention, batch.longest, name="layers")(x, angles, layout)
        return self.rms_norm("final", x, "embed")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder as pure functions of its parameters: hashable, without arrays. Options as in `config.ModelConfig`."""

    config: DecoderConfig
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Implementation = "blocks"
    remat: Literal["none", "dots", "full"] = "none"
    scan: bool = True
    matmul_precision: Literal["default", "high", "highest"] = "default"
    lora: Lora | None = None

    def hidden(self, params: Params, batch: PreferenceBatch, adapters: Params | None = None) -> Float[Array, "R T D"]:
        """Hidden states after the final norm, in the compute dtype; without ``adapters``, those of the model alone."""
        variables, lora = {"params": params}, None
        if adapters is not None:
            assert self.lora is not None, "this model has no adapters"
            variables, lora = {"params": params, "lora": adapters}, self.lora
        with self._precision():
            return cast("Array", self._module(lora).apply(variables, batch))

    @property
    def precision(self) -> str | None:
        """As `jax.default_matmul_precision` takes it."""
        return None if self.matmul_precision == "default" else self.matmul_precision

    def unembedding(self, params: Params) -> Float[Array, "V D"]:
        """The matrix whose rows score the vocabulary: logits = hidden @ unembedding.T."""
        return params["embed" if self.config.tied else "unembed"]

    def init(self, key: Array) -> Params:
        """Untrained parameters: matrices normal with the config's deviation, biases 0, norms 1."""
        return nn.unbox(self._boxed(key))

    def param_shapes(self) -> Params:
        """The parameter tree with a `jax.ShapeDtypeStruct` at each leaf."""
        return nn.unbox(self._abstract())

    def param_axes(self) -> Params:
        """The parameter tree with the logical axis names, a tuple, at each leaf."""
        return _axis_names(self._abstract())

    def adapter_shapes(self) -> Params:
        """The tree of adapters with a `jax.ShapeDtypeStruct` at each leaf; they are float32."""
        return nn.unbox(self._abstract("lora"))

    def adapter_axes(self) -> Params:
        """The tree of adapters with the logical axis names, a tuple, at each leaf."""
        return _axis_names(self._abstract("lora"))

    def _module(self, lora: Lora | None) -> Decoder:
        return Decoder(self.config, jnp.dtype(self.param_dtype), lora, jnp.dtype(self.dtype), self.attention,
                       self.remat, self.scan)  # fmt: skip

    def _boxed(self, key: Array, part: Literal["params", "lora"] = "params") -> Params:
        batch = plain_batch(jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
        module = self._module(self.lora if part == "lora" else None).clone(attention="xla")
        return dict(module.init(key, batch)[part])

    def _abstract(self, part: Literal["params", "lora"] = "params") -> Params:
        # the key is made inside: the mesh in force may be of devices that only compile
        return jax.eval_shape(lambda: self._boxed(jax.random.key(0), part))

    def _precision(self) -> AbstractContextManager:
        # in force while tracing, so it reaches attention too, and the backward pass takes it from the forward pass
        return jax.default_matmul_precision(self.precision)


def _axis_names(boxed: Params) -> Params:
    is_box = lambda leaf: isinstance(leaf, nn.Partitioned)  # noqa: E731
    return jax.tree.map(lambda leaf: tuple(leaf.names), boxed, is_leaf=is_box)


def make_model(
    config: DecoderConfig,
    *,
    platform: str,
    dtype: Literal["auto", "float32", "bfloat16"],
    param_dtype: Literal["float32", "bfloat16"],
    attention: Literal["auto", "blocks", "xla", "splash", "cudnn"],
    remat: Literal["none", "dots", "full"],
    scan: bool,
    matmul_precision: Literal["default", "high", "highest"],
    lora: Lora | None = None,
) -> Model:
    """The model, with each ``auto`` settled for devices of ``platform``; other options as in `config.ModelConfig`.

    Raises:
        UserError: the attention asked for does not run on that platform.
    """
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    return Model(
        config=config,
        dtype=dtype,
        param_dtype=param_dtype,
        attention=choose(attention, platform=platform, dtype=dtype, head_dim=config.head_dim),
        remat=remat,
        scan=scan,
        matmul_precision=matmul_precision,
        lora=lora,
    )


def count_params(model: Model) -> int:
    """Number of parameters without adapters; tied embeddings count once."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.param_shapes()))


def count_adapters(model: Model) -> int:
    """Number of parameters in adapters."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.adapter_shapes()))
