"""Mamba-2 of transformers: the step of one token, and how older versions call the scan."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.hf_models import CLOSE, MAMBA, build, cached, globals_of, spy_on_sleepkern, tokens
from torch import Tensor, nn
from transformers import DynamicCache

from sleepkern.integrations.transformers import mamba2, patch, unpatch
from sleepkern.testing import relative_error

SCAN, STEP = "mamba2_chunk_scan", "mamba2_selective_state_update"


@pytest.fixture(autouse=True)
def _start_and_end_unpatched() -> Iterator[None]:
    unpatch()
    yield
    unpatch()


def arguments(groups: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """As a mixer gives them: what a head shares is expanded."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    B, H, P, N = 2, 4, 16, 8
    return {
        "state": normal(B, H, P, N).float(),
        "hidden_states": normal(B, H, P),
        "dt": normal(B, H, 1).expand(-1, -1, P),
        "A": (-torch.rand(H, generator=generator))[:, None, None].expand(-1, P, N),
        "B": normal(B, groups, N),
        "C": normal(B, groups, N),
        "D": normal(H).float()[:, None].expand(-1, P),
        "dt_bias": normal(H).float()[:, None].expand(-1, P),
        "dt_softplus": True,
        "z": normal(B, H, P),
    }


@pytest.mark.parametrize("S_in_rows", [True, False])
@pytest.mark.parametrize("left_out", [(), ("z",), ("D", "dt_bias", "z")], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_step_is_stocks(
    groups: int, left_out: tuple[str, ...], S_in_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, run, ours = [], mamba2._step, spy_on_sleepkern(monkeypatch)
    monkeypatch.setattr(mamba2, "_step", lambda call: steps.append(1) or run(call))
    given = {name: x for name, x in arguments(groups).items() if name not in left_out}
    stock_state, state = given["state"].clone(), given["state"].clone()
    state = state.mT.contiguous().mT if S_in_rows else state
    expected = getattr(globals_of("mamba2"), STEP)(**{**given, "state": stock_state})
    with patch("mamba2"):
        step, junk = getattr(globals_of("mamba2"), STEP), {"use_cache": True}
        found = step(state, *list(given.values())[1:6], **{n: given[n] for n in list(given)[6:]}, **junk)
    assert steps and ours == ["recurrent_step"] * S_in_rows
    assert relative_error(found, expected) < CLOSE and relative_error(state, stock_state) < CLOSE
    assert relative_error(given["state"], state) > 0.01


def test_a_step_in_half_precision_is_nearer_than_stocks() -> None:
    given = arguments(dtype=torch.bfloat16)
    exact = {n: x.double() if torch.is_tensor(x) else x for n, x in given.items()}
    stock = inspect.unwrap(getattr(globals_of("mamba2"), STEP))
    expected = stock(**exact)
    errors = [
        relative_error(f(**{**given, "state": state}), expected)
        for f, state in (
            (mamba2.one_step(stock), given["state"].clone()),
            (mamba2.one_step(stock), given["state"].mT.contiguous().mT),
            (stock, given["state"].clone()),
        )
    ]
    assert max(errors[:2]) < 4e-3 and max(errors[:2]) < errors[2]


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"state": torch.randn(2, 4, 16, 9)[..., :8]}, True),
        ({"dt": torch.randn(2, 4, 16)}, True),
        ({"A": -torch.rand(4, 16, 8)}, True),
        ({"dt_bias": torch.rand(4, 16)}, True),
        ({"hidden_states": torch.zeros(2, 4, 16, requires_grad=True)}, False),
        ({"hidden_states": torch.zeros(2, 4, 16, device="meta")}, False),
    ],
    ids=["state", "dt", "A", "dt_bias", "gradient", "device"],
)
def test_other_steps_stay_stocks(changed: dict[str, Tensor], same: bool) -> None:
    given, calls = arguments() | changed, []
    stock = inspect.unwrap(getattr(globals_of("mamba2"), STEP))

    def spied(**options: Any) -> Any:
        calls.append(1)
        return stock(**options) if same else None

    expected = stock(**{**given, "state": given["state"].clone()}) if same else None
    out = mamba2.one_step(spied)(**given)
    assert calls and (not same or torch.equal(out, expected))


@torch.no_grad()
@pytest.mark.parametrize("family", MAMBA)
def test_models_step_in_their_caches_buffers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(family), tokens(2, 12)
    cache = DynamicCache(config=model.config)
    steps: list[int] = []
    calls = spy_on_sleepkern(monkeypatch)
    run = mamba2._step
    monkeypatch.setattr(mamba2, "_step", lambda call: steps.append(call.state.data_ptr()) or run(call))
    with patch(model):
        model(ids, **cached(model, cache), use_cache=True)
        assert not steps
        calls.clear()
        model(ids[:, :1], **cached(model, cache), use_cache=True)
    buffers = [x.recurrent_states[0] for x in cache.layers if getattr(x, "recurrent_states", None)]
    assert steps == [x.data_ptr() for x in buffers if x is not None] and steps
    assert calls == ["recurrent_step"] * len(steps)  # the scan left S in rows


OLDER = """
from torch import nn

class Mixer(nn.Module):
    def forward(self, x, dt, A, B, C, D, dt_bias, final=True):
        return mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=16, D=D, z=None, seq_idx=None, return_final_states=final, dt_bias=dt_bias,
            dt_softplus=True,
        )
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_older_files_call_mamba_ssm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4.57 to 5.10 on a GPU: a global of the file, given by mamba_ssm, None without it."""

    def stays(*args: Any, **options: Any) -> None:
        raise RuntimeError("0 active drivers")

    module = ModuleType("older_mamba2")
    vars(module).update(mamba_chunk_scan_combined=stays, selective_state_update=stays, is_fast_path_available=True)
    exec(OLDER, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    model, calls, x = nn.Sequential(module.Mixer()), spy_on_sleepkern(monkeypatch), arguments(dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    given = [torch.randn(2, 30, *shape, generator=generator).to(dtype) for shape in ((4, 16), (4,), (2, 8), (2, 8))]
    given = [*given[:2], x["A"][:, 0, 0], *given[2:], x["D"][:, 0], x["dt_bias"][:, 0]]
    names = ("D", "dt_bias")
    stock = inspect.unwrap(getattr(globals_of("mamba2"), SCAN))
    expected = stock(
        *given[:5], chunk_size=16, **dict(zip(names, given[5:], strict=True)), dt_softplus=True,
        return_final_states=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="0 active drivers"):
        model[0](*given)
    with patch(model):
        y, state = model[0](*given)
        alone = model[0](*given, final=False)
        assert module.selective_state_update is stays
    close = CLOSE if dtype == torch.float32 else 8e-3
    assert y.dtype == alone.dtype == dtype and torch.equal(y, alone) and calls == ["simple_gla"] * 2
    assert relative_error(y, expected[0]) < close and relative_error(state, expected[1]) < close
    assert module.mamba_chunk_scan_combined is stays
    module.mamba_chunk_scan_combined = None
    with pytest.raises(ValueError, match="expected a model with a recurrence that sleepkern has"):
        patch(model)


def test_a_family_that_computes_inline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformers.models.bamba.modeling_bamba"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ImportError, match="'bamba' of this version of transformers has no function to replace"):
        patch("bamba")
