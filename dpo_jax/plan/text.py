"""Render plans as text: each slice in full, and several in a table."""

from collections.abc import Sequence
from typing import Any

ASSUMED = "             ASSUMED: equal lengths that fill the rows; set --rows, --lengths or --data"
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def _short(number: float) -> str:
    return next((f"{number / size:.3g}{unit}" for size, unit in UNITS if number >= size), f"{number:.3g}")


def _num_weights(number: int) -> str:
    return _short(number).replace("G", "B")  # billions, as in model names


def _slice_name(plan: dict[str, Any]) -> str:
    prefix = f"{plan['slices']} slices of " if plan["slices"] > 1 else ""
    return f"{prefix}{plan['topology']}"


def render(plan: dict[str, Any]) -> str:
    """Return the full plan of one slice as text."""
    model, batch, memory = plan["model"], plan["batch"], plan["memory"]
    mesh_text = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    adapters_note = f", {_num_weights(model['adapters'])} more in adapters" if model["adapters"] else ""
    head_note = ", with a score head" if model["scores"] else ""
    split_note = f" in {batch['microbatches']} microbatches" if batch["microbatches"] > 1 else ""
    rows_text = f"{batch['rows_per_device']} x {batch['row_length']} tokens per device"
    lengths_text = " + ".join(f"{length:.0f}" for length in batch["mean_lengths"])
    lines = [
        f"{_slice_name(plan)}: {plan['chips']} chips, mesh {mesh_text}",
        f"model        {model['path']}: {_num_weights(model['parameters'])} parameters{adapters_note}{head_note}",
        f"             {model['dtype']}, attention {model['attention']}, remat {model['remat']}",
        f"step         {batch['pairs']} pairs{split_note}, {rows_text}",
        f"             {batch['fill']:.0%} full, of prompt, chosen and rejected answer of {lengths_text} tokens",
        *[ASSUMED] * batch["assumed"],
        *_memory_lines(memory),
    ]
    if "seconds" in plan:
        lines += _cost_lines(plan)
    if "changed" in plan:
        lines.append("changed      " + ", ".join(f"{option} {value}" for option, value in plan["changed"].items()))
    if plan["compile_seconds"] is None:
        lines.append('not compiled: pip install "dpo_jax[plan]", on Linux x86-64')
    else:
        lines.append(f"compiled in {plan['compile_seconds']:.0f} s")
    return "\n".join(lines)


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    save, names = memory["save"], ("weights", "optimizer", "reference", "batch", "activations")
    breakdown = ", ".join(f"{name} {memory[name]:.2f}" for name in names if memory[name])
    verdicts = {True: "fits", False: "DOES NOT FIT; --search looks for settings that do", None: "at least this much"}
    return [
        f"memory       {memory['peak']:.2f} of {memory['capacity']:.2f} GiB per device: {verdicts[memory['fits']]}",
        f"             {breakdown}",
        f"save         {save:.3g} GiB each: {_minutes(save, 0.1)} at 100 MB/s, {_minutes(save, 1)} at 1 GB/s",
    ]


def _minutes(gib: float, gb_per_second: float) -> str:
    minutes = gib * 2**30 / 1e9 / gb_per_second / 60
    return f"{minutes:.0f} min" if minutes >= 10 else f"{minutes:.2g} min"


def _cost_lines(plan: dict[str, Any]) -> list[str]:
    flops, seconds = plan["flops"], plan["seconds"]
    times_text = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items() if value)
    gib_by_kind = {kind: ops["gib"] for kind, ops in plan["collectives"].items() if ops["gib"] >= 0.005}
    moved_text = ", ".join(f"{kind} {size:.3g}" for kind, size in gib_by_kind.items())
    if plan["collectives_at_least"]:
        moved_text += ", at least: some are in loops whose length depends on the data"
    if plan["compile_seconds"] is None:
        moved_text = "unknown, and not included in the times"
    lines = [
        f"operations   {_short(flops['model'])} on real tokens, {_short(flops['model_per_pair'])} per pair",
        f"             {_short(flops['hardware'])} with padding and recomputation",
        f"collectives  GiB per device and step: {moved_text or 'none'}",
        f"time         each resource alone: {times_text}; bound by {plan['bound']}",
    ]
    for name, words in (("full_overlap", "full overlap"), ("no_overlap", "no overlap")):
        estimate = plan[name]
        lines.append(
            f"{words:12} {estimate['step_seconds']:.3g} s per step, MFU {estimate['mfu']:.0%}, "
            f"{estimate['tokens_per_second']:,.0f} tokens/s, {estimate['pairs_per_second']:.3g} pairs/s"
        )
    if "run" in plan:
        run = plan["run"]
        low, high = (f"{hours:.3g}" for hours in run["hours"])
        cost_text = " to ".join(f"{hours:.3g}" for hours in run["chip_hours"])
        lines.append(f"run          {run['steps']} steps: {low} to {high} hours, {cost_text} chip-hours")
    return lines


def table(plans: Sequence[dict[str, Any]]) -> str:
    """Return a table of plans as text, one line per plan."""
    head = ["slice", "chips", "GiB", "of", "fits", "s/step", "MFU", "pairs/s", "bound by", "chip-hours"]
    rows = [head, *map(_row, plans)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _row(plan: dict[str, Any]) -> list[str]:
    memory = plan["memory"]
    verdict = {True: "yes", False: "no", None: "?"}[memory["fits"]]
    first_cells = [_slice_name(plan), str(plan["chips"]), f"{memory['peak']:.2f}", f"{memory['capacity']:.2f}", verdict]
    if "seconds" not in plan:
        return [*first_cells, *[""] * 5]
    best, worst = plan["full_overlap"], plan["no_overlap"]
    format_range = lambda name, form: f"{best[name]:{form}} - {worst[name]:{form}}"  # noqa: E731
    hours_text = " - ".join(f"{chip_hours:.3g}" for chip_hours in plan["run"]["chip_hours"]) if "run" in plan else ""
    cells = [format_range("step_seconds", ".3g"), format_range("mfu", ".0%"), format_range("pairs_per_second", ".3g")]
    return [*first_cells, *cells, plan["bound"], hours_text]
