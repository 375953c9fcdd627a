"""Which backend runs the passes of a stack, by name, by environment and by itself; and blocks of other models."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.block_stacks import State, all_of, model
from torch import Tensor, nn
from torch.nn import functional as F

from sleepkern import backends, settings
from sleepkern.backends import modules
from sleepkern.problems.blocks import BlockProblem, Slept
from sleepkern.problems.layer_weights import AttentionWeights, GatedDeltaWeights, LayerWeights
from sleepkern.sleep import explain_blocks, sleep_blocks
from sleepkern.sleep.blocks import one_by_one, why_not
from sleepkern.state import KVState
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import BLOCK_GRADIENTS, BLOCKS, SAME_SUMS

ROOT = Path(__file__).resolve().parents[2]
H = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_backends_by_name() -> None:
    blocks = model(24, 2, {}).blocks()
    by_name = {
        name: sleep_blocks(H, blocks, passes=2, feedback="reinject", backend=name) for name in ("cpu", "modules")
    }
    assert torch.equal(by_name["modules"].h, one_by_one(H, blocks, 2, feedback="reinject").h)
    assert torch.equal(by_name["cpu"].h, sleep_blocks(H, blocks, passes=2, feedback="reinject").h)
    for a, b in zip(*(all_of(slept) for slept in by_name.values()), strict=True):
        assert 0 < relative_error(a, b.double()) < BLOCKS


REFUSED: dict[str, dict[str, Any]] = {
    "backend: got 'gpu'; expected one of cuda, cpu, modules": {"backend": "gpu"},
    "backend: got 3; expected one of": {"backend": 3},
    "backend: got 'cuda', which cannot do this call: .*(built without CUDA|runs on a GPU)": {"backend": "cuda"},
    "backend: got 'cpu', which cannot do this call: one call for torch.float64": {"backend": "cpu", "h": H.double()},
    "backend: got 'cpu', which cannot do this call: short convolutions of at most 4": {
        "backend": "cpu", "blocks": model(24, 2, {"convolution": 6}).blocks(),
    },
}  # fmt: skip


@pytest.mark.parametrize("message", list(REFUSED))
def test_a_backend_that_cannot_says_why(message: str) -> None:
    given = {"h": H, "blocks": model(24, 2, {}).blocks()} | REFUSED[message]
    for call in (sleep_blocks, explain_blocks):
        with pytest.raises(ValueError, match=message):
            call(**given)


@torch.no_grad()
def test_explanations(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = model(24, 2, {}).blocks()
    told = explain_blocks(H, blocks)
    assert told.chosen == "cpu" and "C++" in told.kernel and list(told.reasons) == ["cuda", "cpu", "modules"]
    assert told.reasons["cuda"] and told.reasons["cpu"] is None and told.reasons["modules"] is None
    assert re.search(r"sleep_blocks: cpu \(C\+\+.*\n  cuda +no: .*\n  cpu +chosen\n  modules +could", str(told))
    assert explain_blocks(H, blocks, "modules").chosen == "modules"
    wide = explain_blocks(H, model(24, 2, {"convolution": 6}).blocks())
    assert wide.chosen == "modules" and wide.reasons["cpu"] == "short convolutions of at most 4 tokens"
    monkeypatch.setattr(settings, "BACKEND", "chunked")
    told = explain_blocks(H, blocks)
    assert told.chosen == "modules" and told.reasons["cpu"] == "SLEEPKERN_BACKEND requests another backend"
    assert explain_blocks(H, blocks, "cpu").chosen == "cpu"  # an argument comes before the environment
    for wrong in (None, torch.zeros(3, 4)):
        with pytest.raises((TypeError, ValueError), match="^h: got"):
            explain_blocks(wrong, blocks)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^blocks: got none"):
        explain_blocks(H, [])


@torch.no_grad()
def test_a_graph_is_made_of_the_modules() -> None:
    blocks = model(24, 2, {}).blocks()[1:2]

    def slept(h: Tensor) -> Tensor:
        return sleep_blocks(h, blocks, passes=2, feedback="reinject").h

    compiled = torch.compile(slept, fullgraph=True, backend="eager")
    assert relative_error(compiled(H), one_by_one(H, blocks, 2, feedback="reinject").h.double()) < SAME_SUMS


class Counting:
    """A backend for attention that calls the modules and counts its runs."""

    NAME, RECORDED = "counting", True
    SUPPORTS: frozenset[type] | None = frozenset({AttentionWeights})

    def __init__(self) -> None:
        self.runs = 0

    def why_not(self, problem: BlockProblem) -> str | None:
        return problem.refusal

    def kernel(self, problem: BlockProblem) -> str:
        return "counted"

    def run(self, problem: BlockProblem, h: Tensor, blocks: Sequence[Any], states: Sequence[State]) -> Slept:
        self.runs += 1
        return modules.run(problem, h, blocks, states)


@torch.no_grad()
def test_a_backend_that_is_put_first_is_taken_for_mixers_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    first, blocks = Counting(), model(24, 2, {}).blocks()
    monkeypatch.setattr(backends, "BLOCK_BACKENDS", (first, *backends.BLOCK_BACKENDS))
    assert torch.equal(sleep_blocks(H, blocks[:1]).h, one_by_one(H, blocks[:1]).h) and first.runs == 1
    told = explain_blocks(H, blocks)
    assert told.chosen == "cpu" and told.reasons["counting"] == "does not know GatedDeltaWeights"
    sleep_blocks(H, blocks)
    assert first.runs == 1


class Theirs(nn.Module):
    """Another model's block: its own names, norms with an eps of 0.1, and attention written out."""

    recurrent = False

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        torch.manual_seed(d)
        sizes = {"qkv": (3 * d, d), "qn": (d // heads,), "kn": (d // heads,), "proj": (d, d), "n1": (d,), "n2": (d,),
                 "fc1": (2 * d, d), "fc2": (d, 2 * d)}  # fmt: skip
        self.w = nn.ParameterDict(
            {name: nn.Parameter(torch.rand(size) / size[-1] ** 0.5) for name, size in sizes.items()}
        )

    def forward(self, h: Tensor, before: KVState | None = None) -> tuple[Tensor, KVState]:
        def norm(x: Tensor, gain: Tensor) -> Tensor:
            return F.rms_norm(x, gain.shape, gain, 0.1)

        w = self.w
        x = F.linear(norm(h, w["n1"]), w["qkv"]).unflatten(-1, (3, self.heads, -1))
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        q, k = norm(q, w["qn"]), norm(k, w["kn"])
        if before is not None:
            k, v = torch.cat([before.keys, k], 2), torch.cat([before.values, v], 2)
        T, S = q.shape[2], k.shape[2]
        seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(-2)
        h = h + F.linear(o, w["proj"])
        return h + F.linear(F.linear(norm(h, w["n2"]), w["fc1"]).relu().square(), w["fc2"]), KVState(k, v)


class Handing(Theirs):
    """The same, whose weights kernels may read."""

    def layer_weights(self) -> LayerWeights | str:
        w = self.w
        mixer = AttentionWeights(self.heads, 0.1, 0.1, w["qkv"], w["qn"], w["kn"], w["proj"])
        return LayerWeights(mixer, 0.1, 0.1, w["n1"], w["n2"], w["fc1"], w["fc2"])


def test_blocks_of_other_models_hand_out_their_weights() -> None:
    mixed = [Handing(24, 2), *model(24, 2, {}).blocks()[1:], Handing(24, 3)]
    assert explain_blocks(H, mixed).chosen == "cpu"
    assert "hands out no layer weights" in str(why_not(H, [Theirs(24, 2), *mixed]))
    with torch.no_grad():
        states = sleep_blocks(H, mixed).states
        for options in ({}, {"states": states, "passes": 3, "feedback": "reinject"}):
            ours, true = sleep_blocks(H, mixed, **options), sleep_blocks(H, mixed, **options, backend="modules")  # type: ignore[arg-type]
            for a, b in zip(all_of(ours), all_of(true), strict=True):
                assert relative_error(a, b.double()) < BLOCKS
    parameters = [p for block in mixed for p in block.parameters()]
    grads = [
        torch.autograd.grad(sleep_blocks(H, mixed, passes=2, backend=name).h.square().sum(), parameters)
        for name in ("cpu", "modules")
    ]
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b.double()) < BLOCK_GRADIENTS


def changed(**values: Any) -> Callable[[LayerWeights], Any]:
    return lambda layer: layer._replace(**values)


def with_mixer(**values: Any) -> Callable[[LayerWeights], Any]:
    return lambda layer: layer._replace(mixer=layer.mixer._replace(**values))


STRANGE: dict[str, Callable[[LayerWeights], Any]] = {
    "the reason": lambda layer: "the reason",
    "sizes of weights do not fit each other: {'up'": changed(up=torch.zeros(48, 23)),
    "sizes of weights do not fit each other: {'qkv'": with_mixer(qkv=torch.zeros(24, 24)),
    "a int among the weights is not numbers at an address": changed(down=3),
    "a mixer's heads and widths are ('2',)": with_mixer(heads="2"),
    "a mixer's heads and widths, (5,), do not fit": with_mixer(heads=5),
    "a block has the numbers (2, nan": with_mixer(q_eps=float("nan")),
    "weights are torch.float64 on cpu, h is torch.float32": changed(mlp_norm=torch.ones(24, dtype=torch.float64)),
    "a Theirs has recurrent = False and weights of the other kind": lambda layer: layer._replace(
        mixer=GatedDeltaWeights(2, 2, 4, 4, 0.0, 1.0, 0.1, *[torch.zeros(24, 24)] * 6)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("reason", list(STRANGE))
def test_weights_that_do_not_fit_are_not_read(reason: str) -> None:
    class Wrong(Handing):
        def layer_weights(self) -> Any:
            return STRANGE[reason](super().layer_weights())  # type: ignore[arg-type]

    Wrong.__name__ = "Theirs"
    block = Wrong(24, 2)
    assert reason in str(why_not(H, [block]))
    assert torch.equal(sleep_blocks(H, [block]).h, one_by_one(H, [block]).h)


def test_something_else_than_weights_is_refused() -> None:
    class Wrong(Handing):
        def layer_weights(self) -> Any:
            return {"up": 3}

    with pytest.raises(TypeError, match="blocks: got a dict out of a Wrong's layer_weights; expected LayerWeights"):
        sleep_blocks(H, [Wrong(24, 2)])


@torch.no_grad()
def test_examples_of_the_page_run() -> None:
    names: dict[str, Any] = {}
    for page in ("kernels/cpu_blocks.md", "guides/adapt_your_model.md"):
        exec(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)[-1], names)
    mine = [names["Mine"](names["blocks"][0]), *names["blocks"][1:]]
    assert explain_blocks(torch.randn(1, 24, 64), mine).chosen == "cpu" and names["slept"].h.isfinite().all()
    mine[0].register_forward_hook(lambda *_: None)
    assert why_not(torch.randn(1, 24, 64), mine) == "hooks want to be called"
