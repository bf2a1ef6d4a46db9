"""Table of published accelerator figures, and parsing of TPU topology names.

A *chip* is the physical unit that is sold and counted; a *device* is one entry of ``jax.devices()``. Rates are per chip
and per second, bandwidths in bytes; peaks are without sparsity. Each entry names its source. ``device_memory`` of TPUs
is the amount that the compiler reports as available (libtpu 0.0.50; 0.0.42 reports 0.01 GiB more on v5p, v6e and
tpu7x): less than the published memory, except on v5p, where it is slightly more.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dpo_jax.errors import UserError, suggestion

GIB = 2**30
_HOST_SHAPE = (2, 2, 1)  # chips of one host along each torus axis, in multi-host TPU slices


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Published figures of one accelerator."""

    name: str  # prefix of its topology names, such as v5e in v5e:4x4
    platform: Literal["tpu", "gpu"]
    kinds: tuple[str, ...]  # values of `device.device_kind` in JAX
    peak_flops: float  # bfloat16 operations per second
    memory: int  # bytes, as published
    device_memory: int  # bytes available to a program on one device
    memory_bandwidth: float
    link_bandwidth: float  # of one link to another chip, per direction, with both directions in use
    links: int
    torus_dims: int  # dimensions of the torus of links; 0: all chips are joined by a switch
    dcn_bandwidth: float | None  # to other slices or hosts, per chip; None: not published
    max_chips: int  # in one slice, or in one group of linked GPUs
    devices: int = 1  # per chip
    accelerator: str | None = None  # prefix of Google Cloud's accelerator type, PREFIX-NUMBER
    units_per_chip: int = 1  # units that NUMBER counts per chip: 2 if it counts TensorCores
    compiler_name: str = "default"  # `chip_config_name` of libtpu
    source: str  # vendor page or paper with these figures

    @property
    def device_peak_flops(self) -> float:
        """Peak bfloat16 operations per second of one device."""
        return self.peak_flops / self.devices

    @property
    def ici_bandwidth(self) -> float:
        """Bytes per second over all links of a chip in one direction; vendors publish the sum of both directions."""
        return self.links * self.link_bandwidth


_DOCS = "https://docs.cloud.google.com/tpu/docs/"
_TPU: dict[str, Any] = {"platform": "tpu"}
_GPU: dict[str, Any] = {"platform": "gpu", "torus_dims": 0, "dcn_bandwidth": None, "max_chips": 8}

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            **_TPU, name="v4", kinds=("TPU v4",), peak_flops=275e12, memory=32 * GIB, device_memory=int(30.75 * GIB),
            memory_bandwidth=1200e9, link_bandwidth=50e9, links=6, torus_dims=3, dcn_bandwidth=None, max_chips=4096,
            accelerator="v4", units_per_chip=2, compiler_name="megacore",
            source=_DOCS + "v4; links: arXiv 2304.01433, table 4",
        ),
        Chip(
            **_TPU, name="v5e", kinds=("TPU v5 lite", "TPU v5e"), peak_flops=197e12, memory=16 * GIB,
            device_memory=int(15.75 * GIB), memory_bandwidth=819e9, link_bandwidth=50e9, links=4, torus_dims=2,
            dcn_bandwidth=25e9 / 8, max_chips=256, accelerator="v5litepod", source=_DOCS + "v5e",
        ),
        Chip(
            **_TPU, name="v5p", kinds=("TPU v5", "TPU v5p"), peak_flops=459e12, memory=95 * GIB,
            device_memory=int(95.73 * GIB), memory_bandwidth=2765e9, link_bandwidth=100e9, links=6, torus_dims=3,
            dcn_bandwidth=50e9 / 8, max_chips=6144, accelerator="v5p", units_per_chip=2, source=_DOCS + "v5p",
        ),
        Chip(
            **_TPU, name="v6e", kinds=("TPU v6 lite", "TPU v6e"), peak_flops=918e12, memory=32 * GIB,
            device_memory=int(31.24 * GIB), memory_bandwidth=1638e9, link_bandwidth=100e9, links=4, torus_dims=2,
            dcn_bandwidth=100e9 / 8, max_chips=256, accelerator="v6e",
            source=_DOCS + "v6e; between hosts: " + _DOCS + "tpu7x",
        ),
        Chip(
            **_TPU, name="tpu7x", kinds=("TPU7x",), peak_flops=2307e12, memory=192 * GIB,
            device_memory=int(94.74 * GIB), memory_bandwidth=7380e9, link_bandwidth=100e9, links=6, torus_dims=3,
            dcn_bandwidth=100e9 / 8, max_chips=9216, devices=2, source=_DOCS + "tpu7x",
        ),
        Chip(
            **_GPU, name="a100-40gb", kinds=("NVIDIA A100-SXM4-40GB",), peak_flops=312e12, memory=40 * GIB,
            device_memory=40 * GIB, memory_bandwidth=1555e9, link_bandwidth=25e9, links=12,
            source="https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf",
        ),
        Chip(
            **_GPU, name="a100-80gb", kinds=("NVIDIA A100-SXM4-80GB",), peak_flops=312e12, memory=80 * GIB,
            device_memory=80 * GIB, memory_bandwidth=2039e9, link_bandwidth=25e9, links=12,
            source="https://www.nvidia.com/en-us/data-center/a100/",
        ),
        Chip(
            **_GPU, name="h100", kinds=("NVIDIA H100 80GB HBM3",), peak_flops=989.5e12, memory=80 * GIB,
            device_memory=80 * GIB, memory_bandwidth=3350e9, link_bandwidth=25e9, links=18,
            source="https://www.nvidia.com/en-us/data-center/h100/",
        ),
        Chip(
            **_GPU, name="h200", kinds=("NVIDIA H200",), peak_flops=989.5e12, memory=141 * GIB,
            device_memory=141 * GIB, memory_bandwidth=4800e9, link_bandwidth=25e9, links=18,
            source="https://www.nvidia.com/en-us/data-center/h200/",
        ),
    )
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip with this JAX device kind, or None if the table has no such chip (a CPU, for example)."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


class Topology(NamedTuple):
    """A slice of TPU chips."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of the torus
    devices: int

    @property
    def name(self) -> str:
        """Name of the topology, such as ``v5e:4x4``, as ``parse_topology`` and libtpu accept it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Number of chips in the slice."""
        return math.prod(self.shape)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``jax.experimental.topologies.get_topology_desc`` that describe this slice."""
        bounds = _HOST_SHAPE if self.chips > 1 else (1, 1, 1)
        return {"chip_config_name": self.chip.compiler_name, "chips_per_host_bounds": bounds}


def attached_accelerator() -> Literal["TPU", "GPU"] | None:
    """Return the kind of accelerator that this machine has, whether or not JAX can use it."""
    from jax._src import hardware_utils  # no public API looks for devices without taking them

    if hardware_utils.num_available_tpu_chips_and_device_id()[0]:
        return "TPU"
    return "GPU" if hardware_utils.has_visible_nvidia_gpu() else None


def parse_topology(text: str) -> Topology:
    """Parse a TPU slice name: a chip and shape, ``v5e:4x4``, or Google Cloud's accelerator type, ``v5litepod-16``.

    ``v5litepod`` may also be written ``v5e``. An accelerator type stands for the shape that Google Cloud assigns to it,
    as close to a square or cube as powers of two allow. For v4 and v5p its number counts TensorCores, two per chip:
    ``v5p-128`` has 64 chips.

    Raises:
        UserError: the chip, accelerator type or shape does not exist.
    """
    examples = "write v5e:4x4, v5p:4x4x8 or v6e:4x4, or an accelerator type such as v5litepod-16 or v5p-128"
    match = re.fullmatch(r"([a-z]\w*)(?::(\d+(?:x\d+)*)|-(\d+))", text)
    if match is None:
        raise UserError("topology", text, examples)
    name, sizes, number = match.groups()
    chips = {chip.name: chip for chip in CHIPS.values() if chip.platform == "tpu"}
    if not sizes:
        chips = {alias: chip for chip in chips.values() if chip.accelerator for alias in (chip.accelerator, chip.name)}
    if name not in chips:
        kind = "chip" if sizes else "accelerator type"
        raise UserError("topology", text, f"{name} is not a known {kind}: {suggestion(name, chips)}")
    chip = chips[name]
    shape = tuple(map(int, sizes.split("x"))) if sizes else _usual_shape(text, chip, int(number))
    _check_shape(text, chip, shape)
    return Topology(chip, shape, math.prod(shape) * chip.devices)


def _usual_shape(text: str, chip: Chip, number: int) -> tuple[int, ...]:
    num_chips, remainder = divmod(number, chip.units_per_chip)
    if remainder or num_chips < 1 or num_chips & (num_chips - 1):
        unit = "chips" if chip.units_per_chip == 1 else "TensorCores, two per chip,"
        remedy = f"its number of {unit} is not a power of two; give a shape such as {_example(chip)}"
        raise UserError("topology", text, remedy)
    exponent, num_larger = divmod(num_chips.bit_length() - 1, chip.torus_dims)
    shape = (2**exponent,) * (chip.torus_dims - num_larger) + (2 ** (exponent + 1),) * num_larger
    return shape if exponent else shape[::-1]  # a host's four chips span the first two dimensions


def _check_shape(text: str, chip: Chip, shape: tuple[int, ...]) -> None:
    example = _example(chip)
    if len(shape) != chip.torus_dims:
        problem = f"{chip.name} slices have {chip.torus_dims} dimensions, not {len(shape)}"
        raise UserError("topology", text, f"{problem}; write a shape such as {example}")
    fills_hosts = all(size > 0 and size % host == 0 for size, host in zip(shape, _HOST_SHAPE, strict=False))
    if not fills_hosts and math.prod(shape) != 1:
        raise UserError("topology", text, f"a host has 2x2 chips, so the first two sizes must be even, as in {example}")
    if math.prod(shape) > chip.max_chips:
        raise UserError("topology", text, f"a slice has at most {chip.max_chips} chips; use fewer, or several slices")


def _example(chip: Chip) -> str:
    return f"{chip.name}:{'x'.join('4' * chip.torus_dims)}"
