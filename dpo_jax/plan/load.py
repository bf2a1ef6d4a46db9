"""The size of a step's input, from a config and what is known about its data."""

from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from dpo_jax.batch import BLOCK, round_up
from dpo_jax.batching.batches import train_batches
from dpo_jax.batching.packing import assign_rows, make_units
from dpo_jax.batching.sets import DataSets
from dpo_jax.config import PairConfig, PPOConfig
from dpo_jax.errors import UserError, require
from dpo_jax.inference.generate import prompt_bucket
from dpo_jax.parallel.sharding import row_devices

PlannedConfig = PairConfig | PPOConfig


@dataclass(frozen=True)
class Inputs:
    """Inputs of a plan besides the config: the number of slices, and sizes of the data."""

    slices: int = 1
    rows: int | None = None  # of ``batch.row_length`` tokens, per device; None: see `find_load`
    lengths: tuple[float, ...] | None = None  # mean tokens of a prompt, and of each answer of a pair or a sampled one
    sets: DataSets | None = None  # the data, from which mean lengths, rows and steps follow
    examples: int | None = None  # pairs or prompts in the data, for the hours of a run without ``run.steps``
    data: bool = False  # read the data for all of these


@dataclass(frozen=True, kw_only=True)
class Load:
    """Size of a step's input; ``lengths`` are the mean tokens of a prompt and of each of its answers."""

    examples: int  # pairs or prompts, per step
    microbatches: int
    rows: int  # per microbatch, over all devices
    row_length: int
    lengths: tuple[float, ...]
    copies: int = 1  # copies of a prompt in the rows
    longest: int  # most tokens of a prompt with one answer
    answer_room: float | None = None  # tokens for which rows have room in place of an answer's mean; None: no more

    @property
    def unit(self) -> float:
        """Mean tokens that a prompt and its answers occupy in the rows."""
        prompt, *answers = self.lengths
        return self.copies * prompt + sum(answers)

    @property
    def room(self) -> tuple[float, ...]:
        """Number of tokens for which the rows have room, for a prompt and for each of its answers."""
        prompt, *answers = self.lengths
        return prompt, *(length if self.answer_room is None else self.answer_room for length in answers)

    @property
    def unit_room(self) -> float:
        """Number of tokens that a prompt and its answers may occupy in the rows."""
        return self.copies * self.room[0] + sum(self.room[1:])

    @property
    def slots(self) -> int:
        """Number of token slots in a step's rows."""
        return self.microbatches * self.rows * self.row_length

    @property
    def fill(self) -> float:
        """Share of the slots that hold real tokens."""
        return self.examples * self.unit / self.slots

    @property
    def targets(self) -> int:
        """Answer tokens for which a full row has room, rounded up to a multiple of ``BLOCK``."""
        return round_up(self.row_length * sum(self.room[1:]) / self.unit_room, BLOCK)


@dataclass(frozen=True, kw_only=True)
class RolloutLoad:
    """Size of a rollout: R rows, each a prompt that is padded to P tokens, and N new tokens."""

    rows: int  # over all devices, with those that only fill up the devices
    answers: int
    prompt_slots: int
    max_tokens: int
    longest: int  # most tokens of a prompt with its answer

    @property
    def slots(self) -> int:
        """Slots of a row's cache."""
        return self.prompt_slots + self.max_tokens


def find_load(config: PlannedConfig, mesh: Mesh | AbstractMesh, inputs: Inputs) -> Load:
    """Return the input size of a step, from the config and ``inputs``.

    Without lengths, pairs fill one row per device, or ``inputs.rows``, with prompt and answers of equal length; sampled
    answers and their prompts are as long as they may be. Without rows, as many as the lengths need.
    """
    batch, devices, rows = config.batch, row_devices(mesh), inputs.rows
    remedy = "the rows of this layout depend on the data; use shared or repeated"
    require(batch.layout != "padded", "batch.layout", batch.layout, remedy)
    if batch.row_length == "auto":
        raise UserError("batch.row_length", "auto", "plan needs a number, such as --batch.row_length 4096")
    copies = 1 if batch.layout == "shared" else 2  # of a prompt
    planned, max_length = config.planned, config.data.max_length
    if planned.per_prompt:
        prompt, answer = inputs.lengths or (max_length - planned.num_tokens, planned.num_tokens)
        lengths = (prompt, *[answer] * planned.per_prompt)
        fits = prompt + planned.num_tokens <= max_length and answer <= planned.num_tokens
        reason = f"{max_length - planned.num_tokens} tokens (data.max_length) and an answer {planned.num_tokens}"
        require(
            fits, "--lengths", inputs.lengths, f"a prompt may have at most {reason} (sampling.max_tokens); reduce them"
        )
    elif inputs.lengths is None:
        rows = rows or 1
        lengths = _filling_lengths(config, rows * devices, copies)
    else:
        lengths = inputs.lengths
    load = Load(
        examples=batch.size,
        microbatches=batch.accumulation,
        rows=(rows or 1) * devices,
        row_length=batch.row_length,
        lengths=lengths,
        copies=copies,
        longest=min(max_length, batch.row_length),
        answer_room=planned.num_tokens if planned.per_prompt else None,
    )
    longest = lengths[0] + max(lengths[1:])
    fits = longest <= max_length and max(longest, load.unit_room / copies) <= batch.row_length
    unit = "a prompt with its answers" if planned.per_prompt else "a pair"
    limits = f"{max_length} tokens (data.max_length), and {unit} at most {batch.row_length} (batch.row_length)"
    require(fits, "--lengths", lengths, f"a prompt and answer may have at most {limits}; reduce the lengths")
    if rows is None:
        return replace(load, rows=_needed_rows(config, load, devices, inputs.sets))
    if load.examples * load.unit_room > load.slots:
        rows_text = f"{rows} rows of {batch.row_length} tokens per device"
        num_examples = batch.size / batch.accumulation
        remedy = "give more rows or raise batch.accumulation"
        raise UserError(
            f"--rows: {rows_text} cannot hold {num_examples:g} {batch.counts} of {load.unit_room:g} tokens; {remedy}"
        )
    return load


def _filling_lengths(config: PlannedConfig, num_rows: int, copies: int) -> tuple[float, ...]:
    """Return the mean length, the same for prompt and answers, with which a microbatch fills ``num_rows`` rows."""
    batch = config.batch
    assert batch.row_length != "auto"
    pairs = batch.size / batch.accumulation
    pair_slots = batch.row_length * min(num_rows / pairs, copies)
    mean_length = float(int(min(pair_slots / (copies + 2), config.data.max_length / 2)))
    remedy = f"no row has room for {pairs / num_rows:g} pairs; give --rows, or raise batch.row_length"
    require(mean_length > 0, "batch.row_length", batch.row_length, remedy)
    return mean_length, mean_length, mean_length


def _needed_rows(config: PlannedConfig, load: Load, devices: int, sets: DataSets | None) -> int:
    """Return the number of rows that a microbatch needs, from the data, or without data from ``load.room``."""
    batch = config.batch
    if sets is not None:
        return train_batches(sets, batch, devices).packer.shapes[-1].rows
    lengths = np.tile(np.round(load.room).astype(int), (load.examples // load.microbatches, 1))
    units = make_units(lengths, lengths[:, 1:], batch.layout)
    return len(assign_rows(units, layout=batch.layout, multiple=devices, row_length=load.row_length))


def find_rollout(config: PlannedConfig, mesh: Mesh | AbstractMesh, inputs: Inputs) -> RolloutLoad:
    """Return the size of a step's rollout; prompts are padded to fit the longest that the data has or may have."""
    max_tokens, answers = config.sampling.max_tokens, config.batch.size * config.planned.sampled
    longest = config.data.max_length - max_tokens
    if inputs.sets is not None:
        longest = int(inputs.sets.train.lengths[:, 0].max())
    return RolloutLoad(
        rows=round_up(answers, row_devices(mesh)),
        answers=answers,
        prompt_slots=prompt_bucket(longest),
        max_tokens=max_tokens,
        longest=longest + max_tokens,
    )
