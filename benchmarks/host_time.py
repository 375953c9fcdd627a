"""Time of the host in a call: checks, recording, allocations and launches, without the kernels themselves.

    python -m benchmarks.host_time                    # this checkout
    python -m benchmarks.host_time --before FOLDER    # beside another checkout of the package, in turns

With a GPU calls are made on it, so small that the host is what they wait for. Without one, Triton launches on a stub of
libcuda (tests/backends/launches) and tensors of the CPU pass for those of a GPU; calls of CUDA kernels are left out.
Times are those of the calling thread, the shortest of many rounds: a busy machine makes them longer, so compare them
within one run only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
TURNS = 3
"""Processes of each checkout."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, with its compiled module")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(json.dumps(measure(options.worker)))
        return
    folders = {"after": ROOT, **({} if options.before is None else {"before": options.before.resolve()})}
    found: dict[str, dict[str, float]] = {name: {} for name in folders}
    for _ in range(TURNS):
        for name, folder in folders.items():
            for call, seconds in _worker(folder).items():
                found[name][call] = min(seconds, found[name].get(call, seconds))
    for call, after in found["after"].items():
        before = found.get("before", {}).get(call)
        beside = "" if before is None else f"   before {1e6 * before:8.1f} us   {before / after:5.2f} x"
        print(f"{call:<24} {1e6 * after:8.1f} us{beside}")


def _worker(folder: Path) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), "--worker", str(folder)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def measure(folder: Path) -> dict[str, float]:
    """Seconds of the host in each kind of call of the package in a folder."""
    sys.path[:0] = [str(folder), str(ROOT / "tests" / "backends" / "launches")]
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import torch

    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    with contextlib.nullcontext() if gpu else _on_the_stub():
        return {name: _seconds(call) for name, call in _calls("cuda" if gpu else "cpu").items()}


def _on_the_stub() -> contextlib.ExitStack:
    """Triton launches on the stub, and tensors of the CPU pass for those of a GPU."""
    import stub_driver

    stub_driver.install(stub_driver.temporary_folder())
    from sleepkern.autograd import recurrence as autograd
    from sleepkern.backends import triton
    from sleepkern.problems import recurrence as problems

    patches, describe = contextlib.ExitStack(), problems.describe
    patches.enter_context(mock.patch.object(triton, "why_not_on", return_value=None))
    for module in (problems, autograd):
        patches.enter_context(
            mock.patch.object(module, "describe", lambda *a, **b: describe(*a, **b)._replace(device="cuda"))
        )
    with contextlib.suppress(ImportError):  # a checkout that remembers no checks
        from sleepkern.ops import known_calls

        patches.enter_context(mock.patch.object(known_calls, "DEVICES", ("cpu",)))
    return patches


def _calls(device: str) -> dict[str, Callable[[], Any]]:
    """Each kind of call on small tensors."""
    import torch

    import sleepkern

    def inputs(B: int, T: int) -> list[Any]:
        q, k, v = (torch.randn(B, T, 4, 64, device=device).mul_(0.1).bfloat16() for _ in range(3))
        return [q, k, v, -torch.rand(B, T, 4, device=device), torch.rand(B, T, 4, device=device)]

    x, token, window, leaves = inputs(1, 128), inputs(16, 1), inputs(1, 64), inputs(1, 128)
    state, do = torch.zeros(16, 4, 64, 64, device=device), torch.randn(1, 128, 4, 64, device=device).bfloat16()
    for t in leaves:
        t.requires_grad_()

    def without_grad(call: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(call)

    def gradients() -> Any:
        o, _ = sleepkern.gated_delta_rule(*leaves, backend="triton")
        return torch.autograd.grad(o, leaves, do)

    def replay(backend: str) -> Callable[[], Any]:
        return without_grad(lambda: sleepkern.sleep_ingest(*window[1:], passes=8, backend=backend))

    def decode(backend: str) -> Callable[[], Any]:
        return without_grad(lambda: sleepkern.recurrent_step(*token, state, backend=backend))

    calls = {
        "forward": without_grad(lambda: sleepkern.gated_delta_rule(*x, backend="triton")),
        "forward and gradients": gradients,
        "decode, Triton": decode("triton"),
        "replay, Triton": replay("triton"),
        "sleep_blocks": without_grad(_sleep(device)),
    }
    return calls if device == "cpu" else {**calls, "decode, CUDA": decode("cuda"), "replay, CUDA": replay("cuda")}


def _sleep(device: str) -> Callable[[], Any]:
    """One pass of three small blocks over four tokens: on the CPU by C++, on a GPU by one launch."""
    import torch

    from sleepkern.nn import SleepLM
    from sleepkern.sleep.blocks import sleep_blocks

    model = SleepLM(8, 32, 2, 3, window=64, pattern="AG", factor=2)
    model = model.bfloat16().to(device) if device == "cuda" else model
    blocks, h = model.blocks(), torch.randn(1, 4, 32, device=device).to(next(model.parameters()).dtype)
    return lambda: sleep_blocks(h, blocks, passes=1, backend=device)


def _seconds(call: Callable[[], Any], calls: int = 50, rounds: int = 20) -> float:
    """The shortest time of a call in this thread. A GPU has time to catch up after each round."""
    import torch

    times = []
    for _ in range(rounds):
        for _ in range(3):
            call()
        if torch.cuda.is_available() and torch.version.cuda is not None:
            torch.cuda.synchronize()
        begin = time.thread_time()
        for _ in range(calls):
            call()
        times.append((time.thread_time() - begin) / calls)
    return min(times)


if __name__ == "__main__":
    main()
