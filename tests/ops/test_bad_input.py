"""Bad input of every kind: one clear error that names the argument, what it got and what it expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import sleepkern
from sleepkern import rules, settings
from sleepkern.testing import Shape, call, make_inputs

Change = Callable[[dict[str, Any]], dict[str, Any]]
RULE = rules.GATED_DELTA_RULE
SHAPE = Shape(B=2, T=5, H=2, HV=4, K=8, V=6)
PACKED = Shape(H=2, HV=4, K=8, V=6, lengths=(2, 3))


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values)


BAD: dict[str, tuple[type[Exception], str, Change]] = {
    "q not a tensor": (TypeError, r"q: got list; expected a torch.Tensor", lambda x: {"q": [1.0]}),
    "q missing": (TypeError, r"q: got NoneType; expected a torch.Tensor", lambda x: {"q": None}),
    "k rank": (ValueError, r"k: got shape \[2, 5, 16\]; expected \[B, T, H, K\]", lambda x: {"k": x["k"].flatten(2)}),
    "q shape": (ValueError, r"q: got shape \[2, 5, 2, 7\]; expected \[2, 5, 2, 8\]", lambda x: {"q": x["q"][..., :7]}),
    "v tokens": (
        ValueError,
        r"v: got shape \[2, 4, 4, 6\]; expected \[2, 5, HV, V\]",
        lambda x: {"v": x["v"][:, :4]},
    ),
    "heads": (
        ValueError,
        r"v: got HV = 3 value heads; expected a multiple of H = 2",
        lambda x: {"v": x["v"][:, :, :3]},
    ),
    "no heads": (
        ValueError,
        r"k: got shape \[2, 5, 0, 8\]; expected H and K of at least 1",
        lambda x: {n: x[n][:, :, :0] for n in "qk"},
    ),
    "g shape": (
        ValueError,
        r"g: got shape \[2, 5, 4, 8\]; expected \[2, 5, 4\]",
        lambda x: {"g": x["g"][..., None].expand(-1, -1, -1, 8)},
    ),
    "g missing": (ValueError, r"g: gated_delta_rule needs it, got None", lambda x: {"g": None}),
    "g positive": (ValueError, r"g: got a log decay of 0.5; expected g <= 0", lambda x: {"g": x["g"] * 0 + 0.5}),
    "g integer": (TypeError, r"g: got torch.int64; expected one of", lambda x: {"g": x["g"].long()}),
    "beta missing": (ValueError, r"beta: gated_delta_rule needs it, got None", lambda x: {"beta": None}),
    "beta shape": (
        ValueError,
        r"beta: got shape \[2, 5, 2\]; expected \[2, 5, 4\]",
        lambda x: {"beta": x["beta"][..., :2]},
    ),
    "types": (
        TypeError,
        r"v: got torch.bfloat16; expected torch.float32, the type of k",
        lambda x: {"v": x["v"].bfloat16()},
    ),
    "integers": (TypeError, r"k: got torch.int32; expected one of", lambda x: {n: x[n].int() for n in "qkv"}),
    "device": (ValueError, r"q: got device meta; expected cpu, where k is", lambda x: {"q": x["q"].to("meta")}),
    "state shape": (
        ValueError,
        r"initial_state: got shape \[1, 4, 8, 6\]; expected \[2, 4, 8, 6\]",
        lambda x: {"initial_state": x["initial_state"][:1]},
    ),
    "state transposed": (
        ValueError,
        r"initial_state: got shape \[2, 4, 6, 8\]; expected \[2, 4, 8, 6\]",
        lambda x: {"initial_state": x["initial_state"].transpose(2, 3)},
    ),
    "state type": (
        TypeError,
        r"initial_state: got torch.bfloat16; expected torch.float32",
        lambda x: {"initial_state": x["initial_state"].bfloat16()},
    ),
    "packed batch": (
        ValueError,
        r"cu_seqlens: got a batch of B = 2; expected B = 1",
        lambda x: {"cu_seqlens": offsets(0, 5)},
    ),
}

BAD_PACKING: dict[str, tuple[type[Exception], str, Change]] = {
    "falling": (ValueError, r"cu_seqlens: got \[0, 6, 5\]; expected offsets that start at 0, never fall and end at",
                lambda x: {"cu_seqlens": offsets(0, 6, 5)}),
    "start": (ValueError, r"cu_seqlens: got \[1, 2, 5\]; expected offsets that start at 0",
              lambda x: {"cu_seqlens": offsets(1, 2, 5)}),
    "end": (ValueError, r"cu_seqlens: got \[0, 2, 4\]; expected .* end at T = 5",
            lambda x: {"cu_seqlens": offsets(0, 2, 4)}),
    "type": (TypeError, r"cu_seqlens: got torch.float32; expected torch.int32 or torch.int64",
             lambda x: {"cu_seqlens": x["cu_seqlens"].float()}),
    "rank": (ValueError, r"cu_seqlens: got shape \[1, 3\]; expected \[n \+ 1\]",
             lambda x: {"cu_seqlens": x["cu_seqlens"][None]}),
    "count": (ValueError, r"initial_state: got shape \[2, 4, 8, 6\]; expected \[1, 4, 8, 6\]",
              lambda x: {"cu_seqlens": offsets(0, 5)}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(case: tuple[type[Exception], str, Change]) -> None:
    error, message, change = case
    x = make_inputs(RULE, SHAPE)
    with pytest.raises(error, match=message):
        call(RULE, {**x, **change(x)})


@pytest.mark.parametrize("case", BAD_PACKING.values(), ids=BAD_PACKING)
def test_bad_packing(case: tuple[type[Exception], str, Change]) -> None:
    error, message, change = case
    x = make_inputs(RULE, PACKED)
    with pytest.raises(error, match=message):
        call(RULE, {**x, **change(x)})


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend: got 'gpu'; expected one of cuda, cpu, triton, chunked, reference"):
        call(RULE, make_inputs(RULE, SHAPE), backend="gpu")


def test_gates_a_rule_has_not() -> None:
    x = make_inputs(RULE, SHAPE)
    arguments = (x["q"], x["k"], x["v"], x["g"], x["beta"], x["initial_state"])
    with pytest.raises(ValueError, match=r"g: delta_rule has no decay, got a tensor \[2, 5, 4\]; expected None"):
        sleepkern.recurrent_step(*arguments, rule=rules.DELTA_RULE)
    with pytest.raises(ValueError, match=r"g: got shape \[2, 5, 4\]; expected \[2, 5, 4, 8\]"):
        sleepkern.recurrent_step(*arguments, rule=rules.KDA)


def test_bad_replay() -> None:
    x = make_inputs(RULE, SHAPE)
    for options, message in (
        ({"passes": 0}, r"passes: got 0; expected an integer of at least 1"),
        ({"passes": 2.0}, r"passes: got 2.0; expected an integer"),
        ({"tol": 0.0}, r"tol: got 0.0; expected None or a number above 0"),
        ({"method": "power"}, r"method: got 'power'; expected one of auto, repeat, wy, affine, rank"),
        (
            {"method": "wy", "backend": "reference"},
            r"backend: got 'reference', which cannot do this call: .*method 'wy'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sleepkern.sleep_ingest(**x, **options)


def test_a_rejected_step_leaves_the_state_alone() -> None:
    x = make_inputs(RULE, SHAPE)
    state = x["initial_state"].clone()
    for change in ({"g": x["g"] + 1}, {"v": x["v"][:, :4]}):
        bad = {**x, **change}
        with pytest.raises(ValueError):
            sleepkern.recurrent_step(bad["q"], bad["k"], bad["v"], bad["g"], bad["beta"], state)
        assert torch.equal(state, x["initial_state"])
    with pytest.raises(ValueError, match=r"^state: got shape"):
        sleepkern.recurrent_step(x["q"], x["k"], x["v"], x["g"], x["beta"], state[:1])


def test_nan_is_found_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make_inputs(RULE, SHAPE)
    x["v"][0, 3, 1, 2] = float("nan")
    call(RULE, x)
    monkeypatch.setattr(settings, "DEBUG", True)
    with pytest.raises(ValueError, match="v: got NaN; expected numbers"):
        call(RULE, x)


def test_values_are_checked_in_a_compiled_graph_too() -> None:
    x = make_inputs(RULE, SHAPE)
    compiled = torch.compile(
        lambda q, k, v, g, b: sleepkern.gated_delta_rule(q, k, v, g, b)[0], fullgraph=True, backend="eager"
    )
    compiled(x["q"], x["k"], x["v"], x["g"], x["beta"])
    with pytest.raises(ValueError, match="expected g <= 0"):
        compiled(x["q"], x["k"], x["v"], -x["g"], x["beta"])
