"""Where training runs: one process, or several under torchrun with torch's own DDP or FSDP2."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .sleeper import Sleeper

KINDS = ("single", "ddp", "fsdp")


@dataclass(frozen=True)
class Placement:
    """device: of this process. kind: "single", "ddp" (a copy in each process) or "fsdp" (FSDP2: a shard in each)."""

    device: torch.device
    kind: str = "single"
    rank: int = 0
    processes: int = 1

    def wrap(self, sleeper: Sleeper) -> nn.Module:
        """The module to call, on the device."""
        sleeper = sleeper.to(self.device)
        if self.kind == "ddp":
            return DistributedDataParallel(sleeper)
        if self.kind == "fsdp":
            from torch.distributed.fsdp import fully_shard  # a second of imports

            for block in sleeper.model.layers:
                fully_shard(block)
            fully_shard(sleeper)
        return sleeper

    def part(self, size: int) -> slice:
        """This process' rows of a batch of `size`."""
        each = size // self.processes
        return slice(self.rank * each, (self.rank + 1) * each)

    def summed(self, t: Tensor) -> Tensor:
        """Over all processes."""
        if self.kind != "single":
            dist.all_reduce(t)
        return t

    def precision(self) -> AbstractContextManager[Any]:
        """bfloat16 products on a GPU, where the residual stream and fast weights stay float32; float32 on the CPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0


def placed(device: str = "cpu", kind: str = "single") -> Placement:
    """From the environment that torchrun makes; starts the process group for "ddp" and "fsdp".

    Raises:
        ValueError: no such kind, or not under torchrun.
    """
    if kind not in KINDS:
        raise ValueError(f"distributed: got {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "single":
        return Placement(torch.device(device))
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(f"distributed: got {kind!r} in a process of its own; expected to be started by torchrun")
    here = torch.device(device)
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    return Placement(here, kind, dist.get_rank(), dist.get_world_size())
