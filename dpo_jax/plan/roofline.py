"""What a step computes and moves on one device, by closed form, and how long that takes at least.

A time is what one resource needs alone, at its peak. The longest of them is a bound that no step beats; their sum is
what it takes without any overlap.
"""

from collections.abc import Sequence

from dpo_jax.models.decoder import Model
from dpo_jax.models.flops import Work, projections, recomputed_flops, recomputed_projections, step_flops
from dpo_jax.parallel.chips import Chip
from dpo_jax.plan.hlo import Collective


def hardware_flops(model: Model, work: Work, *, live_reference: bool) -> int:
    """Operations of a step with what is computed on padding and what is computed a second time."""
    once = step_flops(model.config, work, live_reference=live_reference, lora=model.lora)
    return once + recomputed_flops(model.config, work, model.remat)


def matrix_traffic(model: Model, tokens: int, targets: int, *, parts: int, tensor: int, live_reference: bool) -> float:
    """Bytes that a device's matrix products read and write in its memory, each operand once a product.

    Args:
        model: says which matrices, in what type, and what is computed a second time.
        tokens: of the device, in a part of the step.
        targets: of the device, in a part of the step.
        parts: of the step, one after another.
        tensor: devices over which each matrix is spread.
        live_reference: one forward pass more.
    """
    width = 2 if model.dtype == "bfloat16" else 4
    by_matrix = model.lora is None  # the model's own matrices are trained; adapters are small beside them
    products = 1 + live_reference + 1 + by_matrix  # forward, the reference's; by the input, and by the matrix
    again = recomputed_projections(model.config, model.remat)
    layer = sum(
        (products + (name in again)) * width * (tokens * (inputs + outputs / tensor) + inputs * outputs / tensor)
        for name, (inputs, outputs) in projections(model.config).items()
    )
    # no scores are kept, so that they are computed again whatever is kept of the layers
    c = model.config
    head = (3 + live_reference + by_matrix) * width * (targets * c.hidden + c.hidden * c.vocab / tensor)
    return parts * (c.layers * layer + head)


def collective_times(collectives: Sequence[Collective], chip: Chip, devices_per_slice: int) -> dict[str, float]:
    """Seconds that the links inside a slice (``ici``) and the network between slices (``dcn``) are busy."""
    seconds = {"ici": 0.0, "dcn": 0.0}
    for collective in collectives:
        members = collective.groups.shape[1]
        slices = collective.slices(devices_per_slice)
        if collective.kind == "collective-permute" or slices == 1:
            seconds["ici" if slices == 1 else "dcn"] += _busy(collective.moved * collective.times, chip, slices > 1)
            continue
        # inside every slice first, then each member its share with its like in the other slices
        inside = collective._replace(groups=collective.groups[:, : members // slices])
        between = collective._replace(
            groups=collective.groups[:, :slices], num_bytes=collective.num_bytes * slices // members
        )
        seconds["ici"] += _busy(inside.moved * collective.times, chip, False)
        seconds["dcn"] += _busy(between.moved * collective.times, chip, True)
    return seconds


def _busy(num_bytes: float, chip: Chip, between_slices: bool) -> float:
    bandwidth = chip.dcn_bandwidth if between_slices else chip.ici_bandwidth
    assert bandwidth is not None, "several slices of such chips are refused before"
    return num_bytes / (bandwidth / chip.devices)
