"""How answers are sampled: by ``generate``, in training on sampled answers, and for ``run.samples``."""

from dataclasses import dataclass

from dpo_jax.config.section import Section, ranged


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section, name="sampling"):
    """How answers are sampled."""

    max_tokens: int = ranged(256, above=0)
    """Maximum number of new tokens per answer."""
    temperature: float = ranged(1.0, at_least=0)
    """Divisor of the logits; 0: take the most likely token."""
    top_k: int = ranged(0, at_least=0)
    """Sample from this many of the most likely tokens; 0: from all."""
    top_p: float = ranged(1.0, above=0, at_most=1)
    """Sample from the fewest most likely tokens that together have this probability."""

    def __post_init__(self):
        super().__post_init__()
        for option in ("top_k", "top_p"):
            self.refuse_idle(option, self.temperature == 0, "at temperature 0 nothing is sampled")
