"""Load-balancing loss of a mixture of experts, and its metrics: functions of sums over the tokens of a step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import BalanceSums, PairLogps


def balance_loss(sums: BalanceSums) -> Float[Array, ""]:
    """Return E sum_e f_e P_e over the tokens of all layers; it is k under uniform routing.

    f_e is the share of tokens that was routed to expert e, so that f sums to k, the experts per token; it carries no
    gradient. P_e is the mean of e's softmax. Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6. Both are means over the
    whole step: sums are added before they are multiplied.
    """
    total = jnp.maximum(jnp.sum(sums.weight), 1.0)
    chosen, probs = (jnp.sum(x.reshape(-1, x.shape[-1]), 0) / total for x in (sums.chosen, sums.probs))
    return chosen.shape[-1] * (jax.lax.stop_gradient(chosen) * probs).sum()


def scaled_balance_loss(policy: PairLogps) -> Float[Array, ""] | float:
    """Return the load-balancing loss of a mixture of experts times its coefficient; 0 if it has none."""
    if policy.balance is None or policy.balance_coef == 0:
        return 0.0
    return policy.balance_coef * balance_loss(policy.balance)


def balance_metrics(policy: PairLogps) -> dict[str, Array]:
    """Compute a mixture's ``aux_loss``, without its coefficient, and statistics of its experts' shares of tokens.

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
