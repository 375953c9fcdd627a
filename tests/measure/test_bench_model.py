"""`bench_model`: what it reports of a model, what it refuses, and that a wrong model gets no time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_models import build as tiny_model
from huggingface_hub import constants
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sleepkern.integrations.caches import cache_in
from sleepkern.integrations.transformers import FAMILIES
from sleepkern.measure import timing
from sleepkern.measure.model_calls import cache_bytes, decoding, prefill, prompts
from sleepkern.measure.models import agreement as comparing
from sleepkern.measure.models import bench_model, memory
from sleepkern.measure.models.agreement import agreement, same_choices, wider_logits
from sleepkern.measure.models.default_sizes import SIZES, TEXT_TYPES
from sleepkern.measure.models.layers import layer_types, with_layers
from sleepkern.measure.models.sources import build, find_model, offline
from sleepkern.ops import recurrence as ops
from sleepkern.testing import TOLERANCE


def write_config(family: str, folder: Path) -> Path:
    """The config.json of a tiny model."""
    tiny_model(family).config.save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a moment."""
    run = timing.time_in_turns
    monkeypatch.setattr(timing, "time_in_turns", lambda found, device, *_, **__: run(found, device, 0.05, (1, 2)))


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2"])
def test_a_config_is_measured_whole(family: str, quick: None, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    report = bench_model(
        write_config(family, tmp_path), [9, 33], 2, quick=True, memory=False,
        progress=lambda *step: said.append(step),
    )  # fmt: skip
    assert report.passed and report.weights == "random" and report.no_sleep is None and report.left == ()
    assert report.batch == 2 and report.dtype == "float32" and report.replaced
    assert len(report.layer_types) == 4 and [row.tokens for row in report.rows] == [9, 33]
    for row in report.rows:
        assert 0 < row.error < 1e-5 and row.stock_error is None
        assert row.prefill is not None and row.decode is not None and row.recurrent_bytes
        for phase in (row.prefill, row.decode):
            assert min(phase.stock_tokens_per_second, phase.patched_tokens_per_second, phase.ratio, phase.turns) > 0
        assert [cost.passes for cost in row.sleep] == [1, 2, 4] and row.sleep[0].relative == 1
    keys = [row.kv_bytes for row in report.rows]  # one layer of 1 head of 16, float32, 2 rows
    assert keys == ([2 * 2 * 16 * 4 * T for T in (9, 33)] if family == "qwen3_next" else [0, 0])
    assert said[0][1] == 0 and said[-1][1] == said[-1][2]
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


def test_peaks_grow_with_the_prompt() -> None:
    """A chunk of a stock Mamba-2 takes [256,256] a head, so that 1024 tokens take megabytes more than 16."""
    source = find_model("mamba2", 1)
    (small, _), (large, decode) = memory.peaks(build(source), source, 1, [16, 1024], 1, with_patch=False)
    if small is None or large is None or decode is None:
        pytest.skip("the system does not tell the peak of a process")
    assert small + (1 << 20) < large < 1 << 31 and 0 <= decode < 1 << 31


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_sizes_that_build_and_run(family: str) -> None:
    if TEXT_TYPES.get(family, family) not in CONFIG_MAPPING:
        with pytest.raises(ImportError, match="needs a transformers that has it"):
            find_model(family)
        pytest.skip("the installed transformers does not have it")
    source = find_model(family, 2)
    assert family in SIZES and 1e6 < source.parameters < 1e8 and len(layer_types(source.text)) == 2
    model = build(source)
    (ids,) = prompts(source.text, 1, 20)
    found = agreement(model, ids)
    assert found.error <= found.tolerance and found.left == ()
    assert wider_logits(model, ids, [ids[:, :1]] * 8, []).isfinite().all()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert cache_bytes(cache_in(prefill(model, ids)))[1] > 0


@pytest.mark.parametrize("family", [name for name in FAMILIES if TEXT_TYPES.get(name, name) in CONFIG_MAPPING])
def test_a_default_has_recurrence_and_attention(family: str) -> None:
    kinds = set(layer_types(find_model(family).text))
    assert kinds & {"linear_attention", "hybrid"}
    assert family == "mamba2" or any("attention" in kind and "linear" not in kind or kind == "hybrid" for kind in kinds)


def test_layers_are_cut_to_a_part_with_both_kinds() -> None:
    config = tiny_model("bamba").config
    sizes = config.to_dict() | {"num_hidden_layers": 12, "attn_layer_indices": [9]}
    long = type(config).from_dict(sizes)
    assert layer_types(with_layers(long, 3)) == ("linear_attention", "linear_attention", "full_attention")
    assert layer_types(with_layers(long, 1)) == ("linear_attention",)
    assert layer_types(with_layers(long, 12)) == layer_types(long)
    for layers in (0, 13):
        with pytest.raises(ValueError, match=f"layers: got {layers}; expected 1 to 12"):
            with_layers(long, layers)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_a_folder_gives_its_weights(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    assert source.weights == tmp_path
    loaded = build(source).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in model.state_dict().items())
    cut = find_model(str(tmp_path), 2)
    assert cut.weights is None and len(layer_types(cut.text)) == 2
    assert find_model(str(tmp_path / "config.json")).weights is None


def test_weights_of_another_config_are_refused(tmp_path: Path) -> None:
    model: Any = tiny_model("qwen3_next")
    model.save_pretrained(tmp_path)
    for changes, message in (({"num_hidden_layers": 5}, "lack"), ({"hidden_size": 64}, "cannot be loaded")):
        sizes = model.config.to_dict() | changes
        sizes["layer_types"] = [*sizes["layer_types"], "linear_attention"][: sizes["num_hidden_layers"]]
        (tmp_path / "config.json").write_text(json.dumps(sizes))
        with pytest.raises(ValueError, match=f"model: the weights in .* {message}"):
            build(find_model(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "got a damaged file"),
        ("[]", "without a model_type; expected a config of transformers"),
        ('{"a": 1}', "without a model_type; expected a config of transformers"),
        (
            '{"model_type": "nope"}',
            "the model type 'nope', which transformers .* does not have; expected one of qwen3_",
        ),
        ('{"model_type": "llama"}', "of the model type 'llama', in which sleepkern.patch finds nothing to replace"),
        ('{"model_type": "bert"}', "model: "),
        ('{"model_type": "mamba2", "num_heads": 3}', "model: transformers "),
    ],
)
def test_other_files_are_refused_in_a_sentence(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        find_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_code_of_a_folder_is_refused(tmp_path: Path) -> None:
    """A config whose class transformers builds no text model of, and which names a class in a file beside it."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "vit", "auto_map": {"AutoModelForImageTextToText": "code.Model"}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('the code has run')")
    with pytest.raises(ValueError, match="transformers builds no model of .*contains custom code"):
        find_model(str(tmp_path))


def test_unknown_names_and_numbers_are_refused(tmp_path: Path) -> None:
    for name in ("nope", str(tmp_path)):
        with pytest.raises(ValueError, match=r"model: got .*; expected a config.json, .*one of qwen3_next, .*zamba2"):
            bench_model(name)
    for options, message in (
        ({"lengths": [0]}, "lengths: got 0; expected at least 1"),
        ({"batch": 0}, "batch: got 0"),
        ({"threads": 0}, "threads: got 0"),
        ({"layers": 0}, "layers: got 0; expected 1 to 24"),
        ({"dtype": torch.float64}, "dtype: got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            bench_model("mamba2", **options)  # type: ignore[arg-type]


def test_layers_that_transformers_itself_cannot_run_are_refused() -> None:
    message = "transformers itself fails on qwen3_next with 1 layer.* of linear_attention: `get_seq_length`"
    with pytest.raises(ValueError, match=message):
        bench_model("qwen3_next", [5], layers=1, quick=True)
    with pytest.raises(ValueError, match="layers: transformers takes no 1 of this model: .*at least one attention"):
        find_model("olmo_hybrid", 1)


def test_a_model_that_differs_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = ops.gated_delta_rule

    def spoiled(*args: Any, **options: Any) -> Any:
        o, S = run(*args, **options)
        return 1.01 * o, S

    monkeypatch.setattr(ops, "gated_delta_rule", spoiled)
    (row,) = (report := bench_model(write_config("qwen3_next", tmp_path), [40], quick=True)).rows
    assert not report.passed and row.error > row.tolerance
    assert row.prefill is None and row.decode is None and row.sleep == () and row.kv_bytes is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_moves_far_may_be_as_far_as_stock(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids,) = build(find_model("qwen3_next", 2), dtype), prompts(find_model("qwen3_next").text, 1, 40)
    direct = agreement(model, ids)
    assert 0 < direct.error <= direct.tolerance
    assert dtype != torch.float32 or direct.stock_error is None and direct.tolerance == TOLERANCE[dtype]
    monkeypatch.setitem(comparing.TOLERANCE, dtype, 1e-9)
    found = agreement(model, ids)
    assert found.stock_error is not None and 0 < found.error <= found.tolerance == 2 * found.stock_error
    monkeypatch.setattr(comparing, "wider_logits", lambda *_: torch.full((1,), torch.nan))
    found = agreement(model, ids)
    assert found.error == float("inf") > found.tolerance


def test_both_runs_take_the_same_experts() -> None:
    scores, seen = torch.tensor([[0.0, 3.0, 2.0, 1.0]]), []
    with same_choices(seen, record=True):
        scores.topk(2), torch.topk(scores, k=1, dim=-1, sorted=False)
    with same_choices(seen):
        values, indices = (-scores).topk(2)
        assert torch.topk(-scores, 1)[1].tolist() == [[1]]
    assert values.tolist() == [[-3, -2]] and indices.tolist() == [[1, 2]]
    assert (-scores).topk(1).indices.tolist() == [[0]]


def test_decoding_starts_from_as_many_keys_each_time() -> None:
    for family in ("qwen3_next", "falcon_h1", "qwen4_exp"):
        model = tiny_model(family)
        lengths: list[int] = []
        decode = decoding(model, torch.randint(1, 64, (1, 20)), 3)
        model.register_forward_pre_hook(
            lambda module, args, options: lengths.append(  # noqa: B023
                next(x for x in options.values() if hasattr(x, "layers")).get_seq_length(3)
            ),
            with_kwargs=True,
        )
        for _ in range(2):
            decode()
        assert lengths == [20, 21, 22] * 2, family


def test_the_hub_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with offline():
        assert constants.HF_HUB_OFFLINE is True and os.environ["HF_HUB_OFFLINE"] == "1"
    assert constants.HF_HUB_OFFLINE is False and "HF_HUB_OFFLINE" not in os.environ


def test_a_measuring_process_that_ends_or_fails_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The target of the second process takes one number and gets two arguments, so it ends at once."""
    nothing: Any = None
    monkeypatch.setattr(memory, "_send_peaks", os._exit)
    assert memory.peaks_apart(nothing, 1, [3, 5], 1, False, nothing, 1) == [(None, None)] * 2
    monkeypatch.undo()
    with pytest.raises(ValueError, match="threads: got 0"):
        memory.peaks_apart(nothing, 1, [3], 1, False, nothing, 0)
