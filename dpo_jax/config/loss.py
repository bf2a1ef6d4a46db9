"""Options of the objective, and the tables that say which losses have which property."""

from dataclasses import dataclass
from typing import Literal

from dpo_jax.errors import require

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "dpop", "simpo", "orpo", "cpo", "sft",
]  # fmt: skip
NO_REFERENCE = frozenset({"simpo", "orpo", "cpo", "sft"})  # losses of the policy alone
SORTED = frozenset({"aot", "aot_unpaired"})  # the pairs of a step are sorted
COUPLED = SORTED | {"sft"}  # the loss of a pair depends on the other pairs of its step
ALSO_CALLED = {  # names that other trainers use -> what to write here
    "dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "cdpo": "sigmoid", "slic": "hinge", "exo": "exo_pair",
    "nca": "nca_pair", "bco": "bco_pair", "sppo": "sppo_hard", "apo": "apo_zero",
    "rpo": "[sigmoid, sft] as loss.types", "mpo": "[sigmoid, bco_pair, sft] as loss.types",
}  # fmt: skip
OF_MARGIN = frozenset({"sigmoid", "hinge", "exo_pair", "robust", "discopop"})  # of beta * (f(s_w) - f(s_l)) alone
PER_TOKEN = frozenset({"sigmoid_norm", "simpo", "orpo", "cpo", "sft"})  # log-probs are divided by lengths; ipo may
LOSS_OPTIONS: dict[str, frozenset[str]] = {  # losses that have an option; for all others it must keep its default
    "label_smoothing": frozenset({"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired"}),
    "ipo_average": frozenset({"ipo"}),
    "discopop_tau": frozenset({"discopop"}),
    "dpop_lambda": frozenset({"dpop"}),
    "simpo_gamma": frozenset({"simpo"}),
    "cpo_weight": frozenset({"cpo"}),
}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective; see docs/objectives.md for equations, papers and when to use which."""

    type: LossType | None = None
    """The loss; default: sigmoid, which is DPO. Several at once: types."""
    types: tuple[LossType, ...] = ()
    """Several losses of the same pairs, added; [sigmoid, sft] is RPO, [sigmoid, bco_pair, sft] is MPO."""
    weights: tuple[float, ...] = ()
    """Weight of each of types; default: 1 each."""
    beta: float = 0.1
    """Weight of the KL term; larger keeps the policy closer to the reference. Of orpo: weight of the odds ratio."""
    label_smoothing: float = 0.0
    """Chance that a label is wrong: sigmoid (cDPO), robust, aot, aot_unpaired; exo_pair needs it above 0."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Divergence from the reference that the loss stands for; reverse_kl is DPO's own."""
    f_alpha: float = 0.5
    """Coefficient of f_divergence alpha; towards 1 it becomes reverse_kl."""
    ld_alpha: float | None = None
    """LD-DPO: weight of the tokens of the longer answer beyond the length of the shorter; null: 1, all count alike."""
    weighting: Literal["none", "wpo"] = "none"
    """wpo: each pair weighs as much as the policy would have written its answers."""
    wpo_gradient: bool = False
    """Let the gradient through the weights of wpo; False: they are constants, as in TRL 1.16."""
    reference_free: bool = False
    """Take the reference's log-probs as 0 in a loss that has one."""
    ipo_average: bool = True
    """Log-ratios of ipo are means over tokens; False: sums, as in the first code of its authors."""
    discopop_tau: float = 0.05
    """Temperature of discopop's mixture."""
    dpop_lambda: float = 50.0
    """Weight of dpop's penalty on a chosen answer that falls below the reference."""
    simpo_gamma: float = 0.5
    """Margin that simpo asks for, in units of its reward."""
    cpo_weight: float = 1.0
    """Weight of cpo's likelihood of the chosen answer, the mean over its tokens."""

    def __post_init__(self):
        if self.type is None and not self.types:
            object.__setattr__(self, "type", "sigmoid")
        require(self.type is None or not self.types, "loss.types", self.types,
                f"loss.type {self.type} is given too; keep one")  # fmt: skip
        require(len(set(self.types)) == len(self.types), "loss.types", self.types, "name each loss once")
        require(not self.weights or len(self.weights) == len(self.types), "loss.weights", self.weights,
                f"give one for each of loss.types, {len(self.types)}")  # fmt: skip
        require(all(0 < weight < float("inf") for weight in self.weights), "loss.weights", self.weights,
                "positive numbers are needed")  # fmt: skip
        require(0 < self.beta < float("inf"), "loss.beta", self.beta, "it must be positive")
        require(-float("inf") < self.f_alpha < float("inf"), "loss.f_alpha", self.f_alpha, "a number is needed")
        require(0 <= self.label_smoothing < 0.5, "loss.label_smoothing", self.label_smoothing, "it lies in [0, 0.5)")
        require(0 < self.discopop_tau < 1, "loss.discopop_tau", self.discopop_tau, "it lies in (0, 1)")
        require(self.ld_alpha is None or 0 <= self.ld_alpha <= 1, "loss.ld_alpha", self.ld_alpha, "it lies in [0, 1]")
        for option in ("dpop_lambda", "simpo_gamma", "cpo_weight"):
            value = getattr(self, option)
            require(0 <= value < float("inf"), f"loss.{option}", value, "it cannot be negative or infinite")
        self._refuse_combinations()

    def _refuse_combinations(self) -> None:
        names = {name for name, _ in self.terms}
        listed = ", ".join(sorted(names))
        for option, owners in LOSS_OPTIONS.items():
            value, default = getattr(self, option), type(self).__dataclass_fields__[option].default
            require(value == default or bool(names & owners), f"loss.{option}", value,
                    f"{listed} has no such option; leave it at {default}")  # fmt: skip
        require("exo_pair" not in names or self.label_smoothing > 0, "loss.label_smoothing", self.label_smoothing,
                "exo_pair is infinite at 0; try 0.001")  # fmt: skip
        divergent = sorted(names - OF_MARGIN)
        require(self.f_divergence == "reverse_kl" or not divergent, "loss.f_divergence", self.f_divergence,
                f"it is defined for {', '.join(sorted(OF_MARGIN))}, not for {', '.join(divergent)}")  # fmt: skip
        require(self.f_alpha == 0.5 or self.f_divergence == "alpha", "loss.f_alpha", self.f_alpha,
                f"f_divergence {self.f_divergence} has no coefficient; leave it at 0.5")  # fmt: skip
        divided = sorted(names & (PER_TOKEN | ({"ipo"} if self.ipo_average else set())))
        require(self.ld_alpha is None or not divided, "loss.ld_alpha", self.ld_alpha,
                f"{', '.join(divided)} divides by the lengths already; use null")  # fmt: skip
        coupled = sorted(names & COUPLED)
        require(self.weighting == "none" or not coupled, "loss.weighting", self.weighting,
                f"{', '.join(coupled)} has no loss of a pair by itself; use none")  # fmt: skip
        require(not self.wpo_gradient or self.weighting == "wpo", "loss.wpo_gradient", self.wpo_gradient,
                f"weighting {self.weighting} has no weights; use false")  # fmt: skip
        require(not self.reference_free or bool(names - NO_REFERENCE), "loss.reference_free", self.reference_free,
                f"{listed} has no reference anyway; use false")  # fmt: skip
        require(not self.reference_free or "dpop" not in names, "loss.reference_free", self.reference_free,
                "dpop is a penalty on falling below the reference; use false")  # fmt: skip

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        """Name and weight of each loss that is added."""
        if self.type is not None:
            return ((self.type, 1.0),)
        return tuple(zip(self.types, self.weights or (1.0,) * len(self.types), strict=True))

    @property
    def coupled(self) -> bool:
        """The loss of a pair depends on the other pairs of its step."""
        return any(name in COUPLED for name, _ in self.terms)

    @property
    def needs_reference(self) -> bool:
        """One of the losses compares with a reference."""
        return not self.reference_free and any(name not in NO_REFERENCE for name, _ in self.terms)
