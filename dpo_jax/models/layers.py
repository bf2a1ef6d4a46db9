"""Decoder layer, and the modules that declare its parameters from the table in projections.py.

Shape letters: R rows, T tokens per row, D model, F feed-forward, N query heads, K key/value heads, H head dim,
C rotated pairs per head (H / 2 by default), V vocabulary, L layers, r rank, S scores of a reward model, E experts.

A parameter tree is a plain nested dictionary. Matrices have their outputs first, as most Hugging Face files do
([N, H, D] for the query projection). Only `gate`, `up` and the experts' matrices have their inputs first ([D, F]):
their gradient then needs the transpose of its smaller factor. The tree does not depend on the mesh or on any layout
option.

Adapters are a second Flax collection, `lora`, whose tree mirrors the parameter tree: each target projection has `a`
[r, inputs] and `b` [outputs, r] with separate head dims, e.g. [L, r, D] and [L, N, H, r] for queries, regardless of the
orientation of the projection itself. Those of the experts have a dim of experts, [L, E, r, D] and [L, E, F, r] for
`gate`. In a reward model the tree also has the head, `score`, which is trained whole.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dpo_jax.batch import AnyArray, BalanceSums
from dpo_jax.models.options import (
    DecoderConfig,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    Lora,
    Rope,
    YarnScaling,
)
from dpo_jax.models.projections import AXES, EXPERTS, layer_projections
from dpo_jax.ops import experts as mixture
from dpo_jax.ops.attention import AttentionInputs, Implementation, attend, attend_cached
from dpo_jax.parallel.sharding import constrain_rows

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


def scaled(x: Array, factor: float) -> Array:
    """Return factor * x, computed in x's dtype."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


class Rotation(NamedTuple):
    """Rotary embeddings at the positions of a batch, for one kind of layer or stacked over all kinds."""

    angles: Float[Array, "*kinds R T C"]
    factor: Float[Array, "*kinds"] | None  # of cosines and sines; None: 1


def rotary_frequencies(rope: Rope, dims: int) -> Float[np.ndarray, "C"]:
    """Return the radians per position of each pair of the rotated ``dims``; see `options` for the scalings."""
    frequency = rope.theta ** (-np.arange(0, dims, 2) / dims)
    match rope.scaling:
        case LinearScaling(factor=factor):
            frequency = frequency / factor
        case Llama3Scaling() as scaling:
            turns = scaling.original_max_position_embeddings * frequency / (2 * np.pi)  # in the original context
            blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            frequency = _blend(frequency, scaling.factor, blend)
        case YarnScaling() as scaling:
            # index, not rounded, of the frequency that makes so many turns in the original context
            pair_index = lambda turns: (  # noqa: E731
                dims * np.log(scaling.original_max_position_embeddings / (turns * 2 * np.pi)) / 2 / np.log(rope.theta)
            )
            first_pair, last_pair = pair_index(scaling.beta_fast), pair_index(scaling.beta_slow)
            if scaling.truncate:
                first_pair, last_pair = np.floor(first_pair), np.ceil(last_pair)
            first_pair, last_pair = max(first_pair, 0), min(last_pair, dims - 1)
            blend = 1 - (np.arange(dims // 2) - first_pair) / max(last_pair - first_pair, 0.001)
            frequency = _blend(frequency, scaling.factor, blend)
        case LongropeScaling(factors=factors):
            frequency = frequency / np.asarray(factors)
    return frequency.astype(np.float32)


def _blend(frequency: np.ndarray, factor: float, blend: np.ndarray) -> np.ndarray:
    """Interpolate from frequencies over ``factor``, where ``blend`` is at most 0, to unchanged ones, from 1 on."""
    share = np.clip(blend, 0, 1)
    return share * frequency + (1 - share) * frequency / factor


def make_rotations(config: DecoderConfig, positions: Int[AnyArray, "R T"]) -> Rotation | None:
    """Return the rotation of each kind of layer at these positions; None if no layer rotates."""
    ropes = [kind.rope for kind in config.kinds]
    if not any(ropes):
        return None
    zeros = np.zeros(config.rotated // 2, np.float32)  # leave a head as it is, bit for bit
    frequencies = np.stack([zeros if rope is None else rotary_frequencies(rope, config.rotated) for rope in ropes])
    scalings = [None if rope is None else rope.scaling for rope in ropes]
    factors = [getattr(scaling, "attention_factor", 1.0) for scaling in scalings]
    angles = jnp.asarray(positions, jnp.float32)[..., None] * frequencies[:, None, None]
    return Rotation(angles, None if set(factors) == {1.0} else jnp.asarray(factors, jnp.float32))


def rotate(x: Float[Array, "R T N H"], rotation: Rotation, interleaved: bool = False) -> Float[Array, "R T N H"]:
    """Apply rotary embeddings in float32 to the first dims of each head, two for each angle.

    The first half of these dims is paired with the second half or, if ``interleaved``, each dim with its neighbor.
    """
    cos, sin = jnp.cos(rotation.angles)[:, :, None], jnp.sin(rotation.angles)[:, :, None]
    if rotation.factor is not None:
        cos, sin = cos * rotation.factor, sin * rotation.factor
    dims = 2 * rotation.angles.shape[-1]
    x, unrotated = (x, None) if dims == x.shape[-1] else (x[..., :dims], x[..., dims:])
    x32 = x.astype(jnp.float32)
    first, second = (x32[..., ::2], x32[..., 1::2]) if interleaved else jnp.split(x32, 2, axis=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    rotated = jnp.stack(pair, axis=-1).reshape(x32.shape) if interleaved else jnp.concatenate(pair, axis=-1)
    rotated = rotated.astype(x.dtype)
    return rotated if unrotated is None else jnp.concatenate([rotated, unrotated], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(x: Float[Array, "..."], matrix: Float[Array, "..."], spec: str, precision: str | None) -> Array:
    """Compute ``einsum(spec, x, matrix)`` in x's dtype; the matrix's gradient is accumulated and reduced in float32.

    JAX's own rule would round each device's partial gradient to x's dtype before the all-reduce.
    """
    return jnp.einsum(spec, x, matrix.astype(x.dtype), precision=precision)


def _project_backward(spec, precision, residuals, g):
    x, matrix = residuals
    operand, weights, result = spec.replace("->", ",").split(",")
    product = partial(jnp.einsum, precision=precision)
    x_grad = product(f"{result},{weights}->{operand}", g, matrix.astype(x.dtype))
    # XLA transposes the first factor. Put first the one with the matrix's first dim: it is the narrower one or needs no
    # transpose. In the other order this is the slowest part of a layer on a CPU.
    (first, a), (second, b) = sorted([(result, g), (operand, x)], key=lambda factor: weights[0] not in factor[0])
    matrix_grad = product(f"{first},{second}->{weights}", a, b, preferred_element_type=jnp.float32)
    return x_grad, matrix_grad.astype(matrix.dtype)


project.defvjp(lambda x, matrix, spec, precision: (project(x, matrix, spec, precision), (x, matrix)), _project_backward)


class DecoderModule(nn.Module):
    """Base module that declares each parameter by the letters of its dims; the config gives their sizes."""

    config: DecoderConfig
    param_dtype: Any
    lora: Lora | None

    def _shape(self, letters: str) -> tuple[int, ...]:
        rank = 0 if self.lora is None else self.lora.rank
        return tuple(rank if letter == "r" else self.config.size(AXES[letter]) for letter in letters)

    def _boxed(self, init: Any, letters: str) -> Any:
        return nn.with_logical_partitioning(init, tuple(AXES[letter] for letter in letters))

    def weight(self, name: str, letters: str, init: nn.initializers.Initializer | None = None) -> Array:
        """Declare the parameter ``name``; the default ``init`` is a normal distribution."""
        boxed = self._boxed(init or nn.initializers.normal(self.config.init_std), letters)
        return cast("Array", self.param(name, boxed, self._shape(letters), self.param_dtype))

    def zeros(self, letters: str) -> Any:
        """Declare a float32 array of the adapters by the letters of its dims; adapters.py sets its initial values."""
        return self._boxed(jnp.zeros, letters)(self._shape(letters), jnp.float32)

    def linear(self, name: str, x: Array) -> Array:
        """Apply projection ``name`` of the table to x, with its bias and adapter, if any."""
        row = layer_projections(self.config)[name]
        # read now, because the precision context is not active when the backward pass is traced
        precision = jax.config.values["jax_default_matmul_precision"]
        y = checkpoint_name(project(x, self.weight(name, row.letters[1]), row.spec, precision), "projected")
        if row.has_bias(self.config):
            y += self.weight(f"{name}_bias", row.outputs, nn.initializers.zeros).astype(x.dtype)
        if self.lora is not None and name in self.lora.targets:
            y += self.lora.scale * self.adapter(name, x)
        return y

    def factors(self, name: str) -> dict[str, Array]:
        """Declare A and B of the adapter of projection ``name``; in a fused module, only the first projection has A."""
        assert self.lora is not None
        row = layer_projections(self.config)[name]
        letters = {"a": f"{row.stack}r{row.inputs}", "b": f"{row.stack}{row.outputs}r"}
        if self.lora.owner(name) != name:
            del letters["a"]
        declare = lambda: {factor: self.zeros(dims) for factor, dims in letters.items()}  # noqa: E731
        return self.variable("lora", name, declare).value

    def adapter(self, name: str, x: Array) -> Array:
        """Compute (x A^T) B^T with the adapter of projection ``name``; projections of a fused module share one A."""
        assert self.lora is not None
        row, owner, factors = layer_projections(self.config)[name], self.lora.owner(name), self.factors(name)
        operand, _, result = row.letters
        a = factors["a"] if owner == name else nn.unbox(self.get_variable("lora", owner))["a"]
        x = jnp.einsum(f"{operand},r{row.inputs}->RTr", x, a.astype(x.dtype))
        return jnp.einsum(f"RTr,{row.outputs}r->{result}", x, factors["b"].astype(x.dtype))

    def norm(self, name: str, x: Array, letters: str = "D", factor: float = 1.0) -> Array:
        """Divide by sqrt(mean(x^2) + eps) over the dims of ``letters`` and scale, in float32 (arXiv 1910.07467).

        LayerNorm subtracts the mean first (arXiv 1607.06450). ``factor``: of the result, rounded with it.
        """
        config = self.config
        init = nn.initializers.constant(1 - config.norm_offset)
        scale = self.weight(f"{name}_norm", letters, init).astype(jnp.float32)
        if config.norm_offset:
            scale += config.norm_offset
        # merge rows and tokens: with a leading dim of 1, XLA's gradient is 8 times slower on a CPU
        x32 = x.astype(jnp.float32).reshape(-1, *x.shape[2:])
        axes = tuple(range(-len(letters), 0))
        if config.norm == "layer":
            x32 -= jnp.mean(x32, axis=axes, keepdims=True)
        mean_square = jnp.mean(x32 * x32, axis=axes, keepdims=True)
        x32 *= jax.lax.rsqrt(mean_square + config.norm_eps)
        x32 *= scaled(scale, factor)
        if config.norm_bias:
            bias = self.weight(f"{name}_norm_bias", letters, nn.initializers.zeros).astype(jnp.float32)
            x32 += scaled(bias, factor)
        return x32.astype(x.dtype).reshape(x.shape)


class CacheInputs(NamedTuple):
    """Attention inputs for T new tokens in a cache of S slots; each token is (segment, branch, position)."""

    queries: Int[Array, "R 3 T"]  # the new tokens
    slots: Int[Array, "R 3 S"]  # the new tokens and all before them
    start: Int[Array, ""]  # slot of the first new token, the same in every row


class KeyValues(NamedTuple):
    """Cached keys and values of all layers; as a carry of the scan over layers, it is updated in place."""

    keys: Float[Array, "L R K S H"]
    values: Float[Array, "L R K S H"]
    layer: Int[Array, ""]  # index of the layer to compute next

    def write(self, start: Array, keys: Array, values: Array) -> "KeyValues":
        """Return the cache with the current layer's new keys and values [R, T, K, H] written from slot ``start`` on."""
        update = partial(jax.lax.dynamic_update_slice, start_indices=(self.layer, 0, 0, start, 0))
        keys, values = (x.swapaxes(1, 2)[None] for x in (keys, values))
        return KeyValues(update(self.keys, keys), update(self.values, values), self.layer)

    def read(self) -> tuple[Float[Array, "R K S H"], Float[Array, "R K S H"]]:
        """Return the current layer's keys and values."""
        return self.keys[self.layer], self.values[self.layer]


class Layer(DecoderModule):
    """Decoder layer: attention and feed-forward, each added to the residual stream."""

    attention: Implementation
    longest: int  # as in `PreferenceBatch`

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "R T D"], KeyValues | None],
        kind: Int[Array, ""],
        rotations: Rotation | None,
        inputs: AttentionInputs | CacheInputs,
        token_weights: Int[Array, "R T"] | None,
    ) -> tuple[tuple[Float[Array, "R T D"], KeyValues | None], BalanceSums | None]:
        """Return the residual stream after the layer, and the cache, if any, with the new tokens added.

        A mixture of experts also returns its router's sums over tokens. ``kind``: index into the config's ``kinds``;
        ``rotations`` are stacked by it. ``token_weights``: how often a token counts in these sums; 0 at padding.
        """
        x, cache = carry
        normed = self.pre_norm("attention", x)
        y, cache = self.self_attention(normed, cache, kind, rotations, inputs)
        if self.config.residual == "sequential":
            x += self.branch("attention", y)
            z, sums = self.feed_forward(self.pre_norm("ffn", x), token_weights)
            x += self.branch("ffn", z)
        else:
            ffn_inputs = normed if self.config.residual == "shared" else self.pre_norm("ffn", x)
            z, sums = self.feed_forward(ffn_inputs, token_weights)
            x += self.branch("attention", y) + self.branch("ffn", z)
        return (constrain_rows(x), cache), sums

    def pre_norm(self, name: str, x: Array) -> Array:
        """Return the input of block ``name``: x, normalized if the config has norms before blocks."""
        return self.norm(name, x) if self.config.pre_norm else x

    def branch(self, name: str, y: Array) -> Array:
        """Return what the output y of the block ``name`` adds to the residual stream."""
        config = self.config
        return scaled(self.norm(f"{name}_post", y) if config.post_norm else y, config.residual_scale)

    def self_attention(
        self,
        x: Array,
        cache: KeyValues | None,
        kind: Array,
        rotations: Rotation | None,
        inputs: AttentionInputs | CacheInputs,
    ) -> tuple[Array, KeyValues | None]:
        """Compute attention; also return the cache, if any, with the new tokens added."""
        config = self.config
        q, k, v = self.linear("query", x), self.linear("key", x), self.linear("value", x)
        if config.qk_norm != "none":
            letters = ("H", "H") if config.qk_norm == "head" else ("NH", "KH")
            q, k = self.norm("query", q, letters[0]), self.norm("key", k, letters[1])
        if rotations is not None:
            rotation = jax.tree.map(lambda table: table[0 if len(config.kinds) == 1 else kind], rotations)
            q, k = rotate(q, rotation, config.rotary_interleaved), rotate(k, rotation, config.rotary_interleaved)
        sinks = self.weight("sinks", "N", nn.initializers.zeros) if config.sinks else None
        options = {"scale": config.score_scale, "softcap": config.attention_softcap, "sinks": sinks}
        if isinstance(inputs, CacheInputs):
            assert cache is not None
            cache = cache.write(inputs.start, k, v)
            fn = partial(attend_cached, q, *cache.read(), inputs.queries, inputs.slots, **options)
            cache = cache._replace(layer=(cache.layer + 1) % config.layers)
        else:
            fn = partial(attend, q, k, v, inputs, implementation=self.attention, longest=self.longest, **options)
        return self.linear("out", self.by_window(fn, kind)), cache

    def by_window(self, fn: Callable[..., Array], kind: Array) -> Array:
        """Call ``fn`` with the sliding window of this kind of layer, which kernels need as a Python value."""
        windows = [each.window for each in self.config.kinds]
        choices = list(dict.fromkeys(windows))
        if len(choices) == 1:
            return fn(window=choices[0])
        index = jnp.asarray([choices.index(window) for window in windows])[kind]
        return jax.lax.switch(index, [partial(fn, window=window) for window in choices])

    def feed_forward(self, x: Array, token_weights: Array | None) -> tuple[Array, BalanceSums | None]:
        """Compute the feed-forward block; a mixture of experts also returns its router's sums over tokens."""
        if self.config.experts is None:
            return self.dense(x), None
        assert token_weights is not None
        return self.experts(x, token_weights)

    def dense(self, x: Array) -> Array:
        """Compute the feed-forward block, gated or plain."""
        activation = ACTIVATIONS[self.config.activation]
        if not self.config.gated:
            return self.linear("down", activation(self.linear("up", x)))
        gate, up = self.linear("gate", x), self.linear("up", x)
        return self.linear("down", activation(gate) * up)

    def experts(self, x: Array, token_weights: Array) -> tuple[Array, BalanceSums]:
        """Compute the feed-forward of each token's experts; also return the router's sums over tokens."""
        config = self.config.experts
        assert config is not None
        matrix, bias = self.expert_weights("router")
        experts = mixture.ExpertWeights(*map(self.expert_linear, ("gate", "up", "down")))
        router = mixture.Router(config.per_token, config.softmax, config.renormalize)
        routing = mixture.route(x, matrix, bias, token_weights > 0, router)
        glu = mixture.Glu(config.alpha, config.offset, config.limit)
        scale = 1.0 if self.lora is None else self.lora.scale
        # no mesh divides the single row of which a model is initialized
        y = x if self.is_initializing() else mixture.feed_forward(x, routing, experts, glu, scale)
        if config.shared_ffn:
            y += jax.nn.sigmoid(self.linear("shared_router", x)) * self.shared_expert(x)
        return y, mixture.balance_sums(routing, token_weights)

    def expert_linear(self, name: str) -> mixture.ExpertLinear:
        """Declare projection ``name`` of all experts, with biases and adapters, if any."""
        factors = self.factors(name) if self.lora is not None and name in self.lora.targets else {}
        return mixture.ExpertLinear(*self.expert_weights(name), **factors)

    def expert_weights(self, name: str) -> tuple[Array, Array | None]:
        """Declare the matrices of all experts, or the router's, and their biases."""
        row = EXPERTS[name]
        matrix, bias = self.weight(name, row.stack + row.letters[1]), None
        if row.has_bias(self.config):
            bias = self.weight(f"{name}_bias", row.stack + row.outputs, nn.initializers.zeros)
        return matrix, bias

    def shared_expert(self, x: Array) -> Array:
        """Compute the feed-forward of the shared expert."""
        gate, up = self.linear("shared_gate", x), self.linear("shared_up", x)
        return self.linear("shared_down", jax.nn.silu(gate) * up)
