"""Trees of tokens in patched models: each path as a row of its own, logits and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.hf_models import CLOSE, FAMILIES, build, tokens
from torch import Tensor, nn

from sleepkern.integrations.transformers import TokenTree, patch, unpatch
from sleepkern.integrations.transformers.packing import SegmentTree
from sleepkern.ops import branches
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import BLOCK_GRADIENTS

pytestmark = pytest.mark.since("5.20")
PARENTS = [-1, 0, 0, 2, 3, -1, 0]
LENGTHS = (20, 7, 2, 9, 1, 5, 0)
INDEXED = ("glm5_next", "qwen4_exp")
"""Families whose attention picks tokens by an index."""


@pytest.fixture(autouse=True)
def _start_and_end_unpatched() -> Iterator[None]:
    unpatch()
    yield
    unpatch()


def tree() -> TokenTree:
    return TokenTree([tokens(1, n, seed=n)[0].tolist() if n else [] for n in LENGTHS], PARENTS)


def of_all_paths(found: TokenTree, model: nn.Module, at_once: bool) -> Tensor:
    """The logits of each path, one after the other: out of one row, or of a row for each."""
    paths = [found.path(i) for i in range(len(LENGTHS))]
    if at_once:
        logits = found.run(model).logits[0]
        return torch.cat([logits[path] for path in paths])
    return torch.cat([model(found.ids[:, path], use_cache=False).logits[0] for path in paths])


def gradients(found: TokenTree, model: nn.Module, at_once: bool) -> dict[str, Tensor]:
    model.zero_grad()
    out = of_all_paths(found, model, at_once)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(relative_error(found[name], x) for name, x in expected.items() if x.norm() > 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", [x for x in FAMILIES if x not in INDEXED])
def test_each_path_has_the_logits_of_a_row(family: str) -> None:
    model = build(family)
    with patch(family):
        assert relative_error(of_all_paths(tree(), model, True), of_all_paths(tree(), model, False)) < CLOSE


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear", "bamba", "falcon_h1"])
def test_gradients_are_the_sums_of_all_paths(family: str) -> None:
    model = build(family).train()
    with patch(family):
        assert worst(gradients(tree(), model, True), gradients(tree(), model, False)) < BLOCK_GRADIENTS


@pytest.mark.parametrize("change", ["eager", "checkpointed"])
def test_eager_attention_and_checkpointing(change: str) -> None:
    model = build("qwen3_next", **({"attn_implementation": "eager"} if change == "eager" else {})).train()
    if change == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.config._attn_implementation == ("eager" if change == "eager" else "sdpa")
    with patch(model):
        assert worst(gradients(tree(), model, True), gradients(tree(), model, False)) < BLOCK_GRADIENTS


def test_a_parent_without_its_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = branches._rows
    monkeypatch.setattr(branches, "_rows", lambda states, order: rows(states.detach(), order))
    model = build("qwen3_next").train()
    with patch(model):
        assert worst(gradients(tree(), model, True), gradients(tree(), model, False)) > 100 * BLOCK_GRADIENTS


def test_segments_without_their_parents_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SegmentTree, "options", property(lambda self: {"cu_seqlens": self.offsets}))
    model = build("qwen3_next")
    with patch(model), torch.no_grad():
        assert relative_error(of_all_paths(tree(), model, True), of_all_paths(tree(), model, False)) > 100 * CLOSE


def test_what_a_tree_is() -> None:
    found = TokenTree([[5, 6, 7], torch.tensor([8, 9]), [4], [3]], torch.tensor([-1, 0, 1, 0]))
    assert found.ids.tolist() == [[5, 6, 7, 8, 9, 4, 3]] and found.cu_seqlens.tolist() == [0, 3, 5, 6, 7]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3]]
    assert found.path(2).tolist() == [0, 1, 2, 3, 4, 5] and found.path(3).tolist() == [0, 1, 2, 6]
    seen = (found.attention_mask() == 0)[0, 0]
    assert seen[6].tolist() == [True, True, True, False, False, False, True]
    assert seen[4].tolist() == [True] * 5 + [False] * 2 and seen.sum() == 6 + 4 + 5 + 6 + 4


def test_texts_share_their_beginnings() -> None:
    texts = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2], [7], [1, 2, 3, 5, 6], []]
    found = TokenTree.from_texts(texts)
    paths = [found.ids[0, found.path(end)].tolist() for end in found.ends]
    assert paths == texts
    assert found.ids.shape[1] == 7 and len(found.parents) == 5  # 1 2, 3, 4, 5 6 and 7


def test_bad_input_is_named() -> None:
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        ([[1], [2]], [0, -1], ValueError, r"^parents: got parents\[0\] = 0; expected -1, or a segment before 0"),
        ([[1], [2]], [-1], ValueError, r"^parents: got 1 parents; expected 2"),
        ([[1], [2]], [-1, 0.0], TypeError, r"^parents: got float"),
        ([[1.0]], [-1], TypeError, r"^segments\[0\]: got a float among them; expected integers"),
        (["ab"], [-1], TypeError, r"^segments\[0\]: got a str; expected a list or a tensor of integers"),
        ([torch.ones(1, 2).long()], [-1], TypeError, r"^segments\[0\]: got torch.int64 \[1, 2\]; expected integers"),
        ([[]], [-1], ValueError, r"^segments: got 1 without a token; expected at least one token"),
    ]
    for segments, parents, error, text in wrong:
        with pytest.raises(error, match=text):
            TokenTree(segments, parents)
    model, found = build("qwen3_next"), tree()
    with pytest.raises(ValueError, match=r"^model: got a Qwen3NextForCausalLM that is not patched"):
        found.run(model)
    with patch(model), pytest.raises(ValueError, match=r"^use_cache: got a cache with a tree of segments; expected"):
        model(found.ids, cu_seq_lens_q=SegmentTree(found.cu_seqlens, found.parents), use_cache=True)
    with patch(model), pytest.raises(ValueError, match=r"^labels: got labels of a row; expected none"):
        found.run(model, labels=found.ids)
    other = build("bamba").double()
    with patch(other), pytest.raises(ValueError, match=r"^cu_seq_lens_q: got a tree of segments for a call that goes"):
        found.run(other)
    for family in set(INDEXED) & set(FAMILIES):
        other = build(family)
        with patch(other), pytest.raises(ValueError, match=r"^model: got a cache layer .*; expected layers with keys"):
            found.run(other)
