"""Training objectives: pure functions of the pair log-probs of policy and reference.

Let x be a prompt, y_w its chosen and y_l its rejected answer, and s(y) = log pi(y|x) - log ref(y|x) the log-ratio. An
answer's implicit reward is beta * s(y) (Rafailov et al. 2023, arXiv 2305.18290, eq. 5), and the pair's margin is
D = s(y_w) - s(y_l). beta weights the KL term: a *larger* beta keeps the policy closer to the reference. |y| is the
number of tokens in an answer, sigma the logistic function, e the label smoothing.

If y_w is the better answer with probability q only, a loss L becomes q L(y_w, y_l) + (1-q) L(y_l, y_w).

Each loss is one equation of a paper, per pair, float32, shape [B]; `LOSSES` maps config names to losses. "At margin 0"
gives the value when policy and reference are identical.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jax.nn import sigmoid as logistic
from jaxtyping import Array, Float

from dpo_jax.balance import balance_metrics, scaled_balance_loss
from dpo_jax.batch import CHOSEN, REJECTED, AnyArray, PairLogps
from dpo_jax.config import LOSS_TRAITS, LossConfig

LARGEST_EXPONENT = 80.0  # exponents are clipped here, so that exp stays finite in float32


class LogRatios(NamedTuple):
    """Inputs of a loss for one step; each field is [B] float32."""

    chosen: Float[Array, " B"]  # s(y_w)
    rejected: Float[Array, " B"]  # s(y_l)
    margin: Float[Array, " B"]  # D = f(s(y_w)) - f(s(y_l)); f(s) = s unless another divergence is configured
    chosen_count: Float[Array, " B"]  # |y_w|, at least 1
    rejected_count: Float[Array, " B"]
    chosen_logps: Float[Array, " B"]  # log pi(y_w|x)
    rejected_logps: Float[Array, " B"]
    valid: Float[Array, " B"]  # 1: real pair; 0: padding
    target: Float[Array, " B"] | float = 0.0  # m: margin by which a reward model should score chosen above rejected


def sigmoid(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-(1-e) log sigma(z) - e log sigma(-z) + c (beta s_w + beta s_l)^2, z = beta D - m; ln 2 at margin 0. DPO.

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7. With e > 0, conservative DPO: Mitchell 2023, "A note on DPO with
    noisy preferences & relationship to IPO". With c = ``center`` > 0, reward centering: Eisenstein et al. 2023, arXiv
    2312.09244, section 2. Applied to a reward model's scores, with beta 1 and no reference, it is the Bradley-Terry
    loss, with the margins m of the data as in Llama 2; m is 0 for log-probs.
    """
    loss = _smoothed(c.beta * r.margin - r.target, c)
    return loss + c.center * (c.beta * (r.chosen + r.rejected)) ** 2 if c.center else loss


def hinge(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """relu(1 - beta D); 1 at margin 0. SLiC-HF's loss (Zhao et al. 2023, arXiv 2305.10425) on DPO's reward."""
    return jax.nn.relu(1 - c.beta * r.margin)


def ipo(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """(s(y_w)/|y_w| - s(y_l)/|y_l| - 1/(2 beta))^2; 1/(4 beta^2) at margin 0.

    IPO: Azar et al. 2023, arXiv 2310.12036, eq. 17. Log-ratios are averaged over tokens, as the paper's authors advise
    for answers of different lengths; with ``ipo_average=False`` they are sums, as in the equation.
    """
    margin = r.chosen / r.chosen_count - r.rejected / r.rejected_count if c.ipo_average else r.chosen - r.rejected
    return (margin - 1 / (2 * c.beta)) ** 2


def exo_pair(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """KL(p || q), p = (sigma(z), sigma(-z)), q = (1-e, e), z = beta D; -ln 2 - (log(1-e) + log e)/2 at margin 0.

    Reverse KL from the model's preference to the smoothed label: pairwise EXO, Ji et al. 2024, arXiv 2402.00856.
    """
    z = c.beta * r.margin
    chosen_term = logistic(z) * (log_sigmoid(z) - jnp.log1p(-c.label_smoothing))
    return chosen_term + logistic(-z) * (log_sigmoid(-z) - jnp.log(c.label_smoothing))


def nca_pair(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-log sigma(beta s_w) - (log sigma(-beta s_w) + log sigma(-beta s_l))/2; 2 ln 2 at margin 0.

    Pairwise NCA: Chen et al. 2024, arXiv 2402.05369. Separate terms keep the chosen reward from falling.
    """
    chosen, rejected = c.beta * r.chosen, c.beta * r.rejected
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def robust(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """[-(1-e) log sigma(beta D) + e log sigma(-beta D)] / (1-2e); ln 2 at margin 0.

    Unbiased estimate of the DPO loss when labels flip with probability e: Chowdhury et al. 2024, arXiv 2403.00409.
    """
    z, e = c.beta * r.margin, c.label_smoothing
    return (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)


def bco_pair(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-log sigma(beta s_w) - log sigma(-beta s_l); 2 ln 2 at margin 0.

    Binary classifier optimization: Jung et al. 2024, arXiv 2404.04656, without its moving reward shift.
    """
    return -log_sigmoid(c.beta * r.chosen) - log_sigmoid(-c.beta * r.rejected)


def sppo_hard(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """(s_w - 1/(2 beta))^2 + (s_l + 1/(2 beta))^2; 1/(2 beta^2) at margin 0.

    SPPO with each label as a win of probability 1: Wu et al. 2024, arXiv 2405.00675.
    """
    return (r.chosen - 1 / (2 * c.beta)) ** 2 + (r.rejected + 1 / (2 * c.beta)) ** 2


def aot(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-log sigma(beta d), d = sort(log pi(y_w)/pi(y_l)) - sort(log ref(y_w)/ref(y_l)); ln 2 at margin 0.

    Alignment via optimal transport, paired: Melnyk et al. 2024, arXiv 2406.05882. The sort runs over the whole
    step: each policy margin is matched with the reference margin of the same rank. Label smoothing as in `sigmoid`.
    """
    policy_margin = r.chosen_logps - r.rejected_logps
    reference_margin = (r.chosen_logps - r.chosen) - (r.rejected_logps - r.rejected)
    return _smoothed(c.beta * (policy_margin - _same_rank(policy_margin, reference_margin, r.valid)), c)


def aot_unpaired(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-log sigma(beta d), d = sort(s(y_w)) - sort(s(y_l)); ln 2 at margin 0.

    Alignment via optimal transport, unpaired: Melnyk et al. 2024, arXiv 2406.05882. The sort runs over the whole
    step: each chosen answer is matched with the rejected answer of the same rank. Label smoothing as in `sigmoid`.
    """
    return _smoothed(c.beta * (r.chosen - _same_rank(r.chosen, r.rejected, r.valid)), c)


def apo_zero(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """1 - sigma(beta s_w) + sigma(beta s_l); 1 at margin 0.

    Anchored preference optimization, chosen up and rejected down: D'Oosterlinck et al. 2024, arXiv 2408.06266.
    """
    return logistic(-c.beta * r.chosen) + logistic(c.beta * r.rejected)


def apo_down(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """sigma(beta s_w) + 1 - sigma(beta D); 1 at margin 0.

    Anchored preference optimization, both down: D'Oosterlinck et al. 2024, arXiv 2408.06266.
    """
    return logistic(c.beta * r.chosen) + logistic(-c.beta * r.margin)


def discopop(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-(1-m) log sigma(z) + m exp(-z), m = sigma(z/tau), z = beta D; (ln 2 + 1)/2 at margin 0.

    Log-ratio modulated loss discovered by LLM-driven search: Lu et al. 2024, arXiv 2406.08414.
    """
    z = c.beta * r.margin
    product = jnp.exp(log_sigmoid(z / c.discopop_tau) - z)  # m exp(-z) in one exponential: exp(-z) alone may overflow
    return -logistic(-z / c.discopop_tau) * log_sigmoid(z) + product


def sigmoid_norm(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-log sigma(beta (s_w/|y_w| - s_l/|y_l|)); ln 2 at margin 0.

    Length-normalized DPO: Tulu 3, Lambert et al. 2024, arXiv 2411.15124, eq. 6.
    """
    return -log_sigmoid(c.beta * (r.chosen / r.chosen_count - r.rejected / r.rejected_count))


def dpop(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-log sigma(beta (D - lambda max(0, -s_w))); ln 2 at margin 0.

    DPO-Positive: Pal et al. 2024, arXiv 2402.13228, eq. 3. Penalizes a chosen answer less likely than under ref.
    """
    return -log_sigmoid(c.beta * (r.margin - c.dpop_lambda * jax.nn.relu(-r.chosen)))


def simpo(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-log sigma(beta log pi(y_w|x)/|y_w| - beta log pi(y_l|x)/|y_l| - gamma); needs no reference.

    SimPO: Meng et al. 2024, arXiv 2405.14734, eq. 6.
    """
    margin = r.chosen_logps / r.chosen_count - r.rejected_logps / r.rejected_count
    return -log_sigmoid(c.beta * margin - c.simpo_gamma)


def orpo(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-log p_w - beta log sigma(log(odds_w / odds_l)), p = pi(y|x)^(1/|y|), odds = p/(1-p); needs no reference.

    ORPO: Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7; beta is the paper's lambda.
    """
    chosen, rejected = r.chosen_logps / r.chosen_count, r.rejected_logps / r.rejected_count

    def log_odds(logp):
        logp = jnp.minimum(logp, -jnp.finfo(logp.dtype).tiny)  # the odds of probability 1 are infinite
        return logp - jnp.log(-jnp.expm1(logp))

    return -chosen - c.beta * log_sigmoid(log_odds(chosen) - log_odds(rejected))


def cpo(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-log sigma(beta (log pi(y_w|x) - log pi(y_l|x))) - w log pi(y_w|x)/|y_w|; needs no reference.

    Contrastive preference optimization: Xu et al. 2024, arXiv 2401.08417, with the log-likelihood per token, as in
    the authors' code; w is ``cpo_weight``.
    """
    mean_logp = r.chosen_logps / r.chosen_count
    return -log_sigmoid(c.beta * (r.chosen_logps - r.rejected_logps)) - c.cpo_weight * mean_logp


def sft(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    """-log pi(y_w|x), averaged over all chosen tokens of the step; needs no reference and no rejected answer.

    The mean over tokens couples the pairs of a step: each pair's loss is scaled by the step's pairs / tokens.
    """
    return -r.chosen_logps * r.valid.sum() / jnp.maximum((r.chosen_count * r.valid).sum(), 1)


LOSSES: dict[str, Callable[..., Float[Array, " B"]]] = {name: globals()[name] for name in LOSS_TRAITS}


def _smoothed(z: Float[Array, " B"], c: LossConfig) -> Float[Array, " B"]:
    return -(1 - c.label_smoothing) * log_sigmoid(z) - c.label_smoothing * log_sigmoid(-z)


def _same_rank(x: Float[Array, " B"], other: Float[Array, " B"], valid: Float[Array, " B"]) -> Float[Array, " B"]:
    """Return, for each value of ``x``, the value of ``other`` with the same rank among the real pairs."""
    sort_order = lambda values: jnp.argsort(jnp.where(valid > 0, jax.lax.stop_gradient(values), jnp.inf))  # noqa: E731
    return other[sort_order(other)][jnp.argsort(sort_order(x))]


def divergence_score(s: Float[Array, " B"], c: LossConfig) -> Float[Array, " B"]:
    """Return f(s) = h'(exp(s)) up to a constant, where h generates the f-divergence: f-DPO, Wang et al. 2023.

    arXiv 2309.16240, table 1, with u = exp(s): reverse KL s, forward KL -1/u, Jensen-Shannon log(u / (1 + u)), alpha
    u^(alpha-1) / (alpha-1). Exponents are clipped at 80 to stay within float32.
    """
    match c.f_divergence:
        case "reverse_kl":
            return s
        case "forward_kl":
            return -jnp.exp(jnp.minimum(-s, LARGEST_EXPONENT))
        case "js":
            return log_sigmoid(s)
    power = c.f_alpha - 1  # the constant 1 / power is dropped: it cancels in the margin but costs precision
    return s if power == 0 else jnp.expm1(jnp.minimum(power * s, LARGEST_EXPONENT)) / power


def sequence_logps(logps: PairLogps, loss: LossConfig) -> Float[AnyArray, "B K"]:
    """Return log pi(y|x) of each answer, with its tokens weighted as the loss requires.

    ``ld_alpha`` is the weight of tokens beyond the length of the pair's shorter answer, for both policy and reference:
    LD-DPO, Liu et al. 2024, arXiv 2409.06411.
    """
    if loss.ld_alpha is None:
        return logps.sum
    if logps.tail_sum is None:
        raise ValueError("loss.ld_alpha: the log-probs have no tail_sum; make logps_fn with tail=True")
    return logps.sum - (1 - loss.ld_alpha) * logps.tail_sum


def log_ratios(
    policy: PairLogps, reference: PairLogps | None, loss: LossConfig, order: tuple[int, int] = (CHOSEN, REJECTED)
) -> LogRatios:
    """Compute the log-ratios of the chosen and rejected answers, or their log-probs if there is no reference.

    ``order``: the indices of the two on the K axis. With one answer per prompt, it is both chosen and rejected.
    """
    logps = jnp.asarray(sequence_logps(policy, loss))
    ratios = (
        logps
        if reference is None or loss.reference_free
        else logps - jax.lax.stop_gradient(sequence_logps(reference, loss))
    )
    count = jnp.maximum(policy.count, 1.0)
    chosen_index, rejected_index = (min(k, logps.shape[-1] - 1) for k in order)
    chosen, rejected = ratios[:, chosen_index], ratios[:, rejected_index]
    return LogRatios(
        chosen=chosen,
        rejected=rejected,
        margin=divergence_score(chosen, loss) - divergence_score(rejected, loss),
        chosen_count=count[:, chosen_index],
        rejected_count=count[:, rejected_index],
        chosen_logps=logps[:, chosen_index],
        rejected_logps=logps[:, rejected_index],
        valid=jnp.asarray(policy.valid, jnp.float32),
        target=0.0 if policy.margin is None else jnp.asarray(policy.margin),
    )


def wpo_weight(policy: PairLogps, loss: LossConfig) -> Float[Array, " B"]:
    """w(y_w) w(y_l), where w(y) = exp(mean over tokens of log(p_token / sum_v p_v^2)). WPO: Zhou et al. 2024.

    arXiv 2406.11827, with weights aligned by the expected probability of a sampled token. They carry no gradient unless
    ``wpo_gradient`` is set.
    """
    if policy.log_sum_sq is None:
        raise ValueError("loss.weighting wpo: the log-probs have no log_sum_sq; make logps_fn with squares=True")
    log_weight = ((policy.sum - policy.log_sum_sq) / jnp.maximum(policy.count, 1.0)).sum(-1)
    return jnp.exp(log_weight if loss.wpo_gradient else jax.lax.stop_gradient(log_weight))


def _weighted_terms(r: LogRatios, c: LossConfig) -> Float[Array, " B"]:
    return sum(weight * LOSSES[name](r, c) for name, weight in c.terms)  # type: ignore[bad-return]


def preference_loss(policy: PairLogps, reference: PairLogps | None, loss: LossConfig) -> Float[Array, " B"]:
    """Compute the loss of each pair, 0 for padding pairs; no gradient flows into the reference.

    The step's loss is the ``mean_loss`` of these: the weighted sum over pairs, divided by the number of pairs.

    Raises:
        ValueError: the log-probs lack a field that the loss needs.
    """
    losses = _weighted_terms(log_ratios(policy, reference, loss), loss)
    if policy.label is not None:
        swapped_losses = _weighted_terms(log_ratios(policy, reference, loss, (REJECTED, CHOSEN)), loss)
        losses = policy.label * losses + (1 - policy.label) * swapped_losses
    if loss.weighting == "wpo":
        losses = losses * wpo_weight(policy, loss)
    return jnp.where(policy.valid, losses, 0.0)


def mean_loss(losses: Float[Array, " B"], policy: PairLogps) -> Float[Array, ""]:
    """Return sum_i weight_i loss_i / (number of real pairs), plus the load-balancing loss of a mixture of experts."""
    return (losses * policy.weight).sum() / jnp.maximum(policy.valid.sum(), 1) + scaled_balance_loss(policy)


def preference_metrics(policy: PairLogps, reference: PairLogps | None, loss: LossConfig) -> dict[str, Array]:
    """Compute TRL's metrics as scalars: means over real pairs, or over answer tokens for token statistics.

    Rewards are beta * log-ratio for every loss; `rewards/accuracies` counts chosen > rejected strictly, so ties count
    as wrong. With a reference there are also ``displacement``, the fraction of pairs whose chosen answer has become
    less likely; ``gradient_weight``, the mean of sigma(-reward margin), DPO's weight of a pair's gradient (Rafailov et
    al. 2023, eq. 7); and ``kl``, the mean over answers of s(y)^2 / 2, which would be KL(policy || reference) to second
    order if the policy had sampled the answers. With one answer per prompt there are only loss and token statistics.

    Sampled answers also have ``sampled_kl``, the mean of s(y), which estimates that KL if none was left out, and
    ``sampler_error`` and ``mean_sampler_error``, of log-probs against the sampler's, relative to their size.
    """
    num_pairs = jnp.maximum(policy.valid.sum(), 1)
    pair_mean = lambda x: (x * policy.valid).sum() / num_pairs  # noqa: E731
    metrics = {"loss": mean_loss(preference_loss(policy, reference, loss), policy), **balance_metrics(policy)}
    if policy.sum.shape[-1] > 1:
        ratios = log_ratios(policy, reference, loss)
        chosen, rejected = loss.beta * ratios.chosen, loss.beta * ratios.rejected
        logps = ratios.chosen_logps, ratios.rejected_logps
        metrics |= {
            "rewards/chosen": pair_mean(chosen),
            "rewards/rejected": pair_mean(rejected),
            "rewards/accuracies": pair_mean(chosen > rejected),
            "rewards/margins": pair_mean(chosen - rejected),
        }
        if not policy.scored:
            metrics |= {
                "logps/chosen": pair_mean(logps[CHOSEN]),
                "logps/rejected": pair_mean(logps[REJECTED]),
                "logps/accuracies": pair_mean(logps[CHOSEN] > logps[REJECTED]),
            }
        if reference is not None:
            weight = logistic(rejected - chosen) - (0.0 if policy.label is None else 1 - policy.label)
            metrics |= {
                "displacement": pair_mean(ratios.chosen < 0),
                "gradient_weight": pair_mean(jnp.abs(weight)),
                "kl": pair_mean(ratios.chosen**2 + ratios.rejected**2) / 4,
            }
    if policy.sampled_sum is not None:
        errors = jnp.abs(policy.sum - policy.sampled_sum) / jnp.maximum(1.0, jnp.abs(policy.sum))
        metrics["mean_sampler_error"] = pair_mean(errors.mean(-1))
        metrics["sampler_error"] = jnp.max(errors, where=policy.valid[:, None], initial=0.0)
        if reference is not None:
            metrics["sampled_kl"] = pair_mean((policy.sum - reference.sum).mean(-1))
    if policy.stats is not None:
        num_tokens = jnp.maximum(policy.count.sum(0), 1)
        token_mean = lambda x: x.sum(0) / num_tokens  # noqa: E731
        metrics["entropy"] = policy.stats.entropy.sum() / num_tokens.sum()
        metrics["mean_token_accuracy"] = token_mean(policy.stats.top1)[CHOSEN]
        for index, name in enumerate(("chosen", "rejected")[: policy.sum.shape[-1]]):
            metrics[f"logits/{name}"] = token_mean(policy.stats.mean_logit)[index]
    return metrics
