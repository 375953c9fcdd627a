"""Modules over the kernels: a gated DeltaNet mixer, window attention, hybrid blocks, and a small model that sleeps.

Beside the recurrence, a mixer's short convolution and gated norm as functions, for models of others too.
"""

from .gated_delta_net import GatedDeltaNet
from .gated_rms_norm import GatedRMSNorm, gated_rms_norm
from .hybrid_block import MLP, HybridBlock
from .short_convolution import ShortConvolution, short_convolution, short_convolution_step
from .sleep_lm import SleepLM
from .window_attention import WindowAttention

__all__ = [
    "MLP", "GatedDeltaNet", "GatedRMSNorm", "HybridBlock", "ShortConvolution", "SleepLM", "WindowAttention",
    "gated_rms_norm", "short_convolution", "short_convolution_step",
]  # fmt: skip
