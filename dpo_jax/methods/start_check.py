"""Checks of step 0: if the policy starts equal to its reference, every margin must be 0.

A wrong mask, boundary, reference, cache or layout shows up here, before the first update is kept.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.batch import PairLogps, Params
from dpo_jax.batching.batches import StepData
from dpo_jax.config import LOSS_TRAITS, AnyConfig, LossConfig
from dpo_jax.errors import UserError
from dpo_jax.inference.agreement import AGREEMENT, MIXTURE_AGREEMENT, log_ratio, logps_scale, tied
from dpo_jax.inference.reference import Reference
from dpo_jax.losses import preference_loss
from dpo_jax.methods.setup import Setup

STEP_CAUSE = (
    "a mask, the reference or a cached log-prob is wrong; compare with batch.layout padded and reference.mode live"
)


class AtMarginZero(NamedTuple):
    """Value and slope of a loss when policy and reference are identical."""

    loss: float
    slope: float  # largest change of the loss per nat of error in the log-ratios, in either direction


def loss_at_start(loss: LossConfig) -> AtMarginZero | None:
    """Return the loss when policy and reference are identical (margin 0), or None if it depends on the policy."""
    uses_only_ratios = loss.needs_reference and all(LOSS_TRAITS[name].reference for name, _ in loss.terms)
    if not uses_only_ratios or loss.weighting == "wpo":
        return None
    zeros, ones = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
    zero_logps = PairLogps(sum=zeros, count=ones, weight=ones[:, 0], valid=ones[:, 0] > 0)
    loss = replace(loss, ld_alpha=None)  # log-ratios of 0 have tails of 0
    pair_loss = lambda sums: preference_loss(replace(zero_logps, sum=sums), zero_logps, loss)[0]  # noqa: E731
    points = 1e-4 * np.array([[[1, 0]], [[-1, 0]], [[0, 1]], [[0, -1]]], np.float32)  # losses may have a kink at 0

    @jax.jit  # one compiled program instead of one per operation
    def value_and_slope() -> tuple[jax.Array, jax.Array]:
        slopes = jnp.abs(jax.vmap(jax.grad(pair_loss))(points)).sum((1, 2))
        return pair_loss(zeros), slopes.max()

    return AtMarginZero(*map(float, value_and_slope()))


def agreement(setup: Setup) -> float:
    """Return the tolerance for differences of log-probs: for their mean if the model is a mixture of experts."""
    return (AGREEMENT if setup.model.config.experts is None else MIXTURE_AGREEMENT)[precision(setup)]


def precision(setup: Setup) -> Literal["float32", "bfloat16"]:
    """Return the precision of matrix products; accelerators may multiply float32 matrices in bfloat16."""
    products_are_exact = jax.default_backend() == "cpu" or setup.model.matmul_precision == "highest"
    return "float32" if setup.model.dtype == "float32" and products_are_exact else "bfloat16"


def start_logps(setup: Setup, reference: Reference | None, weights: Params) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the policy's and the reference's log-probs [B, K] of step 0's pairs, or None if there is no reference."""
    if reference is None:
        return None
    data = setup.batches(0)
    batches = [data.batch]
    if data.batch.valid.ndim > 1:
        batches = [jax.tree.map(lambda x, i=i: x[i], data.batch) for i in range(len(data.batch.valid))]
    batches = list(map(setup.to_devices, batches))
    policy_logps = [np.asarray(setup.logps_step(weights, batch).sum) for batch in batches]
    reference_logps = reference.sums(setup.logps_step, data, setup.batches.store, batches)
    is_real = data.ids >= 0
    return np.concatenate(policy_logps)[is_real], reference_logps[is_real]


def starts_equal(config: AnyConfig, ids: Mapping[str, str]) -> bool:
    """Return whether policy and reference start equal: the same weights and dtype, and no loaded adapters."""
    is_same_dtype = config.reference.dtype in ("auto", config.model.param_dtype)
    return is_same_dtype and ids["weights"] == ids["reference"] and "adapters" not in ids


def mean_margin(policy: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean over pairs of the log-ratio margin s(y_w) - s(y_l), in nats."""
    return float(((policy - reference) @ np.array([1.0, -1.0])).mean())


def prove_start(setup: Setup, policy: np.ndarray, reference: np.ndarray) -> str | None:
    """Check that policy and reference, which have the same weights, give the same log-probs [B, K].

    They must be equal bit for bit if one program computed both at one dtype, else within ``agreement``. With LoRA there
    are two programs: the policy computes its adapters even if their product is 0. For a mixture of experts and two
    programs, return a line with the number of answers that differ by more than rounding.

    Raises:
        UserError: the log-probs differ by more than that.
    """
    config = setup.config.reference
    is_one_program = setup.config.reference_mode == "live" and config.dtype == "auto" and setup.model.lora is None
    bound = 0.0 if is_one_program else agreement(setup)
    differences = np.abs(policy - reference) / np.maximum(1, np.abs(policy))
    is_mean = setup.model.config.experts is not None and not is_one_program
    difference = float(differences.mean() if is_mean else differences.max())
    if not difference <= bound:
        cause = (
            "the adapters change the model before they are trained; compare with model.dtype float32"
            if setup.model.lora is not None and setup.config.reference_mode == "live"
            else "the cache in data.store is stale or damaged; remove its reference-*.npz, or use reference.mode live"
        )
        raise UserError(
            f"step 0: policy and reference have the same weights, but their log-probs differ by {difference:.3g} "
            f"relative to their size{' on average' * is_mean} (tolerance: {bound:g}): {cause}"
        )
    rounding = AGREEMENT[precision(setup)]
    num_flipped = int((differences > rounding).sum())
    if not is_mean or num_flipped == 0:
        return None
    return (
        f"log-probs of {num_flipped} of {differences.size} answers differ by more than {rounding:g} of their size from "
        "the reference's: where two experts are nearly tied for a token, rounding chooses between them"
    )


def check_first(setup: Setup, values: Mapping[str, float], data: StepData) -> None:
    """Check that the first train step, with policy equal to reference, has margins of 0 and the loss at margin 0.

    Equal bits are required of the evaluation function only: in the train step the policy's log-probs come with a
    gradient and the reference's without, and a compiler may round the two differently. The margins are 0 within
    ``agreement``.

    Raises:
        UserError: loss or log-probs differ, so the train step does not compute what evaluation does.
    """
    bound = agreement(setup) * logps_scale(values)
    known_loss = loss_at_start(setup.config.objective)
    if known_loss is not None:
        weight = float(setup.batches.store.weights[data.ids[data.ids >= 0]].mean())
        expected = known_loss.loss * weight
        if setup.model.config.experts is not None:
            expected += setup.model.config.experts.balance_coef * values["aux_loss"]
        tolerance = 3e-6 * max(1.0, abs(expected)) + bound * known_loss.slope * max(1.0, weight)
        if not abs(values["loss"] - expected) <= tolerance:
            raise UserError(
                f"step 0: the loss is {values['loss']:.7g}, but it must be {expected:.7g}, as all margins are 0 "
                f"(tolerance: {tolerance:.2g}): {STEP_CAUSE}"
            )
    if not tied(values, agreement(setup)):
        raise UserError(
            "step 0: policy and reference have the same weights, but in the train step their log-probs "
            f"differ by {log_ratio(values):.3g} nats (tolerance: {bound:.2g}): {STEP_CAUSE}"
        )
