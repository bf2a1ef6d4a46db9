"""Bounds on how far a model's log-probs may differ between two compiled programs, and a test for tied rewards."""

import math
from collections.abc import Mapping

# Maximum difference relative to the log-prob.
AGREEMENT = {"float32": 1e-5, "bfloat16": 2e-2}
# The same for a mixture of experts, where only the mean is bounded: if two experts are nearly tied for a token, another
# program may choose the other one.
MIXTURE_AGREEMENT = {"float32": 1e-4, "bfloat16": 6e-2}


def tied(metrics: Mapping[str, float], bound: float) -> bool:
    """Return whether policy and reference agree on a set of pairs, so that every margin is 0 within rounding.

    This cannot be read from ``rewards/accuracies``, as ties count as wrong and rounding breaks some, nor from the mean
    margin, in which opposite signs cancel. It uses ``kl``, half the mean square of the log-ratios, which ``metrics``
    lack if there is no reference. ``bound``: a value of ``AGREEMENT`` or ``MIXTURE_AGREEMENT``.
    """
    return "kl" in metrics and log_ratio(metrics) <= bound * logps_scale(metrics)


def log_ratio(metrics: Mapping[str, float]) -> float:
    """Return the root mean square of the answers' log-ratios, in nats."""
    return math.sqrt(2 * float(metrics["kl"]))


def logps_scale(metrics: Mapping[str, float]) -> float:
    """Return the factor of the bounds in ``AGREEMENT``: max(1, |mean chosen log-prob|, |mean rejected log-prob|)."""
    return max(1.0, *(abs(float(metrics[f"logps/{answer}"])) for answer in ("chosen", "rejected")))
