"""Supervised fine-tuning: the mean of -log pi over answer tokens (``losses.sft``), with one answer per prompt."""

from collections.abc import Mapping

from dpo_jax.methods.offline import Offline, Start, make_offline
from dpo_jax.methods.setup import Setup, load_policy


def sft(setup: Setup, flags: Mapping[str, str]) -> tuple[Offline, Start]:
    """Build the fine-tuning method and its `Start`."""
    return make_offline(setup, load_policy(setup), None, flags)
