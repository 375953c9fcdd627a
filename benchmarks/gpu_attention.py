"""The attention of sleepkern.nn on a GPU against float64: `python -m benchmarks.gpu_attention [--json F]`.

Windows of their own and after kept keys, padded rows, heads of several widths, bfloat16 and float16, outputs and every
gradient. A line for each width says which attention was checked: flash-attn where it is installed, else torch's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sleepkern.measure.environment import environment
from sleepkern.nn import attention
from sleepkern.testing import relative_error

SHAPES = ((1, 1), (17, 17), (5, 12), (1, 300), (64, 65), (1000, 1000), (250, 1250))
"""(T, S)."""
WIDTHS = (16, 64, 128, 256)
TOLERANCES = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
FLOOR = 1e-3
"""Gradients are compared relative to the largest of all, times this at least: those of one key's scores are 0."""


def checks(device: str = "cuda", widths: tuple[int, ...] = WIDTHS) -> Iterator[tuple[str, str | None]]:
    """(what, None or what is wrong) of each call."""
    capability = attention.capability_of(torch.device(device))
    for dtype, tolerance in TOLERANCES.items():
        for width in widths:
            print(attention.explain_attention(dtype, width, capability), flush=True)
            for T, S in SHAPES:
                for padded in (False, True):
                    name = f"{str(dtype)[6:]} width={width} T={T} S={S}{' padded' * padded}"
                    yield name, _check(device, dtype, width, T, S, padded, tolerance)


def _check(device: str, dtype: torch.dtype, width: int, T: int, S: int, padded: bool, tolerance: float) -> str | None:
    torch.manual_seed(T + S)
    x = [torch.randn(2, 3, n, width, device=device).to(dtype).requires_grad_() for n in (T, S, S)]
    mask = None
    if padded:
        mask = torch.ones(2, S, device=device)
        mask[0, : S // 2] = 0
    try:
        found = _with_gradients(x, mask)
        wide = [t.detach().double().requires_grad_() for t in x]
        expected = _with_gradients(wide, mask)
    except Exception as error:  # the next check is still worth making
        return f"{type(error).__name__}: {str(error)[:300]}"
    largest = max(float(t.abs().max()) for t in expected[1:])
    errors = [relative_error(found[0], expected[0])]
    errors += [float((a - b).abs().max()) / max(largest, FLOOR) for a, b in zip(found[1:], expected[1:], strict=True)]
    return None if max(errors) <= tolerance else f"differs by {max(errors):.1e}"


def _with_gradients(x: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """The output and the gradients of q, k and v in float64, 0 at padding."""
    out = attention.attend(x[0], x[1], x[2], mask).double()
    if mask is not None:
        out = out * mask[:, None, -out.shape[2] :, None]
    return [out.detach(), *(t.double() for t in torch.autograd.grad(out.square().sum(), x))]


def main() -> int:
    """Run all checks; 1 when one is red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, nargs="+", help="of heads  [default: 16 64 128 256]")
    options = parser.parse_args()
    found = {name: fault or "ok" for name, fault in checks(options.device, options.width or WIDTHS)}
    faults = {name: fault for name, fault in found.items() if fault != "ok"}
    for name, fault in faults.items():
        print(f"{name}: {fault}")
    print(f"{len(found)} checks of attention, {len(faults)} red")
    if options.json is not None:
        kind = torch.device(options.device).type
        options.json.write_text(json.dumps({"environment": environment(kind), "checks": found}, indent=1) + "\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
