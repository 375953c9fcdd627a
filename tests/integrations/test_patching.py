"""Patching transformers on and off: nested, repeated, by exception, by model, by older layers."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.hf_models import (
    CHUNK,
    CLOSE,
    CONV,
    FAMILIES,
    STEP,
    arguments,
    build,
    globals_of,
    spy_on_sleepkern,
)
from torch import nn

import sleepkern
from sleepkern.integrations.patching import Registry, Target
from sleepkern.integrations.transformers import FAMILIES as ALL
from sleepkern.integrations.transformers import patch, unpatch
from sleepkern.rules import GATED_DELTA_RULE
from sleepkern.testing import Shape, call, make_inputs, relative_error, to_float64


@pytest.fixture(autouse=True)
def _start_and_end_unpatched() -> Iterator[None]:
    unpatch()
    yield
    unpatch()


def originals(family: str = "qwen3_next") -> list[Any]:
    return [getattr(globals_of(family), name) for name in (CHUNK, STEP, CONV)]


@pytest.mark.since("5.16")
def test_patches_nest_repeat_and_are_undone_exactly() -> None:
    stock, stock_olmo = originals(), originals("olmo_hybrid")
    with patch("qwen3_next") as outer:
        patched = originals()
        assert all(a is not b for a, b in zip(patched, stock, strict=True))
        with patch("qwen3_next", "olmo_hybrid"):
            assert originals() == patched and originals("olmo_hybrid") != stock_olmo
        assert originals() == patched and originals("olmo_hybrid") == stock_olmo
        outer.undo()
        assert originals() == stock
    assert originals() == stock
    patch()
    patch()
    unpatch()
    assert originals() == stock
    with patch():
        unpatch()
        later = patch()
    assert originals() != stock  # the block gave back its own claim only
    later.undo()
    assert originals() == stock


def test_an_exception_leaves_nothing_behind() -> None:
    stock = originals()
    with pytest.raises(RuntimeError, match="from the block"), patch():
        raise RuntimeError("from the block")
    assert originals() == stock
    with pytest.raises(ValueError, match="got 'llama'; expected a model or one of qwen3_next"):
        patch("qwen3_next", "llama")
    with pytest.raises(ValueError, match="got a Linear; expected a model with a recurrence that sleepkern has"):
        patch("qwen3_next", nn.Linear(2, 2))
    assert originals() == stock


@pytest.mark.since("5.16")
def test_a_model_stands_for_its_families() -> None:
    model, stock = build("qwen3_next"), originals()
    saved = {name: x.clone() for name, x in model.state_dict().items()}
    with patch(model):
        assert all(a is not b for a, b in zip(originals(), stock, strict=True))
        state = model.state_dict()
        assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)
    assert originals() == stock


@pytest.mark.since("5.16")
def test_layers_that_keep_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4.57 to 5.10: a layer looks the functions up once, when it is built."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            module = globals_of("qwen3_next")
            self.chunk_gated_delta_rule = getattr(module, CHUNK)
            self.recurrent_gated_delta_rule = getattr(module, STEP)

    model = nn.Sequential(Layer(), nn.Linear(2, 2))
    stock, calls = dict(vars(model[0])), spy_on_sleepkern(monkeypatch)
    expected, _ = model[0].chunk_gated_delta_rule(**arguments(9))
    with patch(model):
        assert relative_error(model[0].chunk_gated_delta_rule(**arguments(9))[0], expected) < CLOSE
        model[0].recurrent_gated_delta_rule(**arguments(1))
        assert len(calls) == 2 and not model.state_dict().keys() - {"1.weight", "1.bias"}
    assert vars(model[0]) == stock


OLDER = """
import torch
from torch import nn

class OlderRMSNormGated(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x, gate=None):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x * nn.functional.silu(gate)

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = OlderRMSNormGated(24) if FusedRMSNormGated is None else FusedRMSNormGated(24)
        self.causal_conv1d_fn = causal_conv1d_fn
        self.chunk_gated_delta_rule = chunk_gated_delta_rule or torch_chunk_gated_delta_rule
        self.recurrent_gated_delta_rule = fused_recurrent_gated_delta_rule or torch_recurrent_gated_delta_rule

    def forward(self, query, key, value, g, beta, cache=None):
        if cache is None or query.shape[1] > 1:
            o, state = self.chunk_gated_delta_rule(
                query, key, value, g=g, beta=beta, initial_state=None, output_final_state=cache is not None,
                use_qk_l2norm_in_kernel=True,
            )
        else:
            o, state = self.recurrent_gated_delta_rule(
                query, key, value, g=g, beta=beta, initial_state=cache["state"], output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
        if cache is not None:
            cache["state"] = state
        return self.norm(o.flatten(0, -2), o.flatten(0, -2)).view(o.shape)
"""


@pytest.mark.since("5.16")
@pytest.mark.parametrize("by", ["a model", "the file, before a model is built"])
def test_files_of_older_versions(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4.57 to 5.10 without fla and causal_conv1d: what those would give is None."""
    name = "transformers.models.qwen3_5.modeling_qwen3_5"
    older, newer = ModuleType(name), globals_of("qwen3_next")
    absent = ("FusedRMSNormGated", "causal_conv1d_fn", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    vars(older).update(dict.fromkeys(absent), is_fast_path_available=False)
    vars(older).update({function: getattr(newer, function) for function in (CHUNK, STEP)})
    exec(OLDER, vars(older))
    monkeypatch.setitem(sys.modules, name, older)
    model, calls = nn.Sequential(older.Layer()), spy_on_sleepkern(monkeypatch)
    given, cache, stock_cache = {n: x for n, x in arguments(9).items() if "_" not in n}, {}, {}
    token = {n: x[:, :1] for n, x in given.items()}
    expected = [model[0](**x, cache=stock_cache) for x in (given, token)]
    with patch(model if by == "a model" else "qwen3_5"):
        patched = model if by == "a model" else nn.Sequential(older.Layer())
        found = [patched[0](**x, cache=cache) for x in (given, token)]
    assert len(calls) == 2 and max(map(relative_error, found, expected)) < CLOSE
    assert relative_error(cache["state"], stock_cache["state"]) < CLOSE
    assert all(getattr(older, name) is None for name in absent)


def test_somebody_elses_later_patch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module, stock = globals_of("qwen3_next"), originals()

    def theirs(*args: Any, **kwargs: Any) -> None:
        """Another library's function."""

    with patch():
        monkeypatch.setattr(module, CONV, theirs)
    assert originals() == [*stock[:2], theirs]
    setattr(module, CONV, stock[2])


def test_importing_does_not_import_transformers() -> None:
    code = "import sys, sleepkern.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_remote_code_on_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jet-Nemotron's call pattern: fla's functions as globals of a file that transformers loads under a name of its
    own, by keyword, with an argument of its own copy of fla; K = 96 and V = 256 as there."""

    def chunk_gated_delta_rule(**given: Any) -> None:
        raise RuntimeError("0 active drivers")

    def fused_recurrent_gated_delta_rule(**given: Any) -> None:
        raise RuntimeError("0 active drivers")

    for function in (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule):
        function.__module__ = "fla.ops.gated_delta_rule"
    source = """
from torch import nn

class JetBlock(nn.Module):
    def forward(self, q, k, v, g, beta, state):
        options = {} if q.shape[1] <= 64 else {"autotune_interval": None}
        rule = fused_recurrent_gated_delta_rule if q.shape[1] <= 64 else chunk_gated_delta_rule
        return rule(
            q=q, k=k, v=v, g=g, beta=beta, initial_state=state, output_final_state=True, cu_seqlens=None,
            use_qk_l2norm_in_kernel=True, **options,
        )
"""
    module = ModuleType("transformers_modules.jet.jet_block")
    vars(module).update(
        chunk_gated_delta_rule=chunk_gated_delta_rule,
        fused_recurrent_gated_delta_rule=fused_recurrent_gated_delta_rule,
    )
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    model = nn.Sequential(module.JetBlock())
    for T in (9, 70):
        x = make_inputs(GATED_DELTA_RULE, Shape(T=T, H=3, HV=3, K=96, V=256))
        given = [x[name] for name in ("q", "k", "v", "g", "beta", "initial_state")]
        with pytest.raises(RuntimeError, match="0 active drivers"):
            model[0](*given)
        with patch(model):
            o, state = model[0](*given)
            with pytest.raises(RuntimeError, match="0 active drivers"):  # a device without kernels stays fla's
                model[0](*(t.to("meta") for t in given))
        expected = call(GATED_DELTA_RULE, to_float64(x), "reference", use_qk_l2norm_in_kernel=True)
        assert relative_error(o, expected[0]) < CLOSE and relative_error(state, expected[1]) < CLOSE
    assert module.chunk_gated_delta_rule is chunk_gated_delta_rule


# ---------------------------------------------------------------- threads, and what is patched


def test_threads_patch_and_leave_at_any_moment() -> None:
    """Each in blocks of its own, switched as often as Python can: nobody fails, and nothing stays behind."""
    module, stock, failed = globals_of("qwen3_next"), originals()[:2], []  # older files have no convolution to replace
    forward = module.Qwen3NextModel.forward

    def serve() -> None:
        try:
            for i in range(150):
                with patch("qwen3_next"):
                    assert all(a is not b for a, b in zip(originals()[:2], stock, strict=True))
                if i % 50 == 49:
                    patch("qwen3_next").undo()
        except BaseException as error:
            failed.append(error)

    threads, interval = [threading.Thread(target=serve) for _ in range(8)], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    assert originals()[:2] == stock and module.Qwen3NextModel.forward is forward and not sleepkern.patched()


def test_a_patch_that_fails_replaces_nothing() -> None:
    def fails(original: Any) -> Any:
        raise RuntimeError("no replacement")

    module, registry = ModuleType("theirs"), Registry()
    vars(module).update(one=len, two=len)
    with pytest.raises(RuntimeError, match="no replacement"):
        registry.claim([Target(module, "one", lambda original: print), Target(module, "two", fails)])
    assert module.one is len and not registry.names()


@pytest.mark.since("5.16")
def test_patched_tells_what_is_replaced() -> None:
    model, llama = build("qwen3_next", num_hidden_layers=1), build("llama", num_hidden_layers=1)
    assert sleepkern.patched() == sleepkern.patched(model) == sleepkern.patched("bamba") == ()
    file = "transformers.models.qwen3_next.modeling_qwen3_next"
    with patch(model) as ours:
        assert sleepkern.patched(model) == sleepkern.patched("qwen3_next") == sleepkern.patched()
        assert f"{file}.{CHUNK}" in sleepkern.patched() and f"{file}.Qwen3NextModel.forward" in repr(ours)
        assert sleepkern.patched("bamba", llama) == ()
        with patch("bamba"):
            assert "transformers.models.bamba.modeling_bamba.mamba2_chunk_scan" in sleepkern.patched("bamba", model)
    assert sleepkern.patched() == () and repr(ours) == "Patch()"
    with pytest.raises(ValueError, match="got 'llama'; expected a model or one of qwen3_next"):
        sleepkern.patched("llama")


def test_patch_without_a_name_takes_all_families(monkeypatch: pytest.MonkeyPatch) -> None:
    with patch():
        assert all(sleepkern.patched(family) for family in FAMILIES)
        everything = sleepkern.patched()
    for family in ALL[1:]:
        monkeypatch.setitem(sys.modules, f"transformers.models.{family}.modeling_{family}", None)
    with patch():  # an older transformers has some of them
        assert sleepkern.patched() == tuple(name for name in everything if ".qwen3_next." in name)
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3_next.modeling_qwen3_next", None)
    with pytest.raises(ImportError, match="'qwen3_next' needs a transformers that has it"):
        patch()
