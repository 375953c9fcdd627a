"""Calls whose launches are held: the first goes through Triton and is recorded, later ones repeat the record.

At every launch Triton binds the arguments, looks at each of them and searches for the compiled kernel, which takes
longer than many kernels run. `run` does so for the first call of a key only:

    first call    launches(recording, tensors): each kernel[grid](...) returns the compiled kernel, which is noted
                  with its grid and with the origin of each argument
    later calls   one allocation for all scratch, the addresses of the call's tensors, compiled[grid](*arguments)

A kernel is compiled for the types of its pointers, for None, for addresses that are multiples of 16, and for its
integers. So the key has all of that: `run` adds types, None, alignment and device to the caller's key, which says the
rest (sizes, strides, switches, tiles). A record holds no tensor. Under TRITON_INTERPRET, while Triton debugs or
instruments kernels, and where an argument has an unknown origin, every call goes through Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

ALIGNMENT = 128
"""Bytes between which scratch begins; Triton compiles for addresses that are multiples of 16."""
MOST = 4096
"""Records that are held; the oldest goes first."""
_records: dict[Hashable, _Record] = {}

Launches = Callable[["Recording", Sequence[Any]], None]
"""The launches of a call in order. It takes the recording, and the tensors of `run` as objects of their own."""
_Pick = Callable[[Sequence[Any]], Sequence[Any]]
_RUNTIME, _COMPILATION = knobs.runtime, knobs.compilation


def run(key: Hashable, tensors: Sequence[Tensor | None], launches: Launches, like: Tensor) -> None:
    """Launch the kernels of a call on the current stream of the device of `like`, which is the current device.

    Args:
        key: decides all that `launches` does, but for which tensors there are and their types, addresses and device.
        tensors: every tensor that the kernels read or write, scratch excepted.
        launches: makes the launches where there is no record of the key.
        like: a tensor on the device.
    """
    device = like.get_device()
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    types = tuple([None if t is None else t.dtype for t in tensors])
    odd = tuple([a for a, address in enumerate(addresses) if address is not None and address & 15])
    whole = (key, device, types, odd)
    record = _records.get(whole)
    if record is not None and _as_compiled():
        record.repeat(addresses, device, like)
        return
    recording = Recording(tensors, like)
    launches(recording, recording.tensors)
    found = recording.record() if _as_compiled() else None
    if found is not None:
        if len(_records) >= MOST:
            _records.pop(next(iter(_records)), None)
        _records[whole] = found


def forget() -> None:
    """Drop all records."""
    _records.clear()


def _as_compiled() -> bool:
    """Tells whether Triton would launch the kernels that the records hold: it compiles others to debug them."""
    return not (
        _RUNTIME.debug
        or getattr(_RUNTIME, "add_stages_inspection_hook", None) is not None
        or getattr(_COMPILATION, "instrumentation_mode", "")
    )


class Recording:
    """The launches of one call as they are made, with the origin of every argument."""

    def __init__(self, tensors: Sequence[Tensor | None], like: Tensor) -> None:
        # An alias of each, because one tensor may have two roles in this call and not in a later one.
        self.tensors = [None if t is None else t.detach() for t in tensors]
        self._like = like
        self._scratch: list[Tensor] = []
        self._launches: list[tuple[Any, tuple[int, ...], list[Any]]] = []
        self._known = not like.is_meta

    def empty(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Scratch of this call, which nobody may keep."""
        self._scratch.append(torch.empty(size, dtype=dtype, device=self._like.device))
        return self._scratch[-1]

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: Mapping[str, Any]) -> None:
        """Launch a kernel by Triton and note it. arguments: by name, all that the kernel has; options: of Triton's."""
        compiled = kernel[grid](**arguments, **options)
        self._known = self._known and isinstance(compiled, CompiledKernel) and not kernel.pre_run_hooks
        if self._known:
            given = [_Constant(arguments[p.name]) if p.is_constexpr else arguments[p.name] for p in kernel.params]
            self._launches.append((compiled, grid, given))

    def record(self) -> _Record | None:
        """What a later call repeats; None where a kernel or the origin of an argument is not known."""
        if not self._known or not self._launches:
            return None
        offsets, end = [], 0
        for t in self._scratch:
            offsets.append(end)
            end += -(-t.nbytes // ALIGNMENT) * ALIGNMENT
        steps = _Steps([*self.tensors, *self._scratch])
        try:
            for compiled, grid, arguments in self._launches:
                steps.add(arguments, compiled[(*grid, 1, 1)[:3]])
        except KeyError:  # a tensor that is neither the call's nor scratch
            return None
        return _Record(end, tuple(offsets), tuple(steps.steps))


class _Step(NamedTuple):
    """Append the constants to the list of values, pick some of all, and launch a kernel with these.

    Without a kernel, what is picked is a group of arguments, and is appended to the values itself.
    """

    constants: tuple[Any, ...]
    pick: _Pick
    launch: Callable[..., None] | None


class _Record(NamedTuple):
    """A recorded call. The values start with the addresses of the call's tensors and of its scratch."""

    scratch_bytes: int
    scratch_offsets: tuple[int, ...]
    steps: tuple[_Step, ...]

    def repeat(self, values: list[Any], device: int, like: Tensor) -> None:
        """Make the launches again, on other tensors and other scratch."""
        if self.scratch_bytes:  # freed on return, for what comes after on this stream
            scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=like.device)
            begin = scratch.data_ptr()
            values += [begin + offset for offset in self.scratch_offsets]
        stream = driver.active.get_current_stream(device)
        for constants, pick, launch in self.steps:
            values += constants
            if launch is None:
                values.append(pick(values))
            else:
                launch(*pick(values), stream=stream)


class _Constant(NamedTuple):
    """An argument that the kernel is compiled for."""

    value: Any


class _Steps:
    """Builds the steps of a record. Each tensor, constant and group has its position in the list of values."""

    def __init__(self, pointers: Sequence[Tensor | None]) -> None:
        self.steps: list[_Step] = []
        self._positions = {id(t): i for i, t in enumerate(pointers) if t is not None}
        self._count = len(pointers)
        self._constants: list[Any] = []

    def add(self, arguments: Sequence[Any], launch: Callable[..., None] | None) -> None:
        """Append the step of a launch, or of a group of arguments, after those of the groups in it."""
        positions = [self._position(argument) for argument in arguments]
        one = itemgetter(slice(positions[0], positions[0] + 1)) if len(positions) == 1 else itemgetter(*positions)
        self.steps.append(_Step(tuple(self._constants), one, launch))
        self._constants = []

    def _position(self, argument: Any) -> int:
        if isinstance(argument, Tensor):
            return self._positions[id(argument)]
        if isinstance(argument, tuple) and not isinstance(argument, _Constant):
            if id(argument) not in self._positions:
                self.add(argument, None)
                self._positions[id(argument)] = self._count
                self._count += 1
            return self._positions[id(argument)]
        self._constants.append(argument.value if isinstance(argument, _Constant) else argument)
        self._count += 1
        return self._count - 1
