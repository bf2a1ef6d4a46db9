"""Options of the objective, and the traits of each loss that decide which options apply."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dpo_jax.config.section import Section, ranged

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "dpop", "simpo", "orpo", "cpo", "sft",
]  # fmt: skip
LOSS_ALIASES = {  # names in other trainers -> value to use here
    "dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "cdpo": "sigmoid", "slic": "hinge", "exo": "exo_pair",
    "nca": "nca_pair", "bco": "bco_pair", "sppo": "sppo_hard", "apo": "apo_zero",
    "rpo": "[sigmoid, sft] as loss.types", "mpo": "[sigmoid, bco_pair, sft] as loss.types",
}  # fmt: skip


class Traits(NamedTuple):
    """Properties of a loss that decide which options apply to it."""

    options: tuple[str, ...] = ()  # loss-specific options; other losses require their defaults
    reference: bool = True  # compares the policy with a reference
    of_margin: bool = False  # a function of beta * (f(s_w) - f(s_l)) alone, so f_divergence applies
    per_token: bool = False  # divides log-probs by lengths; ipo does so if ipo_average
    sorts: bool = False  # sorts the pairs of a step
    coupled: bool = False  # the loss of a pair depends on the other pairs of its step
    imitates: bool = False  # adds the negative log-likelihood of the chosen answer


LOSS_TRAITS: dict[LossType, Traits] = {
    "sigmoid": Traits(("label_smoothing", "center"), of_margin=True),
    "hinge": Traits(of_margin=True),
    "ipo": Traits(("ipo_average",)),
    "exo_pair": Traits(("label_smoothing",), of_margin=True),
    "nca_pair": Traits(),
    "robust": Traits(("label_smoothing",), of_margin=True),
    "bco_pair": Traits(),
    "sppo_hard": Traits(),
    "aot": Traits(("label_smoothing",), sorts=True, coupled=True),
    "aot_unpaired": Traits(("label_smoothing",), sorts=True, coupled=True),
    "apo_zero": Traits(),
    "apo_down": Traits(),
    "discopop": Traits(("discopop_tau",), of_margin=True),
    "sigmoid_norm": Traits(per_token=True),
    "dpop": Traits(("dpop_lambda",)),
    "simpo": Traits(("simpo_gamma",), reference=False, per_token=True),
    "orpo": Traits(reference=False, per_token=True, imitates=True),
    "cpo": Traits(("cpo_weight",), reference=False, per_token=True, imitates=True),
    "sft": Traits(reference=False, per_token=True, coupled=True, imitates=True),
}


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section, name="loss"):
    """The objective; see docs/objectives.md for equations, papers and when to use which."""

    type: LossType | None = None
    """The loss; default: sigmoid, which is DPO. For several at once, see types."""
    types: tuple[LossType, ...] = ()
    """Several losses on the same pairs, summed; [sigmoid, sft] is RPO, [sigmoid, bco_pair, sft] is MPO."""
    weights: tuple[float, ...] = ranged((), above=0)
    """Weights of types, in order; default: 1 each."""
    beta: float = ranged(0.1, above=0)
    """Weight of the KL term; larger keeps the policy closer to the reference. For orpo: of the odds-ratio term."""
    label_smoothing: float = ranged(0.0, at_least=0, below=0.5)
    """Probability that a label is wrong: for sigmoid (cDPO), robust, aot, aot_unpaired; exo_pair needs more than 0."""
    center: float = ranged(0.0, at_least=0)
    """For sigmoid: weight of the squared sum of a pair's rewards, which keeps their mean near 0."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Divergence from the reference that the loss penalizes; reverse_kl is that of DPO."""
    f_alpha: float = 0.5
    """Coefficient of f_divergence alpha; toward 1 it becomes reverse_kl."""
    ld_alpha: float | None = ranged(None, at_least=0, at_most=1)
    """LD-DPO: weight of the longer answer's tokens beyond the length of the shorter; null: 1, all count alike."""
    weighting: Literal["none", "wpo"] = "none"
    """wpo: weight each pair by how likely its answers are under the policy."""
    wpo_gradient: bool = False
    """Backpropagate through the weights of wpo; false: they are constants, as in TRL 1.16."""
    reference_free: bool = False
    """Set the reference log-probs to 0 in a loss that uses a reference."""
    ipo_average: bool = True
    """Average ipo's log-ratios over tokens; false: sum them, as in the authors' first code."""
    discopop_tau: float = ranged(0.05, above=0, below=1)
    """Temperature of discopop's mixture."""
    dpop_lambda: float = ranged(50.0, at_least=0)
    """Weight of dpop's penalty on a chosen answer that falls below the reference."""
    simpo_gamma: float = ranged(0.5, at_least=0)
    """Target margin of simpo, in units of its reward."""
    cpo_weight: float = ranged(1.0, at_least=0)
    """Weight of cpo's negative log-likelihood of the chosen answer, averaged over its tokens."""

    def __post_init__(self):
        super().__post_init__()
        if self.type is None and not self.types:
            object.__setattr__(self, "type", "sigmoid")
        self.refuse("types", self.type and self.types, f"loss.type {self.type} is given too; keep one of the two")
        self.refuse("types", len(set(self.types)) < len(self.types), "name each loss once")
        count_differs = len(self.weights) not in (0, len(self.types))
        self.refuse("weights", count_differs, f"give one for each loss in loss.types ({len(self.types)})")
        traits = {name: LOSS_TRAITS[name] for name, _ in self.terms}
        loss_names = _joined(traits)
        for option in (option for row in LOSS_TRAITS.values() for option in row.options):
            has_option = any(option in row.options for row in traits.values())
            self.refuse_idle(option, not has_option, f"it is not an option of {loss_names}")
        is_infinite = "exo_pair" in traits and self.label_smoothing == 0
        self.refuse("label_smoothing", is_infinite, "exo_pair is infinite at 0; try 0.001")
        margin_loss_names = _joined(name for name, row in LOSS_TRAITS.items() if row.of_margin)
        other_loss_names = _joined(name for name, row in traits.items() if not row.of_margin)
        self.refuse_idle(
            "f_divergence", other_loss_names, f"it is defined for {margin_loss_names}, not for {other_loss_names}"
        )
        divergence = self.f_divergence
        self.refuse_idle("f_alpha", divergence != "alpha", f"loss.f_divergence {divergence} has no coefficient")
        per_token_names = _joined(n for n, row in traits.items() if row.per_token or (n == "ipo" and self.ipo_average))
        self.refuse_idle("ld_alpha", per_token_names, f"{per_token_names} already divides by the lengths")
        coupled_names = _joined(name for name, row in traits.items() if row.coupled)
        self.refuse_idle("weighting", coupled_names, f"{coupled_names} couples a step's pairs, so none can be weighted")
        self.refuse_idle("wpo_gradient", self.weighting == "none", "loss.weighting is none, so there are no weights")
        needs_reference = any(row.reference for row in traits.values())
        self.refuse_idle("reference_free", not needs_reference, f"{loss_names} uses no reference")
        self.refuse_idle("reference_free", "dpop" in traits, "dpop compares the chosen answer with the reference")

    @property
    def terms(self) -> tuple[tuple[LossType, float], ...]:
        """Name and weight of each loss in the sum."""
        if self.type is not None:
            return ((self.type, 1.0),)
        return tuple(zip(self.types, self.weights or (1.0,) * len(self.types), strict=True))

    @property
    def coupled(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its step."""
        return any(LOSS_TRAITS[name].coupled for name, _ in self.terms)

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses uses a reference."""
        return not self.reference_free and any(LOSS_TRAITS[name].reference for name, _ in self.terms)


@dataclass(frozen=True, kw_only=True)
class RewardLossConfig(Section, name="loss"):
    """The Bradley-Terry objective of a reward model; see docs/objectives.md."""

    label_smoothing: float = ranged(0.0, at_least=0, below=0.5)
    """Probability that a label is wrong."""
    center: float = ranged(0.01, at_least=0)
    """Weight of the squared sum of a pair's scores, which keeps their mean near 0; 0: off, as in TRL."""


def _joined(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
