"""Training of models that sleep: `Training(Run(configuration("depo", "mini"), passes=4)).train()`."""

import warnings
from typing import Any

from .configurations import CONFIGURATIONS, Configuration, configuration
from .distributed import Placement, current_placement
from .sleep_module import SleepModule, correct_answers, loss_of
from .training import Run, Training

__all__ = [
    "CONFIGURATIONS", "Configuration", "Placement", "Run", "SleepModule", "Training", "configuration",
    "correct_answers", "current_placement", "loss_of",
]  # fmt: skip

_RENAMED: dict[str, Any] = {"Sleeper": SleepModule, "placed": current_placement, "right": correct_answers}


def __getattr__(name: str) -> Any:
    """Former names of classes and functions."""
    found = _RENAMED.get(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is {__name__}.{found.__name__}", DeprecationWarning, stacklevel=2)
    return found
