"""The order of weights that csrc/cuda/blocks/weight_order.h hands out holds each weight of a stack exactly once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from sleepkern.backends.cuda import blocks_plan as planning
from sleepkern.backends.cuda.blocks_plan import TILE, BlocksPlan, LayerShape, up
from sleepkern.backends.cuda.blocks_weight_layout import order

ATTENTION = LayerShape(False, 8, 8, 16, 16, 1, 200)
DELTA = LayerShape(True, 8, 8, 20, 24, 4, 96)
GROUPED = LayerShape(True, 8, 16, 7, 5, 3, 130)
"""Widths of heads and of hidden columns that are not multiples of 16, and more value heads than heads."""
STACKS = {"attention": (ATTENTION,), "delta": (DELTA,), "both": (GROUPED, ATTENTION, DELTA)}


def weights_of(d: int, s: LayerShape) -> int:
    """Elements of all weights of a layer."""
    values = s.value_heads * s.V
    into = 2 * s.heads * s.K + values + (values + 2 * s.value_heads if s.recurrent else 0)
    return d * (into + values + 2 * s.hidden)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("d", [40, 128, 272])
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_each_weight_appears_once(
    on: Callable[..., AbstractContextManager[None]], stack: str, d: int, cluster: int
) -> None:
    shapes, columns = STACKS[stack], up(-(-d // cluster), TILE)
    expected = torch.arange(1, 1 + sum(weights_of(d, s) for s in shapes), dtype=torch.int32)
    with on():
        for tiles in (2, 8):
            groups_at_once = (1 + planning._C.cuda_blocks_paired(tiles)) * planning._C.CudaBlocksConstants.WARPS
            most = min(columns // TILE, groups_at_once // cluster)
            for exchange in {1, min(2, most), most}:
                plan = BlocksPlan(cluster, 1, tiles, columns, exchange, 2)
                found = order(d, shapes, torch.device("cpu"), plan)
                assert torch.equal(found.indices[found.indices != 0].sort().values, expected)
                # the streams of all warps follow each other without gaps
                ends = found.stages.sum(1)
                assert found.stages[0, 0] == 0 and torch.equal(found.stages[1:, 0], ends[:-1])
