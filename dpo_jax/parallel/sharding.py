"""The mesh, the table from logical axes to mesh axes, and the shardings derived from it.

`axis` is an axis of the mesh, `dim` a dimension of an array. Mesh axes: `data` replicates the model; `fsdp` shards
weights and rows; `expert` does too, but splits a mixture by experts; `tensor` shards each layer's heads and features.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dpo_jax.config import MeshConfig
from dpo_jax.errors import UserError

AXES = tuple(field.name for field in fields(MeshConfig))
ROWS = ("data", "fsdp", "expert")  # a batch is sharded by rows over all three
EMBED = ("fsdp", "expert")  # the hidden dim of dense weights is sharded over both

# logical axis of a weight -> (mesh axes, whether a size that they do not divide is replicated instead)
RULES: dict[str, tuple[tuple[str, ...], bool]] = {
    "layers": ((), False),
    "vocab": (("tensor",), False),
    "embed": (EMBED, False),
    "heads": (("tensor",), False),
    "kv_heads": (("tensor",), True),  # replicated if the mesh axis does not divide the key/value heads
    "head_dim": ((), False),
    "ffn": (("tensor",), False),
    "experts": (("expert",), False),
    "expert_embed": (("fsdp",), False),  # of an expert's matrices, which `expert` shards by experts
    "routes": ((), False),  # of the router's outputs, one for each expert
    "shared_ffn": (("tensor",), False),
    "single": ((), False),
    "rank": ((), False),  # of adapters
    "scores": ((), False),
    "learned_positions": ((), False),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build the configured mesh over ``devices``, by default all; an axis of size -1 takes the remaining devices."""
    devices = list(jax.devices() if devices is None else devices)
    return Mesh(_arrange_devices(devices, _sizes(config, len(devices))), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def rollout_mesh(mesh: Mesh | AbstractMesh) -> Any:
    """Return a mesh over the same devices, on which `data` takes the place of `fsdp`.

    Weights sharded over `fsdp` would be gathered for every token that is generated.
    """
    shape = {**mesh.shape, "data": mesh.shape["data"] * mesh.shape["fsdp"], "fsdp": 1}
    sizes = tuple(shape[axis] for axis in AXES)
    types = (AxisType.Auto,) * len(AXES)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(sizes, AXES, axis_types=types)
    return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=types)


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """Build the configured mesh without actual devices; it suffices for computing shapes and shardings."""
    return AbstractMesh(_sizes(config, num_devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    requested_sizes = {name: getattr(config, name) for name in AXES}
    product = int(np.prod([size for size in requested_sizes.values() if size != -1]))
    sizes = {name: num_devices // product if size == -1 else size for name, size in requested_sizes.items()}
    if int(np.prod(list(sizes.values()))) != num_devices:
        remedy = "set one axis to -1, or change the sizes"
        if -1 in requested_sizes.values():
            remedy = f"{product} does not divide {num_devices}; change the sizes"
        shape = " x ".join(f"{name} {size}" for name, size in requested_sizes.items())
        raise UserError(f"mesh: {shape} does not use {num_devices} devices: {remedy}")
    return tuple(sizes.values())


def _arrange_devices(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """Arrange the devices in an array of the given shape, with mesh axes along the TPU's interconnect.

    Only axis `data` spans slices, because data parallelism communicates the least.
    """
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % num_slices:
        raise UserError("mesh.data", shape[0], f"use a multiple of the {num_slices} slices: no other axis spans slices")
    slice_shape = (shape[0] // num_slices, *shape[1:])
    if num_slices == 1:
        return mesh_utils.create_device_mesh(slice_shape, devices, allow_split_physical_axes=True)
    dcn_shape = (num_slices, *(1,) * len(slice_shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(slice_shape, dcn_shape, devices, allow_split_physical_axes=True)


def local_mesh() -> Mesh:
    """Return a mesh of one device of this process, for arrays that no other process computes."""
    return Mesh(jax.local_devices()[:1], ("local",))


def row_devices(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of devices that shard the rows of a batch; the number of rows must be a multiple of it."""
    return int(np.prod([mesh.shape[axis] for axis in ROWS]))


def platform_of(mesh: Mesh) -> str:
    """Return the platform of the mesh's devices (cpu, gpu or tpu), which may differ from that of this process."""
    return mesh.devices.flat[0].platform


def weight_spec(
    dims: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, name: str
) -> PartitionSpec:
    """Return the partition spec that ``RULES`` gives to a weight whose dims have these logical axes.

    Raises:
        UserError: the mesh axes of a dim do not divide its size.
        ValueError: two dims map to the same mesh axis.
    """
    spec: list[tuple[str, ...]] = []
    for dim, size in zip(dims, shape, strict=True):
        axes, may_replicate = RULES[dim] if dim is not None else ((), False)
        num_shards = math.prod(mesh.shape[axis] for axis in axes)
        if size % num_shards:
            if not may_replicate:
                option = " * ".join(f"mesh.{axis}" for axis in axes if mesh.shape[axis] > 1)
                raise UserError(option, num_shards, f"use a divisor of {size}, the {dim} size of {name}")
            axes = ()
        if repeated := set(axes) & {axis for earlier in spec for axis in earlier}:
            raise ValueError(f"{name}: dims {tuple(dims)} map to mesh axis {min(repeated)!r} twice")
        spec.append(axes)
    return PartitionSpec(*spec)


def weight_shardings(shapes: Any, dims: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return the sharding of each weight, given trees of the weights' shapes and of their logical axes."""

    def sharding(path, leaf, names):
        return NamedSharding(mesh, weight_spec(names, leaf.shape, mesh, jax.tree_util.keystr(path)))

    return jax.tree.map_with_path(sharding, shapes, dims)


def sharded_structs(shapes: Any, shardings: Any) -> Any:
    """Return a tree of `jax.ShapeDtypeStruct` with the given shapes and shardings."""
    to_struct = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(to_struct, shapes, shardings)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh | AbstractMesh, leading: int = 0) -> NamedSharding:
    """Return the sharding of an array by rows; its first ``leading`` dims, before the row dim, are not sharded."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ROWS))


def local_row_shards(mesh: Mesh) -> tuple[int, ...]:
    """Return the ascending indices of the row shards (one per row device) on the devices of this process."""
    row_slices = row_sharding(mesh).addressable_devices_indices_map((row_devices(mesh),)).values()
    return tuple(sorted({rows.start or 0 for (rows,) in filter(None, row_slices)}))


def mesh_is_active() -> bool:
    """Return whether ``jax.set_mesh`` has activated a mesh with the axes of ``AXES``."""
    return set(AXES) <= set(jax.sharding.get_abstract_mesh().axis_names)


def constrain_rows(x: jax.Array) -> jax.Array:
    """Constrain the first dim of an activation to the row sharding; without an active mesh, return it unchanged."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS)) if mesh_is_active() else x
