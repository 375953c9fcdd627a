"""What our modules are called with, and what was put around their layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sleepkern.nn import GatedDeltaNet, SleepLM, WindowAttention
from sleepkern.sleep import SleepSession, sleep_blocks
from sleepkern.sleep.blocks import why_not
from sleepkern.state import KVState
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import BLOCKS


def speaking(kinds: int = 1) -> SleepLM:
    torch.manual_seed(0)
    lm = SleepLM(8, 16, 2, 3, window=32, kinds=kinds)
    nn.init.normal_(lm.lm_head.weight)
    return lm


def compiled(block: nn.Module) -> nn.Module:
    return torch.compile(block, backend="eager")  # type: ignore[no-any-return]


class Around(nn.Module):
    """As tools that checkpoint or shard a layer: what it lacks is asked of the layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(super().__getattr__("inner"), name)

    def forward(self, *given: Any, **options: Any) -> Any:
        return self.inner(*given, **options)


@pytest.fixture
def _eager() -> Iterator[None]:
    """What is compiled runs as it was, which is quicker and stands around as much."""
    with torch.compiler.set_stance("force_eager"):
        yield


@torch.no_grad()
@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("wrap", [compiled, Around])
def test_no_layer_is_left_out(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Whatever is around it; it then runs module by module, in a session too."""
    lm, ids = speaking(), torch.randint(8, (2, 11))
    plain, session = lm(ids), SleepSession(lm, 4, passes=2).ingest(ids)
    expected = session.read(ids[:, :3])
    lm.layers[1] = wrap(lm.layers[1])
    assert len(lm.blocks()) == 3 and "not a HybridBlock" in str(why_not(torch.randn(1, 4, 16), lm.blocks()))
    assert relative_error(lm(ids), plain.double()) < BLOCKS
    with torch.enable_grad():
        assert relative_error(lm(ids), plain.double()) < BLOCKS
    found = SleepSession(lm, 4, passes=2).ingest(ids)
    assert sorted(found.memory.fast()) == [1] and "block by block" in found.explain()
    assert relative_error(found.read(ids[:, :3]), expected.double()) < BLOCKS


def test_a_layer_of_another_kind_is_named() -> None:
    lm, ids = speaking(), torch.randint(8, (1, 5))
    lm.layers[2] = nn.Sequential(lm.layers[2])
    for run in (lambda: lm(ids), lambda: SleepSession(lm, 4), lambda: sleep_blocks(torch.randn(1, 4, 16), lm.blocks())):
        with pytest.raises(TypeError, match="layers: got a Sequential at 2; expected a HybridBlock"):
            run()


IDS: list[tuple[Any, str]] = [
    ([[1, 2]], "ids: got a list; expected a tensor of integers"),
    (None, "ids: got a NoneType; expected"),
    (torch.rand(2, 3), r"ids: got torch.float32 \[2, 3\]; expected integers \[B,T\]"),
    (torch.zeros(2, 3, dtype=torch.bool), r"ids: got torch.bool \[2, 3\]; expected integers"),
    (torch.zeros(3, dtype=torch.int64), r"ids: got torch.int64 \[3\]; expected integers"),
    (torch.zeros(1, 3, 2, dtype=torch.int64), r"ids: got torch.int64 \[1, 3, 2\]; expected integers"),
    (torch.zeros(1, 3, dtype=torch.int64).to_sparse(), "ids: got torch.sparse_coo torch.int64"),
    (torch.tensor([[3, -1]]), "ids: got -1; expected tokens from 0 to 15"),
    (torch.tensor([[16, 3]]), "ids: got 16; expected tokens from 0 to 15"),
    (torch.tensor([[16]], dtype=torch.uint8), "ids: got 16; expected tokens from 0 to 15"),
]


@pytest.mark.parametrize(("ids", "message"), IDS, ids=lambda x: x[9:30] if isinstance(x, str) else "")
def test_ids_that_are_none(ids: Any, message: str) -> None:
    """One sentence, of the model and of its sessions alike."""
    lm, first = speaking(kinds=2), torch.randint(16, (1, 5))
    session = SleepSession(lm, 2).ingest(first)
    for run in (lm, torch.no_grad()(lm), SleepSession(lm, 2).ingest, session.ingest, session.read, session.generate):
        with pytest.raises((TypeError, ValueError), match=message):
            run(ids)
    assert session.position == 4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_narrow_ids_are_those_numbers(dtype: torch.dtype) -> None:
    lm, ids = speaking(kinds=2), torch.randint(16, (2, 7))
    session, other = (SleepSession(lm, 3, passes=2).ingest(x) for x in (ids, ids.to(dtype)))
    assert torch.equal(lm(ids.to(dtype)), lm(ids))
    again = SleepSession(lm, 3, passes=2)
    again.load_state_dict({n: t.to(dtype) if n == "waiting" else t for n, t in session.state_dict().items()})
    for asked in (other, again):
        assert torch.equal(asked.sleep().read(ids[:, :2].to(dtype)), session.fork().sleep().read(ids[:, :2]))
    assert torch.equal(other.generate(ids.to(dtype), max_new_tokens=2), session.sleep().generate(ids, max_new_tokens=2))


@torch.no_grad()
def test_no_rows_and_no_tokens() -> None:
    lm = speaking()
    assert lm(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 8)
    assert lm(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 8)
    with pytest.raises(ValueError, match=r"ids: got \[0, 3\]; expected at least one row"):
        SleepSession(lm, 2).ingest(torch.empty(0, 3, dtype=torch.int64))


def test_ids_of_a_graph_and_of_a_transform_are_taken_on_trust() -> None:
    lm, ids = speaking(), torch.randint(8, (2, 5))
    expected = lm(ids)
    assert relative_error(torch.compile(lm, backend="eager", fullgraph=True)(ids), expected.double()) < BLOCKS
    found = torch.vmap(lambda row: lm(row[None]))(ids)
    assert relative_error(found[:, 0], expected.double()) < BLOCKS


@pytest.mark.parametrize("kind", [WindowAttention, GatedDeltaNet])
@pytest.mark.parametrize("size", [(3, 16), (1, 2, 3, 16), (1, 3, 15), (16,), ()])
def test_what_is_no_window(kind: Any, size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x: got \[.*\]; expected \[B,T,16\]"):
        kind(16, 2)(torch.randn(size))
    with pytest.raises(TypeError, match="x: got a list; expected a tensor"):
        kind(16, 2)([1.0])


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (3, "before: got a int; expected KVState"),
        (KVState(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4, 8)), r"before: got values \[1, 2, 4, 8\]"),
        (
            KVState(torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)),
            r"before: got keys \[2, 2, 3, 8\]; expected \[1, 2\]",
        ),
        (KVState(torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8)), r"before: got keys \[1, 1, 3, 8\]"),
        (KVState(torch.randn(1, 2, 8), torch.randn(1, 2, 8)), r"before: got keys \[1, 2, 8\]"),
    ],
)
def test_what_attention_cannot_go_on_from(before: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        WindowAttention(16, 2)(torch.randn(1, 3, 16), before)
