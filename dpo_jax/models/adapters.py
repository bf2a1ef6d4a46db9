"""Low-rank adapters: initialization, and merging into the weights. layers.py describes their tree."""

from fnmatch import fnmatchcase
from typing import Literal

import jax
import jax.numpy as jnp

from dpo_jax.batch import Adapted
from dpo_jax.config import LoraConfig
from dpo_jax.errors import require
from dpo_jax.models.decoder import Model, Params
from dpo_jax.models.families import modules, target_name, target_names
from dpo_jax.models.flops import projections
from dpo_jax.models.options import DecoderConfig, Lora
from dpo_jax.models.projections import layer_projections


def make_lora(config: LoraConfig, decoder: DecoderConfig) -> Lora | None:
    """Return the adapter options of a model, or None if the config has no adapters.

    Raises:
        UserError: a pattern of ``lora.targets`` matches nothing in this decoder.
    """
    if config.rank == 0:
        return None
    choices, all_text = target_names(decoder), "all" if decoder.experts is None else "all but the experts"
    for pattern in config.targets:
        remedy = f"it matches none of the model's {', '.join(choices)}; * matches {all_text}"
        require(any(_matches(name, pattern) for name in choices), "lora.targets", pattern, remedy)
    adapted = [
        names
        for module, names in modules(decoder).items()
        if any(_matches(target_name(module), pattern) for pattern in config.targets)
    ]
    shared = tuple((name, names[0]) for names in adapted for name in names[1:])
    return Lora(rank=config.rank, scale=config.scale, targets=frozenset(sum(adapted, ())), shared=shared)


def _matches(name: str, pattern: str) -> bool:
    """Return whether a shell pattern matches the name of a target; its wildcards do not match dots."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def start_adapters(
    model: Model, key: jax.Array, init: Literal["kaiming", "gaussian", "zero_a"], head: jax.Array | None = None
) -> Params:
    """Initialize adapters so that their product B A is 0; ``init`` as in `config.LoraConfig`.

    kaiming and gaussian match PEFT; zero_a is Init[B] of arXiv 2406.08447. ``head``: the reward head of the base,
    from which the trained head starts.
    """
    assert model.lora is not None
    shapes, sizes, rank = model.adapter_shapes(), projections(model.config), model.lora.rank
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)

    def draw(path, leaf, key):
        if path[-1].key == "score":
            assert head is not None
            return head.astype(leaf.dtype)
        if (path[-1].key == "b") != (init == "zero_a"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if init == "gaussian":
            return jax.random.normal(key, leaf.shape, leaf.dtype) / rank
        fan_in = rank if init == "zero_a" else sizes[path[-2].key][0]
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -(fan_in**-0.5), fan_in**-0.5)

    arrays = [draw(path, leaf, jax.random.fold_in(key, index)) for index, (path, leaf) in enumerate(leaves)]
    return jax.tree.unflatten(treedef, arrays)


def merge(weights: Adapted, model: Model) -> Params:
    """Merge adapters: return W + scale * B A, summed in float32, cast to the parameter dtype, sharded like the base.

    The head of a reward model is taken from the adapters.
    """
    assert model.lora is not None
    scale, rank, owner, rows = model.lora.scale, model.lora.rank, model.lora.owner, layer_projections(model.config)

    def add(weight: jax.Array, name: str, adapters: Params) -> jax.Array:
        a, b = adapters[owner(name)]["a"], adapters[name]["b"]
        stack = a.shape[: 1 + len(rows[name].stack)]  # layers, or layers and experts
        a, b = a.reshape(*stack, rank, -1), b.reshape(*stack, -1, rank)
        product = jnp.einsum("...or,...ri->...oi", b, a, precision=jax.lax.Precision.HIGHEST)
        product = product.swapaxes(-1, -2) if rows[name].transposed else product
        return weight.astype(jnp.float32) + scale * product.reshape(weight.shape)

    def merged(weights: Adapted) -> Params:
        assert weights.adapters is not None
        layers, adapters = weights.base["layers"], weights.adapters["layers"]
        merged_layers = {name: add(layers[name], name, adapters) for name in adapters}
        params = {**weights.base, **weights.adapters, "layers": {**layers, **merged_layers}}
        return jax.tree.map(lambda x: x.astype(model.param_dtype), params)

    return jax.jit(merged, out_shardings=jax.tree.map(lambda x: x.sharding, weights.base))(weights)
