"""bitsandbytes-cpu-fork: its token loop in C++ on the CPU, with gradients, for the delta rule with a decay per head.

The fork takes the import name of bitsandbytes, so it is no extra of sleepkern: `make bench` puts it into a folder
beside the other packages (requirements-peers.txt).
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from ..cases import Case, Result
from .peer import Prepared, in_passes


def why_not(case: Case, device: str) -> str | None:
    if not _installed():
        return "bitsandbytes-cpu-fork is not installed"
    if torch.device(device).type != "cpu":
        return "its op runs on the CPU"
    if not case.rule.delta or case.rule.gate == "channel":
        return "its op has the delta rule with one decay a head"
    if case.shape.H != case.shape.HV:
        return "its op wants as many key as value heads"
    return None


def prepare(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    module = importlib.import_module("bitsandbytes.gdn_cpu")
    _set_threads(module, threads)
    scale = case.shape.K**-0.5

    def forward(x: dict[str, Any]) -> Result:
        result: Result = module.fused_recurrent_gated_delta_rule(
            x["q"],
            x["k"],
            x["v"],
            beta=x["beta"],
            g=x["g"],
            scale=scale,
            initial_state=x["initial_state"],
            output_final_state=True,
        )
        return result

    return in_passes(case, inputs, forward)


def _installed() -> bool:
    """Tells whether it is the fork that this name finds; the original has no recurrence. Nothing is imported."""
    found = importlib.util.find_spec("bitsandbytes")
    return found is not None and found.origin is not None and Path(found.origin).with_name("gdn_cpu.py").exists()


def _set_threads(module: Any, threads: int) -> None:
    """Its library brings an OpenMP of its own, which torch's number of threads does not reach. The build for AVX-512
    has none and computes on one thread."""
    set_threads = getattr(module.load_native(), "omp_set_num_threads", None)
    if set_threads is not None:
        set_threads(threads)
