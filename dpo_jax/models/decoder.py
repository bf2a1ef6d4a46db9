"""The decoder of the Llama line as pure functions of its parameters. Shape letters as in ``layers.py``."""

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.batch import Params, PreferenceBatch
from dpo_jax.batching.packing import BatchShape, empty_batch
from dpo_jax.config import ModelConfig
from dpo_jax.models.layers import DecoderModule, Layer, rotary_frequencies
from dpo_jax.models.options import DecoderConfig, Lora
from dpo_jax.ops.attention import Implementation, choose, make_inputs
from dpo_jax.parallel.sharding import constrain_rows

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


class Decoder(DecoderModule):
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
            self.weight("unembed", "VD")
        x = self.weight("embed", "VD")[batch.tokens].astype(self.dtype)
        angles = jnp.asarray(batch.positions, jnp.float32)[..., None] * rotary_frequencies(c)
        # a scan's own loop keeps XLA from merging the second forward pass with the first; unrolled, it might
        policy = REMAT[self.remat]
        layer = Layer if policy is None else nn.remat(Layer, policy=policy, prevent_cse=not self.scan)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.layers,
            unroll=1 if self.scan else c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        inputs = make_inputs(batch, self.attention)
        x = constrain_rows(x)
        (kind,) = c.pattern  # what is scanned is one period of the pattern
        stack = layers(c, self.param_dtype, self.lora, kind, self.attention, batch.longest, name="layers")
        x, _ = stack(x, angles, inputs)
        return self.rms_norm("final", x)


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
        # in force while tracing, so it reaches attention too, and the backward pass takes it from the forward pass
        with jax.default_matmul_precision(self.precision):
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
        param_dtype, dtype = jnp.dtype(self.param_dtype), jnp.dtype(self.dtype)
        return Decoder(self.config, param_dtype, lora, dtype, self.attention, self.remat, self.scan)

    def _boxed(self, key: Array, part: Literal["params", "lora"] = "params") -> Params:
        batch = plain_batch(jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
        module = self._module(self.lora if part == "lora" else None).clone(attention="xla")
        return dict(module.init(key, batch)[part])

    def _abstract(self, part: Literal["params", "lora"] = "params") -> Params:
        # the key is made inside: the mesh in force may be of devices that only compile
        return jax.eval_shape(lambda: self._boxed(jax.random.key(0), part))


def _axis_names(boxed: Params) -> Params:
    is_box = lambda leaf: isinstance(leaf, nn.Partitioned)  # noqa: E731
    return jax.tree.map(lambda leaf: tuple(leaf.names), boxed, is_leaf=is_box)


def make_model(config: DecoderConfig, options: ModelConfig, platform: str, lora: Lora | None = None) -> Model:
    """The model, with each ``auto`` of the options settled for devices of ``platform``.

    Raises:
        UserError: the attention asked for does not run on that platform.
    """
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    return Model(
        config=config,
        dtype=dtype,
        param_dtype=options.param_dtype,
        attention=choose(options.attention, platform=platform, dtype=dtype, head_dim=config.head_dim),
        remat=options.remat,
        scan=options.scan,
        matmul_precision=options.matmul_precision,
        lora=lora,
    )


def count_params(model: Model) -> int:
    """Number of parameters without adapters; tied embeddings count once."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.param_shapes()))


def count_adapters(model: Model) -> int:
    """Number of parameters in adapters."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.adapter_shapes()))
