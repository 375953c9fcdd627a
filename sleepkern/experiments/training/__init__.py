"""Training of models that sleep: `Training(Run(configuration("depo", "mini"), passes=4)).train()`."""

from .configurations import CONFIGURATIONS, Configuration, configuration
from .placement import Placement, placed
from .sleeper import Sleeper, loss_of, right
from .training import Run, Training

__all__ = [
    "CONFIGURATIONS",
    "Configuration",
    "Placement",
    "Run",
    "Sleeper",
    "Training",
    "configuration",
    "loss_of",
    "placed",
    "right",
]
