"""A hybrid model of transformers with and without the patch: speed, memory, and what a sleep over a window costs."""

from .bench_model import bench_model
from .report import LengthRow, ModelReport, Phase, SleepCost

__all__ = ["LengthRow", "ModelReport", "Phase", "SleepCost", "bench_model"]
