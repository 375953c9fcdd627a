"""Predict the candidates of rows.py without a device, print them, and write the file that `sleepkern tune` reads.

    python -m benchmarks.candidates [--out benchmarks/candidates.json] [--jobs 2]

Must be a process of its own: under TRITON_INTERPRET nothing can be compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="sleepkern-triton-"))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from rich.console import Console
from rich.progress import track
from rich.table import Table

from sleepkern.measure.candidates import PlanCandidate, candidate_rows

from .predict import predicted
from .rows import rows

OUT = Path(__file__).resolve().parents[1] / "candidates.json"


def main() -> int:
    """Print and write the candidates; 1 where one does not compile or spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="file to write  [default: benchmarks/candidates.json]")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    console = Console(width=200)
    wanted = rows()
    with ProcessPoolExecutor(options.jobs) as pool:
        done = pool.map(predicted, wanted)
        found = list(track(done, "compiling", total=len(wanted), console=console))
    table = Table(title="Candidates, predicted from the machine code; nothing here is measured")
    for column in ("stage", "key", "chunk", "tile", "us", "reason"):
        table.add_column(column, justify="right" if column in ("chunk", "us") else "left")
    for one in found:
        table.add_row(one.stage, name_of(one), str(one.chunk), _tile(one), f"{one.predicted_us:.0f}", one.reason)
    console.print(table)
    options.out.write_text(json.dumps({"candidates": candidate_rows(found)}, indent=1) + "\n")
    return 0


def name_of(one: PlanCandidate) -> str:
    """The key in words."""
    key = one.key
    rule = "KDA" if key.channel else "gated delta rule"
    plain = ", no warp-group products" if key.capability < 0 else ""
    return f"{rule}, {key.direction}, {one.heads} heads of {key.width}{plain}"


def _tile(one: PlanCandidate) -> str:
    tile = one.tile
    return f"{tile.keys} x {tile.values}, {tile.warps} warps, {tile.stages} stages {tile.variant}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
