"""Sessions over models inside of wrappers, of composite ones, and over what a stack cannot be made of."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.hf_models import OWN_SIZES, SIZES, build, tokens
from helpers.sleep_models import sleep_lm
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from sleepkern.integrations.transformers import patch
from sleepkern.sleep import CausalLMAdapter, SleepSession

L = 16


class Peft(nn.Module):
    """As peft's PeftModel: the model itself lies deeper, with adapters in its layers."""

    def __init__(self, model: nn.Module, is_prompt_learning: bool = False) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})
        self.active_peft_config = SimpleNamespace(is_prompt_learning=is_prompt_learning)

    def get_base_model(self) -> nn.Module:
        return self.base_model["model"]


def answers(session: SleepSession) -> list[Tensor]:
    session.ingest(tokens(2, 2 * L + 3))
    return [session.read(tokens(2, 4, 4)), session.generate(tokens(2, 4, 4), max_new_tokens=3, num_beams=2)]


@pytest.fixture
def _one_process() -> Iterator[None]:
    """Of a group of its own, as DistributedDataParallel wants."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS = [nn.DataParallel, Peft, lambda model: Peft(nn.DataParallel(model)), DistributedDataParallel]


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_models(wrap: Any) -> None:
    model = build("qwen3_5")
    with patch(model):
        found, expected = answers(SleepSession(wrap(model), L, 2)), answers(SleepSession(model, L, 2))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("wrap", [nn.DataParallel, DistributedDataParallel])
def test_a_wrapped_model_of_our_own(wrap: Any) -> None:
    model, ids = sleep_lm(), tokens(2, 2 * L)
    found, expected = (SleepSession(m, L).ingest(ids).read(ids[:, :5]) for m in (wrap(model), model))
    assert torch.equal(found, expected)


def test_the_text_of_a_composite_model() -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, **OWN_SIZES.get("qwen3_5", {})}
    vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
    whole = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=sizes, vision_config=vision)).eval()
    before = dict(whole.named_modules())
    alone = build("qwen3_5")
    alone.model, alone.lm_head = whole.model.language_model, whole.lm_head
    with patch("qwen3_5"):
        session = SleepSession(whole, L, 2)
        found, expected = answers(session), answers(SleepSession(alone, L, 2))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert session.model is whole and dict(whole.named_modules()) == before
    ids = tokens(1, 5)
    torch.testing.assert_close(SleepSession(whole, L).read(ids), whole(ids).logits)


class Layer(nn.Linear):
    """Takes the memory, and writes nothing into it."""

    def forward(self, h: Tensor, cache: Any = None) -> Tensor:
        return super().forward(h)


class Own(nn.Module):
    """A model of one's own, after the contract of CausalLMAdapter, or not quite."""

    def __init__(self, out: Any = None, layers: int = 2) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer(8, 8) for _ in range(layers))
        self.model.norm, self.model.embed_tokens, self.lm_head = nn.Identity(), nn.Embedding(9, 8), nn.Linear(8, 9)
        base, kept = self.model, out

        def forward(input_ids: Tensor, **options: Any) -> Any:
            h, cache = base.embed_tokens(input_ids), options["past_key_values"]
            return base.layers[0](h, cache) if kept is None else kept(base.layers[1](base.layers[0](h, cache), cache))

        self.model.forward = forward  # type: ignore[method-assign]


class OwnAdapter(CausalLMAdapter):
    def memory(self) -> Any:
        return SimpleNamespace(recurrent=[0, 1], attention=[], cache=object(), **{
            name: lambda *_: {} for name in ("fast", "slow", "set_fast", "set_slow")
        })  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "text", "model: got a str; expected a module, or a ModelAdapter"),
        (lambda: Own(), "model: got a Own without a config of transformers; .*or a ModelAdapter that says where"),
        (lambda: nn.Sequential(build("qwen3_5")), "model: got a Sequential without layers, norm, lm_head; .*pass that"),
        (lambda: Peft(build("qwen3_5"), is_prompt_learning=True), "model: got a Peft with virtual tokens before"),
        (lambda: OwnAdapter(Own()), r"model: got a Own whose forward does not call its own layers \(1 calls of 2\)"),
        (lambda: OwnAdapter(Own(lambda h: SimpleNamespace(h=h))), "model: got a SimpleNamespace out of its forward"),
        (lambda: OwnAdapter(Own(lambda h: (h,))), r"memory: got no fast weights of blocks \[0, 1\] after a pass"),
        (lambda: OwnAdapter(Own(lambda h: SimpleNamespace(last_hidden_state=h))), "memory: got no fast weights of"),
    ],
)  # fmt: skip
def test_what_cannot_sleep_says_what_it_lacks(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SleepSession(make(), L).ingest(tokens(1, L) % 9)


def test_what_a_session_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleepkern.sleep.session.REPORTS", 4)
    session = SleepSession(sleep_lm(), 2, passes=2).ingest(tokens(1, 19))
    assert repr(session) == (
        "SleepSession(SleepLM, window=2, passes=2, eviction='hard', feedback='raw'): 18 tokens slept over, 1 pending"
    )
    assert [report.first for report in session.reports] == [10, 12, 14, 16] and session.position == 18
    fork = session.fork()
    fork.ingest(tokens(1, 1))
    assert session.reports[-1].first == 16 and fork.reports[-1].first == 18
    other = copy.copy(session).ingest(tokens(1, 1))
    assert (other.position, session.position) == (20, 18)
    with pytest.raises(TypeError, match=r"deepcopy: a session is copied by fork\(\)"):
        copy.deepcopy(session)
