"""How far one model's log-probs may differ between two compiled programs, and when rewards are equal within that."""

import math
from collections.abc import Mapping

# Largest difference, as a share of the log-prob.
AGREEMENT = {"float32": 1e-5, "bfloat16": 2e-2}


def tied(metrics: Mapping[str, float], bound: float) -> bool:
    """Whether policy and reference agree on a set of pairs, so that every margin is 0 within rounding.

    ``rewards/accuracies`` then says nothing: ties count as wrong, and rounding breaks some. The mean margin says
    nothing, since margins of two signs cancel; ``kl``, half the mean square of the log-ratios, does.

    Args:
        metrics: as ``preference_metrics`` names them; without ``kl`` there is no reference to agree with.
        bound: one of ``AGREEMENT``.
    """
    return "kl" in metrics and log_ratio(metrics) <= bound * logps_scale(metrics)


def log_ratio(metrics: Mapping[str, float]) -> float:
    """Root mean square of the answers' log-ratios, nats."""
    return math.sqrt(2 * float(metrics["kl"]))


def logps_scale(metrics: Mapping[str, float]) -> float:
    """Size of the answers' log-probs, nats, at least 1: the bounds of ``AGREEMENT`` are shares of it."""
    return max(1.0, *(abs(float(metrics[f"logps/{answer}"])) for answer in ("chosen", "rejected")))
