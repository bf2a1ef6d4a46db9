"""Supervised fine-tuning: the token mean of -log pi over the answers (``losses.sft``), one answer a prompt."""

from collections.abc import Mapping

from dpo_jax.methods.offline import Offline, Start, make_offline
from dpo_jax.methods.setup import Setup, load_policy


def sft(setup: Setup, flags: Mapping[str, str]) -> tuple[Offline, Start]:
    """The method, and what it starts from."""
    return make_offline(setup, load_policy(setup), None, flags)
