"""How the parts write their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file, so that whoever ends the process leaves the earlier one or this one."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)
