"""One of several processes of a training; torchrun starts it for tests: training_process.py KIND FILE."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.training import TINY

from sleepkern.experiments.training import Run, Training, placed

kind, out = sys.argv[1], Path(sys.argv[2])
torch.set_num_threads(1)
training = Training(Run(TINY, passes=3), placed("cpu", kind))
loss = training.placement.summed(training.step()) / training.placement.processes
training.step()
accuracy = training.measure()
training.save(out.with_suffix(".checkpoint"))
if training.placement.first:
    weights = torch.load(out.with_suffix(".checkpoint"))["weights"]
    torch.save({"loss": loss, "weights": weights, "accuracy": accuracy}, out)
dist.destroy_process_group()
