"""Step 3 of a call, CHOOSE: the first backend, best first, that has no reason to refuse."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from . import settings
from .backends import BACKENDS
from .problem import Problem


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
        lines = [f"{self.problem.rule.name}: {self.chosen or 'no backend'} ({self.kernel})"]
        for name, reason in self.reasons.items():
            mark = "chosen" if name == self.chosen else "could" if reason is None else f"no: {reason}"
            lines.append(f"  {name:<10} {mark}")
        return "\n".join(lines)


def choose(problem: Problem, backend: str | None = None) -> ModuleType:
    """The backend for this problem: the one asked for (argument, then SLEEPKERN_BACKEND), or the best that can.

    Raises:
        ValueError: no such backend, or the one asked for cannot do the problem (with its reason).
    """
    wanted = backend or settings.BACKEND
    if wanted is not None:
        return _by_name(wanted, problem)
    for candidate in BACKENDS:
        if candidate.why_not(problem) is None:
            return candidate
    raise ValueError(f"backend: none can do this call:\n{explain_problem(problem)}")


def explain_problem(problem: Problem, backend: str | None = None) -> Explanation:
    """Every backend's answer for the problem, and which one a call would take."""
    reasons = {candidate.NAME: candidate.why_not(problem) for candidate in BACKENDS}
    wanted = backend or settings.BACKEND
    can = [name for name, reason in reasons.items() if reason is None and wanted in (None, name)]
    if not can:
        return Explanation(problem, None, "-", reasons)
    chosen = next(candidate for candidate in BACKENDS if can[0] == candidate.NAME)
    return Explanation(problem, chosen.NAME, chosen.kernel(problem), reasons)


def backend_named(name: str) -> ModuleType:
    """The backend of that name; ValueError with the known names otherwise."""
    for candidate in BACKENDS:
        if name == candidate.NAME:
            return candidate
    known = ", ".join(candidate.NAME for candidate in BACKENDS)
    raise ValueError(f"backend: got {name!r}; expected one of {known}")


def _by_name(name: str, problem: Problem) -> ModuleType:
    candidate = backend_named(name)
    reason = candidate.why_not(problem)
    if reason is not None:
        raise ValueError(f"backend: got {name!r}, which cannot do this call: {reason}")
    return candidate
