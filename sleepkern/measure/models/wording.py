"""How the error of a library is quoted in a message."""

from __future__ import annotations

MOST = 200
"""The most characters that are quoted."""


def one_line(error: Exception) -> str:
    """The text of an error in one line, without what is beyond MOST characters."""
    return " ".join(str(error).split())[:MOST]
