"""Files that are never half there: each is written beside its place, synchronised, and renamed."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends.

    Where the block or the disk fails, the old file stays as it is and nothing is left beside it. Missing folders are
    made. Through a symbolic link the file behind it is replaced; a device or pipe is written to directly.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    try:
        if path.exists() and not path.is_file():
            yield path
        else:
            with _partial(path) as partial:
                yield partial
    except OSError as error:  # named after the file that was asked for, not the one beside it
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    # The ending stays, because matplotlib takes the format from it.
    partial = path.parent / f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}"
    partial.touch(exist_ok=False)
    try:
        if path.exists():
            partial.chmod(path.stat().st_mode & 0o7777)
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """The text, in UTF-8, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as place:
        place.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is not JSON; the message names the file.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got a damaged file ({error}); expected JSON") from error


def report_text(content: dict[str, Any]) -> str:
    """JSON of a report, a dict. Entries that hold lists or dicts take a line for each of their elements."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {_entry(value)}" for name, value in content.items()) + "\n}\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a report that `sleepkern bench` has written: one dict a case."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def _entry(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(_line(element) for element in value) + "\n]"
    if isinstance(value, dict) and any(isinstance(element, (list, dict)) for element in value.values()):
        return "{\n" + ",\n".join(f"{json.dumps(k)}: {_line(element)}" for k, element in value.items()) + "\n}"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
