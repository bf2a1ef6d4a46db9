"""Compute the example ids of step k in integer arithmetic, as a pure function of (data, seed, step).

The order is stateless, so resuming, changing the number of hosts and auditing a step need no replay. numpy's random
generators are not used, because their streams may change between versions.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from dpo_jax.errors import UserError

_MASK_64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # odd, so i -> i * _GOLDEN is a bijection of 64-bit words


def mix_words(x: np.ndarray) -> np.ndarray:
    """Apply the finalizer of splitmix64 (Steele, Lea, Flood 2014), an elementwise bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _fold(seed: int, value: int) -> int:
    """Derive a new seed from a seed and a number."""
    word = (seed + (value + 1) * _GOLDEN) & _MASK_64
    return int(mix_words(np.array([word], np.uint64))[0])


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the numbers 0..n-1, int64 [n], sorted by a hash of (seed, epoch, number).

    Hashes of one (seed, epoch) never collide, so the order is independent of the sort algorithm; a test pins it.
    """
    first_word = _fold(_fold(0, seed), epoch)
    words = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(first_word)
    return np.argsort(mix_words(words), kind="stable").astype(np.int64)


def integer_shares(weights: Sequence[float]) -> list[int]:
    """Return the smallest integers in the ratio of the weights, which are read as exact decimals."""
    fractions = [Fraction(str(weight)) for weight in weights]
    denominator = math.lcm(*(share.denominator for share in fractions))
    shares = [int(share * denominator) for share in fractions]
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares]


def chairman_assignment(shares: Sequence[int], draws: int) -> np.ndarray:
    """Return the source of each draw, int64 [draws]; after every draw, each source has its share to within one draw.

    Tijdeman (1980), "The chairman assignment problem", Discrete Mathematics 32: among the sources that are owed enough,
    draw the one with the earliest deadline. The sequence repeats after sum(shares) draws.
    """
    total_shares, num_sources = sum(shares), len(shares)
    owed = [0] * num_sources  # total * (draws due - draws made)
    slack = 2 * num_sources - 2
    sources = np.zeros(draws, np.int64)
    for draw in range(draws if num_sources > 1 else 0):
        earliest_source, earliest_deadline = -1, math.inf
        for i, share in enumerate(shares):
            owed[i] += share
            if slack * owed[i] >= total_shares:
                deadline = (total_shares * (slack - 1) - slack * owed[i]) / share
                if deadline < earliest_deadline:
                    earliest_source, earliest_deadline = i, deadline
        sources[draw] = earliest_source
        owed[earliest_source] -= total_shares
    return sources


@dataclass(frozen=True, kw_only=True)
class Order:
    """Order of the examples in a run, created by ``make_order``; thread-safe."""

    groups: tuple[np.ndarray, ...]  # example ids of each source
    batch: int  # examples per step
    num_steps: int
    num_draws: int  # examples in the run; less than num_steps * batch when the last step is ragged
    epoch_draws: int  # examples per epoch: sum of the group sizes
    cycle_sources: np.ndarray  # [C] source of each draw; repeats after C draws
    cycle_ranks: np.ndarray  # [C] number of earlier draws from the same source in the cycle
    cycle_counts: np.ndarray  # [number of groups] draws from each source per cycle
    arrange: Callable[[int, int], np.ndarray]  # (group, epoch of the group) -> permutation of the group

    def step_ids(self, step: int) -> np.ndarray:
        """Return the example ids of step ``step`` (0-based), int64 [batch]; a ragged last step is padded with -1."""
        assert 0 <= step < self.num_steps, (step, self.num_steps)
        draws = np.arange(step * self.batch, min((step + 1) * self.batch, self.num_draws), dtype=np.int64)
        cycle, offset = np.divmod(draws, len(self.cycle_sources))
        sources = self.cycle_sources[offset]
        source_draws = cycle * self.cycle_counts[sources] + self.cycle_ranks[offset]
        ids = np.full(self.batch, -1, np.int64)
        for source in np.unique(sources):
            (slots,) = np.nonzero(sources == source)
            group = self.groups[source]
            epochs, ranks = np.divmod(source_draws[slots], len(group))
            for epoch in np.unique(epochs):
                is_in_epoch = epochs == epoch
                ids[slots[is_in_epoch]] = group[self.arrange(int(source), int(epoch))[ranks[is_in_epoch]]]
        return ids

    def drawn_ids(self) -> np.ndarray:
        """Return the sorted ids of the examples that the run draws, each once, int64 [n]."""
        cycles, rest = divmod(self.num_draws, len(self.cycle_sources))
        draws = cycles * self.cycle_counts + np.bincount(self.cycle_sources[:rest], minlength=len(self.groups))
        drawn = [group[self.arrange(i, 0)[: draws[i]]] for i, group in enumerate(self.groups)]
        return np.unique(np.concatenate(drawn))

    def epoch(self, steps_done: int) -> float:
        """Return the epochs completed after ``steps_done`` steps: examples drawn / examples in all sources."""
        return min(steps_done * self.batch, self.num_draws) / self.epoch_draws


def make_order(
    *,
    groups: Sequence[np.ndarray],
    weights: Sequence[float] | None,
    seed: int,
    shuffle: bool,
    batch: int,
    steps: int | None,
    epochs: float | None,
) -> Order:
    """Make the order in which a run draws examples from ``groups``, the example ids of each source.

    Without weights the sources are concatenated: each example is drawn once per epoch, in a new permutation every epoch
    (file order if not ``shuffle``), and epochs follow one another without a gap. With weights each source has its own
    permutations and pace: after every step, source i has supplied its share of all pairs to within one pair. An epoch
    of a weighted mixture has as many draws as all sources have examples; a source whose weight exceeds its share of
    the examples is then repeated, and one whose weight is below it is not exhausted. The run has
    ``steps`` full steps or ``epochs`` (may be fractional; the last step may be ragged); default: one epoch.

    Raises:
        UserError: no examples, or a weighted source without examples.
    """
    assert steps is None or epochs is None
    groups = tuple(np.asarray(group, np.int64) for group in groups)
    num_examples = sum(map(len, groups))
    if num_examples == 0:
        raise UserError("data.train: no training examples are left; add data or lower data.eval_fraction")
    if weights is None:
        groups, shares = (np.concatenate(groups),), [1]
    else:
        shares = integer_shares(weights)
        for i, group in enumerate(groups):
            if len(group) == 0:
                raise UserError(f"data.train.{i}: no training examples, but weight {weights[i]}; remove this data set")
    draws_in_epochs = math.floor(Fraction(str(epochs or 1)) * num_examples + Fraction(1, 2))  # rounded half up
    num_draws = steps * batch if steps is not None else max(1, draws_in_epochs)
    sources = chairman_assignment(shares, min(sum(shares), num_draws))
    ranks = np.zeros_like(sources)
    for source in range(len(groups)):
        is_source = sources == source
        ranks[is_source] = np.arange(is_source.sum())

    # An epoch may end inside a step, so up to two permutations of each source are in use at a time.
    @functools.lru_cache(maxsize=2 * len(groups))
    def arrange(group: int, epoch: int) -> np.ndarray:
        if not shuffle:
            return np.arange(len(groups[group]))
        return permutation(len(groups[group]), _fold(seed, group), epoch)

    return Order(
        groups=groups,
        batch=batch,
        num_steps=-(-num_draws // batch),
        num_draws=num_draws,
        epoch_draws=num_examples,
        cycle_sources=sources,
        cycle_ranks=ranks,
        cycle_counts=np.bincount(sources, minlength=len(groups)),
        arrange=arrange,
    )
