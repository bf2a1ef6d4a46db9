"""Direct Preference Optimization in JAX.

``train_step`` and its argument types can be used in any JAX program; the commands are in `dpo_jax.cli`. Importing the
package alone does not import JAX, so that an invalid config is refused at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_jax.batch import PairLogps, PreferenceBatch
    from dpo_jax.step import TrainState, make_train_step, train_step

__version__ = "0.1.0"
__all__ = ["PairLogps", "PreferenceBatch", "TrainState", "__version__", "make_train_step", "train_step"]

_LAZY_IMPORTS = dict.fromkeys(("PairLogps", "PreferenceBatch"), "dpo_jax.batch") | dict.fromkeys(
    ("TrainState", "make_train_step", "train_step"), "dpo_jax.step"
)


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY_IMPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY_IMPORTS])
