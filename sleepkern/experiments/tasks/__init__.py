"""Tasks that a model has to think about: their data is made in code, and training and test problems never meet."""

from .arithmetic import Arithmetic
from .depo import Depo, NamedDepo
from .rule110 import Rule110
from .task import IGNORED, SPLITS, Batch, Task

__all__ = ["IGNORED", "SPLITS", "Arithmetic", "Batch", "Depo", "NamedDepo", "Rule110", "Task"]
