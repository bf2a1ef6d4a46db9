"""Training methods, one file each: frozen dataclasses that the loop in train.py runs."""

from dpo_jax.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.offline import Offline
from dpo_jax.methods.ppo import PPO, ppo
from dpo_jax.methods.reward import reward
from dpo_jax.methods.sft import sft

__all__ = ["METHODS", "Method"]

Method = Offline | PPO
METHODS = {
    DPOConfig: dpo,
    SFTConfig: sft,
    RewardConfig: reward,
    PPOConfig: ppo,
}  # -> function from a `Setup` to method and `Start`
