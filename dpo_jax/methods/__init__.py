"""Training methods, one file each. A method is a frozen dataclass that the loop in train.py drives."""

from dpo_jax.config import DPOConfig, RewardConfig, SFTConfig
from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.offline import Offline as Method
from dpo_jax.methods.reward import reward
from dpo_jax.methods.sft import sft

__all__ = ["METHODS", "Method"]

METHODS = {DPOConfig: dpo, SFTConfig: sft, RewardConfig: reward}  # -> function from a `Setup` to method and `Start`
