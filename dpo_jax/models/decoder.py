"""The decoder of all model families, as pure functions of its parameters. Shape letters as in ``layers.py``."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from dpo_jax.batch import Adapted, AnyArray, BalanceSums, Params, PreferenceBatch, RoutedHidden
from dpo_jax.batching.packing import BatchShape, empty_batch
from dpo_jax.config import ModelConfig
from dpo_jax.errors import require
from dpo_jax.models.layers import CacheInputs, DecoderModule, KeyValues, Layer, make_rotations, scaled
from dpo_jax.models.options import DecoderConfig, Lora
from dpo_jax.ops.attention import AttentionInputs, Implementation, choose, make_inputs
from dpo_jax.parallel.sharding import EMBED, constrain_rows, mesh_is_active

# What to save of a layer's forward pass for its backward pass; None: everything, without rematerialization. The indices
# of a token's experts are always saved: a router recomputed with other rounding could choose others. So is the result
# of attention over blocks: it is as small as the layer's input, and computing it again is a loop.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names("projected", "attended", "routed"),
    "full": jax.checkpoint_policies.save_only_these_names("attended", "routed"),
}


def plain_batch(tokens: Int[Array, "R T"], lengths: Int[Array, " R"]) -> PreferenceBatch:
    """Make a batch with one plain sequence per row and no targets, blocks or answers; needs ``attention="xla"``."""
    num_rows, length = tokens.shape
    shape = BatchShape(num_rows, length, targets=0, answers=0, blocks=0, longest=length, branch_length=length)
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    empty = empty_batch(shape, num_pairs=0, num_answers=1, zeros=jnp.zeros)
    return replace(empty, tokens=tokens, positions=positions, segments=segments)


def count_answers(batch: PreferenceBatch) -> Int[Array, "R T"]:
    """Return the number of sequences that each token is part of: for a prompt token, one per answer; 0 at padding."""
    segments, branches = jnp.asarray(batch.segments), jnp.asarray(batch.branches)
    num_rows, length = segments.shape
    rows = jnp.arange(num_rows)[:, None]
    num_answers = jnp.zeros((num_rows, length + 1), jnp.int32).at[rows, segments].add(batch.answer_begins())
    num_answers = jnp.maximum(jnp.take_along_axis(num_answers, segments, axis=1), 1)
    return jnp.where(segments > 0, jnp.where(branches > 0, 1, num_answers), 0)


class Decoder(DecoderModule):
    """Flax module that maps token ids to normalized hidden states."""

    dtype: Any
    attention: Implementation
    remat: Literal["none", "dots", "full"]
    scan: bool

    @nn.compact
    def __call__(
        self,
        tokens: Int[AnyArray, "R T"],
        positions: Int[AnyArray, "R T"],
        inputs: AttentionInputs | CacheInputs,
        longest: int,
        token_weights: Int[Array, "R T"] | None,
        cache: KeyValues | None = None,
    ) -> tuple[Float[Array, "R T D"], KeyValues | None, BalanceSums | None]:
        """Return the hidden states after the final norm, and the cache, if any, with the tokens added.

        A mixture of experts also returns its routers' sums over tokens, by layer; ``token_weights`` as in `Layer`.
        """
        config = self.config
        if config.scores:
            self.weight("score", "SD", nn.initializers.zeros)
            if self.lora is not None:
                self.variable("lora", "score", partial(self.zeros, "SD"))
        elif not config.tied:
            self.weight("unembed", "VD")
        if config.unembed_bias and not config.scores:
            self.weight("unembed_bias", "V", nn.initializers.zeros)
        x = scaled(self.weight("embed", "VD")[tokens].astype(self.dtype), config.embed_scale)
        if config.learned_positions:
            x += self.weight("position_embed", "PD")[positions].astype(self.dtype)
        # inside a scan XLA cannot merge the recomputed forward pass with the first; unrolled, it could
        remat_policy = REMAT[self.remat]
        layer = Layer if remat_policy is None else nn.remat(Layer, policy=remat_policy, prevent_cse=not self.scan)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=config.layers,
            unroll=1 if self.scan else config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x = constrain_rows(x)
        stack = layers(config, self.param_dtype, self.lora, self.attention, longest, name="layers")
        kinds, rotations = jnp.asarray(config.kind_of_layer), make_rotations(config, positions)
        (x, cache), sums = stack((x, cache), kinds, rotations, inputs, token_weights)
        return self.norm("final", x, factor=1.0 if config.scores else config.logit_scale), cache, sums


@struct.dataclass
class Cache:
    """Keys and values of the tokens so far, R rows of S slots; token t after the prompt has the same slot in every row.

    Prompts are right-padded, so a row's positions have a gap in slots but not in value.
    """

    layers: KeyValues
    positions: Int[Array, "R S"]  # -1: unused slot or padding
    end: Int[Array, ""]  # number of slots in use

    def grow(self, num_slots: int) -> "Cache":
        """Return the cache with ``num_slots`` more empty slots per row."""
        pad_slots = lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, num_slots), (0, 0)))  # noqa: E731
        layers = self.layers._replace(keys=pad_slots(self.layers.keys), values=pad_slots(self.layers.values))
        positions = jnp.pad(self.positions, ((0, 0), (0, num_slots)), constant_values=-1)
        return Cache(layers, positions, self.end)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Decoder as pure functions of its parameters; hashable, holds no arrays. Options as in `config.ModelConfig`."""

    config: DecoderConfig
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Implementation = "blocks"
    remat: Literal["none", "dots", "full"] = "none"
    scan: bool = True
    matmul_precision: Literal["default", "high", "highest"] = "default"
    lora: Lora | None = None

    def hidden(self, weights: Params | Adapted, batch: PreferenceBatch) -> Float[Array, "R T D"]:
        """Return hidden states after the final norm, in the compute dtype; ``weights`` may have adapters."""
        return self._hidden(weights, batch)[0]

    def routed_hidden(self, weights: Params | Adapted, batch: PreferenceBatch) -> Float[Array, "R T D"] | RoutedHidden:
        """Return hidden states as `hidden` does, and the routers' sums over tokens if the model has experts."""
        hidden, sums = self._hidden(weights, batch)
        if self.config.experts is None or sums is None:
            return hidden
        return RoutedHidden(hidden, sums, self.config.experts.balance_coef)

    def _hidden(self, weights: Params | Adapted, batch: PreferenceBatch) -> tuple[Array, BalanceSums | None]:
        inputs = make_inputs(batch, self.attention, self.config.head_dim)
        token_weights = None if self.config.experts is None else count_answers(batch)
        inputs = (batch.tokens, batch.positions, inputs, batch.longest, token_weights)
        hidden, _, sums = self._apply(weights, *inputs)
        return self._with_bias_dims(hidden), sums

    def empty_cache(self, num_rows: int, num_slots: int) -> Cache:
        """Return an empty cache with ``num_slots`` slots per row."""
        config = self.config
        zeros = jnp.zeros((config.layers, num_rows, config.kv_heads, num_slots, config.head_dim), self.dtype)
        return Cache(KeyValues(zeros, zeros, jnp.int32(0)), jnp.full((num_rows, num_slots), -1), jnp.int32(0))

    def extend(
        self, weights: Params | Adapted, tokens: Int[Array, "R T"], positions: Int[Array, "R T"], cache: Cache
    ) -> tuple[Float[Array, "R T D"], Cache]:
        """Return hidden states of T more tokens per row, as `hidden` does for whole sequences, and the extended cache.

        ``positions``: of the tokens in their sequences; -1: padding.
        """
        slots = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, cache.end, axis=1)
        as_tokens = lambda positions: jnp.stack([positions >= 0, jnp.zeros_like(positions), positions], axis=1)  # noqa: E731
        inputs = CacheInputs(as_tokens(positions), as_tokens(slots), cache.end)
        is_token = (positions >= 0).astype(jnp.int32)
        hidden, layers, _ = self._apply(weights, tokens, positions, inputs, slots.shape[1], is_token, cache.layers)
        return self._with_bias_dims(hidden), Cache(layers, slots, cache.end + tokens.shape[1])

    def _apply(self, weights: Params | Adapted, *inputs: Any) -> tuple[Array, Any, Any]:
        """Call the Flax module on ``inputs`` with these weights."""
        adapters, base = _split(weights)
        assert adapters is None or self.lora is not None, "the model has no adapters"
        variables = {"params": base} if adapters is None else {"params": base, "lora": adapters}
        # active while tracing, so it applies to attention too, and the backward pass inherits it from the forward pass
        with jax.default_matmul_precision(self.precision):
            module = self._module(None if adapters is None else self.lora)
            return cast("tuple[Array, Any, Any]", module.apply(variables, *inputs))

    @property
    def precision(self) -> str | None:
        """Value for `jax.default_matmul_precision`."""
        return None if self.matmul_precision == "default" else self.matmul_precision

    @property
    def logit_options(self) -> dict[str, Any]:
        """Options of `logprobs.make_logps_fn` that depend on the model."""
        return {"precision": self.precision, "softcap": self.config.logit_softcap}

    def unembedding(self, weights: Params | Adapted) -> Float[Array, "V D"]:
        """Return the unembedding matrix: logits = hidden @ unembedding.T, then capped if the model has a cap.

        A bias is one more column of the matrix, next to zeros: hidden states have a 1 there.
        """
        base = _split(weights).base
        matrix = base["embed" if self.config.tied else "unembed"]
        if not self._has_bias_dims:
            return matrix
        columns = jnp.pad(base["unembed_bias"][:, None], ((0, 0), (0, _num_bias_dims() - 1)))
        return jnp.concatenate([matrix, columns.astype(matrix.dtype)], axis=1)

    @property
    def _has_bias_dims(self) -> bool:
        return self.config.unembed_bias and not self.config.scores

    def _with_bias_dims(self, hidden: Float[Array, "R T _"]) -> Float[Array, "R T _"]:
        """Append a 1 and zeros to hidden states, if the unembedding has a bias."""
        if not self._has_bias_dims:
            return hidden
        ones = jnp.zeros((*hidden.shape[:-1], _num_bias_dims()), hidden.dtype).at[..., 0].set(1)
        return jnp.concatenate([hidden, ones], axis=-1)

    def head(self, weights: Params | Adapted) -> Float[Array, "S D"]:
        """Return the head of a reward model: the adapters' own or, without adapters, the base's."""
        adapters, base = _split(weights)
        return (base if adapters is None else adapters)["score"]

    def init(self, key: Array) -> Params:
        """Initialize parameters: matrices normal with standard deviation ``init_std``, biases 0, norms 1."""
        return nn.unbox(self._boxed(key))

    def param_shapes(self) -> Params:
        """Return the parameter tree with a `jax.ShapeDtypeStruct` at each leaf."""
        return nn.unbox(self._abstract())

    def param_axes(self) -> Params:
        """Return the parameter tree with a tuple of logical axis names at each leaf."""
        return _axis_names(self._abstract())

    def adapter_shapes(self) -> Params:
        """Return the adapter tree with a `jax.ShapeDtypeStruct` at each leaf; adapters are float32."""
        return nn.unbox(self._abstract("lora"))

    def adapter_axes(self) -> Params:
        """Return the adapter tree with a tuple of logical axis names at each leaf."""
        return _axis_names(self._abstract("lora"))

    def _module(self, lora: Lora | None) -> Decoder:
        param_dtype, dtype = jnp.dtype(self.param_dtype), jnp.dtype(self.dtype)
        return Decoder(self.config, param_dtype, lora, dtype, self.attention, self.remat, self.scan)

    def _boxed(self, key: Array, part: Literal["params", "lora"] = "params") -> Params:
        batch = plain_batch(jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
        module = self._module(self.lora if part == "lora" else None).clone(attention="xla")
        inputs = make_inputs(batch, "xla")
        return dict(module.init(key, batch.tokens, batch.positions, inputs, batch.longest, batch.segments)[part])

    def _abstract(self, part: Literal["params", "lora"] = "params") -> Params:
        # the key is made inside, because the mesh in force may have compile-only devices
        return jax.eval_shape(lambda: self._boxed(jax.random.key(0), part))


def _num_bias_dims() -> int:
    """Return the number of dims that hold the unembedding's bias: one for each shard of the matrix's hidden dim."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in EMBED) if mesh_is_active() else 1


def _split(weights: Params | Adapted) -> Adapted:
    return weights if isinstance(weights, Adapted) else Adapted(None, weights)


def _axis_names(boxed: Params) -> Params:
    is_box = lambda leaf: isinstance(leaf, nn.Partitioned)  # noqa: E731
    return jax.tree.map(lambda leaf: tuple(leaf.names), boxed, is_leaf=is_box)


def make_model(config: DecoderConfig, options: ModelConfig, platform: str, lora: Lora | None = None) -> Model:
    """Make the model, resolving each ``auto`` option for devices of ``platform``.

    Raises:
        UserError: the requested attention does not run on that platform, or the model has no experts to balance.
    """
    if options.router_aux_loss_coef is not None:
        remedy = "the model has no experts; remove this option"
        require(config.experts is not None, "model.router_aux_loss_coef", options.router_aux_loss_coef, remedy)
        config = with_balance(config, options.router_aux_loss_coef)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    return Model(
        config=config,
        dtype=dtype,
        param_dtype=options.param_dtype,
        attention=choose(
            options.attention,
            platform=platform,
            dtype=dtype,
            head_dim=config.head_dim,
            softcap=config.attention_softcap,
            sinks=config.sinks,
        ),
        remat=options.remat,
        scan=options.scan,
        matmul_precision=options.matmul_precision,
        lora=lora,
    )


def refuse_expert_axis(config: DecoderConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raise ``UserError`` if the size of the mesh axis `expert` does not divide the number of the model's experts."""
    size, number = mesh.shape["expert"], config.experts.number if config.experts is not None else 0
    require(number > 0 or size == 1, "mesh.expert", size, "the model has no experts; use mesh.fsdp")
    require(number % size == 0, "mesh.expert", size, f"the model has {number} experts; use a divisor of it")


def gathers_all_experts(config: DecoderConfig, mesh: Mesh | AbstractMesh) -> bool:
    """Return whether each device gathers all experts of a layer, which `fsdp` shards but `expert` does not."""
    return config.experts is not None and mesh.shape["expert"] == 1 < mesh.shape["fsdp"]


def with_balance(config: DecoderConfig, coef: float) -> DecoderConfig:
    """Return the config with a new coefficient for the load-balancing loss, if it has experts."""
    if config.experts is None:
        return config
    return replace(config, experts=replace(config.experts, balance_coef=coef))


def count_params(model: Model) -> int:
    """Return the number of parameters without adapters; tied embeddings count once."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.param_shapes()))


def count_adapters(model: Model) -> int:
    """Return the number of adapter parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.adapter_shapes()))
