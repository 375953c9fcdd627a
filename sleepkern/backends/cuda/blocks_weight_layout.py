"""The order in which the CUDA kernel for a stack of blocks reads weights.

csrc/cuda/blocks/weight_order.h computes the order, beside the kernel whose schedule it follows. The order is a list of
indices, made once for a stack's sizes and a plan: changed weights are then put in order by one indexing. It needs a
sleepkern._C with CUDA; `why_not` refuses a call before it is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..native.module import _C
from .blocks_plan import TILE, BlocksPlan, LayerShape, call_of, share, up


class Order(NamedTuple):
    """The sources of the elements in the streams of all warps.

    indices  [n] int32 into [0, w_0, w_1, ...], a zero and then all weights of the stack: fragments of 16 outputs x 16
             terms, warp after warp, CTA after CTA
    stages   [cluster * warps, 2] int32: the first stage of a warp's stream, and how many stages it has
    """

    indices: Tensor
    stages: Tensor


def order(d: int, shapes: tuple[LayerShape, ...], device: torch.device, p: BlocksPlan) -> Order:
    """Compute the order of these layers for a plan; the plan's group and ring do not change it."""
    call = call_of(p, 0)
    call.d = d
    found = _C.CudaWeightOrder(call, [share(s, p.cluster) for s in shapes], [s.hidden for s in shapes])
    stages = torch.tensor(found.stages, dtype=torch.int32, device="cpu").view(-1, 2)
    elements = _C.CudaBlocksConstants.STAGE // torch.bfloat16.itemsize
    indices = torch.empty(int(stages[:, 1].sum()) * elements, dtype=torch.int32, device="cpu")
    found.copy_indices(indices.data_ptr())
    return Order(indices.to(device), stages.to(device))


def heads_of(x: Tensor, heads: int, width: int, cluster: int, rank: int) -> Tensor:
    """Take the rows of one CTA's heads, each head with zeros up to a multiple of 16 rows."""
    local = x.unflatten(0, (heads, width))[rank * (heads // cluster) : (rank + 1) * (heads // cluster)]
    return F.pad(local, (0, 0, 0, up(width, TILE) - width)).flatten(0, 1)
