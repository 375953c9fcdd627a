"""One of several processes of a training; torchrun starts it for tests: training_process.py KIND FILE."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.training import TINY

from sleepkern.experiments.training import Run, Training, current_placement

kind, out = sys.argv[1], Path(sys.argv[2])
torch.set_num_threads(1)
training = Training(Run(TINY, passes=3), current_placement("cpu", kind))
loss = training.placement.sum_over_processes(training.step()) / training.placement.processes
training.step()
accuracy = training.measure()
training.save(out.with_suffix(".checkpoint"))
if training.placement.is_main:
    weights = torch.load(out.with_suffix(".checkpoint"))["weights"]
    torch.save({"loss": loss, "weights": weights, "accuracy": accuracy}, out)
dist.destroy_process_group()
