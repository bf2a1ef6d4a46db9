"""Render plans as text: each slice in full, and several in a table."""

from collections.abc import Sequence
from typing import Any

ASSUMED = {  # by whether the answers are sampled
    False: "equal lengths that fill the rows; set --rows, --lengths or --data",
    True: "prompts and answers as long as they may be; set --lengths, or --data for the prompts",
}
SIZES = {
    "weights": "weights",
    "optimizer": "optimizer",
    "reference": "reference",
    "reward_model": "reward model",
    "batch": "batch",
    "copy": "copy of the policy",
    "cache": "cache",
    "activations": "activations",
}
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def _short(number: float) -> str:
    return next((f"{number / size:.3g}{unit}" for size, unit in UNITS if number >= size), f"{number:.3g}")


def _num_weights(number: int) -> str:
    return _short(number).replace("G", "B")  # billions, as in model names


def _slice_name(plan: dict[str, Any]) -> str:
    prefix = f"{plan['slices']} slices of " if plan["slices"] > 1 else ""
    return f"{prefix}{plan['topology']}"


def _unit(plan: dict[str, Any]) -> str:
    return "prompt" if "prompts" in plan["batch"] else "pair"


def render(plan: dict[str, Any]) -> str:
    """Return the full plan of one slice as text."""
    model, batch, unit = plan["model"], plan["batch"], _unit(plan)
    mesh_text = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    adapters_note = f", {_num_weights(model['adapters'])} more in adapters" if model["adapters"] else ""
    head_note = ", with a score head" if model["scores"] else ""
    split_note = f" in {batch['microbatches']} microbatches" if batch["microbatches"] > 1 else ""
    rows_text = f"{batch['rows_per_device']} x {batch['row_length']} tokens per device"
    lengths_text = " + ".join(f"{length:.0f}" for length in batch["mean_lengths"])
    example_text = {"pair": "prompt, chosen and rejected answer", "prompt": "prompt and each answer"}[unit]
    lines = [
        f"{_slice_name(plan)}: {plan['chips']} chips, mesh {mesh_text}",
        f"model        {model['path']}: {_num_weights(model['parameters'])} parameters{adapters_note}{head_note}",
        f"             {model['dtype']}, attention {model['attention']}, remat {model['remat']}",
        *(_rollout_lines(plan["rollout"]) if "rollout" in plan else ()),
        f"step         {batch[f'{unit}s']} {unit}s{split_note}, {rows_text}",
        f"             {batch['fill']:.0%} full, of {example_text} of {lengths_text} tokens",
        *[f"             ASSUMED: {ASSUMED['rollout' in plan]}"] * batch["assumed"],
        *_memory_lines(plan["memory"]),
    ]
    if "seconds" in plan:
        lines += _cost_lines(plan, unit)
    if "changed" in plan:
        lines.append("changed      " + ", ".join(f"{option} {value}" for option, value in plan["changed"].items()))
    if plan["compile_seconds"] is None:
        lines.append('not compiled: pip install "dpo_jax[plan]", on Linux x86-64')
    else:
        lines.append(f"compiled in {plan['compile_seconds']:.0f} s")
    return "\n".join(lines)


def _rollout_lines(rollout: dict[str, Any]) -> list[str]:
    """Return lines on what a step on sampled answers has besides the policy: other models, and a rollout's size."""
    value, reward, updates = rollout["value_parameters"], rollout["reward_parameters"], rollout["updates"]
    value_text = (
        "a head on the policy's layers" if rollout["value_shared"] else f"{_num_weights(value or 0)} parameters"
    )
    size = "a Python function, whose time is not counted" if reward is None else f"{_num_weights(reward)} parameters"
    assumption = "it is not found, so it is taken to be the policy's model with a score head"
    rows_text = f"{rollout['rows_per_device']} answers per device, {rollout['answers']} to a prompt"
    return [
        *([] if value is None else [f"value model  {value_text}"]),
        f"reward       {rollout['reward']}: {size}",
        *[f"             ASSUMED: {assumption}"] * (not rollout["reward_exists"]),
        f"rollout      {rows_text}; {updates} update{'s' * (updates > 1)} on them",
        f"             prompts padded to {rollout['prompt_slots']} tokens, answers of up to {rollout['max_tokens']}",
    ]


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    size, phases = memory["save"], memory.get("phases", {})
    breakdown = ", ".join(f"{text} {memory[name]:.2f}" for name, text in SIZES.items() if memory.get(name))
    verdicts = {True: "fits", False: "DOES NOT FIT; --search looks for settings that do", None: "at least this much"}
    phase_note = f" during the {memory['phase']}" if phases else ""
    peak_text = f"{memory['peak']:.2f} of {memory['capacity']:.2f} GiB per device{phase_note}"
    return [
        f"memory       {peak_text}: {verdicts[memory['fits']]}",
        f"             {breakdown}",
        *(f"  {name:10} {_phase_text(phase)}" for name, phase in phases.items() if name != memory["phase"]),
        f"save         {size:.3g} GiB each: {_minutes(size, 0.1)} at 100 MB/s, {_minutes(size, 1)} at 1 GB/s",
    ]


def _phase_text(phase: dict[str, Any]) -> str:
    """Return as text a phase's peak memory, and those parts of it that not every phase has."""
    part_texts = [f"{SIZES[name]} {phase[name]:.2f}" for name in ("copy", "cache", "activations") if phase.get(name)]
    return f"{phase['peak']:.2f} GiB: {', '.join(part_texts)}"


def _minutes(gib: float, gb_per_second: float) -> str:
    minutes = gib * 2**30 / 1e9 / gb_per_second / 60
    return f"{minutes:.0f} min" if minutes >= 10 else f"{minutes:.2g} min"


def _times_text(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items() if value)


def _time_lines(plan: dict[str, Any]) -> list[str]:
    """Return lines on the time that each resource alone would take, by stage if a step has several."""
    if "stages" not in plan:
        return [f"time         each resource alone: {_times_text(plan['seconds'])}; bound by {plan['bound']}"]
    return [
        f"time         each resource alone, by stage; bound by {plan['bound']} of {plan['longest_stage']}",
        *(f"  {name:10} {_times_text(seconds) or '0 s'}" for name, seconds in plan["stages"].items()),
    ]


def _cost_lines(plan: dict[str, Any], unit: str) -> list[str]:
    flops = plan["flops"]
    gib_by_kind = {kind: ops["gib"] for kind, ops in plan["collectives"].items() if ops["gib"] >= 0.005}
    moved_text = ", ".join(f"{kind} {size:.3g}" for kind, size in gib_by_kind.items())
    if plan["collectives_at_least"]:
        moved_text += ", at least: some are in loops whose length depends on the data"
    if plan["compile_seconds"] is None:
        moved_text = "unknown, and not included in the times"
    lines = [
        f"operations   {_short(flops['model'])} on real tokens, {_short(flops[f'model_per_{unit}'])} per {unit}",
        f"             {_short(flops['hardware'])} with padding and recomputation",
        f"collectives  GiB per device and step: {moved_text or 'none'}",
        *_time_lines(plan),
    ]
    for name, words in (("full_overlap", "full overlap"), ("no_overlap", "no overlap")):
        estimate = plan[name]
        is_sampled = "sampled_tokens_per_second" in estimate
        tokens_text = f"{estimate['sampled_tokens_per_second' if is_sampled else 'tokens_per_second']:,.0f} "
        lines.append(
            f"{words:12} {estimate['step_seconds']:.3g} s per step, MFU {estimate['mfu']:.0%}, "
            f"{tokens_text}{'sampled ' if is_sampled else ''}tokens/s, {estimate[f'{unit}s_per_second']:.3g} {unit}s/s"
        )
    if "run" in plan:
        run = plan["run"]
        low, high = (f"{hours:.3g}" for hours in run["hours"])
        cost_text = " to ".join(f"{hours:.3g}" for hours in run["chip_hours"])
        lines.append(f"run          {run['steps']} steps: {low} to {high} hours, {cost_text} chip-hours")
    return lines


def table(plans: Sequence[dict[str, Any]]) -> str:
    """Return a table of plans as text, one line per plan."""
    unit = _unit(plans[0])
    head = ["slice", "chips", "GiB", "of", "fits", "s/step", "MFU", f"{unit}s/s", "bound by", "chip-hours"]
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
    speed = f"{_unit(plan)}s_per_second"
    cells = [format_range("step_seconds", ".3g"), format_range("mfu", ".0%"), format_range(speed, ".3g")]
    stage_text = f" of {plan['longest_stage']}" if "stages" in plan else ""
    return [*first_cells, *cells, f"{plan['bound']}{stage_text}", hours_text]
