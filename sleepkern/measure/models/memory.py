"""The most memory that a prefill and a decode take beside the weights: of a process of its own, or of a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...integrations.caches import cache_in
from ...integrations.transformers import patch
from .. import timing
from ..model_calls import greedy, prefill, prompts
from ..model_cases import quiet_transformers
from .sources import ModelSource, build

Peaks = list[tuple[int | None, int | None]]
"""The peaks of (prefill, decode) for each length, bytes; None where the system does not tell them."""


def peaks_apart(
    source: ModelSource,
    batch: int,
    lengths: Sequence[int],
    steps: int,
    with_patch: bool,
    dtype: torch.dtype,
    threads: int,
    device: str = "cpu",
) -> Peaks:
    """The peaks of a model that is built for this call.

    On a CPU it runs in a process of its own, in which nothing else takes memory.
    """
    work = (source, batch, lengths, steps, with_patch, dtype, threads, device)
    if torch.device(device).type == "cuda":
        return _built_peaks(*work)
    context = get_context("spawn")
    result, sent = context.Pipe(duplex=False)
    process = context.Process(target=_send_peaks, args=(sent, work), daemon=True)
    with _child_without_interrupts():
        process.start()
    sent.close()
    try:
        found: Peaks | Exception = result.recv()
    except EOFError:  # the process has ended without an answer, as where the system has no more memory for it
        return [(None, None)] * len(lengths)
    finally:
        process.terminate()
        process.join()
    if isinstance(found, Exception):
        raise found
    return found


@contextlib.contextmanager
def _child_without_interrupts() -> Iterator[None]:
    """Let a process that starts here ignore Ctrl-C, which goes to both and which its parent answers by ending it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _send_peaks(connection: Connection, work: tuple[Any, ...]) -> None:
    """The work of the other process."""
    try:
        connection.send(_built_peaks(*work))
    except Exception as error:  # the parent raises it
        connection.send(error)


def _built_peaks(
    source: ModelSource,
    batch: int,
    lengths: Sequence[int],
    steps: int,
    with_patch: bool,
    dtype: torch.dtype,
    threads: int,
    device: str,
) -> Peaks:
    with quiet_transformers(), timing.threads(threads):
        return peaks(build(source, dtype, device), source, batch, lengths, steps, with_patch, device)


def peaks(
    model: nn.Module, source: ModelSource, batch: int, lengths: Sequence[int], steps: int, with_patch: bool,
    device: str = "cpu",
) -> Peaks:  # fmt: skip
    """The peaks at each length, after a warm-up on a few tokens; those of a decode hold the cache of its prompt too."""
    found: Peaks = []
    with patch(model) if with_patch else contextlib.nullcontext():
        (few,) = prompts(source.text, batch, 4, device=device)
        greedy(model, cache_in(prefill(model, few)), few[:, -1:], 1)
        for tokens in lengths:
            (ids,) = prompts(source.text, batch, tokens, device=device)
            kept: list[Any] = []
            before = _in_use(device)
            first = _peak(lambda: kept.append(cache_in(prefill(model, ids))), device)  # noqa: B023
            _in_use(device)  # what the prefill has freed is no memory of a decode
            second = _peak(lambda: greedy(model, kept[0], ids[:, -1:], steps), device)  # noqa: B023
            found.append((_beyond(first, before), _beyond(second, before)))
    return found


def _beyond(peak: int | None, before: int | None) -> int | None:
    return None if peak is None or before is None else max(0, peak - before)


def _in_use(device: str) -> int | None:
    gc.collect()
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed pages go back to the system
    return _status("VmRSS")


def _peak(run: Callable[[], Any], device: str) -> int | None:
    """The most bytes in use while `run` runs, with those that were in use before; None where they are not told."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the resident memory
    except OSError:
        run()
        return None
    run()
    return _status("VmHWM")


def _status(field: str) -> int | None:
    """A size in the status of this process, bytes; None where the system has no such file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None
