"""A record is repeated for a call of the same key alone, on the tensors of that call; kernels are stand-ins here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from launch_cases import Case
from stub_driver import Stub
from test_held_launches import by_triton_alone, launched
from torch import Tensor

import sleepkern
from sleepkern.backends.triton import held_launches
from sleepkern.rules import GATED_DELTA_RULE


class Compiled:
    """A compiled kernel that notes what it is launched with."""

    def __init__(self, into: list[Any]) -> None:
        self.into = into

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *given, stream: self.into.append((grid, given, stream))


class Kernel:
    """What Triton compiles: its first launch is told apart from those of the record."""

    params = [SimpleNamespace(name=n, is_constexpr=n == "C") for n in ("x", "y", "scratch", "more", "n", "C")]
    pre_run_hooks: list[Any] = []

    def __init__(self) -> None:
        self.first: list[dict[str, Any]] = []
        self.repeated: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def launch(**given: Any) -> Compiled:
            self.first.append(given)
            return Compiled(self.repeated)

        return launch


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    held_launches.forget()
    streams = iter(range(100, 1000))
    active = SimpleNamespace(get_current_stream=lambda device: next(streams))
    with (
        mock.patch.object(held_launches, "CompiledKernel", Compiled),
        mock.patch.object(held_launches, "driver", SimpleNamespace(active=active)),
    ):
        yield Kernel()
    held_launches.forget()


class OnDevice(Tensor):
    """A tensor of the CPU that says it is on the second GPU."""

    def get_device(self) -> int:
        return 1


def call(kernel: Kernel, x: Tensor, y: Tensor | None, key: Any = "key", like: Tensor | None = None) -> bool:
    """Tells whether the call went through Triton."""

    def launches(recording: Any, tensors: Any) -> None:
        scratch, more = recording.empty([3], torch.float32), recording.empty([40], torch.float64)
        given = {"x": tensors[0], "y": tensors[1], "scratch": scratch, "more": more, "n": 7, "C": 5}
        recording.launch(kernel, (2, 3), given, {})

    before = len(kernel.first)
    held_launches.run(key, (x, y), launches, x if like is None else like)
    return len(kernel.first) > before


def memory() -> Tensor:
    """Floats from a multiple of 64 bytes on."""
    t = torch.zeros(64)
    assert t.data_ptr() % 64 == 0
    return t


def test_what_a_kernel_is_compiled_for_is_part_of_the_key(kernel: Kernel) -> None:
    x, y = memory(), memory()
    assert call(kernel, x, y) and not call(kernel, x, y) and not call(kernel, memory(), memory())
    others: dict[str, tuple[Any, ...]] = {
        "another key": (x, y, "other"), "another type": (x, y.double()), "the other's type": (x.double(), y),
        "none": (x, None), "8 bytes on": (x[2:], y), "the other 8 bytes on": (x, y[2:]),
        "another device": (x, y, "key", x.as_subclass(OnDevice)),
    }  # fmt: skip
    for what, given in others.items():
        assert call(kernel, *given), what
        assert not call(kernel, *given), what
    assert not call(kernel, x[4:], y[8:]), "multiples of 16"


def test_a_repeated_launch_has_the_tensors_of_its_own_call(kernel: Kernel) -> None:
    call(kernel, memory(), memory())
    seen, kept = [], []
    for _ in range(3):
        x, y = memory(), memory()
        kept += [x, y]
        with mock.patch.object(torch, "empty", side_effect=torch.empty) as allocated:
            call(kernel, x, y)
        assert allocated.call_count == 1
        grid, (first, second, scratch, more, n, C), stream = kernel.repeated[-1]
        assert (grid, first, second, n, C) == ((2, 3, 1), x.data_ptr(), y.data_ptr(), 7, 5)
        assert scratch % 16 == 0 and more % 16 == 0 and more - scratch >= 12 and more - scratch < 12 + 128
        seen.append(stream)
    assert len(set(seen)) == 3, "each has the stream that is current then"


def test_scratch_holds_all_of_it(kernel: Kernel) -> None:
    call(kernel, memory(), memory())
    with mock.patch.object(torch, "empty", side_effect=torch.empty) as allocated:
        call(kernel, memory(), memory())
    (size,), _, scratch, more = *allocated.call_args, *kernel.repeated[-1][1][2:4]
    assert size >= more - scratch + 40 * 8


def test_strides_are_part_of_the_key(stub: Stub) -> None:
    """Rows inside of a wider projection have the shapes, types and alignments of rows side by side."""
    case = Case(GATED_DELTA_RULE, "forward", T=70)
    case.call()
    wide = torch.cat([case.x[n].flatten(2) for n in ("q", "k", "v")], -1)  # type: ignore[union-attr]
    parts = wide.split(64, -1)
    case.x.update({n: part.unflatten(-1, (2, 32)) for n, part in zip(("q", "k", "v"), parts, strict=True)})
    for _ in range(2):
        _, held, _ = launched(stub, case)
    with by_triton_alone():
        _, plain, _ = launched(stub, case)
    assert held == plain


def test_raw_gates_are_part_of_the_key(stub: Stub) -> None:
    """beta = sigmoid and beta = 2 sigmoid take the same tensors."""
    case = Case(GATED_DELTA_RULE, "forward", T=70)

    def constants(doubled: bool) -> list[Any]:
        stub.reset(keep_launches=True)
        sleepkern.gated_delta_rule(
            **case.x,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=doubled,
            backend="triton",  # type: ignore[arg-type]
        )
        return [(one.function, [p for p in one.parameters if len(p) == 4]) for one in stub.launches()]

    for _ in range(2):
        one, two = constants(False), constants(True)
        assert one != two
