"""How a tensor in Hugging Face files holds parameters: one, or several fused ones of the same layer.

A tensor's rows are its outputs. Fused parameters follow one another row by row, in groups if the tensor has more than
one: of query, key and value with a group per head, the first rows are those of the first head of each of the three.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from dpo_jax.models.decoder import Model, Params
from dpo_jax.models.families import FAMILIES
from dpo_jax.models.flops import projections
from dpo_jax.models.options import DecoderConfig
from dpo_jax.models.projections import TENSORS, layer_projections
from dpo_jax.weights.safetensors import Tensor


@dataclass(frozen=True, kw_only=True)
class Part:
    """A slice of a parameter: the entry at ``index`` of its first dims."""

    leaf: str  # path of the parameter in its tree
    index: tuple[int, ...]  # layer, or layer and expert; (): the whole parameter
    shape: tuple[int, ...]  # of the slice
    rows: int  # number of the tensor's rows that hold it
    inputs_first: bool = False  # the slice has its input dims first
    experts_last: bool = False  # its first dim, of experts, is the last one among the tensor's inputs


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in the files, as the parts that it consists of; all have the same inputs."""

    parts: tuple[Part, ...]
    inputs: tuple[int, ...] = ()  # dims that follow the rows; (): a vector
    groups: int = 1  # in each of which the rows of the parts follow one another
    transposed: bool = False  # the tensor has its inputs first, unlike most
    stack: int = 0  # number of such tensors, one for each expert, that are one tensor in the file; 0: only one

    @property
    def rows(self) -> int:
        """Number of rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        shape = (*self.inputs, self.rows) if self.transposed else (self.rows, *self.inputs)
        return (self.stack, *shape) if self.stack else shape

    def entries(self) -> list["Stored"]:
        """Return the tensor of each entry of a stack, or this tensor alone if it is not stacked."""
        if self.stack == 0:
            return [self]
        return [replace(self, stack=0).at((*self.parts[0].index, i)) for i in range(self.stack)]

    def at(self, index: tuple[int, ...]) -> "Stored":
        """Return the tensor of this layer, or of this expert in a layer."""
        return replace(self, parts=tuple(replace(part, index=index) for part in self.parts))

    def read(self, tensor: Tensor, part: Part) -> np.ndarray:
        """Read the slice of one part; where its rows are adjacent in the file, no others are read."""
        start = sum(other.rows for other in self.parts[: self.parts.index(part)])
        if self.groups == 1 and not self.transposed:
            rows = tensor.read(slice(start, start + part.rows))
        else:
            matrix = tensor.read().T if self.transposed else tensor.read()
            start, size = start // self.groups, part.rows // self.groups
            rows = matrix.reshape(self.groups, -1, *self.inputs)[:, start : start + size]
        rows = rows.reshape(part.rows, *self.inputs)
        if part.experts_last:
            return np.moveaxis(rows.reshape(*part.shape[1:], part.shape[0]), -1, 0)
        return (rows.T if part.inputs_first else rows).reshape(part.shape)

    def join(self, slices: Sequence[np.ndarray]) -> np.ndarray:
        """Return the tensor, joined from these slices of its parts."""

        def grouped(part: Part, value: np.ndarray) -> np.ndarray:
            rows = value.reshape(*self.inputs, part.rows).T if part.inputs_first else value
            rows = np.moveaxis(rows, 0, -1) if part.experts_last else rows
            return rows.reshape(self.groups, part.rows // self.groups, *self.inputs)

        arrays = [grouped(part, value) for part, value in zip(self.parts, slices, strict=True)]
        tensor = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
        tensor = tensor.reshape(self.rows, *self.inputs)
        return np.ascontiguousarray(tensor.T if self.transposed else tensor)


def leaves_by_name(tree: Params) -> dict[str, Any]:
    """Return the leaves of a tree by their paths."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def leaf_name(path: tuple[Any, ...]) -> str:
    """Return a path of `jax.tree_util` in one string, such as layers/query."""
    return "/".join(part.key for part in path)


def stored_tensors(model: Model) -> dict[str, Stored]:
    """Return what each tensor of a model directory holds, by its name. Files flatten [heads, head_dim]."""
    config, structs = model.config, leaves_by_name(model.param_shapes())
    family, sizes = FAMILIES[config.family], projections(config)
    rows = layer_projections(config).values()
    inputs_first = {f"layers/{row.name}" for row in rows if row.transposed}
    stacked_leaves = {f"layers/{row.name}{end}" for row in rows if row.stack for end in ("", "_bias")}
    fused: dict[str, list[str]] = {}
    for leaf in structs:
        fused.setdefault(family.tensor(leaf), []).append(leaf)
    order = {leaf: index for index, leaf in enumerate(TENSORS)}
    tensors = {}
    for name, leaves in fused.items():
        num_dims = name.count("{}")  # layer, or layer and expert
        parts, inputs, stack = [], (), 0
        for leaf in sorted(leaves, key=lambda leaf: order.get(leaf, -1)):
            shape = structs[leaf].shape[num_dims:]
            if leaf in stacked_leaves and num_dims == 1:
                stack, *shape = shape
            inputs, num_rows = _matrix_size(leaf, tuple(shape), sizes)
            is_first = leaf in inputs_first
            parts.append(Part(leaf=leaf, index=(), shape=tuple(shape), rows=num_rows, inputs_first=is_first))
        stored = Stored(
            parts=tuple(parts),
            inputs=inputs,
            groups=num_groups(config, name),
            transposed=name in family.transposed,
            stack=stack,
        )
        for index in np.ndindex(structs[leaves[0]].shape[:num_dims]):
            tensors[name.format(*index)] = stored.at(index)
    return tensors


def num_groups(config: DecoderConfig, name: str) -> int:
    """Return the number of groups into which the rows of tensor ``name`` are split; {} stands for the layer."""
    axis = FAMILIES[config.family].grouped.get(name)
    return 1 if axis is None else config.size(axis)


def _matrix_size(leaf: str, shape: tuple[int, ...], sizes: dict[str, tuple[int, int]]) -> tuple[tuple[int, ...], int]:
    """Return the input dims and the number of outputs of a slice of a parameter; a vector has no input dims."""
    prefix, _, name = leaf.rpartition("/")
    if name in sizes:
        num_inputs, num_outputs = sizes[name]
        return (num_inputs,), num_outputs
    return ((), math.prod(shape)) if prefix else (shape[1:], shape[0])
