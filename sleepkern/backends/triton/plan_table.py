"""How the Triton kernels are cut, as data: rows of a chunk, columns, warps and stages for each kind of call.

A row is predicted or measured, as the comment above it says. Predicted rows come from compiling for sm_80, sm_90 and
sm_100 without a device (tests/offline/triton): the largest tiles that neither spill beyond a stated budget nor exceed
99 KB of shared memory, which is what the smaller parts of an architecture have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Precision = Literal["bf16", "tf32", "ieee"]
"""What products multiply: bfloat16, float32 rounded to tf32 (also for float16 inputs), or float32 without rounding."""
Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
PLAIN_HOPPER = -90
"""The capability of a Hopper whose assembler is not sound (ptxas.py): its plans have no warp-group products, which
Triton takes where a product has 64 rows and its kernel a multiple of four warps."""

Variant = Literal["", "decays", "segments", "products"]
"""How a kernel goes about its work where there is more than one way; "" is the way that every kernel has.

State passes: "decays" loads the factors of the rows, which chunk_factors_kernel then stores. "segments" does so too,
and scans few heads on two levels (segments.py); the backward state pass has one level.
Chunk backward: "products" makes the products of value columns and those of key columns in two launches.
"""
WITH_DECAYS = ("decays", "segments")
"""The variants for which chunk_factors_kernel stores the factors of the rows."""


class Tile(NamedTuple):
    """One kernel: key and value columns at a time, warps, stages of its loads in flight, and its variant.

    warp_groups False keeps warp-group products out of the kernel on a Hopper, whatever its rows and warps are.
    """

    keys: int
    values: int
    warps: int
    stages: int
    variant: Variant = ""
    warp_groups: bool = True


@dataclass(frozen=True)
class TilePlan:
    """The tiles of the kernels of one problem; `chunk` is the number of rows of a chunk.

    Both state passes hold all key columns. decode None is plan.decode_tile's.
    """

    chunk: int
    chunk_factors: Tile
    state_pass: Tile
    state_pass_backward: Tile
    chunk_backward: Tile
    single_chunk: Tile
    decode: Tile | None = None


class Key(NamedTuple):
    """The properties by which a plan is looked up.

    capability is 80 for devices of 8.x, 90 for 9.x and so on, PLAIN_HOPPER, or 0 for all devices; `channel` says
    whether each key channel has its own decay; width is the largest K of the row.
    """

    capability: int
    direction: Direction
    precision: Precision
    channel: bool
    width: int


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One row of the table, for the keys of its directions. Both state passes take the same tile.

    single_chunk is chunk_backward's tile unless it is given. Heads of 256 columns give it: a single chunk keeps all key
    columns of the state next to what a chunk needs, and has room for few columns at a time.
    """

    capability: int = 0
    directions: tuple[Direction, ...] = DIRECTIONS
    precision: Precision
    channel: bool
    width: int
    chunk: int
    chunk_factors: Tile
    state_pass: Tile
    chunk_backward: Tile
    single_chunk: Tile | None = None

    def plans(self) -> dict[Key, TilePlan]:
        """The row's plan under each of its keys."""
        plan = TilePlan(
            self.chunk,
            self.chunk_factors,
            self.state_pass,
            self.state_pass,
            self.chunk_backward,
            self.single_chunk or self.chunk_backward,
        )
        return {Key(self.capability, d, self.precision, self.channel, self.width): plan for d in self.directions}


# fmt: off
BUILT_IN: tuple[PlanRow, ...] = (
    # bf16, a decay a head or none. Predicted: the largest tiles within the limits, and 32 rows for heads of 256.
    PlanRow(
        precision="bf16", channel=False, width=64, chunk=64,
        chunk_factors=Tile(keys=64, values=64, warps=4, stages=1),
        state_pass=Tile(keys=64, values=32, warps=4, stages=2),
        chunk_backward=Tile(keys=64, values=64, warps=8, stages=1),
    ),
    PlanRow(
        precision="bf16", channel=False, width=128, chunk=64,
        chunk_factors=Tile(keys=64, values=64, warps=4, stages=1),
        state_pass=Tile(keys=128, values=32, warps=4, stages=2),
        chunk_backward=Tile(keys=64, values=64, warps=8, stages=1),
    ),
    PlanRow(
        precision="bf16", channel=False, width=256, chunk=32,
        chunk_factors=Tile(keys=64, values=64, warps=4, stages=1),
        state_pass=Tile(keys=256, values=32, warps=8, stages=2),
        chunk_backward=Tile(keys=64, values=64, warps=4, stages=1),
        single_chunk=Tile(keys=16, values=16, warps=2, stages=1),
    ),
    # tf32. Predicted: elements have twice the bytes of bf16's, so chunks have half the rows.
    PlanRow(
        precision="tf32", channel=False, width=64, chunk=32,
        chunk_factors=Tile(keys=32, values=32, warps=4, stages=1),
        state_pass=Tile(keys=64, values=32, warps=4, stages=2),
        chunk_backward=Tile(keys=32, values=32, warps=8, stages=1),
    ),
    PlanRow(
        precision="tf32", channel=False, width=128, chunk=32,
        chunk_factors=Tile(keys=32, values=32, warps=4, stages=1),
        state_pass=Tile(keys=128, values=16, warps=4, stages=2),
        chunk_backward=Tile(keys=32, values=32, warps=8, stages=1),
    ),
    PlanRow(
        precision="tf32", channel=False, width=256, chunk=16,
        chunk_factors=Tile(keys=32, values=32, warps=4, stages=1),
        state_pass=Tile(keys=256, values=16, warps=8, stages=2),
        chunk_backward=Tile(keys=32, values=32, warps=4, stages=1),
        single_chunk=Tile(keys=16, values=16, warps=4, stages=1),
    ),
    # ieee, for checking. Predicted: products take no matrix unit and hold more in registers, so chunks have 16 rows.
    PlanRow(
        precision="ieee", channel=False, width=64, chunk=16,
        chunk_factors=Tile(keys=32, values=32, warps=4, stages=1),
        state_pass=Tile(keys=64, values=16, warps=4, stages=1),
        chunk_backward=Tile(keys=16, values=16, warps=4, stages=1),
    ),
    PlanRow(
        precision="ieee", channel=False, width=128, chunk=16,
        chunk_factors=Tile(keys=32, values=32, warps=4, stages=1),
        state_pass=Tile(keys=128, values=16, warps=8, stages=1),
        chunk_backward=Tile(keys=16, values=16, warps=4, stages=1),
    ),
    PlanRow(
        precision="ieee", channel=False, width=256, chunk=16,
        chunk_factors=Tile(keys=32, values=32, warps=4, stages=1),
        state_pass=Tile(keys=256, values=16, warps=16, stages=1),
        chunk_backward=Tile(keys=16, values=16, warps=4, stages=1),
        single_chunk=Tile(keys=16, values=16, warps=4, stages=1),
    ),
    # bf16, a decay a key channel. Predicted: tiles of 32 key columns, because the decays have a tile of that width too.
    PlanRow(
        precision="bf16", channel=True, width=64, chunk=64,
        chunk_factors=Tile(keys=32, values=64, warps=8, stages=1),
        state_pass=Tile(keys=64, values=32, warps=4, stages=2),
        chunk_backward=Tile(keys=32, values=64, warps=8, stages=1),
    ),
    PlanRow(
        precision="bf16", channel=True, width=128, chunk=64,
        chunk_factors=Tile(keys=32, values=64, warps=8, stages=1),
        state_pass=Tile(keys=128, values=32, warps=4, stages=2),
        chunk_backward=Tile(keys=32, values=64, warps=8, stages=1),
    ),
    PlanRow(
        precision="bf16", channel=True, width=256, chunk=32,
        chunk_factors=Tile(keys=32, values=64, warps=4, stages=1),
        state_pass=Tile(keys=256, values=32, warps=8, stages=2),
        chunk_backward=Tile(keys=32, values=64, warps=4, stages=1),
        single_chunk=Tile(keys=16, values=16, warps=2, stages=1),
    ),
    # tf32, a decay a key channel. Predicted: 16 rows, which need no level above the blocks of the diagonal.
    PlanRow(
        precision="tf32", channel=True, width=64, chunk=16,
        chunk_factors=Tile(keys=32, values=32, warps=4, stages=1),
        state_pass=Tile(keys=64, values=32, warps=4, stages=2),
        chunk_backward=Tile(keys=32, values=32, warps=4, stages=1),
    ),
    PlanRow(
        precision="tf32", channel=True, width=128, chunk=16,
        chunk_factors=Tile(keys=32, values=32, warps=4, stages=1),
        state_pass=Tile(keys=128, values=16, warps=4, stages=2),
        chunk_backward=Tile(keys=32, values=32, warps=4, stages=1),
    ),
    PlanRow(
        precision="tf32", channel=True, width=256, chunk=16,
        chunk_factors=Tile(keys=32, values=32, warps=4, stages=1),
        state_pass=Tile(keys=256, values=16, warps=8, stages=2),
        chunk_backward=Tile(keys=32, values=32, warps=4, stages=1),
        single_chunk=Tile(keys=16, values=16, warps=4, stages=1),
    ),
    # ieee, a decay a key channel, for checking. Predicted.
    PlanRow(
        precision="ieee", channel=True, width=64, chunk=16,
        chunk_factors=Tile(keys=16, values=32, warps=4, stages=1),
        state_pass=Tile(keys=64, values=16, warps=4, stages=1),
        chunk_backward=Tile(keys=16, values=16, warps=4, stages=1),
    ),
    PlanRow(
        precision="ieee", channel=True, width=128, chunk=16,
        chunk_factors=Tile(keys=16, values=32, warps=4, stages=1),
        state_pass=Tile(keys=128, values=16, warps=8, stages=1),
        chunk_backward=Tile(keys=16, values=16, warps=4, stages=1),
    ),
    PlanRow(
        precision="ieee", channel=True, width=256, chunk=16,
        chunk_factors=Tile(keys=16, values=32, warps=4, stages=1),
        state_pass=Tile(keys=256, values=16, warps=16, stages=1),
        chunk_backward=Tile(keys=16, values=16, warps=4, stages=1),
        single_chunk=Tile(keys=16, values=16, warps=4, stages=1),
    ),
    # Ampere, backward. Predicted: matrix products hold operands in registers, so tiles are smaller or rows fewer.
    PlanRow(
        capability=80, directions=("backward",), precision="bf16", channel=False, width=64, chunk=64,
        chunk_factors=Tile(keys=64, values=64, warps=4, stages=1),
        state_pass=Tile(keys=128, values=32, warps=4, stages=2),
        chunk_backward=Tile(keys=32, values=32, warps=8, stages=1),
    ),
    PlanRow(
        capability=80, directions=("backward",), precision="bf16", channel=False, width=128, chunk=64,
        chunk_factors=Tile(keys=64, values=64, warps=4, stages=1),
        state_pass=Tile(keys=128, values=32, warps=4, stages=2),
        chunk_backward=Tile(keys=32, values=32, warps=8, stages=1),
    ),
    PlanRow(
        capability=80, directions=("backward",), precision="bf16", channel=True, width=64, chunk=32,
        chunk_factors=Tile(keys=32, values=64, warps=8, stages=1),
        state_pass=Tile(keys=128, values=32, warps=4, stages=2),
        chunk_backward=Tile(keys=64, values=64, warps=8, stages=1),
    ),
    PlanRow(
        capability=80, directions=("backward",), precision="bf16", channel=True, width=128, chunk=32,
        chunk_factors=Tile(keys=32, values=64, warps=8, stages=1),
        state_pass=Tile(keys=128, values=32, warps=4, stages=2),
        chunk_backward=Tile(keys=64, values=64, warps=8, stages=1),
    ),
    # Hopper with a sound assembler (ptxas.py), without channel decay, measured on an H200: the fastest tiles within the
    # gate's limits. Microseconds with warp-group products (chunks of 64) and without (32), T = 8192, 32 heads: forward
    # of 128 channels 455 and 483, backward of 128 1849 and 1896, of 64 933 and 955. A chunk backward alone is slower
    # with them, but shares its chunks with the state passes.
    PlanRow(
        capability=90, directions=("backward",), precision="bf16", channel=False, width=64, chunk=64,
        chunk_factors=Tile(keys=64, values=64, warps=4, stages=1),
        state_pass=Tile(keys=64, values=16, warps=4, stages=3),
        chunk_backward=Tile(keys=64, values=64, warps=4, stages=1),
        single_chunk=Tile(keys=32, values=32, warps=4, stages=1),
    ),
    PlanRow(
        capability=90, precision="bf16", channel=False, width=128, chunk=64,
        chunk_factors=Tile(keys=128, values=128, warps=4, stages=1),
        state_pass=Tile(keys=128, values=32, warps=4, stages=3),
        chunk_backward=Tile(keys=64, values=64, warps=8, stages=1),
    ),
    # Hopper with an older assembler: no warp-group products. Measured on an H200 with Triton 3.6's assembler for 128
    # channels; 64 channels take the same tiles.
    PlanRow(
        capability=PLAIN_HOPPER, precision="bf16", channel=False, width=64, chunk=32,
        chunk_factors=Tile(keys=64, values=64, warps=1, stages=1),
        state_pass=Tile(keys=64, values=16, warps=2, stages=4),
        chunk_backward=Tile(keys=64, values=64, warps=2, stages=1),
        single_chunk=Tile(keys=32, values=32, warps=2, stages=1),
    ),
    PlanRow(
        capability=PLAIN_HOPPER, precision="bf16", channel=False, width=128, chunk=32,
        chunk_factors=Tile(keys=64, values=64, warps=2, stages=1),
        state_pass=Tile(keys=128, values=16, warps=2, stages=4),
        chunk_backward=Tile(keys=64, values=64, warps=4, stages=1),
        single_chunk=Tile(keys=32, values=32, warps=2, stages=1),
    ),
    PlanRow(
        capability=PLAIN_HOPPER, precision="bf16", channel=True, width=64, chunk=32,
        chunk_factors=Tile(keys=32, values=64, warps=2, stages=1),
        state_pass=Tile(keys=64, values=16, warps=2, stages=3),
        chunk_backward=Tile(keys=32, values=64, warps=4, stages=1),
        single_chunk=Tile(keys=32, values=32, warps=2, stages=1),
    ),
    PlanRow(
        capability=PLAIN_HOPPER, precision="bf16", channel=True, width=128, chunk=32,
        chunk_factors=Tile(keys=32, values=64, warps=2, stages=1),
        state_pass=Tile(keys=128, values=16, warps=2, stages=3),
        chunk_backward=Tile(keys=32, values=64, warps=4, stages=1),
        single_chunk=Tile(keys=32, values=32, warps=2, stages=1),
    ),
)
# fmt: on


def without_warp_groups(key: Key, plan: TilePlan) -> TilePlan:
    """A plan without warp-group products, predicted: chunks of at most 32 rows, state passes on two warps.

    State passes have products of as many rows as there are keys, so only the warps can avoid warp-group products; the
    single chunk contains a state pass.
    """
    state_pass = Tile(keys=plan.state_pass.keys, values=16, warps=2, stages=2)
    columns = 32 if key.precision == "bf16" and key.width < 256 else 16
    chunk = 16 if key.precision == "tf32" and key.width == 256 else min(plan.chunk, 32)
    single_chunk = Tile(keys=columns, values=columns, warps=2, stages=1)
    return TilePlan(chunk, plan.chunk_factors, state_pass, state_pass, plan.chunk_backward, single_chunk)


def _without_gain() -> dict[Key, TilePlan]:
    """Plans of a Hopper with a sound assembler that have no warp-group products all the same.

    They were measured slower with such products (microseconds, T = 8192, 32 heads, on an H200): channel decay, chunk
    factors 1562 against 763 and chunk backward 3658 against 2372; the forward of 64 channels, 341 against 321.
    """
    plans = {key: plan for row in BUILT_IN if row.capability == PLAIN_HOPPER for key, plan in row.plans().items()}
    return {
        key._replace(capability=90): plan
        for key, plan in plans.items()
        if key.channel or (key.width, key.direction) == (64, "forward")
    }


def _table() -> dict[Key, TilePlan]:
    everywhere = {key: plan for row in BUILT_IN if row.capability == 0 for key, plan in row.plans().items()}
    plain = {
        key._replace(capability=PLAIN_HOPPER): without_warp_groups(key, plan)
        for key, plan in everywhere.items()
        if key.precision != "ieee"
    }
    devices = {key: plan for row in BUILT_IN if row.capability != 0 for key, plan in row.plans().items()}
    return everywhere | plain | _without_gain() | devices


class PlanTable(dict[Key, TilePlan]):
    """Plans by key. `version` is another one after each change, so that what follows from the plans can be held."""

    version = 0

    def __setitem__(self, key: Key, plan: TilePlan) -> None:
        super().__setitem__(key, plan)
        self.version += 1

    def __delitem__(self, key: Key) -> None:
        super().__delitem__(key)
        self.version += 1

    def update(self, *plans: Any, **more: Any) -> None:
        """Add plans, as dict.update does."""
        super().update(*plans, **more)
        self.version += 1


TABLE = PlanTable(_table())
"""One plan for every key of capability 0. A key with a device's capability comes first; `use_plans` adds such keys."""
