"""FlashQLA as a peer: called as its function is named, and refused where its kernels have no such case."""

import sys
from types import SimpleNamespace

import pytest
import torch

import sleepkern
from sleepkern import rules
from sleepkern.measure.cases import Case, run
from sleepkern.measure.peers import GPU_PEERS, flash_qla
from sleepkern.testing import Shape, relative_error

HEADS = {"H": 1, "HV": 2, "K": 128, "V": 128}
SHAPE = Shape(T=70, **HEADS)
HALF = {"dtype": torch.bfloat16}
GATED = rules.GATED_DELTA_RULE


@pytest.fixture
def calls(monkeypatch):
    """A stand-in with its names, which computes by the reference."""
    seen = []

    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
        cu_seqlens=None, head_first=False, state_v_first=False, auto_cp=True, enable_fwd_cp_cache=True, cp_context=None,
        force_intra_cp=False,
    ):  # fmt: skip
        seen.append(cu_seqlens)
        return sleepkern.gated_delta_rule(
            q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
            cu_seqlens=cu_seqlens, backend="reference",
        )  # fmt: skip

    monkeypatch.setitem(sys.modules, "flash_qla", SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule))
    return seen


@pytest.mark.parametrize(
    "case",
    [
        Case("forward", GATED, SHAPE, **HALF), Case("train", GATED, SHAPE, **HALF),
        Case("ingest", GATED, SHAPE, passes=2, **HALF), Case("forward", GATED, Shape(lengths=(9, 30), **HEADS), **HALF),
    ],
    ids=["forward", "train", "ingest", "packed"],
)  # fmt: skip
def test_it_is_called_as_its_function_is_named(calls, case):
    inputs = case.inputs()
    actual = flash_qla.prepare(case, inputs, 1)()
    expected = run(case, inputs, backend="reference")
    assert max(relative_error(a, e) for a, e in zip(actual, expected, strict=True) if e is not None) <= 2e-2
    assert calls and all(offsets is inputs["cu_seqlens"] for offsets in calls)


def test_what_its_kernels_lack_is_said(monkeypatch):
    monkeypatch.setattr(flash_qla.importlib.util, "find_spec", lambda name: object())
    for case, device, reason in (
        (Case("forward", GATED, SHAPE, **HALF), "cuda", None),
        (Case("forward", GATED, SHAPE, **HALF), "cpu", "a GPU"),
        (Case("forward", rules.KDA, SHAPE, **HALF), "cuda", "the gated delta rule only"),
        (Case("decode", GATED, Shape(T=1, **HEADS), **HALF), "cuda", "no decode"),
        (Case("forward", GATED, SHAPE), "cuda", "bfloat16"),
        (Case("forward", GATED, Shape(K=64, V=64), **HALF), "cuda", "128 only"),
    ):
        said = flash_qla.why_not(case, device)
        assert said is None if reason is None else reason in said, (case.name, said)
    assert "FlashQLA" in [peer.name for peer in GPU_PEERS]


def test_without_the_package_it_is_left_out(monkeypatch):
    monkeypatch.setattr(flash_qla.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in flash_qla.why_not(Case("forward", GATED, SHAPE, **HALF), "cuda")
