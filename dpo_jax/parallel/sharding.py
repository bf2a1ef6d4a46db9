"""Shardings: one table from logical axes to mesh axes, and what follows from it.

`axis` is an axis of the mesh, `dim` a dimension of an array. Mesh axes: `data` holds copies of the model, `fsdp` shards
weights and rows, `tensor` shards each layer's heads and features.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dpo_jax.config import MeshConfig
from dpo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # a batch is sharded by rows over both

# logical axis of a weight -> (mesh axis, whether a size that the mesh axis does not divide is replicated instead)
RULES: dict[str, tuple[str | None, bool]] = {
    "layers": (None, False),
    "vocab": ("tensor", False),
    "embed": ("fsdp", False),
    "heads": ("tensor", False),
    "kv_heads": ("tensor", True),  # fewer key/value heads than devices: each holds them all
    "head_dim": (None, False),
    "ffn": ("tensor", False),
    "rank": (None, False),  # of adapters
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of all devices (or those given) in the shape of the config; -1 takes what the other axes leave."""
    devices = list(jax.devices() if devices is None else devices)
    return Mesh(_arranged(devices, _sizes(config, len(devices))), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """The same mesh without devices: enough for shapes and shardings."""
    return AbstractMesh(_sizes(config, num_devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    asked = {name: getattr(config, name) for name in AXES}
    product = int(np.prod([size for size in asked.values() if size != -1]))
    sizes = {name: num_devices // product if size == -1 else size for name, size in asked.items()}
    if int(np.prod(list(sizes.values()))) != num_devices:
        remedy = f"{product} does not divide {num_devices}" if -1 in asked.values() else "set one axis to -1"
        raise UserError(f"mesh: {asked} does not use {num_devices} devices: {remedy}, or change the sizes")
    return tuple(sizes.values())


def _arranged(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The devices as an array of that shape, in which the axes run along the links of TPUs.

    Only axis `data` spans slices, because copies of the model exchange the least.
    """
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise UserError("mesh.data", shape[0], f"make it a multiple of the {slices} slices, which only this axis spans")
    inside = (shape[0] // slices, *shape[1:])
    if slices == 1:
        return mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    between = (slices, *(1,) * len(inside[1:]))
    return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)


def row_devices(mesh: Mesh | AbstractMesh) -> int:
    """Number of devices that shard the rows of a batch: the number of rows is a multiple of it."""
    return int(np.prod([mesh.shape[axis] for axis in ROWS]))


def platform_of(mesh: Mesh) -> str:
    """Platform of its devices, cpu, gpu or tpu, which may differ from that of this process."""
    return mesh.devices.flat[0].platform


def weight_spec(
    dims: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, name: str
) -> PartitionSpec:
    """The table applied to one weight.

    Raises:
        UserError: a mesh axis does not divide the size of a dim.
        ValueError: two dims are on one mesh axis.
    """
    spec: list[str | None] = []
    for dim, size in zip(dims, shape, strict=True):
        axis, may_replicate = RULES[dim] if dim is not None else (None, False)
        if axis is not None and size % mesh.shape[axis]:
            if not may_replicate:
                raise UserError(f"mesh.{axis}", mesh.shape[axis], f"use a divisor of the {dim} size {size} of {name}")
            axis = None
        if axis is not None and axis in spec:
            raise ValueError(f"{name}: dims {tuple(dims)} put the mesh axis {axis!r} twice")
        spec.append(axis)
    return PartitionSpec(*spec)


def weight_shardings(shapes: Any, dims: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Sharding of each weight, from trees of shapes and of logical axes."""

    def sharding(path, leaf, names):
        return NamedSharding(mesh, weight_spec(names, leaf.shape, mesh, jax.tree_util.keystr(path)))

    return jax.tree.map_with_path(sharding, shapes, dims)


def placed(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes as `jax.ShapeDtypeStruct`, each with its sharding."""
    with_sharding = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(with_sharding, shapes, shardings)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh | AbstractMesh, leading: int = 0) -> NamedSharding:
    """Sharding by rows; ``leading`` dims before the rows are not sharded."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ROWS))


def own_shares(mesh: Mesh) -> tuple[int, ...]:
    """Which of the equal shares of the rows, one per row device, are on devices of this process; ascending."""
    slices = row_sharding(mesh).addressable_devices_indices_map((row_devices(mesh),)).values()
    return tuple(sorted({rows.start or 0 for (rows,) in filter(None, slices)}))


def in_force() -> bool:
    """Whether a mesh with these axes is in force (``jax.set_mesh``)."""
    return set(AXES) <= set(jax.sharding.get_abstract_mesh().axis_names)


def constrain_rows(x: jax.Array) -> jax.Array:
    """Keep the first dim of an activation sharded as rows are, under the mesh in force, if any."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS)) if in_force() else x
