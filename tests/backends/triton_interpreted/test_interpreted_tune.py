"""Tuning as a mechanism: candidates are tried, wrong ones left out, the table is written and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sleepkern.backends.triton import plan, plan_table
from sleepkern.measure import tune
from sleepkern.measure.candidates import PlanCandidate, candidate_rows, read_candidates
from sleepkern.rules import GATED_DELTA_RULE
from sleepkern.testing import Shape


def test_tuned_plans_are_written_and_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tune, "COLUMNS", (16,))
    monkeypatch.setattr(tune, "WARPS", (2, 4))
    monkeypatch.setattr(tune, "LOADS", (1,))
    table = dict(plan_table.TABLE)
    shape = Shape(T=20, H=1, HV=1, K=16, V=16)
    best, trials = tune.tune(GATED_DELTA_RULE, shape, torch.float32, "cpu", chunks=(16, 24), seconds=0.01)
    assert plan_table.TABLE == table
    assert {key.direction for key in best} == {"forward", "backward"}
    assert all(found.chunk == 16 for found in best.values())
    refused = [t for t in trials if t.seconds is None]
    assert refused and all(t.plan.chunk == 24 and t.note for t in refused)  # no tile has 24 rows
    file = tmp_path / "plans.json"
    file.write_text(json.dumps({"plans": plan.table_rows(best)}))
    monkeypatch.setattr(plan, "TABLE", table)
    assert plan.use_plans(file) == len(best)
    assert all(plan.TABLE[key] == found for key, found in best.items())


def test_listed_candidates_are_the_only_ones(tmp_path: Path) -> None:
    """Tiles of a file are tried, those of its chunk alone, and a chunk that is not the table's starts with them."""
    shape = Shape(T=20, H=1, HV=1, K=16, V=16)
    key = plan_table.Key(0, "forward", "ieee", False, 64)
    tiles = [plan_table.Tile(16, 16, warps, 1) for warps in (2, 4)]
    stage = "chunk_factors"
    listed = [PlanCandidate(stage, "tile", key, 16 * (i + 1), tile, 1.0, "", 1) for i, tile in enumerate(tiles)]
    file = tmp_path / "candidates.json"
    file.write_text(json.dumps({"candidates": candidate_rows(listed)}))
    assert read_candidates(file) == listed
    _, trials = tune.tune(GATED_DELTA_RULE, shape, torch.float32, "cpu", seconds=0.01, candidates=read_candidates(file))
    forward = [(t.stage, t.plan.chunk, t.plan.chunk_factors) for t in trials if t.key.direction == "forward"]
    built_in = plan_table.TABLE[key].chunk_factors
    assert forward == [("all", 16, built_in), ("chunk_factors", 16, tiles[0]), ("all", 32, tiles[1])]
    assert [t.stage for t in trials if t.key.direction == "backward"] == ["all"]
    with pytest.raises(ValueError, match=r"path: got .*other.json, which is not a file of candidates"):
        read_candidates(_other_file(tmp_path))


def _other_file(folder: Path) -> Path:
    file = folder / "other.json"
    file.write_text(json.dumps({"rows": []}))
    return file


def test_candidates_keep_to_what_the_assembler_can_do() -> None:
    """State passes have products of as many rows as keys: with four warps they would be warp-group products."""
    current = plan_table.Tile(128, 16, 2, 2)
    for capability, warps in ((plan_table.PLAIN_HOPPER, {2}), (90, {2, 4, 8})):
        key = plan_table.Key(capability, "forward", "bf16", False, 128)
        assert {tile.warps for tile in tune._tiles("state_pass", key, current)} == warps
        assert {tile.warps for tile in tune._tiles("chunk_factors", key, current)} == {2, 4, 8}


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: got .*other.json, which is not a table"):
        plan.use_plans(_other_file(tmp_path))


def test_a_file_of_an_older_version_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = {"capability": 90, "direction": "forward", "operands": "exact", "channel": False, "width": 64}
    tiles = {name: [16, 16, 4, 1] for name in ("prepare", "ingest", "adjoint", "gradients", "window")}
    file = tmp_path / "plans.json"
    file.write_text(json.dumps({"plans": [{"key": key, "plan": {"chunk": 16, **tiles}}]}))
    monkeypatch.setattr(plan, "TABLE", {})
    assert plan.use_plans(file) == 1
    tile = plan_table.Tile(16, 16, 4, 1)
    expected = plan_table.TilePlan(16, tile, tile, tile, tile, tile)
    assert plan.TABLE == {plan_table.Key(90, "forward", "ieee", False, 64): expected}
