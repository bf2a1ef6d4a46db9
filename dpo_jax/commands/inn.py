"""A built-in task with exact results: guests of an inn order a meal, and all possible answers can be enumerated.

An answer is a list of courses, ended by the first token that is no course or by its maximum length. So the answers to a
guest form a finite tree, over the whole vocabulary: expected reward and KL of any policy are sums over its leaves, and
the optimum of E[r] - beta KL(policy || reference) is known: ref(y) exp(r(y) / beta) / Z (Rafailov et al. 2023, eq. 4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

BOS, EOS, PAD, UNKNOWN = range(4)
COURSES = ("soup", "bread", "fish", "roast", "cheese", "cake")
GUESTS = ("captain", "carter", "fiddler", "judge", "miller", "piper", "smith", "weaver")
FIRST_COURSE, NUM_COURSES, NUM_GUESTS = 4, len(COURSES), len(GUESTS)
FIRST_GUEST = FIRST_COURSE + NUM_COURSES
VOCAB = FIRST_GUEST + NUM_GUESTS
MAX_TOKENS = 5  # of an answer
STOPS = np.array([token for token in range(VOCAB) if not FIRST_COURSE <= token < FIRST_COURSE + NUM_COURSES])

# The rule: each guest's reward for each course, and the penalties for repeating one at once and for not ending.
REWARDS = np.array([1, 0.5, 0, 0, -0.5, -1])
GUEST_REWARDS = np.stack([np.roll(REWARDS if guest % 2 else REWARDS[::-1], guest // 2) for guest in range(NUM_GUESTS)])
REPEAT_PENALTY, MISSING_END_PENALTY = 0.5, 2.0

# The supervised policy, the same for all guests: a Markov chain of courses.
FIRST_PROBS = np.array([3, 3, 2, 2, 1, 1]) / 12  # probabilities of the first course
NEXT_PROBS = np.array([1, 4, 3, 2, 2, 1]) / 13  # of the next one, by its distance from the previous course in COURSES
END_PROB = 0.4  # probability of an end after each course but the fourth, after which every meal ends
LIKED_LOGP_SHIFT = -20.0  # added to the log-prob of a course that `without_liked_courses` never serves
UNIFORM_PROB = 1e-3  # total probability of uniformly drawn tokens, so that no token has probability 0


class Exact(NamedTuple):
    """A policy's reward, KL and other expectations, computed without sampling and averaged over guests."""

    reward: float
    kl: float  # KL(policy || reference), nats
    ended: float  # share of answers that end with the end-of-sequence token
    entropy: float  # nats
    length: float  # courses


@dataclass(frozen=True)
class Tree:
    """The tree of all answers: nodes are lists of 0 to 4 courses; a leaf is a node plus a stop token, or 5 courses."""

    @cached_property
    def meals(self) -> list[Int[np.ndarray, "n depth"]]:
        """Courses of the nodes at each depth, ordered by parent, then by last course."""
        nodes = (list(product(range(NUM_COURSES), repeat=depth)) for depth in range(MAX_TOKENS + 1))
        return [np.array(meals, np.int32).reshape(len(meals), depth) for depth, meals in enumerate(nodes)]

    @cached_property
    def rewards(self) -> Float[np.ndarray, "guests leaves"]:
        """The reward that the rule gives to each leaf."""
        *node_rewards, unended_rewards = [meal_rewards(meals) for meals in self.meals]
        penalties = np.where(STOPS == EOS, 0, MISSING_END_PENALTY)
        stop_rewards = [(node[:, :, None] - penalties).reshape(NUM_GUESTS, -1) for node in node_rewards]
        return np.concatenate([*stop_rewards, unended_rewards - MISSING_END_PENALTY], axis=1)

    @cached_property
    def ended(self) -> Bool[np.ndarray, "leaves"]:
        """Whether each leaf ends with the end-of-sequence token."""
        num_nodes = sum(map(len, self.meals[:-1]))
        return np.concatenate([np.tile(STOPS == EOS, num_nodes), np.zeros(len(self.meals[-1]), bool)])

    @cached_property
    def lengths(self) -> Int[np.ndarray, "leaves"]:
        """Number of courses of each leaf."""
        *node_counts, num_unended = map(len, self.meals)
        return np.repeat(np.arange(MAX_TOKENS + 1), [*(n * len(STOPS) for n in node_counts), num_unended])

    def leaf_logps(self, next_logps: Callable[[np.ndarray], np.ndarray]) -> Float[np.ndarray, "guests leaves"]:
        """Return the log-prob of every answer; ``next_logps``: meals [n, depth] -> log-probs [guests, n, V]."""
        prefix_logps = np.zeros((NUM_GUESTS, 1))
        leaves = []
        for meals in self.meals[:-1]:
            logps = prefix_logps[:, :, None] + next_logps(meals).astype(np.float64)
            leaves.append(logps[:, :, STOPS].reshape(NUM_GUESTS, -1))
            prefix_logps = logps[:, :, FIRST_COURSE : FIRST_COURSE + NUM_COURSES].reshape(NUM_GUESTS, -1)
        return np.concatenate([*leaves, prefix_logps], axis=1)

    def exact(self, logps: np.ndarray, reference: np.ndarray) -> Exact:
        """Return the exact reward, KL and other expectations of the policy with these log-probs of the leaves."""
        mean = lambda values: float((np.exp(logps) * values).sum(1).mean())  # noqa: E731
        return Exact(mean(self.rewards), mean(logps - reference), mean(self.ended), mean(-logps), mean(self.lengths))

    def optimum(self, reference: np.ndarray, beta: float) -> Exact:
        """Return the exact reward, KL and other expectations of the optimal policy, ref(y) exp(r(y) / beta) / Z."""
        logps = reference + self.rewards / beta
        normalizers = np.logaddexp.reduce(logps, axis=1, keepdims=True)
        return self.exact(logps - normalizers, reference)

    def best_of(self, reference: np.ndarray, n: int) -> Exact:
        """Return the exact expectations for the best of ``n`` answers of the reference; ties are broken at random."""
        rewards, probs = np.round(self.rewards, 6), np.exp(reference)
        logps = np.zeros_like(reference)
        for guest in range(NUM_GUESTS):
            reward_levels, level_index = np.unique(rewards[guest], return_inverse=True)
            level_probs = np.bincount(level_index, probs[guest], len(reward_levels))
            cumulative_probs = np.minimum(np.cumsum(level_probs), 1)
            best_probs = np.diff(cumulative_probs**n, prepend=0)  # probability that the best reward is this one
            with np.errstate(divide="ignore"):
                logps[guest] = reference[guest] + np.log(best_probs / level_probs)[level_index]
        return self.exact(np.maximum(logps, -700), reference)

    def best_reward(self, reference: np.ndarray, kl: float) -> float:
        """Return the largest expected reward at this KL from the reference: that of the optimal policy with this KL."""
        low, high = 1e-3, 1e3  # of beta; the optimum's KL falls with beta
        for _ in range(60):
            beta = (low * high) ** 0.5
            low, high = (beta, high) if self.optimum(reference, beta).kl > kl else (low, beta)
        return self.optimum(reference, beta).reward


def meal_rewards(meals: Int[np.ndarray, "n depth"]) -> Float[np.ndarray, "guests n"]:
    """Return each guest's reward for lists of courses, without the penalty of answers that do not end."""
    repeats = (meals[:, 1:] == meals[:, :-1]).sum(1)
    return GUEST_REWARDS[:, meals].sum(-1) - REPEAT_PENALTY * repeats


def answer_rewards(
    guests: Int[Array, "*R"], tokens: Int[Array, "*R N"], mask: Bool[Array, "*R N"]
) -> Float[Array, "*R"]:
    """Return the rewards that the rule gives to sampled answers."""
    courses = tokens - FIRST_COURSE
    is_course = mask & (courses >= 0) & (courses < NUM_COURSES)
    rewards = jnp.asarray(GUEST_REWARDS, jnp.float32)[guests[..., None], jnp.clip(courses, 0, NUM_COURSES - 1)]
    repeats = is_course[..., 1:] & (tokens[..., 1:] == tokens[..., :-1])
    ended = (mask & (tokens == EOS)).any(-1)
    return jnp.sum(rewards, axis=-1, where=is_course) - REPEAT_PENALTY * repeats.sum(-1) - MISSING_END_PENALTY * ~ended


def language() -> Float[np.ndarray, "guests depth previous V"]:
    """Return the supervised policy as a table of next-token log-probs; index 6 of `previous` stands for the prompt."""
    probs = np.zeros((MAX_TOKENS, NUM_COURSES + 1, VOCAB))
    courses = slice(FIRST_COURSE, FIRST_COURSE + NUM_COURSES)
    end_probs = np.array([0, *[END_PROB] * 3, 1])
    for previous in range(NUM_COURSES):
        probs[:, previous, courses] = (1 - end_probs)[:, None] * np.roll(NEXT_PROBS, previous)
    probs[:, NUM_COURSES, courses] = (1 - end_probs)[:, None] * FIRST_PROBS
    probs[:, :, EOS] = end_probs[:, None]
    return np.log(np.broadcast_to((1 - UNIFORM_PROB) * probs + UNIFORM_PROB / VOCAB, (NUM_GUESTS, *probs.shape)))


class Meals(NamedTuple):
    """Sampled answers, and the guests to whom they were given."""

    guests: Int[Array, "*B K"]
    tokens: Int[Array, "*B K N"]
    mask: Bool[Array, "*B K N"]  # True: a token of the answer, its stop included

    @property
    def rewards(self) -> Float[Array, "*B K"]:
        """The reward that the rule gives to each answer."""
        return answer_rewards(*self)

    @property
    def ended(self) -> Bool[Array, "*B K"]:
        """Whether each answer ends with the end-of-sequence token."""
        return (self.mask & (self.tokens == EOS)).any(-1)

    @property
    def texts(self) -> list[str]:
        """The text of each answer, with a dash for a token that is not a course, and an ellipsis if it does not end."""
        return [_text(tokens[mask]) for tokens, mask in zip(*map(_rows, (self.tokens, self.mask)), strict=True)]


def _rows(x: Array) -> np.ndarray:
    return np.asarray(x).reshape(-1, MAX_TOKENS)


def _text(tokens: Int[np.ndarray, " n"]) -> str:
    words = [COURSES[t - FIRST_COURSE] if FIRST_COURSE <= t < FIRST_GUEST else "-" for t in tokens if t != EOS]
    return ", ".join(words) + ("." if EOS in tokens else " ...")


def without_liked_courses() -> Float[np.ndarray, "guests depth previous V"]:
    """Return the table of another policy: the supervised one, except that no guest gets a course they like."""
    logps = language().copy()
    logps[..., FIRST_COURSE:FIRST_GUEST] += np.where(GUEST_REWARDS > 0, LIKED_LOGP_SHIFT, 0)[:, None, None]
    return logps
