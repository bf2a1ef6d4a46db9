"""Load-balancing loss of a mixture of experts, and its metrics: functions of sums over the tokens of a step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import BalanceSums, PairLogps


def balance_loss(sums: BalanceSums) -> Float[Array, ""]:
    """Return the loss E sum_e f_e P_e of E experts over all layers, f and P as below; k for uniform top-k routing.

    f_e is the share of tokens that was routed to expert e, so that f sums to k, the experts per token; it carries no
    gradient. P_e is the mean of e's softmax. Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6. Both are means over the
    whole step: sums are added before they are multiplied.
    """
    num_tokens = jnp.maximum(jnp.sum(sums.weight), 1.0)
    token_shares, mean_probs = (jnp.sum(x.reshape(-1, x.shape[-1]), 0) / num_tokens for x in (sums.chosen, sums.probs))
    return token_shares.shape[-1] * (jax.lax.stop_gradient(token_shares) * mean_probs).sum()


def scaled_balance_loss(policy: PairLogps) -> Float[Array, ""] | float:
    """Return the load-balancing loss times its coefficient; 0 for a dense model or a coefficient of 0."""
    if policy.balance is None or policy.balance_coef == 0:
        return 0.0
    return policy.balance_coef * balance_loss(policy.balance)


def balance_metrics(policy: PairLogps) -> dict[str, Array]:
    """Compute ``aux_loss``, the load-balancing loss without its coefficient, and statistics of the experts' loads.

    A layer's experts share its tokens' choices: ``router/max_share`` and ``router/min_share`` are the largest and
    smallest share of any expert in any layer, ``router/entropy`` the shares' entropy, averaged over layers, relative to
    that of equal shares.
    """
    if (sums := policy.balance) is None:
        return {}
    shares = sums.chosen / jnp.maximum(sums.chosen.sum(-1, keepdims=True), 1.0)
    entropy = -(shares * jnp.log(jnp.maximum(shares, jnp.finfo(shares.dtype).tiny))).sum(-1)
    return {
        "aux_loss": balance_loss(sums),
        "router/max_share": shares.max(),
        "router/min_share": shares.min(),
        "router/entropy": entropy.mean() / jnp.log(shares.shape[-1]),
    }
