"""Meshes and the table from logical axes to mesh axes; what does not fit is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dpo_jax.config import MeshConfig
from dpo_jax.errors import UserError
from dpo_jax.parallel.sharding import (
    EMBED,
    constrain_rows,
    local_row_shards,
    make_mesh,
    replicated,
    row_devices,
    row_sharding,
    weight_shardings,
)
from dpo_jax.parallel.sharding import weight_spec as spec

MESH = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(tensor=2), (1, 4, 1, 2)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(fsdp=1, tensor=-1), (1, 1, 1, 8)),
        (MeshConfig(expert=4), (1, 2, 4, 1)),
        (MeshConfig(fsdp=1, expert=-1, tensor=2), (1, 1, 4, 2)),
        (MeshConfig(data=8, fsdp=1), (8, 1, 1, 1)),
    ],
)
def test_the_rest_of_the_devices_goes_where_minus_1_stands(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.values()) == shape
    assert tuple(mesh.shape) == ("data", "fsdp", "expert", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert row_devices(mesh) == shape[0] * shape[1] * shape[2]


def test_devices_in_hand_are_used_in_their_order():
    devices = jax.devices()[6:1:-2]
    mesh = make_mesh(MeshConfig(data=3, fsdp=1), devices)
    assert mesh.devices.ravel().tolist() == devices


@pytest.mark.parametrize("config", [MeshConfig(fsdp=3), MeshConfig(fsdp=-1, tensor=3), MeshConfig(data=16)], ids=str)
def test_a_mesh_of_another_size_is_refused(config):
    with pytest.raises(UserError, match=r"mesh: .* does not use 8 devices: (set one|\d+ does not divide 8)"):
        make_mesh(config)


@pytest.mark.parametrize(
    "config",
    [MeshConfig(data=2), MeshConfig(data=2, fsdp=2, tensor=8), MeshConfig(data=4, fsdp=4, tensor=2),
     MeshConfig(data=-1, fsdp=1, tensor=4)],
    ids=str,
)  # fmt: skip
def test_only_copies_of_the_model_lie_in_several_slices(config, tpus):
    mesh = make_mesh(config, tpus("v5e:4x4", slices=2))
    slices = [{device.slice_index for device in copy.flat} for copy in mesh.devices]
    half = len(slices) // 2
    assert slices == [{0}] * half + [{1}] * half
    assert len(set(mesh.devices.flat)) == 32


def test_one_copy_in_two_slices_is_refused(tpus):
    with pytest.raises(UserError, match=r"^mesh.data: 1 cannot be used: use a multiple of the 2 slices") as e:
        make_mesh(MeshConfig(), tpus("v5e:4x4", slices=2))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("tensor", "block"), [(4, (4, 1)), (8, (4, 2))])
def test_chips_of_a_layer_are_neighbors(tpus, tensor, block):
    mesh = make_mesh(MeshConfig(tensor=tensor), tpus("v5e:4x4"))
    for layer in mesh.devices.reshape(-1, tensor):
        places = np.array([device.coords for device in layer])
        assert sorted(np.ptp(places, axis=0)[:2] + 1) == sorted(block)


def test_weights_lie_by_the_table():
    assert spec(("layers", "heads", "head_dim", "embed"), (3, 4, 5, 6), MESH, "q") == P(None, "tensor", None, EMBED)
    assert spec(("vocab", "embed"), (8, 8), MESH, "embed") == P("tensor", EMBED)
    assert spec(("ffn",), (4,), MESH, "bias") == P(
        "tensor",
    )
    assert spec((None, "embed"), (3, 4), MESH, "x") == P(None, EMBED)
    assert spec(("experts", "expert_embed", "ffn"), (2, 4, 4), MESH, "gate") == P("expert", "fsdp", "tensor")


def test_few_key_heads_are_held_by_all():
    assert spec(("kv_heads", "embed"), (1, 4), MESH, "k") == P(None, EMBED)
    assert spec(("kv_heads", "embed"), (2, 4), MESH, "k") == P("tensor", EMBED)


def test_sizes_that_do_not_divide_are_refused_by_name():
    with pytest.raises(UserError, match=r"mesh.tensor: 2 cannot be used: use a divisor of 3, the heads size of q"):
        spec(("heads", "embed"), (3, 4), MESH, "q")
    with pytest.raises(UserError, match=r"mesh.fsdp: 2 cannot be used: use a divisor of 5, the embed size of \['q'\]"):
        weight_shardings({"q": jax.ShapeDtypeStruct((5,), jnp.float32)}, {"q": ("embed",)}, MESH)
    with pytest.raises(UserError, match=r"mesh.fsdp \* mesh.expert: 8 cannot be used: use a divisor of 4, the "):
        spec(("embed",), (4,), make_mesh(MeshConfig(expert=4)), "x")


def test_one_mesh_axis_twice_and_unknown_names_are_errors():
    with pytest.raises(ValueError, match="map to mesh axis 'tensor' twice"):
        spec(("heads", "ffn"), (4, 4), MESH, "x")
    with pytest.raises(ValueError, match="map to mesh axis 'expert' twice"):
        spec(("experts", "embed"), (4, 4), MESH, "x")
    with pytest.raises(KeyError, match="no_such_axis"):
        spec(("no_such_axis",), (4,), MESH, "x")


def test_rows_are_spread_over_all_axes_but_tensor():
    assert row_sharding(MESH).spec == P(("data", "fsdp", "expert"))
    assert row_sharding(MESH, 1).spec == P(None, ("data", "fsdp", "expert"))
    x = jax.device_put(np.arange(8.0).reshape(4, 2), row_sharding(MESH))
    assert {shard.data.shape for shard in x.addressable_shards} == {(1, 2)}
    assert replicated(MESH).is_fully_replicated


def test_one_process_holds_all_rows():
    assert local_row_shards(MESH) == (0, 1, 2, 3)


def test_activations_are_held_spread_under_a_mesh_and_left_alone_without():
    x = jnp.arange(8.0).reshape(4, 2)
    with jax.set_mesh(MESH):
        spread = jax.jit(constrain_rows)(x)
    assert spread.sharding.is_equivalent_to(row_sharding(MESH), 2)
    np.testing.assert_array_equal(spread, x)
    assert constrain_rows(x) is x
