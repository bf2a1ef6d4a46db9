"""Training methods, one file each: frozen dataclasses that the loop in train.py runs."""

from dpo_jax.config import DPOConfig, RewardConfig, SFTConfig
from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.offline import Offline as Method
from dpo_jax.methods.reward import reward
from dpo_jax.methods.sft import sft

__all__ = ["METHODS", "Method"]

METHODS = {DPOConfig: dpo, SFTConfig: sft, RewardConfig: reward}  # -> function from a `Setup` to method and `Start`
