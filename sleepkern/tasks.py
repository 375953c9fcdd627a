"""The former name of `sleepkern.experiments.tasks`, for one release."""

import sys
import warnings

from .experiments import tasks

warnings.warn("sleepkern.tasks is sleepkern.experiments.tasks", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = tasks
