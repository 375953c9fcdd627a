"""A training that takes seconds."""

from sleepkern.experiments.tasks import Depo
from sleepkern.experiments.training import Configuration

TINY = Configuration(Depo(5, (1, 2), 4), width=16, heads=2, blocks=2, batch=8, steps=6, look=3, problems=20)
