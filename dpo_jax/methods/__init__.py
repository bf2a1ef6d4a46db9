"""What is trained on what: a file a method. A method is a frozen dataclass that the one loop of train.py drives."""

from collections.abc import Callable
from typing import Any, Protocol

from dpo_jax.methods.dpo import dpo
from dpo_jax.methods.sft import sft
from dpo_jax.runs.directory import RunDir


class Method(Protocol):
    """What the loop needs of a method. ``state`` is any pytree; the session saves it and does not look inside."""

    @property
    def num_steps(self) -> int:
        """Steps of the run."""

    @property
    def evaluates(self) -> bool:
        """There is an evaluation set."""

    @property
    def manifest(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""

    @property
    def abstract_state(self) -> Any:
        """The state's shapes, types and shardings."""

    @property
    def first_state(self) -> Callable[[Any], Any]:
        """From what training starts from, whose arrays it takes over, to the state before the first step."""

    def check_start(self, state: Any) -> str | None:
        """A line about a new run's start; raises `UserError` if it is not what it must be."""

    def resumed(self, state: Any) -> str | None:
        """A line about a resumed run's state."""

    def batch(self, step: int, state: Any) -> Any:
        """The data of step ``step``, on the devices; its ``facts`` are the session's `StepFacts`."""

    def update(self, state: Any, data: Any) -> tuple[Any, dict[str, Any]]:
        """The next state, and the step's metrics, which may still be under way."""

    def recovered(self, state: Any) -> Any:
        """The state before the step that was not finite, such that training may resume from it."""

    def evaluate(self, state: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of the evaluation sets, and the distributions that these summarise; both empty without sets."""

    def keep_files(self, run: RunDir) -> None:
        """Put what an export needs beside weights into a new run."""

    def export(self, run: RunDir, state: Any) -> None:
        """Write the model to ``run.export``."""

    def data_report(self) -> dict[str, list[dict[str, Any]]]:
        """What became of the rows of each set, for the report."""


METHODS = {"dpo": dpo, "sft": sft}  # by the config's stage: of a `Setup`, the method and what it trains from
