"""A fault planted in a kernel of the mixer's operators is seen. Each runs in a copy of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_interpreted_faults import ANCHOR, FOLDER, MIXER, faulty
from torch import Tensor

from sleepkern import settings
from sleepkern.backends.triton import mixer
from sleepkern.nn import gated_rms_norm, short_convolution, short_convolution_step
from sleepkern.testing import relative_error

pytestmark = pytest.mark.mutation
BOUND = 1e-5


def results(call: Callable[..., Any], backend: str, *leaves: Tensor) -> list[Tensor]:
    """Results of a call and every gradient, in float64 for torch's operators."""
    torch.manual_seed(1)
    inputs = [t.detach().to(torch.float64 if backend == "torch" else t.dtype).requires_grad_() for t in leaves]
    found = call(*inputs, backend=backend)
    found = list(found) if isinstance(found, tuple) else [found]
    upstream = [torch.randn(t.shape).to(t) for t in found]
    return [*found, *torch.autograd.grad(found, inputs, upstream)]


def worst(call: Callable[..., Any], *leaves: Tensor) -> float:
    pairs = zip(results(call, "triton", *leaves), results(call, "torch", *leaves), strict=True)
    return max(float("inf") if torch.isnan(a).any() else float(relative_error(a, b)) for a, b in pairs)


def convolution() -> float:
    """Packed sequences, the first of fewer tokens than the width, after inputs of an earlier call."""
    offsets = torch.tensor([0, 2, 2, 32, 72])

    def call(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return short_convolution(x, weight, bias, past, cu_seqlens=offsets, backend=backend)

    return worst(call, torch.randn(1, 72, 3), torch.randn(3, 4), torch.randn(3), torch.randn(4, 3, 3))


def step() -> float:
    x, state, weight = torch.randn(2, 5), torch.randn(2, 5, 3), torch.randn(5, 3)
    exact = short_convolution_step(x.double(), state.double(), weight.double(), backend="torch")
    return float(relative_error(short_convolution_step(x, state, weight, backend="triton"), exact))


def norm() -> float:
    def call(x: Tensor, gate: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, ...]:
        orders = (False, True)
        return tuple(gated_rms_norm(x, gate, weight, gate_first=first, backend=backend) for first in orders)

    return worst(call, torch.randn(1, 5, 2, 6), torch.randn(1, 5, 2, 6), torch.randn(2, 6))


class Fault(NamedTuple):
    """What happens to the line below `# mutant: name`, and the error that it must make large."""

    old: str | None
    new: str
    error: Callable[[], float]


FAULTS = {
    "convolution-slots-of-packed-sequences": Fault(r" - \(.*\)\.to\(tl\.int32\)", "", convolution),
    "past-of-another-row": Fault(r" - 1 \+ u\)", " - 2 + u)", convolution),
    "taps-in-reverse": Fault(r"ws\[W - 1 - i\]", "ws[i]", convolution),
    "last-inputs-of-the-wrong-row": Fault(r"\(W - 1\) \+ m", "W + m", convolution),
    "slope-of-the-sigmoid-alone": Fault(r"s \* \(1\.0 \+ z \* \(1\.0 - s\)\)", "s", convolution),
    "dx-of-earlier-tokens": Fault(r"ws\[W - 1 - i\]", "ws[i]", convolution),
    "dweight-of-the-wrong-tap": Fault(r"xs\[r \+ i\]", "xs[r + W - 1 - i]", convolution),
    "dlast-of-the-wrong-row": Fault(r"\(W - 1\)", "W", convolution),
    "dpast-is-not-stored": Fault(None, "", convolution),
    "step-without-shift": Fault(r"state \+ i", "state + i - 1", step),
    "rows-of-another-head": Fault(r"group \+ ", "", norm),
    "slope-of-the-gate": Fault(r", s \* .*", ", s", norm),
    "mean-over-padding": Fault(r"DIMS\.V", "DIMS.VP", norm),
    "dweight-without-the-gate": Fault(r" \* a", "", norm),
    "dx-without-the-mean": Fault(r"r \* \(dn - .*", "r * dn", norm),
    "dgate-without-the-weight": Fault(r" \* w", "", norm),
}


@pytest.fixture(autouse=True)
def requested() -> Iterator[None]:
    """The process requests Triton, so that operators on CPU tensors go to its interpreter."""
    with settings.backend("triton"):
        yield


def test_every_anchor_of_a_mixer_has_its_fault() -> None:
    anchors = [name for file in MIXER for name in ANCHOR.findall((FOLDER / file).read_text())]
    assert sorted(anchors) == sorted(FAULTS)


@pytest.mark.parametrize(
    "name", [name if i % 4 == 0 else pytest.param(name, marks=pytest.mark.hardening) for i, name in enumerate(FAULTS)]
)
def test_a_fault_planted_in_a_mixer_is_seen(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    torch.manual_seed(0)
    sound = fault.error()
    with faulty(tmp_path, name, fault, mixer, "mixer_launch"):
        torch.manual_seed(0)
        found = fault.error()
    assert sound < BOUND < found
