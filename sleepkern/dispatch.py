"""Step 3 of a call, CHOOSE: the first backend, best first, that has no reason to refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import backends, settings
from .backends import chunked, reference
from .backends.cpu import recurrence as cpu
from .backends.cuda import recurrence as cuda
from .backends.interface import Backend, BlocksBackend, blocks_refusal, refusal
from .problems.blocks import BlockProblem
from .problems.recurrence import Problem

_OTHERS = {
    "sleep_blocks": ((cuda.NAME, cpu.NAME), "its modules"),
    "short_convolution, gated_rms_norm": ((cpu.NAME,), "torch's operators"),
}
"""The families of calls beside the recurrence: the backends each has, best first, and its torch form."""
_SIZES = ("B", "T", "H", "HV", "K", "V", "sequences")
_LARGE = 1 << 40
"""Stands for a size that a graph leaves open."""


@dataclass(frozen=True)
class Explanation:
    """What a call would take, and why not the others.

    chosen   name of the backend, None when every one refuses
    kernel   one line on the code it runs
    reasons  for each backend in order of preference: None (it could) or the sentence why not
    """

    problem: Problem
    chosen: str | None
    kernel: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = _lines(self.problem.rule.name, self.chosen, self.kernel, self.reasons)
        forced = f"  SLEEPKERN_BACKEND={settings.BACKEND}:"
        return "\n".join([*lines, *(f"{forced} {family} by {what}" for family, what in other_families().items())])


@dataclass(frozen=True)
class BlocksExplanation:
    """What `sleep_blocks` would take, and why not the others; fields as those of Explanation."""

    problem: BlockProblem
    chosen: str | None
    kernel: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        return "\n".join(_lines("sleep_blocks", self.chosen, self.kernel, self.reasons))


def _lines(name: str, chosen: str | None, kernel: str, reasons: dict[str, str | None]) -> list[str]:
    lines = [f"{name}: {chosen or 'no backend'} ({kernel})"]
    for backend, reason in reasons.items():
        mark = "chosen" if backend == chosen else "could" if reason is None else f"no: {reason}"
        lines.append(f"  {backend:<10} {mark}")
    return lines


def choose(problem: Problem, backend: str | None = None) -> Backend:
    """The backend for this problem: the one asked for (argument, then SLEEPKERN_BACKEND), or the best that can.

    Raises:
        ValueError: no such backend, or the one asked for cannot do the problem (with its reason).
    """
    if torch.compiler.is_compiling():
        problem = _of_any_size(problem)
    if backend is not None or settings.BACKEND is not None:
        return _by_name(problem, backend)
    for candidate in backends.BACKENDS:
        if refusal(candidate, problem) is None:
            return candidate
    raise ValueError(f"backend: none can do this call:\n{explain_problem(problem)}")


def explain_problem(problem: Problem, backend: str | None = None) -> Explanation:
    """Every backend's answer for the problem, and which one a call would take: none where `choose` raises."""
    reasons = {candidate.NAME: refusal(candidate, problem) for candidate in backends.BACKENDS}
    wanted = settings.BACKEND if backend is None else backend
    can = [name for name, reason in reasons.items() if reason is None and wanted in (None, name)]
    if not can:
        return Explanation(problem, None, "-", reasons)
    chosen = backend_named(can[0])
    return Explanation(problem, chosen.NAME, chosen.kernel(problem), reasons)


def backend_named(name: str, source: str = "backend") -> Backend:
    """The backend of that name; ValueError with the known names, and who gave this one, otherwise."""
    for candidate in backends.BACKENDS:
        if name == candidate.NAME:
            return candidate
    known = ", ".join(candidate.NAME for candidate in backends.BACKENDS)
    raise ValueError(f"{source}: got {name!r}; expected one of {known}")


def choose_blocks(problem: BlockProblem, backend: str | None = None) -> BlocksBackend:
    """What runs the passes of a stack of blocks: the backend asked for, or the best that can.

    Where SLEEPKERN_BACKEND says a name, the backends of other names are left out, but for the modules.

    Raises:
        ValueError: no such backend, or the one asked for cannot do the call (with its reason).
    """
    if backend is not None:
        chosen = _blocks_backend_named(backend)
        reason = blocks_refusal(chosen, problem)
        if reason is not None:
            raise ValueError(f"backend: got {backend!r}, which cannot do this call: {reason}")
        return chosen
    for candidate in backends.BLOCK_BACKENDS:
        if _refusal_unnamed(candidate, problem) is None:
            return candidate
    raise ValueError(f"backend: none can do this call:\n{explain_blocks_problem(problem)}")


def explain_blocks_problem(problem: BlockProblem, backend: str | None = None) -> BlocksExplanation:
    """Every backend's answer for these blocks, and which one a call would take: none where `choose_blocks` raises."""
    refused = _refusal_unnamed if backend is None else blocks_refusal
    reasons = {candidate.NAME: refused(candidate, problem) for candidate in backends.BLOCK_BACKENDS}
    can = [name for name, reason in reasons.items() if reason is None and backend in (None, name)]
    if not can:
        return BlocksExplanation(problem, None, "-", reasons)
    return BlocksExplanation(problem, can[0], _blocks_backend_named(can[0]).kernel(problem), reasons)


def _refusal_unnamed(candidate: BlocksBackend, problem: BlockProblem) -> str | None:
    """Why a call that names no backend does not take this one."""
    if candidate.SUPPORTS is not None and not asked_for(candidate.NAME):
        return "SLEEPKERN_BACKEND asks for another backend"
    return blocks_refusal(candidate, problem)


def _blocks_backend_named(name: str) -> BlocksBackend:
    for candidate in backends.BLOCK_BACKENDS:
        if name == candidate.NAME:
            return candidate
    known = ", ".join(candidate.NAME for candidate in backends.BLOCK_BACKENDS)
    raise ValueError(f"backend: got {name!r}; expected one of {known}")


def asked_for(name: str) -> bool:
    """Whether SLEEPKERN_BACKEND leaves a call to the backend of that name: it says nothing, or that.

    Where not, a family of calls without a backend of the name that it says takes its torch form.

    Raises:
        ValueError: SLEEPKERN_BACKEND says a name that no family of calls knows.
    """
    if settings.BACKEND is None or settings.BACKEND == name:
        return True
    backend_named(settings.BACKEND, "SLEEPKERN_BACKEND")
    return False


def other_families() -> dict[str, str]:
    """What SLEEPKERN_BACKEND, where it is set, makes each family of calls beside the recurrence take."""
    name = settings.BACKEND
    return (
        {} if name is None else {family: name if name in known else form for family, (known, form) in _OTHERS.items()}
    )


def method_of(problem: Problem, engine: Backend) -> str:
    """The replay method that the backend takes; the one asked for where a graph leaves sizes open, which decide."""
    return problem.method if _open_sizes(problem) else engine.method_of(problem)


def torch_form(problem: Problem, engine: Backend | None = None) -> Backend:
    """The backend whose operators torch can differentiate as often as wanted: `engine` if it is one, else the best.

    Raises:
        NotImplementedError: neither of them does the problem.
    """
    for candidate in (chunked, reference):
        if candidate is engine:
            return candidate
    for candidate in (chunked, reference):
        if refusal(candidate, problem) is None:
            return candidate
    raise NotImplementedError(
        f"backend: no torch form of this call, which transforms and second gradients take: {refusal(chunked, problem)}"
    )


def _by_name(problem: Problem, backend: str | None) -> Backend:
    """The one that is asked for, by argument before environment."""
    source, name = ("SLEEPKERN_BACKEND", settings.BACKEND) if backend is None else ("backend", backend)
    assert name is not None
    candidate = backend_named(name, source)
    reason = refusal(candidate, problem)
    if reason is not None:
        raise ValueError(f"{source}: got {name!r}, which cannot do this call: {reason}")
    return candidate


def _of_any_size(problem: Problem) -> Problem:
    """The problem with large numbers where a graph leaves batch and tokens open, so that the choice holds for all.

    A comparison with an open size would become a condition of the graph. Method "rank" asks for few tokens itself.
    """
    if problem.method == "rank":
        return problem
    sizes: dict[str, Any] = {name: _LARGE for name in _open_sizes(problem) if name in ("B", "T", "sequences")}
    return problem._replace(**sizes) if sizes else problem


def _open_sizes(problem: Problem) -> list[str]:
    """The sizes that are no numbers in the graph that is being made."""
    if not torch.compiler.is_compiling():
        return []
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return [name for name in _SIZES if not has_static_value(getattr(problem, name))]
