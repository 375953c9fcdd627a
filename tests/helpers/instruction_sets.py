"""Fixtures that choose the instruction set of the C++ kernels, and put back what was chosen before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sleepkern.backends.native.module import _C


@pytest.fixture
def restore_isa() -> Iterator[None]:
    """The test may call `_C.set_isa`."""
    before = _C.isa()
    yield
    _C.set_isa(before)


@pytest.fixture(params=[] if _C is None else _C.isas())
def isa(request: pytest.FixtureRequest, restore_isa: None) -> str:
    """Each instruction set of this machine in turn."""
    name: str = request.param
    _C.set_isa(name)
    return name
