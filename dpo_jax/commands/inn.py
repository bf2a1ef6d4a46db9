"""A built-in task on which everything is exact: guests of an inn ask for a meal, and every answer can be enumerated.

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

# The rule: how much a guest likes each course, and what it costs to repeat one at once or not to end the answer.
LIKES = np.array([1, 0.5, 0, 0, -0.5, -1])
LIKED = np.stack([np.roll(LIKES if guest % 2 else LIKES[::-1], guest // 2) for guest in range(NUM_GUESTS)])
REPEATED, NOT_ENDED = 0.5, 2.0

# The language before preferences, the same for all guests: a chain of courses.
START = np.array([3, 3, 2, 2, 1, 1]) / 12  # of the first course
FOLLOWS = np.array([1, 4, 3, 2, 2, 1]) / 13  # of the next one, by its distance from the last in the list of courses
STOPS_AFTER = 0.4  # any course but the fourth, after which every meal ends
NEVER = -20.0  # nats, of a token that another policy than the reference does not use
SLIP = 1e-3  # probability of a token that the language does not have there


class Exact(NamedTuple):
    """A policy's reward, KL and other expectations, computed without sampling and averaged over guests."""

    reward: float
    kl: float  # KL(policy || reference), nats
    ended: float  # share of answers that end with the end-of-sequence token
    entropy: float  # nats
    length: float  # courses


@dataclass(frozen=True)
class Tree:
    """All answers: nodes are the lists of 0 to 4 courses, by depth; leaves are each node's stops, then 5 courses."""

    @cached_property
    def meals(self) -> list[Int[np.ndarray, "n depth"]]:
        """Courses of the nodes of each depth, in the order in which children follow from parents."""
        nodes = (list(product(range(NUM_COURSES), repeat=depth)) for depth in range(MAX_TOKENS + 1))
        return [np.array(meals, np.int32).reshape(len(meals), depth) for depth, meals in enumerate(nodes)]

    @cached_property
    def rewards(self) -> Float[np.ndarray, "guests leaves"]:
        """The rule's reward of every leaf."""
        *nodes, unended = [meal_rewards(meals) for meals in self.meals]
        penalties = np.where(STOPS == EOS, 0, NOT_ENDED)
        stopped = [(node[:, :, None] - penalties).reshape(NUM_GUESTS, -1) for node in nodes]
        return np.concatenate([*stopped, unended - NOT_ENDED], axis=1)

    @cached_property
    def ended(self) -> Bool[np.ndarray, "leaves"]:
        """Whether each leaf ends with the end-of-sequence token."""
        num_nodes = sum(map(len, self.meals[:-1]))
        return np.concatenate([np.tile(STOPS == EOS, num_nodes), np.zeros(len(self.meals[-1]), bool)])

    @cached_property
    def lengths(self) -> Int[np.ndarray, "leaves"]:
        """Number of courses of each leaf."""
        *nodes, unended = map(len, self.meals)
        return np.repeat(np.arange(MAX_TOKENS + 1), [*(n * len(STOPS) for n in nodes), unended])

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
        """Return what the policy with these log-probs of its leaves reaches."""
        mean = lambda values: float((np.exp(logps) * values).sum(1).mean())  # noqa: E731
        return Exact(mean(self.rewards), mean(logps - reference), mean(self.ended), mean(-logps), mean(self.lengths))

    def optimum(self, reference: np.ndarray, beta: float) -> Exact:
        """Return what ref(y) exp(r(y) / beta) / Z reaches."""
        logps = reference + self.rewards / beta
        normalizers = np.logaddexp.reduce(logps, axis=1, keepdims=True)
        return self.exact(logps - normalizers, reference)

    def best_of(self, reference: np.ndarray, n: int) -> Exact:
        """Return what the best of ``n`` answers of the reference reaches; of equal rewards, one is drawn at random."""
        rewards, probs = np.round(self.rewards, 6), np.exp(reference)
        logps = np.zeros_like(reference)
        for guest in range(NUM_GUESTS):
            levels, level = np.unique(rewards[guest], return_inverse=True)
            mass = np.bincount(level, probs[guest], len(levels))
            below = np.minimum(np.cumsum(mass), 1)
            best = np.diff(below**n, prepend=0)  # probability that the best reward is this one
            with np.errstate(divide="ignore"):
                logps[guest] = reference[guest] + np.log(best / mass)[level]
        return self.exact(np.maximum(logps, -700), reference)

    def best_reward(self, reference: np.ndarray, kl: float) -> float:
        """Return the largest expected reward at this KL from the reference: that of the optimum with such a KL."""
        low, high = 1e-3, 1e3  # of beta; the optimum's KL falls with beta
        for _ in range(60):
            beta = (low * high) ** 0.5
            low, high = (beta, high) if self.optimum(reference, beta).kl > kl else (low, beta)
        return self.optimum(reference, beta).reward


def meal_rewards(meals: Int[np.ndarray, "n depth"]) -> Float[np.ndarray, "guests n"]:
    """Return each guest's reward of lists of courses, before anything that their end costs."""
    repeats = (meals[:, 1:] == meals[:, :-1]).sum(1)
    return LIKED[:, meals].sum(-1) - REPEATED * repeats


def answer_rewards(
    guests: Int[Array, "*R"], tokens: Int[Array, "*R N"], mask: Bool[Array, "*R N"]
) -> Float[Array, "*R"]:
    """Return the rule's reward of sampled answers."""
    courses = tokens - FIRST_COURSE
    is_course = mask & (courses >= 0) & (courses < NUM_COURSES)
    liked = jnp.asarray(LIKED, jnp.float32)[guests[..., None], jnp.clip(courses, 0, NUM_COURSES - 1)]
    repeats = is_course[..., 1:] & (tokens[..., 1:] == tokens[..., :-1])
    ended = (mask & (tokens == EOS)).any(-1)
    return jnp.sum(liked, axis=-1, where=is_course) - REPEATED * repeats.sum(-1) - NOT_ENDED * ~ended


def language() -> Float[np.ndarray, "guests depth previous V"]:
    """Return the language before preferences as a table of next-token log-probs; `previous` 6 is the prompt."""
    probs = np.zeros((MAX_TOKENS, NUM_COURSES + 1, VOCAB))
    courses = slice(FIRST_COURSE, FIRST_COURSE + NUM_COURSES)
    stops = np.array([0, *[STOPS_AFTER] * 3, 1])
    for previous in range(NUM_COURSES):
        probs[:, previous, courses] = (1 - stops)[:, None] * np.roll(FOLLOWS, previous)
    probs[:, NUM_COURSES, courses] = (1 - stops)[:, None] * START
    probs[:, :, EOS] = stops[:, None]
    return np.log(np.broadcast_to((1 - SLIP) * probs + SLIP / VOCAB, (NUM_GUESTS, *probs.shape)))


class Meals(NamedTuple):
    """Answers to guests."""

    guests: Int[Array, "*B K"]
    tokens: Int[Array, "*B K N"]
    mask: Bool[Array, "*B K N"]  # True: a token of the answer, its stop included

    @property
    def rewards(self) -> Float[Array, "*B K"]:
        """The rule's reward of each answer."""
        return answer_rewards(*self)

    @property
    def ended(self) -> Bool[Array, "*B K"]:
        """Whether each answer ends with the end-of-sequence token."""
        return (self.mask & (self.tokens == EOS)).any(-1)

    @property
    def texts(self) -> list[str]:
        """What each answer says; a dash for a token that is no course, an ellipsis for an answer without end."""
        return [_text(tokens[mask]) for tokens, mask in zip(*map(_rows, (self.tokens, self.mask)), strict=True)]


def _rows(x: Array) -> np.ndarray:
    return np.asarray(x).reshape(-1, MAX_TOKENS)


def _text(tokens: Int[np.ndarray, " n"]) -> str:
    words = [COURSES[t - FIRST_COURSE] if FIRST_COURSE <= t < FIRST_GUEST else "-" for t in tokens if t != EOS]
    return ", ".join(words) + ("." if EOS in tokens else " ...")


def without_liked_courses() -> Float[np.ndarray, "guests depth previous V"]:
    """Return the table of another policy: the language, but it serves no guest a course that the guest likes."""
    logps = language().copy()
    logps[..., FIRST_COURSE:FIRST_GUEST] += np.where(LIKED > 0, NEVER, 0)[:, None, None]
    return logps
