"""Training methods, one file each: frozen dataclasses that the loop in train.py runs."""

from collections.abc import Mapping

from dpo_jax.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.offline import Offline, Start
from dpo_jax.methods.online_dpo import OnlineDPO, online_dpo
from dpo_jax.methods.ppo import PPO, ppo
from dpo_jax.methods.reward import reward
from dpo_jax.methods.setup import Setup
from dpo_jax.methods.sft import sft

__all__ = ["METHODS", "Method"]


def _pairs(setup: Setup, flags: Mapping[str, str]) -> tuple[Offline | OnlineDPO, Start]:
    """Build DPO or, if the policy samples the pairs itself, online DPO."""
    return (dpo if setup.config.data.online is None else online_dpo)(setup, flags)


Method = Offline | OnlineDPO | PPO
METHODS = {
    DPOConfig: _pairs,
    SFTConfig: sft,
    RewardConfig: reward,
    PPOConfig: ppo,
}  # config class -> function from a `Setup` and compiler flags to the method and its initial arrays
