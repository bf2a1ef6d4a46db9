"""What the means of an evaluation stand for: how rewards and margins are spread, and which answers they favour.

Plain data (JSON can hold it), and a function of the log-probs alone.
"""

import math
from typing import Any

import numpy as np

from dpo_jax.batch import CHOSEN, REJECTED, PairLogps
from dpo_jax.config import LossConfig
from dpo_jax.losses import log_ratios

BINS = 24  # of a histogram, at most
BUCKETS = 5  # of lengths, at most


def reward_distributions(policy: PairLogps, reference: PairLogps | None, loss: LossConfig) -> dict[str, Any]:
    """How rewards and margins of a set of pairs, all real, are spread.

    Returns an object of:

    - ``margins``: a histogram, ``edges`` and the ``counts`` between them (the last edge belongs to the last bin);
    - ``rewards``: ``edges`` that both answers share, the counts ``chosen`` and ``rejected``;
    - ``not_finite``: pairs with a reward that is NaN or infinite, which no histogram counts;
    - ``by_length``: buckets of the longer answer's tokens, about equally many pairs in each: ``from``, ``to`` (both in
      it), ``pairs``, ``share`` of all, ``accuracy`` (chosen over rejected, strictly), mean ``margin``;
    - ``by_longer``: the same by which answer is the longer one, ``chosen``, ``rejected`` or ``equal``.
    """
    ratios = log_ratios(policy, reference, loss)
    chosen, rejected = (loss.beta * np.asarray(ratio) for ratio in (ratios.chosen, ratios.rejected))
    margins = chosen - rejected
    finite = np.isfinite(margins)
    edges, margin_edges = nice_edges(np.concatenate([chosen[finite], rejected[finite]])), nice_edges(margins[finite])
    lengths = np.asarray(policy.count).astype(np.int64)
    longer, more = lengths.max(1), lengths[:, CHOSEN] - lengths[:, REJECTED]
    sides = {"chosen": more > 0, "rejected": more < 0, "equal": more == 0}
    return {
        "margins": {"edges": margin_edges, "counts": _counts(margins[finite], margin_edges)},
        "rewards": {
            "edges": edges,
            "chosen": _counts(chosen[finite], edges),
            "rejected": _counts(rejected[finite], edges),
        },
        "not_finite": int((~finite).sum()),
        "by_length": [
            {"from": first, "to": last} | _group(margins, (longer >= first) & (longer <= last))
            for first, last in length_buckets(longer)
        ],
        "by_longer": [{"longer": side} | _group(margins, mask) for side, mask in sides.items() if mask.any()],
    }


def _group(margins: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """Of the pairs in ``mask``."""
    selected = margins[mask].astype(np.float64)
    share, accuracy = len(selected) / len(margins), float((selected > 0).mean())
    return {"pairs": len(selected), "share": share, "accuracy": accuracy, "margin": float(selected.mean())}


def nice_edges(values: np.ndarray) -> list[float]:
    """Edges of at most ``BINS`` equal bins that hold all values.

    They are multiples of 1, 2 or 5 times a power of ten, so that 0 is one of them where values lie on both its sides.
    """
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    spread = max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-6)
    power = 10.0 ** math.floor(math.log10(spread / BINS))
    for width in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.floor(low / width), math.ceil(high / width)
        if last - first <= BINS:
            break
    edges = [float(f"{index * width:.12g}") for index in range(first, max(last, first + 1) + 1)]
    return [min(edges[0], low), *edges[1:-1], max(edges[-1], high)]


def _counts(values: np.ndarray, edges: list[float]) -> list[int]:
    return np.histogram(values.astype(np.float64), edges)[0].tolist()


def length_buckets(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(first, last) of at most ``BUCKETS`` ranges of lengths that hold every one of them, once."""
    ends = np.unique(np.quantile(lengths, np.arange(1, BUCKETS + 1) / BUCKETS, method="inverted_cdf")).tolist()
    firsts = [int(lengths.min()), *(end + 1 for end in ends[:-1])]
    return list(zip(firsts, ends, strict=True))
