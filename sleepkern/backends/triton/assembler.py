"""Lets the kernels of this package, and no others, be assembled by the ptxas of the package nvidia-cuda-nvcc.

That is for Hopper, where Triton's own ptxas may not be sound (ptxas.py).

Triton has one switch for its assembler, for every kernel of a process, and its cache does not notice when the switch
changes. So the switch stays as it is. A kernel of this package carries the version of its assembler among its own
compile options, which Triton puts into the keys of its caches, and a hook of Triton's compiler replaces the last stage
of kernels that carry it. Kernels of others go the usual way, also in another thread at the same time. An assembler
of Triton's refuses the option, so a kernel that escapes the hook is an error and never code of the wrong assembler.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from .ptxas import PACKAGE, Assembler, assembler_of, numbers, packaged_assembler

MARK = "--sleepkern-assembler="
"""Begins the option that names the assembler; no ptxas knows it."""


class Hook(NamedTuple):
    """The hook in place, the one that it replaced, and how many compilations hold it."""

    installed: Any
    before: Any
    holders: int


_lock = Lock()
_hook = Hook(None, None, 0)


@lru_cache(maxsize=8)
def compile_options(capability: tuple[int, int]) -> Mapping[str, str]:
    """Options that a launch or a compilation on this device takes beside num_warps and num_stages; often none."""
    chosen = assembler_of(capability)
    if chosen.source != PACKAGE:
        return {}
    from triton import knobs

    usual = getattr(knobs.nvidia, "ptxas_options", None)
    return {"ptx_options": " ".join(filter(None, (usual, MARK + chosen.version)))}


@contextmanager
def assembling(capability: tuple[int, int]) -> Iterator[Mapping[str, str]]:
    """While held, kernels compiled with the options that it returns are assembled by `assembler_of(capability)`.

    It costs nothing where that is Triton's. Several threads may hold it.
    """
    options = compile_options(capability)
    if not options:
        yield options
        return
    _take()
    try:
        yield options
    finally:
        _give_back()


def _take() -> None:
    """Put the hook in front of the one that is there, unless another compilation has done so."""
    from triton import knobs

    global _hook
    with _lock:
        if _hook.holders == 0:
            before = knobs.runtime.add_stages_inspection_hook
            _hook = Hook(_stages_hook(before), before, 0)
            knobs.runtime.add_stages_inspection_hook = _hook.installed
        _hook = _hook._replace(holders=_hook.holders + 1)


def _give_back() -> None:
    """Put the earlier hook back after the last compilation, unless somebody has set another hook."""
    from triton import knobs

    global _hook
    with _lock:
        _hook = _hook._replace(holders=_hook.holders - 1)
        if _hook.holders == 0:
            if knobs.runtime.add_stages_inspection_hook is _hook.installed:
                knobs.runtime.add_stages_inspection_hook = _hook.before
            _hook = Hook(None, None, 0)


def _stages_hook(before: Any) -> Any:
    """A hook that replaces the last stage of marked kernels and does for others what the hook `before` does."""

    def hook(*arguments: Any) -> tuple[str, str] | None:
        result: tuple[str, str] | None = None if before is None else before(*arguments)
        if not arguments:  # newer versions of Triton call it so, for what it adds to the key of their cache
            return ("", "") if result is None else result
        _, stages, options, *_ = arguments
        if MARK in (getattr(options, "ptx_options", None) or ""):
            stages["cubin"] = lambda ptx, metadata: assemble(ptx, options)
        return result

    return hook


def assemble(ptx: str, options: Any) -> bytes:
    """Machine code for Hopper of a kernel whose options carry the mark, by the assembler that the mark names.

    Raises:
        RuntimeError: the assembler is another one by this time, or it refuses the code.
    """
    words = options.ptx_options.split()
    wanted = next(word.removeprefix(MARK) for word in words if word.startswith(MARK))
    ptxas = packaged_assembler()
    if ptxas is None or ptxas.version != wanted:
        raise RuntimeError(f"{PACKAGE}: got {ptxas}; expected version {wanted}, as when this process first looked")
    fused = () if options.enable_fp_fusion else ("--fmad=false",)
    return machine_code(ptx, ptxas, ("-lineinfo", *fused, *(word for word in words if not word.startswith(MARK))))


def machine_code(ptx: str, ptxas: Assembler, flags: tuple[str, ...] = ()) -> bytes:
    """Code for Hopper by an assembler, with these flags beside those that its version needs.

    Raises:
        RuntimeError: the assembler refuses the code.
    """
    command = [ptxas.path, "--gpu-name=sm_90a", *flags]
    if numbers(ptxas.version) >= (13,):
        command.append("--regAllocOptLevel=2")  # as newer versions of Triton do for ptxas 13
    with tempfile.TemporaryDirectory(prefix="sleepkern-ptxas-") as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{ptxas.path} ended with {done.returncode}: {(done.stdout + done.stderr)[-800:]}")
        return target.read_bytes()
