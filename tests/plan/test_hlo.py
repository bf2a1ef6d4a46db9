"""Collectives of compiled programs, against programs whose collectives are known by hand, for CPUs and for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dpo_jax.config import MeshConfig
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.plan.hlo import collectives

STEPS, ROWS, WIDTH = 5, 8, 1024


def program(mesh, unknown: bool = False):
    """A loop that gathers two arrays over `fsdp` each time, then a sum over `tensor` of what all devices hold.

    ``unknown``: how often is an argument.
    """

    def local(x, times):
        def body(i, total):
            sines, cosines = (jax.lax.all_gather(fn(x * i), "fsdp", axis=0, tiled=True) for fn in (jnp.sin, jnp.cos))
            return total + jnp.dot(sines, cosines.T, precision="highest")

        total = jax.lax.fori_loop(0, times if unknown else STEPS, body, jnp.zeros((ROWS, ROWS)))
        return jax.lax.psum(total * jax.lax.axis_index("tensor"), "tensor")

    spread = jax.shard_map(local, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P(), check_vma=False)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=jax.NamedSharding(mesh, P("fsdp")))
    times = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(mesh, P()))
    return jax.jit(spread).lower(x, times).compile().as_text()


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_loop_and_a_sum(platform, for_tpus):
    devices = jax.devices()[:4] if platform == "cpu" else for_tpus("v5e:2x2")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices)
    found = collectives(program(mesh), mesh.size)
    gathers = [one for one in found if one.kind == "all-gather"]
    assert [(one.num_bytes, one.times) for one in gathers] == [(4 * ROWS * WIDTH, STEPS)] * 2
    assert gathers[0].moved == 4 * ROWS * WIDTH / 2
    assert sorted(map(sorted, gathers[0].groups.tolist())) == [[0, 2], [1, 3]]  # over fsdp
    (total,) = [one for one in found if one.kind == "all-reduce"]
    assert (total.num_bytes, total.times, total.moved) == (4 * ROWS * ROWS, 1, 4 * ROWS * ROWS)
    assert sorted(map(sorted, total.groups.tolist())) == [[0, 1], [2, 3]]  # over tensor
    assert len(found) == 3
    assert not any(one.at_least for one in found)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_loop_of_unknown_length_is_told(platform, for_tpus):
    devices = jax.devices()[:4] if platform == "cpu" else for_tpus("v5e:2x2")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices)
    found = collectives(program(mesh, unknown=True), mesh.size)
    kinds = sorted((one.kind, one.at_least, one.times) for one in found)
    assert kinds == [*[("all-gather", True, 1)] * 2, ("all-reduce", False, 1)]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=1,'b'=4] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
    ],
)
def test_every_way_to_write_groups(text, groups):
    line = f"%x = f32[4]{{0}} all-reduce(%y), channel_id=1, {text}, to_apply=%add"
    program = f"ENTRY %main (y: f32[4]) -> f32[4] {{\n  {line}\n}}\n"
    (one,) = collectives(program, 4)
    np.testing.assert_array_equal(one.groups, groups)


def test_a_permutation_moves_its_whole_operand():
    line = ("%s = (f32[4]{0}, f32[4]{0}, u32[]) collective-permute-start(%y), channel_id=1, "
            "source_target_pairs={{0,1},{1,0}}")  # fmt: skip
    (one,) = collectives(f"ENTRY %main (y: f32[4]) -> f32[4] {{\n  {line}\n}}\n", 2)
    assert (one.moved, one.times) == (16, 1)
    np.testing.assert_array_equal(one.groups, [[0, 1], [1, 0]])
