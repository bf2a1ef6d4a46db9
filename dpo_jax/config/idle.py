"""Find options that have no effect because of a run's data, length or devices; the run reports them when it starts.

A value that has no effect with any data is an error in its section. Limits that are never reached (``max_length``,
``limit``, ``max_shapes``, ``keep``) and handling of invalid rows that do not occur do not count as idle.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

from dpo_jax.config.data import TEMPLATE_DATE


class Facts(NamedTuple):
    """Facts about a run's data, length and devices that decide whether an option has an effect."""

    steps: int
    eval_sets: int
    examples: int  # number of training and evaluation examples
    messages: int  # number of examples rendered by a chat template
    dated: bool  # whether a chat template that rendered examples asks for the date
    platform: str  # platform of the devices, such as tpu
    flags: frozenset[str]  # compiler options set by default on these devices


# option, predicate, explanation with {fields of Facts}
IDLE: tuple[tuple[str, Callable[[Any, Facts], bool], str], ...] = (
    ("optimizer.warmup_steps", lambda value, run: value >= run.steps,
     "the run has {steps} steps, so the learning rate never reaches its peak"),
    ("reference.sync_every", lambda value, run: value > run.steps,
     "the run has {steps} steps, so the reference never moves"),
    ("checkpoint.every", lambda value, run: value > run.steps,
     "the run has {steps} steps, so only the last step is saved"),
    ("run.log_every", lambda value, run: value > run.steps,
     "the run has {steps} steps, so only the last step is logged"),
    ("run.eval_every", lambda value, run: run.eval_sets > 0 and value > run.steps,
     "the run has {steps} steps, so evaluations run only before the first and after the last"),
    ("run.eval_every", lambda value, run: run.eval_sets == 0 and value > 0,
     "there is no evaluation set; name one in data.eval, or set data.eval_fraction"),
    ("run.samples", lambda value, run: run.eval_sets == 0 and value > 0,
     "there is no evaluation set; name one in data.eval, or set data.eval_fraction"),
    ("eval.reward.path", lambda value, run: run.eval_sets == 0 and value is not None,
     "there is no evaluation set; name one in data.eval, or set data.eval_fraction"),
    ("data.chat_template", lambda value, run: value is not None and run.messages == 0,
     "no example holds messages, so the template renders nothing"),
    ("data.template_date", lambda value, run: value != TEMPLATE_DATE and not run.dated,
     "no example is rendered by a template that asks for the date"),
    ("data.append_eos", lambda value, run: not value and run.messages == run.examples,
     "every example holds messages, and the chat template ends their answers itself"),
    ("model.matmul_precision", lambda value, run: value != "default" and run.platform == "cpu",
     "a CPU multiplies float32 in full precision anyway"),
    ("run.compiler_flags", lambda value, run: any(not text and name not in run.flags for name, text in value.items()),
     "an empty value removes a default, but {platform} has no such default"),
)  # fmt: skip


def idle_options(config: Any, facts: Facts) -> list[str]:
    """Return one line for each option of a config that has no effect in a run with these facts."""
    explanations = []
    for option, is_idle, explanation in IDLE:
        section, _, _ = option.partition(".")
        if hasattr(config, section):
            value = reduce(getattr, option.split("."), config)
            if is_idle(value, facts):
                explanations.append(f"{option} is {value!r}: {explanation.format(**facts._asdict())}")
    return explanations
