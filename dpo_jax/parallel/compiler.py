"""Options for the compiler, each with its reason; handed over with the program, not by environment variables.

Only what is documented or published in use, and changes when things happen, not what is computed beyond rounding, is
set unasked. Left out, since what it gains was not measured here and what it costs was: a larger scoped VMEM
(``xla_tpu_scoped_vmem_limit_kib``, which MaxText raises to 98304 on v6e; compiling took two to four times as long), and
whole all-gathers in place of windowed products (``xla_jf_spmd_threshold_for_windowed_einsum_mib``; up to a ninth more
memory). ``run.compiler_flags`` is the place to try them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.errors import UserError


class Flag(NamedTuple):
    """One option."""

    name: str
    value: str
    why: str
    kinds: tuple[str, ...] = ()  # of the devices it is for, as JAX names them; (): every one of the platform


# The set that MaxText publishes for FSDP on TPUs as the one for all-gathers, benchmarks/xla_flags_library.py.
FLAGS: dict[str, tuple[Flag, ...]] = {
    "tpu": (
        Flag("xla_enable_async_all_gather", "true", "weights are gathered while something else is computed"),
        Flag("xla_tpu_enable_async_collective_fusion", "true", "what is computed meanwhile is one program with it"),
        # libtpu 0.0.50 refuses this one on other chips, where it "might lead to incorrect results, hang"
        Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "... for all-gathers, too",
             ("TPU v5 lite", "TPU v5e")),
        Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", "... over several such computations"),
        Flag("xla_tpu_overlap_compute_collective_tc", "true", "the core computes while its links are busy"),
    ),
}  # fmt: skip


_BOOLEANS = {"true": "True", "false": "False"}  # the one spelling that options of every platform read


@contextmanager
def not_kept() -> Iterator[None]:
    """Inside, no program goes to JAX's cache on disk: one for devices that are not there cannot be read back."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[option]
    jax.config.update(option, float("inf"))
    try:
        yield
    finally:
        jax.config.update(option, before)


def platform_flags(platform: str, kind: str, overrides: Mapping[str, str]) -> dict[str, str]:
    """The options for devices of a platform, such as tpu, and kind, as ``jax.jit`` and ``lowered.compile`` take them.

    ``overrides``, as in `config.RunConfig`, are added or take the place of a flag of the table; an empty value leaves
    one out.

    Raises:
        UserError: what is to be left out is set on no platform.
    """
    set_here = {flag.name for flags in FLAGS.values() for flag in flags}
    for name in (name for name, value in overrides.items() if not value and name not in set_here):
        raise UserError(f"run.compiler_flags: {name}: nothing sets it, so an empty value leaves nothing out: give it a "
                        f"value, or remove it; these are set on TPUs: {', '.join(sorted(set_here))}")  # fmt: skip
    defaults = (flag for flag in FLAGS.get(platform, ()) if not flag.kinds or kind in flag.kinds)
    options = {flag.name: flag.value for flag in defaults} | dict(overrides)
    return {name: _BOOLEANS.get(value, value) for name, value in options.items() if value}


def compiler_options(mesh: Mesh, overrides: Mapping[str, str]) -> dict[str, str]:
    """``platform_flags`` of the mesh's devices, after their compiler was asked for them.

    Raises:
        UserError: the compiler has no such option, or cannot read its value.
    """
    device = mesh.devices.flat[0]
    options = platform_flags(device.platform, device.device_kind, overrides)
    if not options:
        return options
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(scalar).compile()
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"run.compiler_flags: {dict(overrides)} cannot be used: {reason}; "
                        "correct it, or leave it out by an empty value") from error  # fmt: skip
    return options
