"""The objectives: pure functions of the policy's and the reference's pair log-probs.

With x a prompt, y_w its chosen and y_l its rejected answer, and the log-ratio s(y) = log pi(y|x) - log ref(y|x), an
answer's implicit reward is beta * s(y) (Rafailov et al. 2023, arXiv 2305.18290, eq. 5) and the pair's margin is
D = s(y_w) - s(y_l). beta weighs the KL term: a *larger* beta keeps the policy closer to the reference.

Each loss is one line of a paper, per pair, float32, shape [B]; `LOSSES` names them for the config.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import CHOSEN, REJECTED, PairLogps
from dpo_jax.config import LossConfig


class LogRatios(NamedTuple):
    """What a loss sees of a step; each [B] float32."""

    chosen: Float[Array, " B"]  # s(y_w)
    rejected: Float[Array, " B"]  # s(y_l)
    chosen_count: Float[Array, " B"]  # |y_w|, at least 1
    rejected_count: Float[Array, " B"]
    chosen_logps: Float[Array, " B"]  # log pi(y_w|x)
    valid: Float[Array, " B"]  # 1: a pair; 0: an empty slot

    @property
    def margin(self) -> Float[Array, " B"]:
        """D = s(y_w) - s(y_l)."""
        return self.chosen - self.rejected


def sigmoid(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-(1-e) log sigma(beta D) - e log sigma(-beta D); ln 2 at margin 0. DPO.

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7. With e = label_smoothing > 0, conservative DPO: Mitchell 2023,
    "A note on DPO with noisy preferences", eq. 3.
    """
    z = c.beta * r.margin
    return -(1 - c.label_smoothing) * jax.nn.log_sigmoid(z) - c.label_smoothing * jax.nn.log_sigmoid(-z)


def hinge(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """relu(1 - beta D); 1 at margin 0. SLiC-HF's calibration (Zhao et al. 2023, arXiv 2305.10425) of DPO's reward."""
    return jax.nn.relu(1 - c.beta * r.margin)


def ipo(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """(s(y_w)/|y_w| - s(y_l)/|y_l| - 1/(2 beta))^2; 1/(4 beta^2) at margin 0.

    IPO: Azar et al. 2023, arXiv 2310.12036, eq. 17. Log-ratios are means over tokens, as the paper's authors advise
    for answers of different lengths.
    """
    return (r.chosen / r.chosen_count - r.rejected / r.rejected_count - 1 / (2 * c.beta)) ** 2


def sft(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-log pi(y_w|x), as the mean over all chosen tokens of the step; needs no reference and no rejected answer.

    The mean over tokens couples the pairs of a step: each pair's part is scaled by pairs / tokens of the whole step.
    """
    return -r.chosen_logps * r.valid.sum() / jnp.maximum((r.chosen_count * r.valid).sum(), 1)


LOSSES: dict[str, Callable[[LogRatios, LossConfig], Float[Array, " B"]]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "sft": sft,
}

COUPLED = frozenset({"sft"})  # the loss of a pair depends on the other pairs of its step


def log_ratios(policy: PairLogps, reference: PairLogps | None) -> LogRatios:
    """s(y) of both answers; without a reference, log pi(y|x) itself. With one answer, y_l is y_w."""
    logps = jnp.asarray(policy.sum)
    ratio = logps if reference is None else logps - jax.lax.stop_gradient(reference.sum)
    count = jnp.maximum(policy.count, 1.0)
    last = min(REJECTED, logps.shape[-1] - 1)
    valid = jnp.asarray(policy.valid, jnp.float32)
    return LogRatios(ratio[:, CHOSEN], ratio[:, last], count[:, CHOSEN], count[:, last], logps[:, CHOSEN], valid)


def preference_loss(policy: PairLogps, reference: PairLogps | None, loss: LossConfig) -> Float[Array, " B"]:
    """Loss of each pair, 0 in empty slots; no gradient flows into the reference.

    The step's loss is ``mean_loss`` of these: the weighted sum over pairs, divided by the number of pairs.
    """
    return jnp.where(policy.valid, LOSSES[loss.type](log_ratios(policy, reference), loss), 0.0)


def mean_loss(losses: Float[Array, " B"], policy: PairLogps) -> Float[Array, ""]:
    """sum_i weight_i loss_i / (number of real pairs)."""
    return (losses * policy.weight).sum() / jnp.maximum(policy.valid.sum(), 1)


def loss_at_start(loss: LossConfig) -> float | None:
    """The loss when policy and reference are one (margin 0); None where it depends on the policy."""
    zero, one = jnp.zeros(1), jnp.ones(1)
    if loss.type == "sft":
        return None
    return float(LOSSES[loss.type](LogRatios(zero, zero, one, one, zero, one), loss)[0])


def preference_metrics(policy: PairLogps, reference: PairLogps | None, loss: LossConfig) -> dict[str, Array]:
    """TRL's metrics of a set of pairs: means over real pairs, and over answer tokens for token statistics; scalars.

    Rewards are beta * log-ratio, whatever the loss; `rewards/accuracies` counts chosen > rejected strictly, so equal
    rewards count as wrong. With one answer a prompt (fine-tuning), only the loss and the token statistics.
    """
    num_pairs = jnp.maximum(policy.valid.sum(), 1)
    pair_mean = lambda x: (x * policy.valid).sum() / num_pairs  # noqa: E731
    metrics = {"loss": mean_loss(preference_loss(policy, reference, loss), policy)}
    if policy.sum.shape[-1] > 1:
        ratios = log_ratios(policy, reference)
        chosen, rejected = loss.beta * ratios.chosen, loss.beta * ratios.rejected
        metrics |= {
            "rewards/chosen": pair_mean(chosen),
            "rewards/rejected": pair_mean(rejected),
            "rewards/accuracies": pair_mean(chosen > rejected),
            "rewards/margins": pair_mean(chosen - rejected),
            "logps/chosen": pair_mean(policy.sum[:, CHOSEN]),
            "logps/rejected": pair_mean(policy.sum[:, REJECTED]),
            "logps/accuracies": pair_mean(policy.sum[:, CHOSEN] > policy.sum[:, REJECTED]),
        }
    if policy.stats is not None:
        num_tokens = jnp.maximum(policy.count.sum(0), 1)
        token_mean = lambda x: x.sum(0) / num_tokens  # noqa: E731
        metrics["entropy"] = policy.stats.entropy.sum() / num_tokens.sum()
        metrics["mean_token_accuracy"] = token_mean(policy.stats.top1)[CHOSEN]
        for place, name in enumerate(("chosen", "rejected")[: policy.sum.shape[-1]]):
            metrics[f"logits/{name}"] = token_mean(policy.stats.mean_logit)[place]
    return metrics
