"""state_dict and load_state_dict: all of it or nothing, in tensors of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_models import build, retrofitted, tokens
from helpers.sleep_models import ouro, sleep_lm
from safetensors.torch import load_file, save_file
from torch import Tensor

from sleepkern.integrations.transformers import patch
from sleepkern.sleep import SleepSession

L = 16
MODELS: dict[str, Any] = {
    "qwen3_next": lambda: build("qwen3_next"),
    "mamba2": lambda: build("mamba2"),
    "falcon_h1": lambda: build("falcon_h1"),
    "kimi_linear": lambda: build("kimi_linear"),
    "retrofit": lambda: retrofitted(decay_bias=1.0),
    "ouro": lambda: ouro()[1],
    "SleepLM": sleep_lm,
}


@pytest.fixture(autouse=True)
def _kernels():
    with patch("qwen3_next", "mamba2", "falcon_h1", "kimi_linear"):
        yield


def session_of(model: Any, length: int = 2 * L + 5, **options: Any) -> SleepSession:
    options = {"eviction": "sliding", "passes": 2, **options}
    ids = tokens(2, length)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return SleepSession(model, L, **options).ingest(ids, mask)


@pytest.mark.parametrize("length", [0, 5, 2 * L + 5])
@pytest.mark.parametrize("name", MODELS)
def test_goes_on_bit_for_bit_and_shares_nothing(name: str, length: int, tmp_path: Path) -> None:
    model = MODELS[name]()
    session, more = session_of(model, length), tokens(2, L, seed=5)
    save_file(session.state_dict(), tmp_path / "session.safetensors")
    state = load_file(tmp_path / "session.safetensors")
    other = SleepSession(model, L, 2, "sliding")
    other.load_state_dict(state)
    for t in (*session.state_dict().values(), *state.values()):  # neither way is anything shared
        t.zero_()
    expected = session_of(model, length).ingest(more).state_dict()
    for one in (session, other):
        found = one.ingest(more).state_dict()
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_differentiable_session_saves_values() -> None:
    session = SleepSession(sleep_lm(), L, differentiable=True).ingest(tokens(1, L))
    assert any(x.state.requires_grad for x in session.memory.fast().values())
    assert not any(t.requires_grad for t in session.state_dict().values())


def without(*names: str) -> Any:
    return lambda state: {name: t for name, t in state.items() if name not in names}


def with_(**changes: Any) -> Any:
    return lambda state: {**state, **changes}


def changed(name: str, change: Any) -> Any:
    return lambda state: {**state, name: change(state[name])}


BAD: dict[str, tuple[Any, str]] = {
    "no layer's conv": (without("0.conv"), "state: got one without 0.conv; expected that of a session of this model"),
    "no layer's state": (without("0.state"), "state: got one without 0.state"),
    "no keys": (without("3.keys", "3.values"), "state: got one without 3.keys, 3.values"),
    "position alone": (lambda state: {"position": state["position"]}, "without 0.conv, 0.state, .* and 2 more"),
    "no position": (without("position"), "state: got no 'position'"),
    "nothing": (lambda state: {}, "state: got no 'position'"),
    "None": (lambda state: None, "state: got a NoneType; expected what state_dict"),
    "an unknown layer": (with_(**{"9.state": torch.zeros(1)}), "with 9.state, which it does not know"),
    "an unknown name": (with_(other=torch.zeros(1)), "with other, which it does not know"),
    "keys of a recurrent layer": (with_(**{"0.keys": torch.zeros(1)}), "with 0.keys, which it does not know"),
    "no tensor": (with_(**{"0.conv": [1.0]}), "state: got a list for '0.conv'; expected a tensor"),
    "another shape": (
        changed("0.state", lambda t: t[:, :1]),
        r"got torch.float32 \[2, 1, 16, 24\] for '0.state'; expected torch.float32 \[B, 4, 16, 24\], as this model has",
    ),
    "fewer dimensions": (changed("0.conv", lambda t: t[0]), "for '0.conv'; expected"),
    "another type": (changed("0.conv", Tensor.bfloat16), r"got torch.bfloat16 .* '0.conv'; expected torch.float32"),
    "another width of keys": (changed("3.keys", lambda t: t[..., :3]), r"'3.keys'; expected .* \[B, 1, tokens, 16\]"),
    "fewer keys": (changed("3.keys", lambda t: t[..., 1:, :]), "kept tokens; expected one number"),
    "rows": (changed("0.state", lambda t: t[:1]), "state: got rows of a batch: .*; expected one number of them"),
    "rows that wait": (changed("waiting", lambda t: t[:1]), "rows of a batch"),
    "a vector for a position": (with_(position=torch.tensor([1, 2])), r"\[2\] for 'position'; expected one whole"),
    "a position below 0": (with_(position=torch.tensor(-1)), "got torch.int64 -1 for 'position'; expected one whole"),
    "a huge position": (with_(position=torch.tensor(2**62)), "for 'position'; expected one whole number"),
    "a position of NaN": (with_(position=torch.tensor(torch.nan)), "got torch.float32 nan for 'position'"),
    "tokens beyond": (changed("waiting", lambda t: t + 60), "tokens beyond the vocabulary of 64 for 'waiting'"),
    "tokens of floats": (changed("waiting", Tensor.float), r"float32 \[2, 5\] for 'waiting'; expected integers"),
    "a mask of twos": (changed("waiting_mask", lambda t: t + 1), "other values than 0 and 1 for 'waiting_mask'"),
    "a short mask": (changed("waiting_mask", lambda t: t[:, 1:]), "for 'waiting_mask'; expected"),
    "a mask of nothing": (without("waiting"), "for 'waiting_mask'; expected none"),
    "a mask of other keys": (changed("kept_mask", lambda t: t[:, 1:]), "kept tokens; expected one number"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return build("qwen3_next")


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_whole(model: Any, spoil: Any, message: str) -> None:
    session = session_of(model)
    before = session.state_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        session.load_state_dict(spoil(session.state_dict()))
    after = session.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    session.read(tokens(2, 3))


def test_states_of_other_sessions_are_refused(model: Any) -> None:
    """Of another model, of one with other heads, and of one that evicts otherwise."""
    state = session_of(model).state_dict()
    for other in (build("mamba2"), build("qwen3_next", linear_num_value_heads=2), sleep_lm()):
        session = SleepSession(other, L, 2, "sliding")
        with pytest.raises(ValueError, match="state: got .*; expected"):
            session.load_state_dict(state)
        assert session.position == 0 and not session.memory.fast()
    with pytest.raises(
        ValueError, match="with 3.keys, 3.values, kept_mask, which it does not know; .* eviction 'hard'"
    ):
        SleepSession(model, L).load_state_dict(state)
