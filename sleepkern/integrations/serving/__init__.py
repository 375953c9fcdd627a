"""The calls of serving engines in their own words: SGLang's linear-attention kernels and vLLM's recurrent functions.

Both keep the states of all requests in one pool, name the row of each sequence of a step, and pack sequences into one
row of tokens. Nothing of the engines is imported, and these functions have not run inside of them: they follow the
names and shapes that the engines' kernels have, and are tested against sleepkern's reference.
"""

from .sglang import LinearAttnKernel
from .vllm import chunk_gated_delta_rule, chunk_kda, fused_recurrent_gated_delta_rule, fused_recurrent_kda

__all__ = [
    "LinearAttnKernel",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda",
]
