"""Modules over the kernels: a gated DeltaNet mixer, window attention, hybrid blocks, and a small model that sleeps."""

from .attention import WindowAttention
from .block import MLP, HybridBlock
from .layers import GatedRMSNorm, ShortConvolution
from .mixer import GatedDeltaNet
from .model import SleepLM

__all__ = ["MLP", "GatedDeltaNet", "GatedRMSNorm", "HybridBlock", "ShortConvolution", "SleepLM", "WindowAttention"]
