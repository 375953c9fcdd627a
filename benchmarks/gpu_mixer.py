"""The operators around a recurrence on a GPU: `python -m benchmarks.gpu_mixer [--json F] [--times]`.

Short convolution, its step and gated norm in Triton against torch's operators in float64: outputs and every gradient,
in three types. --times adds microseconds of each in a CUDA graph beside those of the bytes that it has to move, and
beside torch's operators.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sleepkern.backends.triton import mixer as triton_mixer
from sleepkern.measure.environment import environment
from sleepkern.nn import gated_rms_norm, short_convolution, short_convolution_step
from sleepkern.testing import relative_error

TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
CONVOLUTIONS = ((2, 1, 5, 4), (1, 17, 257, 4), (3, 65, 96, 3), (2, 1000, 128, 4), (1, 40, 20, 8))
"""(B, T, D, W), with a bias, past inputs and silu."""
WIDE = 8
"""A width that the C++ kernels, which rehearse the checks on a CPU, do not have."""
PACKED = (0, 5, 1, 0, 100, 2, 300, 3)
NORMS = (((2, 17, 3, 37), False), ((1, 200, 4, 128), True), ((2, 3, 1500), False), ((1, 3, 8192), False))
"""(shape, whether each head has a weight)."""
BYTES_A_SECOND = 4.2e12
"""What copies of large tensors reach on an H200."""
TOKENS, CHANNELS, HEADS, WIDTH = 8192, 8192, 32, 128


class Check(NamedTuple):
    """A call: its name, its floats, and what makes results of them with a backend."""

    name: str
    inputs: list[Tensor]
    run: Callable[..., tuple[Tensor, ...]]


def calls(dtype: torch.dtype, device: str) -> Iterator[Check]:
    """All calls in a type."""
    torch.manual_seed(0)

    def x(*size: int) -> Tensor:
        return torch.randn(*size).to(device, dtype)

    def w(*size: int) -> Tensor:
        return torch.randn(*size).to(device)

    for B, T, D, W in CONVOLUTIONS:
        inputs = [x(B, T, D), w(D, W), w(D), x(B, W - 1, D)]
        yield Check(f"convolution {B} {T} {D} {W}", inputs, short_convolution)
    offsets = torch.tensor([0, *torch.tensor(PACKED).cumsum(0)], dtype=torch.int32).to(device)

    def packed(*inputs: Tensor, backend: str) -> tuple[Tensor, ...]:
        return short_convolution(*inputs, activation=None, cu_seqlens=offsets, backend=backend)

    slices = x(1, int(offsets[-1]), 120)[..., 40:80]
    yield Check("convolution, packed", [slices, w(40, 4), w(40), x(len(PACKED), 3, 40)], packed)
    for shape, heads in NORMS:
        for first in (False, True):

            def norm(*inputs: Tensor, backend: str, first: bool = first) -> tuple[Tensor, ...]:
                return (gated_rms_norm(*inputs, activation="silu", gate_first=first, backend=backend),)

            inputs = [x(*shape), x(*shape) * 3, w(*shape[2:]) if heads else w(shape[-1])]
            yield Check(f"norm {shape}{' gate first' * first}", inputs, norm)


def checks(device: str = "cuda", backend: str = "triton") -> Iterator[tuple[str, str | None]]:
    """(what, None or what is wrong) of each call: all in bfloat16, every fourth in other types, to compile less."""
    for dtype, tolerance in TOLERANCES.items():
        chosen = list(calls(dtype, device))
        for one in chosen if dtype == torch.bfloat16 else chosen[1::4]:
            if backend == "triton" or one.inputs[1].shape[-1] != WIDE:
                yield f"{str(dtype)[6:]} {one.name}", _attempt(lambda one=one: _difference(one, backend), tolerance)
        yield f"{str(dtype)[6:]} step", _attempt(lambda dtype=dtype: _step(dtype, device, backend), tolerance)


def _attempt(check: Callable[[], float], tolerance: float) -> str | None:
    try:
        difference = check()
    except Exception as error:  # the next check is still worth making
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None if difference <= tolerance else f"differs by {difference:.1e}"


def _difference(one: Check, backend: str) -> float:
    """The largest error of results and gradients; infinite where two runs differ in a bit."""
    found, again = _results(one, backend), _results(one, backend)
    if not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
        return float("inf")
    expected = _results(one._replace(inputs=[t.double() for t in one.inputs]), "torch")
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True) if b.numel())


def _results(one: Check, backend: str) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in one.inputs]
    results = one.run(*inputs, backend=backend)
    upstream = [torch.linspace(-1, 2, t.numel(), device=t.device).view(t.shape).to(t) for t in results]
    return [*(t.detach() for t in results), *torch.autograd.grad(results, inputs, upstream)]


def _step(dtype: torch.dtype, device: str, backend: str) -> float:
    torch.manual_seed(0)
    x, state, weight = (t.to(device) for t in (torch.randn(3, 521), torch.randn(3, 521, 4), torch.randn(521, 4)))
    x, state = x.to(dtype), state.to(dtype)
    expected = short_convolution_step(x.double(), state.double(), weight.double(), backend="torch")
    shifted = torch.cat([state[..., 1:], x[..., None]], dim=-1)
    found = short_convolution_step(x, state, weight, backend=backend)
    return relative_error(found, expected) if torch.equal(state, shifted) else float("inf")


def times(device: str = "cuda") -> Iterator[dict[str, Any]]:
    """Microseconds in a CUDA graph at the sizes of a Qwen3-Next layer, and of the bytes alone."""
    x = torch.randn(1, TOKENS, CHANNELS, device=device).bfloat16()
    gate = torch.randn(1, TOKENS, HEADS, WIDTH, device=device).bfloat16()
    weight, gain = torch.randn(CHANNELS, 4, device=device), torch.randn(WIDTH, device=device)
    y, z = x.clone(), gate.clone()
    rows, state = x[0, :64].clone(), torch.randn(64, CHANNELS, 4, device=device).bfloat16()
    operators: Any = torch.ops.sleepkern
    options = (None, None, None, True)
    for name, run, moved, by_torch in (
        ("convolution", lambda: operators.convolve(x, weight, *options), 2 * x.nbytes,
         lambda: short_convolution(x, weight, backend="torch")),
        ("convolution backward", lambda: operators.convolve_backward(x, weight, *options, y, None), 3 * x.nbytes, None),
        ("gated norm", lambda: operators.gated_norm(gate, z, gain, 1e-6, True, False), 3 * z.nbytes,
         lambda: gated_rms_norm(gate, z, gain, backend="torch")),
        ("gated norm backward", lambda: operators.gated_norm_backward(gate, z, gain, 1e-6, True, False, z),
         5 * z.nbytes, None),
        ("step of 64 rows", lambda: short_convolution_step(rows, state, weight, backend="triton"),
         2 * state.nbytes + 2 * rows.nbytes, None),
    ):  # fmt: skip
        told = {"call": name, "us": _graph_time(run), "us of its bytes": moved / BYTES_A_SECOND * 1e6}
        yield told if by_torch is None else {**told, "us by torch": _graph_time(by_torch)}


def _graph_time(run: Callable[[], Any], repeats: int = 50) -> float:
    """Microseconds of a call in a graph."""
    run()  # compiles
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1000 / repeats


def main() -> int:
    """Run all checks; 1 when one is red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", help="default: triton, and cpu for a rehearsal on a CPU")
    parser.add_argument("--times", action="store_true")
    options = parser.parse_args()
    told: dict[str, Any] = {"environment": environment(torch.device(options.device).type), "checks": {}, "times": []}

    def written() -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(told, indent=1) + "\n")

    rehearsed = options.device == "cpu" and not triton_mixer.interprets()
    for name, fault in checks(options.device, options.backend or ("cpu" if rehearsed else "triton")):
        told["checks"][name] = fault or "ok"
        if fault is not None:
            print(f"{name}: {fault}", flush=True)
        written()
    red = sum(found != "ok" for found in told["checks"].values())
    print(f"{len(told['checks'])} checks of mixer operators, {red} red")
    for row in times(options.device) if options.times else ():
        told["times"].append(row)
        print(", ".join(f"{key} {value:.1f}" if isinstance(value, float) else str(value) for key, value in row.items()))
        written()
    return int(red > 0)


if __name__ == "__main__":
    sys.exit(main())
