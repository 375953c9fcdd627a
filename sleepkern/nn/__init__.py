"""Modules over the kernels: a gated DeltaNet mixer, window attention, hybrid blocks, and a small model that sleeps.

Beside the recurrence, a mixer's short convolution and gated norm as functions, for models of others too.
"""

from .attention import WindowAttention
from .block import MLP, HybridBlock
from .gated_norm import GatedRMSNorm, gated_rms_norm
from .mixer import GatedDeltaNet
from .model import SleepLM
from .short_convolution import ShortConvolution, short_convolution, short_convolution_step

__all__ = [
    "MLP", "GatedDeltaNet", "GatedRMSNorm", "HybridBlock", "ShortConvolution", "SleepLM", "WindowAttention",
    "gated_rms_norm", "short_convolution", "short_convolution_step",
]  # fmt: skip
