"""What is trained on what: a file a method. A method is a frozen dataclass that the one loop of train.py drives."""

from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.offline import Offline as Method
from dpo_jax.methods.sft import sft

__all__ = ["METHODS", "Method"]

METHODS = {"dpo": dpo, "sft": sft}  # by the config's stage: from a `Setup`, the method and what it starts from
