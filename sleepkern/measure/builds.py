"""Builds of sleepkern that `bench --against` compares: where one is found, and the process that times it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

WORKER = Path(__file__).with_name("against_worker.py")
EXPECTED = "a folder with a compiled sleepkern, or a Python interpreter that imports one"


class CallFailed(RuntimeError):
    """Raised where a build cannot make a call; the message says why."""


@dataclass(frozen=True)
class Build:
    """A build of sleepkern.

    path    as the user named it
    python  the interpreter of its process
    folder  holds the folder sleepkern; None where the interpreter finds the package itself
    """

    path: Path
    python: str
    folder: Path | None

    def environment(self) -> dict[str, str]:
        """The variables of its process. A folder comes before other packages; an interpreter finds its own alone."""
        variables = dict(os.environ)
        paths = variables.pop("PYTHONPATH", "")
        if self.folder is not None:
            variables["PYTHONPATH"] = os.pathsep.join([str(self.folder), *filter(None, [paths])])
        return variables


@dataclass(frozen=True)
class BuildFacts:
    """What the process of a build says of it: the file of the package, versions, the instruction set of `_C`."""

    path: str
    file: str
    native: str
    version: str
    python: str
    torch: str


def this_build() -> Build:
    """The build that the calling process has imported."""
    folder = Path(__file__).resolve().parents[2]
    return Build(folder, sys.executable, folder)


def build_at(path: Path) -> Build:
    """The build in a folder, or that of another virtual environment's interpreter.

    Raises:
        ValueError: there is none.
    """
    if path.is_file() and os.access(path, os.X_OK):
        return Build(path, str(path.absolute()), None)
    if not path.exists():
        raise ValueError(f"build: got {path}, which is not there; expected {EXPECTED}")
    if not (path / "sleepkern" / "__init__.py").is_file():
        raise ValueError(f"build: got {path}, which has no sleepkern/__init__.py; expected {EXPECTED}")
    return Build(path, sys.executable, path.resolve())


class Worker:
    """A process that times one build; `facts` reads its first answer, so it comes before any order.

    Raises:
        ValueError: the system cannot run the interpreter.
    """

    errors: IO[str]
    process: subprocess.Popen[str]

    def __init__(self, build: Build) -> None:
        self.build = build
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (__exit__ closes it)
        try:
            self.process = subprocess.Popen(
                [build.python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                text=True, errors="replace", env=build.environment(),
            )  # fmt: skip
        except OSError as error:
            self.errors.close()
            reason = f"which cannot run: {error.strerror}"
            raise ValueError(f"build: got {build.path}, {reason}; expected {EXPECTED}") from error

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    @property
    def ended(self) -> bool:
        """Tells whether the process is gone, as after a fault in compiled code."""
        return self.process.poll() is not None

    def facts(self) -> BuildFacts:
        """What the process imports; waits for the import.

        Raises:
            ValueError: the build cannot be imported or has no compiled module, or another one is imported.
        """
        path, folder = self.build.path, self.build.folder
        try:
            found = self._answer()
        except CallFailed as error:
            raise ValueError(f"build: got {path}, whose sleepkern cannot be imported: {error}") from error
        if folder is not None and not Path(found["file"]).parent.samefile(folder / "sleepkern"):
            raise ValueError(
                f"build: got {path}, but Python imports sleepkern from {found['file']}; expected {EXPECTED}"
            )
        if found["native"] is None:
            python = f"Python {found['python']}"
            raise ValueError(f"build: got {path}, whose sleepkern has no compiled _C for {python}; expected {EXPECTED}")
        return BuildFacts(str(path), **found)

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer to an order (against_worker.py has them).

        Raises:
            CallFailed: the build cannot do it, or its process has ended.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise CallFailed(self._last_words()) from error
        answer = self._answer()
        if "error" in answer:
            raise CallFailed(answer["error"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise CallFailed(self._last_words())
        try:
            answer: Any = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise CallFailed(f"its process wrote {line.strip()[:80]!r}, which is no answer")
        return answer

    def _last_words(self) -> str:
        status = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return lines[-1][:200] if lines and status > 0 else f"its process ended with status {status}"
