"""Threads whose sessions share one model: the model is not changed while its layers' calls are recorded."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial, update_wrapper
from typing import Any

import pytest
import torch
from helpers.hf_models import CLOSE, build, retrofitted, tokens
from helpers.recorder import Recorder
from helpers.remote_models import JetForCausalLM
from helpers.sleep_models import jet, ouro, sleep_lm
from torch import Tensor, nn

from sleepkern.integrations.transformers import patch
from sleepkern.sleep import SleepSession, retrofit
from sleepkern.sleep.cuda_graph import GraphCache
from sleepkern.testing import relative_error

L, THREADS = 16, 4


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads take turns all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(run: Callable[[int], Any]) -> list[Any]:
    """What run(number) gives in threads that start together; what one of them raises."""
    found: list[Any] = [None] * THREADS
    start = threading.Barrier(THREADS)

    def body(i: int) -> None:
        try:
            start.wait()
            with torch.no_grad():  # each thread has a switch of its own
                found[i] = run(i)
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=body, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x in found:
        if isinstance(x, BaseException):
            raise x
    return found


def hooked(model: nn.Module) -> nn.Module:
    """As accelerate does it: what was bound stays bound to this very module."""
    base: Any = model.model

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        module.seen_by_hook = module.seen_by_hook + 1
        return module._old_forward(*args, **kwargs)

    base.seen_by_hook = 0
    old = base._old_forward = base.forward
    base.forward = update_wrapper(partial(new_forward, base), old)
    return model


def enclosed(model: nn.Module) -> nn.Module:
    """Behind a function that nothing can be read out of."""
    old = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return old(*args, **kwargs)

    model.model.forward = update_wrapper(forward, old)
    return model


def compiled(model: nn.Module) -> nn.Module:
    """Blocks in both ways, and the whole base model around them."""
    layers = model.model.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    layers[1].compile(backend="eager")
    model.model.compile(backend="eager")
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_next": lambda: build("qwen3_next"),
    "mamba2": lambda: build("mamba2"),
    "bamba": lambda: build("bamba"),
    "zamba2": lambda: build("zamba2"),
    "retrofit": lambda: retrofitted(decay_bias=1.0),
    "hooked": lambda: hooked(build("qwen3_5")),
    "enclosed": lambda: enclosed(build("qwen3_5")),
    "SleepLM": sleep_lm,
    "jet": lambda: jet()[1],
    "ouro": lambda: ouro()[1],
}


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
def test_threads_ask_about_one_text(made: Callable[[], Any]) -> None:
    given = made()
    model = given if isinstance(given, nn.Module) else given.model
    with torch.no_grad():
        session = SleepSession(given, L, passes=2).ingest(tokens(1, 2 * L))
        questions = [tokens(1, 5, seed=10 + i) for i in range(THREADS)]
        expected = [session.read(q) for q in questions]
        answers = [session.generate(q, max_new_tokens=3) for q in questions]
        slept = [session.fork().ingest(tokens(1, L, seed=20 + i)).state_dict() for i in range(THREADS)]
    modules = dict(model.named_modules())

    def ask(i: int) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        read = [session.fork().read(questions[i]) for _ in range(4)]
        asleep = session.fork().ingest(tokens(1, L, seed=20 + i)).state_dict()
        return read, session.generate(questions[i], max_new_tokens=3), asleep

    for i, (read, answer, asleep) in enumerate(at_once(ask)):
        assert max(relative_error(x, expected[i]) for x in read) < CLOSE
        assert torch.equal(answer, answers[i])
        assert max(relative_error(asleep[name], t) for name, t in slept[i].items() if "." in name) < CLOSE
    after = dict(model.named_modules())
    assert list(after) == list(modules) and all(after[name] is modules[name] for name in modules)


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [hooked, enclosed, pytest.param(compiled, marks=pytest.mark.hardening)])
@pytest.mark.parametrize("patched", [True, False])
def test_wrapped_models_sleep_as_themselves(wrapped: Callable[[nn.Module], nn.Module], patched: bool) -> None:
    plain, model, ids = build("qwen3_5"), wrapped(build("qwen3_5")), tokens(2, 2 * L)
    expected = SleepSession(plain, L, passes=2).ingest(ids).read(ids)
    if patched:
        with patch(model):
            found = SleepSession(model, L, passes=2).ingest(ids).read(ids)
    else:
        found = SleepSession(model, L, passes=2).ingest(ids).read(ids)
    assert relative_error(found, expected) < CLOSE
    assert relative_error(model(ids).logits, plain(ids).logits) < CLOSE


@torch.no_grad()
def test_a_compiled_base_model() -> None:
    plain, model, ids = build("qwen3_5"), build("qwen3_5"), tokens(1, 2 * L)
    whole = torch.compile(build("qwen3_5"), backend="eager")
    model.model = torch.compile(model.model, backend="eager")
    for given in (model, whole):
        found = SleepSession(given, L).ingest(ids).read(ids)
        assert relative_error(found, SleepSession(plain, L).ingest(ids).read(ids)) < CLOSE


@torch.no_grad()
def test_hooks_of_the_base_model_run() -> None:
    model, seen = build("qwen3_5"), []
    model.model.register_forward_pre_hook(lambda module, args: seen.append(type(module).__name__))
    SleepSession(model, L).ingest(tokens(1, L))
    assert seen == ["Qwen3_5TextModel"]
    hidden = model(tokens(1, L), output_hidden_states=True).hidden_states
    assert len(hidden) == 5  # transformers hooks a model's own layers the first time that it is asked
    model = build("qwen3_5")
    model.config.output_hidden_states = True
    SleepSession(model, L).ingest(tokens(1, L))
    assert len(model(tokens(1, L)).hidden_states) == 5


@torch.no_grad()
def test_recording_leaves_the_model_alone() -> None:
    """Even while it goes on."""
    model = JetForCausalLM(("jet", "attn")).eval()
    blocks, norm, seen = model.model.layers, model.model.norm, []

    def look(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(model.model.layers is blocks and model.model.norm is norm)

    model.model.embed_tokens.register_forward_hook(look)
    adapter = type(jet()[1])(model)
    SleepSession(adapter, L).ingest(tokens(1, L))
    assert seen == [True]


def test_only_a_model_that_hides_its_forward_is_changed() -> None:
    for model, turns in (
        (build("qwen3_5"), False),
        (hooked(build("qwen3_5")), False),
        (enclosed(build("llama")), True),
    ):
        taken = SleepSession(retrofit(model, [0]) if turns else model, L).adapter.locked()
        assert isinstance(taken, nullcontext) != turns
    both: Any = hooked(enclosed(build("qwen3_5")))
    assert not isinstance(SleepSession(both, L).adapter.locked(), nullcontext)


class Meanwhile:
    """Whenever somebody asks what it is, a model is given something, as another thread may do at that moment."""

    def __init__(self, base: nn.Module) -> None:
        self.base, self.asked = base, 0

    @property  # type: ignore[override]
    def __class__(self) -> type:
        self.asked += 1
        vars(self.base)[f"noted_{self.asked}"] = self.asked
        return Meanwhile


def test_a_model_may_be_given_attributes_meanwhile() -> None:
    model: Any = build("qwen3_5")
    session = SleepSession(model, L)
    vars(model.model)["other"] = other = Meanwhile(model.model)
    session.ingest(tokens(1, L))
    assert session.position == L and other.asked > 0


def test_forks_share_graphs() -> None:
    """A graph's tensors hold one sleep at a time."""
    session = SleepSession(build("qwen3_5"), L, passes=2, capture=True)
    session.graph_cache = GraphCache(Recorder())
    texts = [tokens(1, 4 * L, seed=i) for i in range(THREADS)]
    with torch.no_grad():
        expected = [session.fork().ingest(ids).state_dict() for ids in texts]
    for found, right in zip(at_once(lambda i: session.fork().ingest(texts[i]).state_dict()), expected, strict=True):
        assert max(relative_error(found[name], t) for name, t in right.items() if "." in name) < CLOSE
