"""The former name of `sleepkern.experiments.training`, for one release."""

import sys
import warnings

from .experiments import training

warnings.warn("sleepkern.training is sleepkern.experiments.training", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = training
