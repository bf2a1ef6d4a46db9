"""Training methods, one file each. A method is a frozen dataclass that the loop in train.py drives."""

from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.offline import Offline as Method
from dpo_jax.methods.sft import sft

__all__ = ["METHODS", "Method"]

METHODS = {"dpo": dpo, "sft": sft}  # config stage -> function from a `Setup` to the method and its `Start`
