"""Training methods, one file each: frozen dataclasses that the loop in train.py runs."""

from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.offline import Offline as Method
from dpo_jax.methods.sft import sft

__all__ = ["METHODS", "Method"]

METHODS = {"dpo": dpo, "sft": sft}  # config stage -> function from a `Setup` to the method and its `Start`
