"""Score generated answers with a reward model."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.batch import BLOCK, Adapted, PairLogps, Params, round_up
from dpo_jax.batching.packing import BatchShape, make_units, pack_rows
from dpo_jax.batching.to_devices import make_to_devices
from dpo_jax.models.decoder import Model
from dpo_jax.models.families import refuse_positions
from dpo_jax.models.heads import make_scores_fn
from dpo_jax.parallel.sharding import local_row_shards, replicated, row_devices

SCORE_DECIMALS = 6  # in output files; later digits of a float32 depend on the batch

AnswerScores = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[float]]  # (prompts, answers) -> scores


def make_answer_scores(model: Model, weights: Params | Adapted, mesh: Mesh) -> AnswerScores:
    """Return a function that scores one answer per prompt at the answer's last token, in one batch.

    Each prompt and answer is a row of its own. Rows are padded to a power of two of blocks, so that few programs are
    compiled.
    """
    scores_fn = make_scores(model, mesh)
    to_devices, shards = make_to_devices(mesh), local_row_shards(mesh)

    def answer_scores(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        examples = [(np.array(p), (np.array(a),), None) for p, a in zip(prompts, answers, strict=True)]
        lengths = np.array([[len(p), len(a)] for p, a in zip(prompts, answers, strict=True)])
        longest = int(lengths.sum(1).max())
        refuse_positions(model.config, longest, "reward.path", "the reward model")
        rows = [[unit] for unit in make_units(lengths, lengths[:, 1:], "padded")]
        rows_per_shard = round_up(len(rows), row_devices(mesh)) // row_devices(mesh)
        shape = scored_shape(rows_per_shard * row_devices(mesh), longest)
        local_rows = [shard * rows_per_shard + row for shard in shards for row in range(rows_per_shard)]
        batch = pack_rows(rows, shape, examples, np.ones(len(rows), np.float32), 1, local_rows)
        scores: Any = scores_fn(weights, to_devices(batch)).sum
        return np.asarray(scores)[:, 0].tolist()

    return answer_scores


@cache
def make_scores(model: Model, mesh: Mesh) -> Callable[..., PairLogps]:
    """Return the jitted function that scores the answers of a batch; ``plan`` compiles it ahead of time, too."""
    return jax.jit(make_scores_fn(model), out_shardings=replicated(mesh))


def scored_shape(num_rows: int, longest: int) -> BatchShape:
    """Return the batch shape for rows that hold one prompt and its answer, of at most ``longest`` tokens in all."""
    num_blocks = 1 << (round_up(longest, BLOCK) // BLOCK - 1).bit_length()
    length, pairs = num_blocks * BLOCK, num_blocks * (num_blocks + 1) // 2
    return BatchShape(
        num_rows, length, length, answers=1, blocks=round_up(pairs, 16), longest=length, branch_length=length
    )
