"""Default compiler options, which are passed to each compilation rather than set in the environment.

The defaults are documented or in published use; they change scheduling but no results beyond rounding. Two options are
left out, whose cost was measured here but not their gain: a larger scoped VMEM (``xla_tpu_scoped_vmem_limit_kib``,
which MaxText raises to 98304 on v6e; compilation took 2 to 4 times as long), and full all-gathers instead of windowed
einsums (``xla_jf_spmd_threshold_for_windowed_einsum_mib``; up to 1/9 more memory). ``run.compiler_flags`` can set them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.errors import UserError


class Flag(NamedTuple):
    """One default compiler option."""

    name: str
    value: str
    kinds: tuple[str, ...] = ()  # device kinds that take the option, as JAX names them; (): all of the platform


_V5E = ("TPU v5 lite", "TPU v5e")
# MaxText's published flags for FSDP all-gathers on TPUs (benchmarks/xla_flags_library.py).
FLAGS: dict[str, tuple[Flag, ...]] = {
    "tpu": (
        Flag("xla_enable_async_all_gather", "true"),  # gathers weights while other computations run
        Flag("xla_tpu_enable_async_collective_fusion", "true"),  # fuses these computations with the collective
        # libtpu 0.0.50 rejects this flag on other chips, where it "might lead to incorrect results, hang"
        Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", _V5E),
        Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", "true"),  # over several computations
        Flag("xla_tpu_overlap_compute_collective_tc", "true"),  # computes while the links are busy
    )
}
_BOOLEANS = {"true": "True", "false": "False"}  # spellings that the options of every platform accept


@contextmanager
def no_cache_writes() -> Iterator[None]:
    """Context manager that stops writes to JAX's compilation cache, which cannot load programs for absent devices."""
    option = "jax_persistent_cache_min_compile_time_secs"
    previous_value = jax.config.values[option]
    jax.config.update(option, float("inf"))
    try:
        yield
    finally:
        jax.config.update(option, previous_value)


def platform_flags(platform: str, kind: str, overrides: Mapping[str, str]) -> dict[str, str]:
    """Return the compiler options for a platform (such as tpu) and device kind, for ``jax.jit`` or ``lowered.compile``.

    ``overrides`` (``run.compiler_flags``) extend or replace the flags of the table; an empty value removes a flag.

    Raises:
        UserError: an override removes a flag that no platform sets by default.
    """
    default_names = {flag.name for flags in FLAGS.values() for flag in flags}
    for name in (name for name, value in overrides.items() if not value and name not in default_names):
        remedy = f"give it a value, or omit it; set by default on TPUs: {', '.join(sorted(default_names))}"
        raise UserError(f"run.compiler_flags: {name} has an empty value, but it is not set by default: {remedy}")
    defaults = (flag for flag in FLAGS.get(platform, ()) if not flag.kinds or kind in flag.kinds)
    options = {flag.name: flag.value for flag in defaults} | dict(overrides)
    return {name: _BOOLEANS.get(value, value) for name, value in options.items() if value}


def compiler_options(mesh: Mesh, overrides: Mapping[str, str]) -> dict[str, str]:
    """Return ``platform_flags`` of the mesh's devices, validated by compiling a trivial program with them.

    Raises:
        UserError: the compiler does not know an option, or cannot parse its value.
    """
    device = mesh.devices.flat[0]
    options = platform_flags(device.platform, device.device_kind, overrides)
    if not options:
        return options
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(scalar).compile()
    except jax.errors.JaxRuntimeError as error:
        cause = " ".join(str(error).split())
        remedy = f"{cause}; correct the flag, or give it an empty value to omit it"
        raise UserError("run.compiler_flags", dict(overrides), remedy) from error
    return options
