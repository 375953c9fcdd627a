"""Models of transformers, patched against stock: same numbers, same tokens, same gradients."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.hf_models import (
    CARRIES,
    CHUNK,
    CLOSE,
    FAMILIES,
    STEP,
    arguments,
    build,
    cached,
    globals_of,
    kept,
    layers_of,
    many_of,
    spy_on_sleepkern,
    tokens,
)
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from transformers import DynamicCache

from sleepkern.cli.demo.patched_model import run_patched_model
from sleepkern.integrations.transformers import patch, unpatch
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import BLOCK_GRADIENTS


@torch.no_grad()
def read(
    model: nn.Module,
    ids: Tensor,
    pieces: tuple[int, ...],
    between: Callable[[Any], None] | None = None,
) -> Tensor:
    """Logits of the text read piece by piece with a cache; `between` may tamper with the cache."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    logits, done, cache = [], 0, None
    for piece in ids.split(list(pieces), dim=1):
        positions = torch.arange(done, done + piece.shape[1]).expand(piece.shape)
        at = {"position_ids": positions} if takes_positions else {}
        out = model(piece, **cached(model, cache), **at, use_cache=True)
        logits.append(out.logits)
        done, cache = done + piece.shape[1], kept(out)
        if between is not None:
            between(cache)
    return torch.cat(logits, dim=1)


@pytest.fixture(autouse=True)
def _start_and_end_unpatched() -> Iterator[None]:
    unpatch()
    yield
    unpatch()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("qwen3_next")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sleepkern functions that ran."""
    return spy_on_sleepkern(monkeypatch)


# ---------------------------------------------------------------- same numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_and_continues_as_stock(family: str, calls: list[str]) -> None:
    model, ids, many = build(family), tokens(2, 48), many_of(family)
    layers, pieces = layers_of(model), ((48,), (20, 28), (20, 1, 1, 26))
    at_once = read(model, ids, (48,))
    stock = [at_once if CARRIES else read(model, ids, lengths) for lengths in pieces]
    assert not calls
    with patch(model):
        for lengths, expected in zip(pieces, stock, strict=True):
            assert relative_error(read(model, ids, lengths), expected) < CLOSE
            assert lengths != (48,) or calls == [many] * layers
        assert len(calls) == 7 * layers and calls.count("recurrent_step") == 2 * layers * CARRIES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_the_same_tokens(family: str, calls: list[str]) -> None:
    model, ids = build(family), tokens(2, 20)
    options = {"max_new_tokens": 8, "do_sample": False}
    stock = model.generate(ids, **options)
    with patch(model):
        assert torch.equal(model.generate(ids, **options), stock)
    assert many_of(family) in calls


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_gradients(family: str, calls: list[str]) -> None:
    model, ids = build(family), tokens(2, 30)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stock = gradients()
    assert not calls
    with patch(model):
        patched = gradients()
    assert many_of(family) in calls and patched.keys() == stock.keys()
    worst = {name: relative_error(patched[name], stock[name]) for name in stock if stock[name].norm() > 0}
    assert max(worst.values()) < BLOCK_GRADIENTS, worst
    assert any("A_log" in name and g.abs().max() > 0 for name, g in patched.items())


@pytest.mark.since("5.16")
def test_the_state_matters(model: nn.Module) -> None:
    """Control of the test above: without the state, continuing goes far wrong."""

    def forget(cache: Any) -> None:
        for layer in cache.layers[:3]:
            layer.recurrent_states[0].zero_()

    ids = tokens(2, 48)
    with patch():
        assert relative_error(read(model, ids, (20, 28), forget), read(model, ids, (48,))) > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [x for x in ("qwen3_next", "bailing_hybrid", "bamba") if x in FAMILIES])
def test_half_precision(family: str, dtype: torch.dtype, calls: list[str]) -> None:
    model, ids = build(family).to(dtype), tokens(2, 40)
    stock = read(model, ids, (39, 1))
    with patch(model):
        patched = read(model, ids, (39, 1))
    assert patched.dtype == dtype and many_of(family) in calls
    assert relative_error(patched, stock) < 4 * torch.finfo(dtype).eps


def test_left_padded_batch(model: nn.Module, calls: list[str]) -> None:
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[1, :7] = mask[2, :33] = 0
    with torch.no_grad():
        stock = model(ids, attention_mask=mask).logits
        with patch(model):
            patched = model(ids, attention_mask=mask).logits
    assert calls
    real = mask.bool()
    assert relative_error(patched[real], stock[real]) < CLOSE


@pytest.mark.parametrize("beams", [1, 3])
def test_generates_the_same_tokens(model: nn.Module, beams: int, calls: list[str]) -> None:
    """Beam search reorders the cache: a step may not write a state that another beam needs."""
    ids, options = tokens(2, 20), {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    stock = model.generate(ids, **options)
    assert not calls
    with patch(model):
        assert torch.equal(model.generate(ids, **options), stock)
    assert set(calls) >= {"gated_delta_rule"}


@pytest.mark.since("5.16")
def test_compiled_mixer(model: nn.Module) -> None:
    """No graph break in the layer, forward and backward, and the graph holds our operator."""
    layer, x = model.model.layers[0].linear_attn, torch.randn(2, 20, 32)
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return lookup_backend("aot_eager")(graph, inputs)

    with torch.no_grad():
        stock = layer(x)
    with patch():
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        with torch.no_grad():
            assert relative_error(compiled(x), stock) < CLOSE
        source = x.clone().requires_grad_()
        compiled(source).sum().backward()
        eager = x.clone().requires_grad_()
        layer(eager).sum().backward()
    assert len(graphs) == 2 and all("sleepkern" in graph for graph in graphs)
    assert source.grad is not None and eager.grad is not None
    assert relative_error(source.grad, eager.grad) < CLOSE
    model.zero_grad()


@pytest.mark.since("5.16")
def test_exported_program_holds_torch_operators_only(model: nn.Module) -> None:
    layer, x = model.model.layers[0].linear_attn, torch.randn(1, 12, 32)
    with patch(), torch.no_grad():
        program = torch.export.export(layer, (x,))
        assert "sleepkern" not in str(program.graph)
        assert relative_error(program.module()(x), layer(x)) < CLOSE


# ---------------------------------------------------------------- the functions


@pytest.mark.since("5.16")
@pytest.mark.parametrize(("name", "T"), [(CHUNK, 70), (CHUNK, 1), (STEP, 1), (STEP, 5)])
def test_functions_take_what_stock_takes(name: str, T: int, calls: list[str]) -> None:
    """Keywords, positions, junk; no state in, none out; and never a write to the caller's state."""
    module, given = globals_of("qwen3_next"), arguments(T)
    kept = given["initial_state"].clone()
    expected_o, expected_S = getattr(module, name)(**given)
    size = {"chunk_size": 32} if name == CHUNK else {}
    with patch():
        function = getattr(module, name)
        o, S = function(**given, **size, cu_seqlens=None, use_cache=True, output_router_logits=False)
        assert relative_error(o, expected_o) < CLOSE and relative_error(S, expected_S) < CLOSE
        assert torch.equal(given["initial_state"], kept)
        by_position = (*list(given.values())[:5], *size.values(), *list(given.values())[5:])
        assert relative_error(function(*by_position)[0], expected_o) < CLOSE
        first = {**given, "initial_state": None, "output_final_state": False}
        o, S = function(**first)
        assert S is None
    assert relative_error(o, getattr(module, name)(**first)[0]) < CLOSE
    assert calls.count("gated_delta_rule") == 3


@pytest.mark.since("5.16")
def test_decode_updates_the_cache_in_place(model: nn.Module, calls: list[str]) -> None:
    """The cache's own buffer is written by the step itself; under autograd it is not."""
    cache = DynamicCache(config=model.config)
    with patch():
        with torch.no_grad():
            model(tokens(1, 10), **cached(model, cache), use_cache=True)
            states = [layer.recurrent_states[0] for layer in cache.layers[:3]]
            before = [state.clone() for state in states]
            calls.clear()
            model(tokens(1, 1), **cached(model, cache), use_cache=True)
        assert calls == ["recurrent_step"] * 3
        for layer, state, old in zip(cache.layers, states, before, strict=False):
            assert layer.recurrent_states[0] is state and not torch.equal(state, old)
        calls.clear()
        module, given = globals_of("qwen3_next"), {**arguments(1), "initial_state": states[0]}
        given |= {"value": torch.zeros(1, 1, 4, 24).requires_grad_()}
        given |= {name: given[name][:1] for name in ("query", "key", "g", "beta")}
        old = states[0].clone()
        o, _ = getattr(module, STEP)(**given)
        assert o.requires_grad and torch.equal(states[0], old) and calls == ["gated_delta_rule"]


@pytest.mark.since("5.16")
def test_a_state_of_inference_mode_is_read_outside_of_it(model: nn.Module, calls: list[str]) -> None:
    """torch lets nobody write to it there, so a step gives a new state, as stock does."""
    cache, (module, given) = DynamicCache(config=model.config), (globals_of("qwen3_next"), arguments(1))
    with patch(), torch.inference_mode():
        model(tokens(2, 10), **cached(model, cache), use_cache=True)
    state = cache.layers[0].recurrent_states[0]
    old, given = state.clone(), given | {"initial_state": state}
    expected = getattr(module, STEP)(**given)
    with patch(), torch.no_grad():
        calls.clear()
        found = getattr(module, STEP)(**given)
        assert calls == ["gated_delta_rule"] and torch.equal(state, old)
        with torch.inference_mode():
            inside = getattr(module, STEP)(**given)
    assert calls == ["gated_delta_rule", "recurrent_step"] and not torch.equal(state, old)
    for by_us in (found, inside):
        assert all(relative_error(x, y) < CLOSE for x, y in zip(by_us, expected, strict=True))


@pytest.mark.since("5.16")
@pytest.mark.parametrize(
    ("dtype", "device", "reason"),
    [(torch.float64, "cpu", "float64"), (torch.float32, "meta", "no kernel for the device meta")],
)
def test_what_cannot_be_done_goes_to_the_original(
    dtype: torch.dtype, device: str, reason: str, calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    module, given = globals_of("qwen3_next"), arguments(9, dtype, device)
    given["initial_state"] = given["initial_state"].to(device)
    expected, _ = getattr(module, CHUNK)(**given)
    with patch(), caplog.at_level(logging.DEBUG, logger="sleepkern.integrations"):
        o, _ = getattr(module, CHUNK)(**given)
    assert not calls and reason in caplog.text
    assert o.dtype == expected.dtype and o.device == expected.device and o.shape == expected.shape
    assert device == "meta" or torch.equal(o, expected)


@pytest.mark.since("5.16")
def test_dropin_of_the_demo() -> None:
    lines: list[str] = []
    result = run_patched_model(bytes(range(256)), lines.append, tokens=100)
    assert result["tokens"] == 100 and result["same_tokens"] and lines
    assert 0 < result["relative_logit_difference"] < BLOCK_GRADIENTS
    for what in ("read_tokens_per_second", "generate_tokens_per_second"):
        assert result[what].keys() == {"stock", "patched"} and min(result[what].values()) > 0
    with pytest.raises(ValueError, match="text: got 0 bytes"):
        run_patched_model(b"")
