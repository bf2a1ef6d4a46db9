"""Supervised fine-tuning on one answer per prompt; the loss is the mean of -log pi over answer tokens."""

from collections.abc import Mapping

from dpo_jax.methods.offline import Offline, Start, make_offline
from dpo_jax.methods.samples import make_samples
from dpo_jax.methods.setup import Setup, load_policy


def sft(setup: Setup, flags: Mapping[str, str]) -> tuple[Offline, Start]:
    """Build the fine-tuning method and the arrays it starts from; ``flags`` are compiler options of its step."""
    policy = load_policy(setup)
    return make_offline(setup, policy, None, flags, make_samples(setup, "start", policy.start))
