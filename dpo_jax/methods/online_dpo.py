"""Online DPO: pairs of the policy's own answers, labeled by their scores, in the step and the losses of DPO."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def labeled_pairs(scores: Float[Array, "B K"]) -> tuple[Int[Array, "P 2"], Float[Array, " P"]]:
    """Pair each prompt's best and worst answer, in both orders: indices on the K axis, and weights; P = 2 B.

    The weights are 2 p and 2 (1 - p), p = sigma(best score - worst score): the mean loss is that of labels drawn from
    Bradley-Terry, whose fixed point is the optimum of the scores. Hard labels have none: the margin grows without end.
    """
    best = scores.argmax(1)
    worst = scores.shape[1] - 1 - scores[:, ::-1].argmin(1)  # the last of equal ones, so that tied answers are a pair
    pairs = jnp.stack([best, worst], axis=1)
    margin = jnp.take_along_axis(scores, best[:, None], 1) - jnp.take_along_axis(scores, worst[:, None], 1)
    probability = jax.nn.sigmoid(margin[:, 0])
    return jnp.concatenate([pairs, pairs[:, ::-1]]), 2 * jnp.concatenate([probability, 1 - probability])
