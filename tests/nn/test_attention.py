"""The attention of nn by flash-attn's functions, of which a stand-in computes what flash-attn documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.flash_attn_stand_in import Calls, install
from torch import Tensor

from sleepkern.nn import SleepLM, WindowAttention, attention
from sleepkern.nn.attention import FLASH_2, FLASH_4, TORCH, attend, explain_attention, why_not
from sleepkern.sleep import SleepSession
from sleepkern.state import KVState
from sleepkern.testing import relative_error

CLOSE = 2e-2
"""bfloat16 outputs, of two sums in another order."""
VERSIONS = {2: {"flash-attn": "2.8.3"}, 4: {"flash-attn-4": "4.0.0b36"}}


def arrange(monkeypatch: pytest.MonkeyPatch, version: int, capability: tuple[int, int] = (9, 0)) -> Calls:
    """A machine with a GPU of that capability and one release of flash-attn."""
    calls = install(monkeypatch, version)
    monkeypatch.setattr(attention, "installed", VERSIONS[version].get)
    monkeypatch.setattr(attention, "capability_of", lambda device: capability)
    return calls


def inputs(B: int, H: int, T: int, S: int, D: int = 16) -> list[Tensor]:
    return [torch.randn(B, H, n, D).bfloat16().requires_grad_() for n in (T, S, S)]


def both(monkeypatch: pytest.MonkeyPatch, version: int, x: list[Tensor], mask: Tensor | None = None) -> Any:
    """Output and gradients by flash-attn and by torch in float32."""
    results = []
    for flash in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            calls = arrange(patch, version) if flash else None
            y = x if flash else [t.detach().float().requires_grad_() for t in x]
            out = attend(*y, mask)
            rest = 1.0 if mask is None else mask[:, None, -out.shape[2] :, None]
            loss = (out.float() * rest).square().sum()
            results.append((out.detach().float() * rest, torch.autograd.grad(loss, y)))
            assert calls is None or len(calls.made) == 1
    return results


def apart(found: Any, expected: Any) -> float:
    """The largest difference of all gradients, relative to the largest gradient: one of a single key's score is 0."""
    largest = max(float(b.abs().max()) for b in expected)
    return max(float((a.float() - b).abs().max()) for a, b in zip(found, expected, strict=True)) / largest


@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (17, 17), (5, 12), (1, 33), (64, 65)])
def test_full_windows(monkeypatch: pytest.MonkeyPatch, version: int, T: int, S: int) -> None:
    """The last query sees the last key, whether there are keys from before or not."""
    (got, gradients), (expected, others) = both(monkeypatch, version, inputs(2, 3, T, S))
    assert relative_error(got, expected) < CLOSE
    assert apart(gradients, others) < CLOSE


@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize("S", [9, 16])
def test_padding(monkeypatch: pytest.MonkeyPatch, version: int, S: int) -> None:
    """Rows with padding anywhere, one without a token; gradients are finite though flash-attn leaves NaN behind."""
    T, mask = 9, torch.ones(4, S)
    mask[0, S - 9 : S - 4] = mask[1, S - 6] = mask[3] = 0
    mask[2, : S - 9] = 0
    (got, gradients), (expected, others) = both(monkeypatch, version, inputs(4, 2, T, S), mask)
    assert relative_error(got, expected) < CLOSE
    assert apart(gradients, others) < CLOSE


def test_a_causal_mask_aligned_to_the_first_key_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract of flash-attn before 2.1, which `FLASH_2.first` refuses."""
    x = inputs(1, 2, 5, 12)
    (_, _), (expected, _) = both(monkeypatch, 2, x)
    q, k, v = (t.detach() for t in x)
    old = attend(torch.cat([q, q.new_zeros(1, 2, 7, 16)], dim=2).float(), k.float(), v.float())[:, :, :5]
    assert relative_error(old, expected) > 10 * CLOSE
    monkeypatch.setattr(attention, "installed", {"flash-attn": "2.0.9"}.get)
    assert why_not(FLASH_2, torch.bfloat16, 64, (8, 0)) == "2.0.9 is older than 2.1"


def test_modules_and_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer goes on from kept keys; a sleeping model answers as with torch's attention, sliding and padded too."""
    torch.manual_seed(0)
    model = SleepLM(32, width=32, blocks=2, window=64).bfloat16()
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    ids, mask = torch.randint(32, (2, 60)), torch.ones(2, 60, dtype=torch.int64)
    mask[1, :7] = 0

    def answers() -> list[Tensor]:
        slid = SleepSession(model, 16, passes=2, eviction="sliding", backend="modules").ingest(ids)
        padded = SleepSession(model, 16, passes=2).ingest(ids, mask)
        return [slid.read(ids[:, :9]), padded.read(ids[:, :9])]

    with torch.no_grad():
        expected = answers()
        calls = arrange(monkeypatch, 4)
        got = answers()
    assert {"flash-attn 4", "flash-attn 4 packed"} <= {name for name, _, _ in calls.made}
    assert any(T != S for _, T, S in calls.made)
    assert all(relative_error(a.float(), b.float()) < 5e-2 for a, b in zip(got, expected, strict=True))
    layer = WindowAttention(32, 2).bfloat16()
    before = KVState(*torch.randn(2, 1, 2, 5, 16).bfloat16())
    assert layer(torch.randn(1, 3, 32).bfloat16(), before)[0].shape == (1, 3, 32)


def test_autocast_takes_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms return float32 under autocast, which flash-attn refuses."""
    calls, layer = arrange(monkeypatch, 2), WindowAttention(32, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = layer(torch.randn(1, 5, 32))
    assert len(calls.made) == 1 and out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("have", "dtype", "width", "capability", "expected"),
    [
        ({}, torch.bfloat16, 64, None, f"{TORCH} (flash-attn runs on a GPU)"),
        ({}, torch.bfloat16, 64, (9, 0), f"{TORCH} (flash-attn-4: not installed; flash-attn: not installed)"),
        (VERSIONS[2], torch.bfloat16, 64, (9, 0), "flash-attn 2.8.3"),
        (VERSIONS[4] | VERSIONS[2], torch.float16, 256, (9, 0), "flash-attn-4 4.0.0b36"),
        (VERSIONS[4] | VERSIONS[2], torch.float16, 256, (10, 0), "flash-attn 2.8.3"),
        (VERSIONS[4], torch.float16, 64, (8, 6), "not made for compute capability 8.6"),
        (VERSIONS[2], torch.float32, 64, (8, 0), "takes bfloat16 and float16, not torch.float32"),
        (VERSIONS[2], torch.bfloat16, 36, (8, 0), "takes heads of multiples of 8 up to 256, not of 36"),
        (VERSIONS[2], torch.bfloat16, 512, (8, 0), "takes heads of multiples of 8 up to 256, not of 512"),
    ],
)
def test_which_runs(
    monkeypatch: pytest.MonkeyPatch, have: dict[str, str], dtype: Any, width: int, capability: Any, expected: str
) -> None:
    monkeypatch.setattr(attention, "installed", have.get)
    assert expected in explain_attention(dtype, width, capability)


def test_a_graph_leaves_flash_attn_4_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions compile kernels in Python, which torch.compile cannot record."""
    monkeypatch.setattr(attention, "installed", (VERSIONS[4] | VERSIONS[2]).get)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert why_not(FLASH_4, torch.bfloat16, 64, (9, 0)) is not None
    assert attention.release_for(torch.bfloat16, 64, (9, 0)) is FLASH_2
