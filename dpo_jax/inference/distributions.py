"""Distributions behind an evaluation's means: histograms of rewards and margins, and accuracy by answer length.

The results are plain JSON-serializable data and depend on the log-probs alone.
"""

import math
from typing import Any

import numpy as np

from dpo_jax.batch import CHOSEN, REJECTED, PairLogps
from dpo_jax.config import LossConfig
from dpo_jax.losses import log_ratios

BINS = 24  # maximum number of histogram bins
BUCKETS = 5  # maximum number of length buckets
CONFIDENCES = np.linspace(0.5, 1, 11)  # edges of the reliability diagram's bins


def reward_distributions(policy: PairLogps, reference: PairLogps | None, loss: LossConfig) -> dict[str, Any]:
    """Return the distributions of rewards and margins over a set of pairs, none of which may be padding.

    The keys of the result:

    - ``margins``: a histogram with bin ``edges`` and ``counts`` (the last bin includes its upper edge);
    - ``rewards``: bin ``edges`` shared by both answers, and the counts ``chosen`` and ``rejected``;
    - ``not_finite``: number of pairs with a NaN or infinite reward, which the histograms leave out;
    - ``by_length``: buckets by the token count of the longer answer, about equally many pairs in each: ``from``, ``to``
      (both inclusive), ``pairs``, ``share`` of all pairs, ``accuracy`` (margin > 0), mean ``margin``;
    - ``by_longer``: the same, grouped by which answer is ``longer``: ``chosen``, ``rejected`` or ``equal``;
    - ``calibration``: see `calibration`.
    """
    chosen, rejected = rewards(policy, reference, loss)
    margins = chosen - rejected
    is_finite = np.isfinite(margins)
    reward_edges = nice_edges(np.concatenate([chosen[is_finite], rejected[is_finite]]))
    margin_edges = nice_edges(margins[is_finite])
    lengths = np.asarray(policy.count).astype(np.int64)
    max_lengths, excess = lengths.max(1), lengths[:, CHOSEN] - lengths[:, REJECTED]
    longer_masks = {"chosen": excess > 0, "rejected": excess < 0, "equal": excess == 0}
    return {
        "margins": {"edges": margin_edges, "counts": _counts(margins[is_finite], margin_edges)},
        "rewards": {
            "edges": reward_edges,
            "chosen": _counts(chosen[is_finite], reward_edges),
            "rejected": _counts(rejected[is_finite], reward_edges),
        },
        "not_finite": int((~is_finite).sum()),
        "by_length": [
            {"from": first, "to": last} | _group(margins, (max_lengths >= first) & (max_lengths <= last))
            for first, last in length_buckets(max_lengths)
        ],
        "by_longer": [{"longer": side} | _group(margins, mask) for side, mask in longer_masks.items() if mask.any()],
        "calibration": calibration(margins[is_finite]),
    }


def rewards(policy: PairLogps, reference: PairLogps | None, loss: LossConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the implicit rewards of the chosen and of the rejected answers, each [N]."""
    ratios = log_ratios(policy, reference, loss)
    return loss.beta * np.asarray(ratios.chosen), loss.beta * np.asarray(ratios.rejected)


def reward_margins(policy: PairLogps, reference: PairLogps | None, loss: LossConfig) -> np.ndarray:
    """Return the implicit reward of the chosen answer minus that of the rejected one, [N]."""
    chosen, rejected = rewards(policy, reference, loss)
    return chosen - rejected


def calibration(margins: np.ndarray) -> dict[str, Any]:
    """Compare the confidence that the margins imply with how often the chosen answer has the higher reward.

    By the Bradley-Terry model a reward margin m is the probability sigma(m) that the chosen answer is better, so the
    answer with the higher reward is the better one with probability sigma(|m|). A tie counts as half right. Returns the
    expected calibration error ``ece`` (Guo et al. 2017, arXiv 1706.04599, eq. 3), and the ``bins`` that hold pairs:
    ``from``, ``to``, ``pairs``, mean ``confidence`` and ``accuracy``.
    """
    margins = margins.astype(np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    correctness = (np.sign(margins) + 1) / 2
    bin_index = np.clip(np.digitize(confidence, CONFIDENCES) - 1, 0, len(CONFIDENCES) - 2)
    bins, total_gap = [], 0.0
    for i in np.unique(bin_index):
        is_in_bin = bin_index == i
        mean_confidence, accuracy = float(confidence[is_in_bin].mean()), float(correctness[is_in_bin].mean())
        edges = {"from": float(CONFIDENCES[i]), "to": float(CONFIDENCES[i + 1])}
        bins.append({**edges, "pairs": int(is_in_bin.sum()), "confidence": mean_confidence, "accuracy": accuracy})
        total_gap += bins[-1]["pairs"] * abs(accuracy - mean_confidence)
    return {"ece": total_gap / max(len(margins), 1), "bins": bins}


def _group(margins: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """Return count, share, accuracy and mean margin of the pairs that ``mask`` selects."""
    group_margins = margins[mask].astype(np.float64)
    share, accuracy = len(group_margins) / len(margins), float((group_margins > 0).mean())
    return {"pairs": len(group_margins), "share": share, "accuracy": accuracy, "margin": float(group_margins.mean())}


def nice_edges(values: np.ndarray) -> list[float]:
    """Return the edges of at most ``BINS`` bins of equal width that cover all values.

    Edges are multiples of 1, 2 or 5 times a power of ten, so 0 is an edge if the values have both signs.
    """
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    spread = max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-6)
    power = 10.0 ** math.floor(math.log10(spread / BINS))
    for width in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first_index, last_index = math.floor(low / width), math.ceil(high / width)
        if last_index - first_index <= BINS:
            break
    edges = [float(f"{index * width:.12g}") for index in range(first_index, max(last_index, first_index + 1) + 1)]
    return [min(edges[0], low), *edges[1:-1], max(edges[-1], high)]


def _counts(values: np.ndarray, edges: list[float]) -> list[int]:
    return np.histogram(values.astype(np.float64), edges)[0].tolist()


def length_buckets(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Split the lengths into at most ``BUCKETS`` disjoint inclusive ranges (first, last), from their quantiles."""
    range_ends = np.unique(np.quantile(lengths, np.arange(1, BUCKETS + 1) / BUCKETS, method="inverted_cdf")).tolist()
    range_starts = [int(lengths.min()), *(end + 1 for end in range_ends[:-1])]
    return list(zip(range_starts, range_ends, strict=True))
