"""Step 3 of a call, CHOOSE: the first backend, best first, that has no reason to refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from . import backends, settings
from .backends import chunked, reference
from .backends.interface import BlocksBackend, MixerBackend, RecurrenceBackend, blocks_refusal, mixer_refusal, refusal
from .problems.blocks import BlockProblem
from .problems.mixer import MixerProblem
from .problems.recurrence import Problem

_SIZES = ("B", "T", "H", "HV", "K", "V", "sequences")
_LARGE = 1 << 40
"""Stands for a size that a graph leaves open."""


class _Named(Protocol):
    @property
    def NAME(self) -> str: ...


class _Recordable(_Named, Protocol):
    @property
    def RECORDED(self) -> bool: ...


_B = TypeVar("_B", bound=_Named)
_R = TypeVar("_R", bound=_Recordable)
_P = TypeVar("_P")


@dataclass(frozen=True)
class Explanation:
    """What a call would take, and why not the others.

    problem  the checked call: its rule, sizes, types and options
    chosen   name of the backend, None when every one refuses
    kernel   one line on the code it runs
    reasons  for each backend in order of preference: None (it could) or the sentence why not
    """

    problem: Problem
    chosen: str | None
    kernel: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = _lines(_title(self.problem), self.chosen, self.kernel, self.reasons)
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
        return "\n".join(_lines(_title(self.problem), self.chosen, self.kernel, self.reasons))


def _title(problem: Any) -> str:
    """The name of the call that the problem describes."""
    if isinstance(problem, Problem):
        return problem.rule.name
    return "sleep_blocks" if isinstance(problem, BlockProblem) else type(problem).__name__


def _lines(name: str, chosen: str | None, kernel: str, reasons: dict[str, str | None]) -> list[str]:
    lines = [f"{name}: {chosen or 'no backend'} ({kernel})"]
    for backend, reason in reasons.items():
        mark = "chosen" if backend == chosen else "could" if reason is None else f"no: {reason}"
        lines.append(f"  {backend:<10} {mark}")
    return lines


def choose(problem: Problem, backend: str | None = None) -> RecurrenceBackend:
    """The backend for this problem: the requested one (argument, then SLEEPKERN_BACKEND), or the best that can.

    Raises:
        ValueError: no such backend, or the requested one cannot do the problem (with its reason).
    """
    if torch.compiler.is_compiling():
        problem = _of_any_size(problem)
    if backend is not None:
        return _by_name(backends.BACKENDS, refusal, problem, backend)
    if settings.BACKEND is not None:
        return _by_name(backends.BACKENDS, refusal, problem, settings.BACKEND, "SLEEPKERN_BACKEND")
    return _first(backends.BACKENDS, refusal, problem)


def choose_blocks(problem: BlockProblem, backend: str | None = None) -> BlocksBackend:
    """What runs the passes of a stack of blocks: the requested backend, or the best that can.

    Where SLEEPKERN_BACKEND says a name, the backends of other names are left out, but for the modules.

    Raises:
        ValueError: no such backend, or the requested one cannot do the call (with its reason).
    """
    return _choose_or_recorded(backends.BLOCK_BACKENDS, blocks_refusal, problem, backend)


def choose_mixer(problem: MixerProblem, backend: str | None = None) -> MixerBackend:
    """What runs an operator of a mixer: the requested backend, or the best that can.

    Where SLEEPKERN_BACKEND says a name, the backends of other names are left out, but for torch's operators.

    Raises:
        ValueError: no such backend, or the requested one cannot do the call (with its reason).
    """
    return _choose_or_recorded(backends.MIXER_BACKENDS, mixer_refusal, problem, backend)


def explain_problem(problem: Problem, backend: str | None = None) -> Explanation:
    """Every backend's answer for the problem, and which one a call would take: none where `choose` raises."""
    wanted = settings.BACKEND if backend is None else backend
    return Explanation(problem, *_explain(backends.BACKENDS, refusal, problem, wanted))


def explain_blocks_problem(problem: BlockProblem, backend: str | None = None) -> BlocksExplanation:
    """Every backend's answer for these blocks, and which one a call would take: none where `choose_blocks` raises."""
    refused = blocks_refusal if backend is not None else _unless_left_out(blocks_refusal)
    return BlocksExplanation(problem, *_explain(backends.BLOCK_BACKENDS, refused, problem, backend))


def backend_named(name: str, source: str = "backend") -> RecurrenceBackend:
    """The backend of that name; ValueError with the known names, and who gave this one, otherwise."""
    return _named(backends.BACKENDS, name, source)


def requested(name: str) -> bool:
    """Tells whether SLEEPKERN_BACKEND leaves a call to the backend of that name: it says nothing, or that.

    Where it says another name, a family of calls without a backend of that name takes its torch form.

    Raises:
        ValueError: SLEEPKERN_BACKEND says a name that no family of calls knows.
    """
    if settings.BACKEND is None or settings.BACKEND == name:
        return True
    backend_named(settings.BACKEND, "SLEEPKERN_BACKEND")
    return False


def other_families() -> dict[str, str]:
    """What SLEEPKERN_BACKEND, where it is set, makes each family of calls beside the recurrence take."""
    families: dict[str, Sequence[_Recordable]] = {
        "sleep_blocks": backends.BLOCK_BACKENDS,
        "short_convolution, gated_rms_norm": backends.MIXER_BACKENDS,
    }
    name = settings.BACKEND
    if name is None:
        return {}
    return {family: _named_or_recorded(candidates, name) for family, candidates in families.items()}


def _named_or_recorded(candidates: Sequence[_Recordable], name: str) -> str:
    """The name, where a backend that SLEEPKERN_BACKEND can leave out has it, else that of the one it never does."""
    native = {candidate.NAME for candidate in candidates if not candidate.RECORDED}
    return name if name in native else next(candidate.NAME for candidate in candidates if candidate.RECORDED)


def _choose_or_recorded(
    candidates: Sequence[_R], refused: Callable[[_R, _P], str | None], problem: _P, backend: str | None
) -> _R:
    """The requested backend; else the best that can, where SLEEPKERN_BACKEND leaves out those of other names.

    A backend whose operations torch records is never left out, so that every call has one.
    """
    if backend is not None:
        return _by_name(candidates, refused, problem, backend)
    return _first(candidates, _unless_left_out(refused), problem)


def _unless_left_out(refused: Callable[[_R, _P], str | None]) -> Callable[[_R, _P], str | None]:
    """The same refusals, and that of a call that names no backend while SLEEPKERN_BACKEND names another one."""

    def refused_unnamed(candidate: _R, problem: _P) -> str | None:
        if not candidate.RECORDED and not requested(candidate.NAME):
            return "SLEEPKERN_BACKEND requests another backend"
        return refused(candidate, problem)

    return refused_unnamed


def _first(candidates: Sequence[_B], refused: Callable[[_B, _P], str | None], problem: _P) -> _B:
    """The first candidate that does not refuse."""
    for candidate in candidates:
        if refused(candidate, problem) is None:
            return candidate
    chosen, kernel, reasons = _explain(candidates, refused, problem, None)
    told = "\n".join(_lines(_title(problem), chosen, kernel, reasons))
    raise ValueError(f"backend: none can do this call:\n{told}")


def _by_name(
    candidates: Sequence[_B],
    refused: Callable[[_B, _P], str | None],
    problem: _P,
    name: str,
    source: str = "backend",
) -> _B:
    """The candidate that is requested by name."""
    candidate = _named(candidates, name, source)
    reason = refused(candidate, problem)
    if reason is not None:
        raise ValueError(f"{source}: got {name!r}, which cannot do this call: {reason}")
    return candidate


def _named(candidates: Sequence[_B], name: str, source: str = "backend") -> _B:
    for candidate in candidates:
        if name == candidate.NAME:
            return candidate
    known = ", ".join(candidate.NAME for candidate in candidates)
    raise ValueError(f"{source}: got {name!r}; expected one of {known}")


def _explain(
    candidates: Sequence[Any], refused: Callable[[Any, Any], str | None], problem: Any, wanted: str | None
) -> tuple[str | None, str, dict[str, str | None]]:
    """Name and kernel of the backend that a call would take, and every backend's reason."""
    reasons = {candidate.NAME: refused(candidate, problem) for candidate in candidates}
    for candidate in candidates:
        if reasons[candidate.NAME] is None and wanted in (None, candidate.NAME):
            return candidate.NAME, candidate.kernel(problem), reasons
    return None, "-", reasons


def method_of(problem: Problem, engine: RecurrenceBackend) -> str:
    """The replay method that the backend takes; the one asked for where a graph leaves sizes open, which decide."""
    return problem.method if _open_sizes(problem) else engine.method_of(problem)


def torch_form(problem: Problem, engine: RecurrenceBackend | None = None) -> RecurrenceBackend:
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
