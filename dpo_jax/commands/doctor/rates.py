"""Checks that measure: a matrix product, an all-gather and a save, compared with what ``plan`` assumes."""

import shutil
import time
from collections.abc import Callable
from typing import Any

from dpo_jax.commands.doctor.findings import Finding, ok, size_text, warn
from dpo_jax.commands.doctor.machine import closest_folder

MATRIX, PRODUCTS = 8192, 50  # size and number of the matrix products that are timed
GATHERED_BYTES = 2**30
SAVED_BYTES = 2**26  # on a CPU
SAVED_FACTOR = 16  # on accelerators
LOW_RATE = 0.5  # of the published rate


def is_accelerator() -> bool:
    """Return whether JAX runs on a GPU or TPU."""
    import jax

    return jax.default_backend() != "cpu"


def matrix_product() -> Finding | None:
    """Measure the rate of a large bfloat16 matrix product on one accelerator."""
    import jax
    import jax.numpy as jnp

    from dpo_jax.parallel.chips import chip_of

    if not is_accelerator():
        return None
    device = jax.local_devices()[0]
    with jax.default_device(device):
        matrix = jax.random.normal(jax.random.key(0), (MATRIX, MATRIX), jnp.bfloat16) / MATRIX**0.5
        multiply = jax.jit(lambda x: jax.lax.fori_loop(0, PRODUCTS, lambda _, y: x @ y, x))
        flops = 2 * MATRIX**3 * PRODUCTS / _seconds(multiply, matrix)
    chip = chip_of(device.device_kind)
    return compare_rate(flops / 1e12, None if chip is None else chip.device_peak_flops / 1e12, "TFLOP/s")


def all_gather() -> Finding | None:
    """Measure the rate at which each accelerator receives the shards of all others."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from dpo_jax.parallel.chips import chip_of

    all_devices = jax.devices()
    count = len(all_devices)
    if count == 1 or not is_accelerator():
        return None
    mesh = jax.make_mesh((count,), ("all",), axis_types=(AxisType.Auto,))
    sharded, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("all",), ()))
    size = GATHERED_BYTES // 4 // count * count
    shards = jax.jit(lambda: jnp.ones(size, jnp.float32), out_shardings=sharded)()
    gather = jax.jit(lambda x: x, out_shardings=replicated)
    rate = 4 * size * (count - 1) / count / _seconds(gather, shards)
    chip = chip_of(all_devices[0].device_kind)
    is_one_slice = len({getattr(device, "slice_index", 0) for device in all_devices}) == 1
    published = chip.ici_bandwidth / chip.devices / 1e9 if chip is not None and is_one_slice else None
    return compare_rate(rate / 1e9, published, "GB/s per device")


def _seconds(program: Callable[[Any], Any], argument: Any) -> float:
    """Return the seconds of a compiled program's second call."""
    import jax

    jax.block_until_ready(program(argument))
    start = time.perf_counter()
    jax.block_until_ready(program(argument))
    return time.perf_counter() - start


def compare_rate(measured: float, published: float | None, unit: str) -> Finding:
    """Compare a measured rate with the published one, which ``plan`` assumes."""
    facts = {"measured": measured, "published": published, "unit": unit}
    if published is None:
        return ok(f"{measured:,.0f} {unit}", **facts)
    text = f"{measured:,.0f} of {published:,.0f} {unit} ({measured / published:.0%}); plan assumes all of it"
    if measured < LOW_RATE * published:
        return warn(text, "end other programs that use the devices, and check their temperature and links", **facts)
    return ok(text, **facts)


def save(folder: str | None, name: str) -> Finding | None:
    """Measure the rate of a checkpoint of random bytes in the run directory, which is removed again.

    ``name``: that of the checkpoint; process 0's is taken.
    """
    import jax
    import jax.numpy as jnp
    from etils import epath
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from dpo_jax.bucket import Bucket, is_remote
    from dpo_jax.config import CheckpointConfig
    from dpo_jax.parallel import hosts
    from dpo_jax.runs.checkpoint import Checkpoints
    from dpo_jax.runs.manifest import make_manifest

    if folder is None:
        return None
    wanted = SAVED_BYTES * (SAVED_FACTOR if is_accelerator() else 1)
    if is_remote(folder):
        Bucket.named("run.dir", folder).with_patience(0).connect()
        existing = folder
    else:
        existing = closest_folder(folder)
        wanted = min(wanted, shutil.disk_usage(existing).free // 8)
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("all",), axis_types=(AxisType.Auto,))
    size = hosts.gather(wanted, "size of the trial save")[0] // 4 // count * count  # numbers of 4 bytes
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    bits = jax.jit(lambda: jax.random.bits(jax.random.key(0), (size,), jnp.uint32), out_shardings=sharding)()
    jax.block_until_ready(bits)
    probe = epath.Path(existing) / hosts.gather(name, "trial save")[0]
    seconds = 0.0
    try:
        with Checkpoints(probe, CheckpointConfig(keep=1)) as checkpoints:
            for step in (1, 2):  # the first also compiles and starts threads
                start = time.perf_counter()
                checkpoints.save(step, {"bits": bits}, make_manifest({}, {}, {}), wait=True)
                seconds = time.perf_counter() - start
    finally:
        if hosts.is_writer() and probe.exists():
            probe.rmtree()
    rate = 4 * size / seconds
    return ok(f"{size_text(4 * size)} in {seconds:.1f} s, {rate / 1e6:,.0f} MB/s", bytes_per_second=rate)
