"""The processes of a training: one, or several under torchrun with torch's own DDP or FSDP2."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .sleep_module import SleepModule

KINDS = ("single", "ddp", "fsdp")


@dataclass(frozen=True)
class Placement:
    """The device of this process, and its rank among the processes.

    kind: "single", "ddp" (a copy of the model in each process) or "fsdp" (FSDP2: a shard in each process).
    """

    device: torch.device
    kind: str = "single"
    rank: int = 0
    processes: int = 1

    def wrap(self, module: SleepModule) -> nn.Module:
        """The module on the device, wrapped for several processes."""
        module = module.to(self.device)
        if self.kind == "ddp":
            return DistributedDataParallel(module)
        if self.kind == "fsdp":
            from torch.distributed.fsdp import fully_shard  # a second of imports

            for block in module.model.layers:
                fully_shard(block)
            fully_shard(module)
        return module

    def shard(self, size: int) -> slice:
        """The rows of this process in a batch of `size` rows."""
        rows = size // self.processes
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def sum_over_processes(self, t: Tensor) -> Tensor:
        """The sum of t over all processes, in place."""
        if self.kind != "single":
            dist.all_reduce(t)
        return t

    def precision(self) -> AbstractContextManager[Any]:
        """bfloat16 products on a GPU, where the residual stream and fast weights stay float32; float32 on the CPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    @property
    def is_main(self) -> bool:
        """Tells whether this process writes files and prints."""
        return self.rank == 0


def current_placement(device: str = "cpu", kind: str = "single") -> Placement:
    """The placement by the environment of torchrun; "ddp" and "fsdp" start the process group.

    Raises:
        ValueError: an unknown kind, or several processes without torchrun.
    """
    if kind not in KINDS:
        raise ValueError(f"distributed: got {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "single":
        return Placement(torch.device(device))
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(f"distributed: got {kind!r} in a process of its own; expected to be started by torchrun")
    local = torch.device(device)
    if local.type == "cuda":
        local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if local.type == "cuda" else "gloo")
    return Placement(local, kind, dist.get_rank(), dist.get_world_size())
