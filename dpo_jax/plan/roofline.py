"""Closed forms for the memory traffic of a step's matmuls, and for the time of its collectives.

Each time is what one resource needs alone, at its peak rate. The longest is a lower bound on the step's time; their sum
is the time without any overlap.
"""

from collections.abc import Sequence

from dpo_jax.models.decoder import Model
from dpo_jax.models.flops import copies, projections, recomputed_projections
from dpo_jax.models.options import DecoderConfig
from dpo_jax.models.projections import layer_projections
from dpo_jax.parallel.chips import Chip
from dpo_jax.plan.hlo import Collective


def matrix_traffic(
    model: Model, tokens: int, targets: int, *, microbatches: int, tensor: int, live_reference: bool, expert: int = 1
) -> float:
    """Return the bytes that a device's matmuls read and write, counting each operand once per matmul.

    ``tokens`` and ``targets`` are per device and microbatch; ``tensor`` devices shard each matrix, and ``expert``
    devices the experts of a mixture.
    """
    trains_matrices = model.lora is None  # the model's own matrices are trained
    matmuls = 1 + live_reference + 1 + trains_matrices  # forward, reference forward, input gradient, matrix gradient
    recomputed = recomputed_projections(model.config, model.remat)
    products = _layer_products(model, tokens, tensor, expert)
    layer_bytes = sum((matmuls + (name in recomputed)) * num_bytes for name, num_bytes in products.items())
    layer_bytes += 3 * _adapter_products(model, tokens, tensor, expert)
    # logits are never saved, so they are recomputed whatever remat saves of the layers
    head_bytes = (3 + live_reference + trains_matrices) * _head_product(model, targets, tensor)
    return microbatches * (model.config.layers * layer_bytes + head_bytes)


def forward_traffic(model: Model, tokens: int, targets: int, *, tensor: int, expert: int = 1) -> float:
    """Return the bytes that the matmuls of a forward pass read and write, as in `matrix_traffic`."""
    layer_bytes = sum(_layer_products(model, tokens, tensor, expert).values())
    layer_bytes += _adapter_products(model, tokens, tensor, expert)
    head_bytes = _head_product(model, targets, tensor) if targets else 0  # without targets no logits are computed
    return model.config.layers * layer_bytes + head_bytes


def _layer_products(model: Model, tokens: int, tensor: int, expert: int) -> dict[str, float]:
    """Return the bytes of the operands of each matmul of a layer, by name."""
    products = {}
    for name, (inputs, outputs) in projections(model.config).items():
        rows, matrices = _rows_and_matrices(model.config, name, tokens, expert)
        products[name] = _itemsize(model) * (rows * (inputs + outputs / tensor) + matrices * inputs * outputs / tensor)
    return products


def _adapter_products(model: Model, tokens: int, tensor: int, expert: int) -> float:
    """Return the bytes of the operands of a layer's adapter matmuls: x A^T, and its product with B^T."""
    lora, total = model.lora, 0.0
    if lora is None:
        return total
    sizes = projections(model.config)
    for name in lora.targets:
        (inputs, outputs), rank = sizes[name], lora.rank
        rows, matrices = _rows_and_matrices(model.config, name, tokens, expert)
        if lora.owner(name) == name:
            total += rows * (inputs + rank) + matrices * inputs * rank
        total += rows * (rank + outputs / tensor) + matrices * rank * outputs / tensor
    return _itemsize(model) * total


def _rows_and_matrices(config: DecoderConfig, name: str, tokens: int, expert: int) -> tuple[int, float]:
    """Return how many rows a device multiplies in the matmuls called ``name``, and by how many matrices.

    An expert's matrices are read if it has a token, as most do in a step, but few in a mixture that samples one row.
    """
    rows = tokens * copies(config, name)
    is_expert = config.experts is not None and layer_projections(config)[name].stack
    return rows, min(config.size("experts") / expert, rows) if is_expert else 1.0


def _itemsize(model: Model) -> int:
    return 2 if model.dtype == "bfloat16" else 4


def _head_product(model: Model, targets: int, tensor: int) -> float:
    """Return the bytes of the operands of the matmul that computes logits; 0 for a model without logits."""
    c, itemsize = model.config, _itemsize(model)
    return itemsize * c.hidden * (targets + c.vocab / tensor) if c.logits else 0


def collective_times(collectives: Sequence[Collective], chip: Chip, devices_per_slice: int) -> dict[str, float]:
    """Return the seconds that collectives take inside TPU slices (``ici``) and between them (``dcn``)."""
    seconds = {"ici": 0.0, "dcn": 0.0}
    for collective in collectives:
        members = collective.groups.shape[1]
        slices = collective.slices(devices_per_slice)
        if collective.kind == "collective-permute" or slices == 1:
            seconds["ici" if slices == 1 else "dcn"] += _seconds(collective.moved * collective.times, chip, slices > 1)
            continue
        # first inside each slice, then each member exchanges its share with its peers in the other slices
        ici_part = collective._replace(groups=collective.groups[:, : members // slices])
        dcn_part = collective._replace(
            groups=collective.groups[:, :slices], num_bytes=collective.num_bytes * slices // members
        )
        seconds["ici"] += _seconds(ici_part.moved * collective.times, chip, False)
        seconds["dcn"] += _seconds(dcn_part.moved * collective.times, chip, True)
    return seconds


def _seconds(num_bytes: float, chip: Chip, between_slices: bool) -> float:
    bandwidth = chip.dcn_bandwidth if between_slices else chip.ici_bandwidth
    assert bandwidth is not None, "several slices of such chips are refused earlier"
    return num_bytes / (bandwidth / chip.devices)
