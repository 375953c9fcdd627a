"""How far the model is off on the ten kernels that its constants were fitted to, also when each is left out of the fit.

    python -m benchmarks.candidates.calibration

The times are those of docs/kernels/triton.md: one H200, Triton 3.6. The machine code is that of the Triton here.
"""

from __future__ import annotations

import os
import sys
import tempfile

os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="sleepkern-triton-"))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from rich.console import Console
from rich.table import Table

from sleepkern.backends.triton.plan_table import PLAIN_HOPPER, Direction, Key
from sleepkern.measure.candidates import plan_in_table

from .model import COSTS, fitted
from .predict import compiled
from .rows import HOPPER, WIDTH, Row

MEASURED: tuple[tuple[int, bool, Direction, str, float], ...] = (
    (HOPPER, False, "forward", "chunk_factors", 223),
    (HOPPER, False, "forward", "state_pass", 232),
    (HOPPER, False, "backward", "state_pass_backward", 269),
    (HOPPER, False, "backward", "chunk_backward", 914),
    (PLAIN_HOPPER, False, "forward", "chunk_factors", 191),
    (PLAIN_HOPPER, False, "forward", "state_pass", 293),
    (PLAIN_HOPPER, False, "backward", "state_pass_backward", 403),
    (PLAIN_HOPPER, False, "backward", "chunk_backward", 889),
    (PLAIN_HOPPER, True, "forward", "chunk_factors", 763),
    (PLAIN_HOPPER, True, "backward", "chunk_backward", 2372),
)
"""(capability, channel decay, direction, stage, microseconds), T = 8192, 32 heads of 128, bfloat16."""


def main() -> int:
    """Print the table."""
    kernels = []
    for capability, channel, direction, stage, us in MEASURED:
        key = Key(capability, direction, "bf16", channel, WIDTH)
        plan = plan_in_table(key)
        kernels.append((compiled(Row(stage, key, plan.chunk, getattr(plan, stage), ""))[0][0], us))
    table = Table(title="Microseconds, measured and predicted")
    for column in ("kernel", "measured", "predicted", "off", "left out of the fit", "off"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for i, (kernel, us) in enumerate(kernels):
        capability, channel, _, stage, _ = MEASURED[i]
        name = f"{stage}{', channel decay' * channel}{', no warp-group products' * (capability < 0)}"
        found = (kernel.microseconds(costs) for costs in (COSTS, fitted(kernels[:i] + kernels[i + 1 :])))
        table.add_row(
            name, f"{us:.0f}", *(cell for t in found for cell in (f"{t:.0f}", f"{100 * (t / us - 1):+.0f} %"))
        )
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
