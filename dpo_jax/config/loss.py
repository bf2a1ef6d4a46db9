"""Options of the objective, and the traits of each loss that they depend on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dpo_jax.config.section import Section, ranged

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "dpop", "simpo", "orpo", "cpo", "sft",
]  # fmt: skip
ALSO_CALLED = {  # names that other trainers use -> what to write here
    "dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "cdpo": "sigmoid", "slic": "hinge", "exo": "exo_pair",
    "nca": "nca_pair", "bco": "bco_pair", "sppo": "sppo_hard", "apo": "apo_zero",
    "rpo": "[sigmoid, sft] as loss.types", "mpo": "[sigmoid, bco_pair, sft] as loss.types",
}  # fmt: skip


class Traits(NamedTuple):
    """What the options of a loss depend on."""

    options: tuple[str, ...] = ()  # those that only some losses have; for the others they must keep their defaults
    reference: bool = True  # compares the policy with a reference
    of_margin: bool = False  # a function of beta * (f(s_w) - f(s_l)) alone, so f_divergence applies
    per_token: bool = False  # divides log-probs by lengths; ipo does so if ipo_average
    sorts: bool = False  # sorts the pairs of a step
    coupled: bool = False  # the loss of a pair depends on the other pairs of its step


LOSS_TRAITS: dict[LossType, Traits] = {
    "sigmoid": Traits(("label_smoothing",), of_margin=True),
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
    "orpo": Traits(reference=False, per_token=True),
    "cpo": Traits(("cpo_weight",), reference=False, per_token=True),
    "sft": Traits(reference=False, per_token=True, coupled=True),
}


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section, name="loss"):
    """The objective; see docs/objectives.md for equations, papers and when to use which."""

    type: LossType | None = None
    """The loss; default: sigmoid, which is DPO. For several at once, see types."""
    types: tuple[LossType, ...] = ()
    """Several losses of the same pairs, summed; [sigmoid, sft] is RPO, [sigmoid, bco_pair, sft] is MPO."""
    weights: tuple[float, ...] = ranged((), above=0)
    """Weights of types, in order; default: 1 each."""
    beta: float = ranged(0.1, above=0)
    """Weight of the KL term; larger keeps the policy closer to the reference. For orpo: weight of the odds ratio."""
    label_smoothing: float = ranged(0.0, at_least=0, below=0.5)
    """Probability that a label is wrong: for sigmoid (cDPO), robust, aot, aot_unpaired; exo_pair needs more than 0."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Divergence from the reference that the loss penalizes; reverse_kl is that of DPO."""
    f_alpha: float = 0.5
    """Coefficient of f_divergence alpha; towards 1 it becomes reverse_kl."""
    ld_alpha: float | None = ranged(None, at_least=0, at_most=1)
    """LD-DPO: weight of the longer answer's tokens beyond the length of the shorter; null: 1, all count alike."""
    weighting: Literal["none", "wpo"] = "none"
    """wpo: weigh each pair by how likely the policy is to write its answers."""
    wpo_gradient: bool = False
    """Let the gradient through the weights of wpo; false: they are constants, as in TRL 1.16."""
    reference_free: bool = False
    """Take the reference's log-probs as 0 in a loss that has one."""
    ipo_average: bool = True
    """Average ipo's log-ratios over tokens; false: sum them, as in the authors' first code."""
    discopop_tau: float = ranged(0.05, above=0, below=1)
    """Temperature of discopop's mixture."""
    dpop_lambda: float = ranged(50.0, at_least=0)
    """Weight of dpop's penalty on a chosen answer that falls below the reference."""
    simpo_gamma: float = ranged(0.5, at_least=0)
    """Target margin of simpo, in units of its reward."""
    cpo_weight: float = ranged(1.0, at_least=0)
    """Weight of cpo's likelihood of the chosen answer, the mean over its tokens."""

    def __post_init__(self):
        super().__post_init__()
        if self.type is None and not self.types:
            object.__setattr__(self, "type", "sigmoid")
        self.refuse("types", self.type and self.types, f"loss.type {self.type} is given too; keep one")
        self.refuse("types", len(set(self.types)) < len(self.types), "name each loss once")
        unequal = len(self.weights) not in (0, len(self.types))
        self.refuse("weights", unequal, f"give one for each of loss.types, {len(self.types)}")
        self._refuse_combinations()

    def _refuse_combinations(self) -> None:
        traits = {name: LOSS_TRAITS[name] for name, _ in self.terms}
        names = _listed(traits)
        for option in (option for row in LOSS_TRAITS.values() for option in row.options):
            owned = any(option in row.options for row in traits.values())
            self.refuse_idle(option, not owned, f"{names} has no such option")
        infinite = "exo_pair" in traits and self.label_smoothing == 0
        self.refuse("label_smoothing", infinite, "exo_pair is infinite at 0; try 0.001")
        divergent = _listed(name for name, row in LOSS_TRAITS.items() if row.of_margin)
        others = _listed(name for name, row in traits.items() if not row.of_margin)
        self.refuse_idle("f_divergence", others, f"it is defined for {divergent}, not for {others}")
        divergence = self.f_divergence
        self.refuse_idle("f_alpha", divergence != "alpha", f"f_divergence {divergence} has no coefficient")
        divided = _listed(n for n, row in traits.items() if row.per_token or (n == "ipo" and self.ipo_average))
        self.refuse_idle("ld_alpha", divided, f"{divided} divides by the lengths already")
        coupled = _listed(name for name, row in traits.items() if row.coupled)
        self.refuse_idle("weighting", coupled, f"{coupled} couples the pairs of a step, so none can be weighed alone")
        self.refuse_idle("wpo_gradient", self.weighting == "none", "weighting none has no weights")
        compares = any(row.reference for row in traits.values())
        self.refuse_idle("reference_free", not compares, f"{names} has no reference anyway")
        self.refuse_idle("reference_free", "dpop" in traits, "dpop penalizes falling below the reference")

    @property
    def terms(self) -> tuple[tuple[LossType, float], ...]:
        """Name and weight of each loss that is added."""
        if self.type is not None:
            return ((self.type, 1.0),)
        return tuple(zip(self.types, self.weights or (1.0,) * len(self.types), strict=True))

    @property
    def coupled(self) -> bool:
        """The loss of a pair depends on the other pairs of its step."""
        return any(LOSS_TRAITS[name].coupled for name, _ in self.terms)

    @property
    def needs_reference(self) -> bool:
        """One of the losses compares with a reference."""
        return not self.reference_free and any(LOSS_TRAITS[name].reference for name, _ in self.terms)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
