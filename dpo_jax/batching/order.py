"""Which examples step k holds: a pure function of (data, seed, step), in integer arithmetic of our own.

Nothing here keeps a state, so resuming, another number of hosts and an audit of any step need no replay. numpy's random
generators are not used: their streams change between versions.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from dpo_jax.errors import UserError

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # odd, so i -> i * _GOLDEN hits every 64-bit word once


def mix_words(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words, elementwise."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _fold(seed: int, value: int) -> int:
    """Another seed, made from a seed and a number."""
    word = (seed + (value + 1) * _GOLDEN) & _MASK
    return int(mix_words(np.array([word], np.uint64))[0])


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers 0..n-1, int64 [n], in the order of a hash of (seed, epoch, number).

    Hashes of one (seed, epoch) never collide, so the order does not depend on the sort; a test pins known answers.
    """
    start = _fold(_fold(0, seed), epoch)
    words = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(start)
    return np.argsort(mix_words(words), kind="stable").astype(np.int64)


def integer_shares(weights: Sequence[float]) -> list[int]:
    """The smallest integers in the proportion of the weights, which are taken as the decimals they are written as."""
    exact = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(share.denominator for share in exact))
    shares = [int(share * common) for share in exact]
    divisor = math.gcd(*shares)
    return [share // divisor for share in shares]


def chairman_assignment(shares: Sequence[int], draws: int) -> np.ndarray:
    """The source of each draw, int64 [draws]: after every t draws source i has had t * share_i within less than 1.

    Tijdeman (1980), "The chairman assignment problem", Discrete Mathematics 32: among the sources that are owed enough,
    take the one that must be served first. It repeats after sum(shares) draws.
    """
    total, k = sum(shares), len(shares)
    owed = [0] * k  # total * (draws due - draws had)
    slack = 2 * k - 2
    sources = np.zeros(draws, np.int64)
    for draw in range(draws if k > 1 else 0):
        first, first_key = -1, math.inf
        for i, share in enumerate(shares):
            owed[i] += share
            if slack * owed[i] >= total:
                key = (total * (slack - 1) - slack * owed[i]) / share
                if key < first_key:
                    first, first_key = i, key
        sources[draw] = first
        owed[first] -= total
    return sources


@dataclass(frozen=True, kw_only=True)
class Order:
    """The examples of every step. Made by ``make_order``; safe to call from any thread."""

    groups: tuple[np.ndarray, ...]  # example ids of each source that is drawn from
    batch: int  # examples in a step
    num_steps: int
    num_draws: int  # examples in the run; less than num_steps * batch when the last step is ragged
    epoch_draws: int  # examples in an epoch: the groups' sizes together
    cycle_sources: np.ndarray  # [C] the source of each draw, repeated after C draws
    cycle_ranks: np.ndarray  # [C] earlier draws in the cycle from the same source
    cycle_counts: np.ndarray  # [number of groups] draws from each source in a cycle
    arrange: Callable[[int, int], np.ndarray]  # (group, its epoch) -> order in the group

    def step_ids(self, step: int) -> np.ndarray:
        """Example ids of step ``step``, counted from 0: int64 [batch], -1 in the empty slots of a ragged last step."""
        assert 0 <= step < self.num_steps, (step, self.num_steps)
        draws = np.arange(step * self.batch, min((step + 1) * self.batch, self.num_draws), dtype=np.int64)
        cycle, offset = np.divmod(draws, len(self.cycle_sources))
        sources = self.cycle_sources[offset]
        own_draws = cycle * self.cycle_counts[sources] + self.cycle_ranks[offset]
        ids = np.full(self.batch, -1, np.int64)
        for source in np.unique(sources):
            (slots,) = np.nonzero(sources == source)
            group = self.groups[source]
            epochs, ranks = np.divmod(own_draws[slots], len(group))
            for epoch in np.unique(epochs):
                now = epochs == epoch
                ids[slots[now]] = group[self.arrange(int(source), int(epoch))[ranks[now]]]
        return ids

    def epoch(self, steps_done: int) -> float:
        """Epochs that the first ``steps_done`` steps hold: examples drawn, over the sizes of all sources together."""
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
    """The order of a run over ``groups``, the example ids of each source.

    Without weights the sources are one set: each example comes once an epoch, in a new permutation each epoch (file
    order if not ``shuffle``), and epochs follow one another without a gap. With weights every source has its own
    permutations and its own pace: after every step source i has given its share of all pairs within less than one
    pair. An epoch of a weighted mixture is as many draws as the sources have examples together; a source whose share
    is above its size's is then repeated, one below it is not exhausted.

    ``steps`` full steps, or ``epochs`` (may be a fraction; the last step is then ragged); neither means one epoch.
    """
    assert steps is None or epochs is None
    groups = tuple(np.asarray(group, np.int64) for group in groups)
    size = sum(map(len, groups))
    if size == 0:
        raise UserError("data.train: 0 examples are left to train on; add data, or lower data.eval_fraction")
    if weights is None:
        groups, shares = (np.concatenate(groups),), [1]
    else:
        shares = integer_shares(weights)
        for i, group in enumerate(groups):
            if len(group) == 0:
                left = f"it has weight {weights[i]} but 0 examples left to train on"
                raise UserError(f"data.train[{i}]: {left}; remove the set")
    in_epochs = math.floor(Fraction(str(epochs or 1)) * size + Fraction(1, 2))  # rounded, halves up
    num_draws = steps * batch if steps is not None else max(1, in_epochs)
    sources = chairman_assignment(shares, min(sum(shares), num_draws))
    ranks = np.zeros_like(sources)
    for source in range(len(groups)):
        mask = sources == source
        ranks[mask] = np.arange(mask.sum())

    # An epoch's end lies inside a step, so two permutations of each source are in use at once.
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
        epoch_draws=size,
        cycle_sources=sources,
        cycle_ranks=ranks,
        cycle_counts=np.bincount(sources, minlength=len(groups)),
        arrange=arrange,
    )
