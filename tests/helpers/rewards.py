"""Reward functions, in a module that processes started by tests can import."""

import jax.numpy as jnp


def vowels(prompts, answers, rows):
    """Score answers by their share of vowels; each answer comes with its prompt's row."""
    assert [row["prompt"] for row in rows] == prompts
    return [sum(letter in "aeiou" for letter in answer) / (1 + len(answer)) for answer in answers]


def equal(prompts, answers, rows):
    """Score all answers alike."""
    return [0.0] * len(answers)


def devices(prompts, answers, rows):
    """Score all answers by the number of devices on which an array is made."""
    return [float(len(jnp.zeros(3).devices()))] * len(answers)


def length(prompts, answers, rows):
    """Score answers by their number of letters."""
    return [len(answer) / 10 for answer in answers]
