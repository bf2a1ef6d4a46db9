"""The table of chips, and the names of slices."""

import math
import re

import jax
import pytest

from dpo_jax.errors import UserError
from dpo_jax.parallel.chips import CHIPS, GIB, chip_of, parse_topology


@pytest.mark.parametrize(
    ("name", "both_directions"), [("v4", 600e9), ("v5e", 400e9), ("v5p", 1200e9), ("v6e", 800e9), ("tpu7x", 1200e9),
                                  ("a100-80gb", 600e9), ("h100", 900e9), ("h200", 900e9)],
)  # fmt: skip
def test_links_add_up_to_the_published_bandwidth(name, both_directions):
    assert 2 * CHIPS[name].ici_bandwidth == both_directions


def test_figures_of_the_table_belong_together():
    for chip in CHIPS.values():
        assert chip.source.startswith("https://")
        assert 0.9 * chip.memory < chip.device_memory * chip.devices < 1.01 * chip.memory  # v5p: 95.73 of "95" GiB
        assert 100 < chip.peak_flops / chip.memory_bandwidth < 700  # operations a byte
        assert chip.links == 2 * chip.torus_dims or chip.platform == "gpu"
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


def test_a_device_kind_names_its_chip():
    assert chip_of("TPU v5 lite") is CHIPS["v5e"]
    assert chip_of("TPU v5") is CHIPS["v5p"]
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["h100"]
    assert chip_of("NVIDIA H100 PCIe") is None  # another peak
    assert chip_of("cpu") is None
    assert CHIPS["tpu7x"].device_peak_flops == 2307e12 / 2


@pytest.mark.parametrize(
    ("text", "chip", "shape", "devices"),
    [
        ("v5e:4x4", "v5e", (4, 4), 16), ("v5p:4x4x8", "v5p", (4, 4, 8), 128), ("tpu7x:2x2x1", "tpu7x", (2, 2, 1), 8),
        ("v6e:1x1", "v6e", (1, 1), 1), ("v5litepod-1", "v5e", (1, 1), 1), ("v5litepod-4", "v5e", (2, 2), 4),
        ("v5litepod-8", "v5e", (2, 4), 8), ("v5litepod-16", "v5e", (4, 4), 16), ("v5e-16", "v5e", (4, 4), 16),
        ("v6e-256", "v6e", (16, 16), 256),
        ("v4-8", "v4", (2, 2, 1), 4), ("v5p-32", "v5p", (2, 2, 4), 16), ("v5p-64", "v5p", (2, 4, 4), 32),
        ("v5p-128", "v5p", (4, 4, 4), 64), ("v5p-256", "v5p", (4, 4, 8), 128),
    ],
)  # fmt: skip
def test_slices_by_shape_and_by_accelerator_type(text, chip, shape, devices):
    topology = parse_topology(text)
    assert topology == (CHIPS[chip], shape, devices)
    assert parse_topology(topology.name) == topology
    assert topology.chips == math.prod(shape)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5e", "write v5e:4x4"), ("v5e:4*4", "write v5e:4x4"), ("v5litepod:4x4", "v5litepod is not a known chip"),
        ("v5ee:4x4", "did you mean v5e?"), ("v5lite-16", "did you mean v5litepod?"),
        ("tpu7x-16", "tpu7x is not a known accelerator type"),
        ("h100:4x4", "h100 is not a known chip: choose from v4, v5e"), ("v5e:4x4x4", "v5e slices have 2 dimensions"),
        ("v5p:4x3x4", "must be even"), ("v5e:0x4", "must be even"), ("v5p-48", "not a power of two; give a shape such"),
        ("v5p-129", "TensorCores, two per chip"), ("v5e:32x16", "at most 256 chips"),
    ],
)  # fmt: skip
def test_what_is_no_slice_is_refused_in_one_line(text, words):
    with pytest.raises(UserError, match=r"^topology: '") as refused:
        parse_topology(text)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["v4:2x2x1", "v5e:4x4", "v5e:1x1", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
def test_libtpu_agrees_on_devices_kinds_and_memory(text, for_tpus):
    topology, devices = parse_topology(text), for_tpus(text)
    assert len(devices) == topology.devices
    assert chip_of(devices[0].device_kind) is topology.chip
    too_much = jax.ShapeDtypeStruct((100 * GIB,), "float32", sharding=jax.sharding.SingleDeviceSharding(devices[0]))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"HBM \([\d.]+G\)") as refused:
        jax.jit(lambda x: x * 2).lower(too_much).compile()
    (stated,) = re.findall(r"HBM \(([\d.]+)G\)", str(refused.value))
    assert round(float(stated) - topology.chip.device_memory / GIB, 3) in (0, 0.01)  # by libtpu's version
