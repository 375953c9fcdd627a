"""What the model needs to know of a candidate: its launches, compiled for sm_90, their loops and their bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "offline" / "triton"))

from compiling import Compiled, Launch, compile_launch, on_device, record

from sleepkern.backends.triton.plan_table import TABLE, Key, TilePlan
from sleepkern.measure.candidates import PlanCandidate, plan_in_table
from sleepkern.rules import GATED_DELTA_RULE, KDA
from sleepkern.testing import Shape

from .machine_code import Trips, read
from .model import Kernel
from .rows import Row

FACTORS = ("W", "P", "Kt", "Qe", "G_end")
GRADIENTS = ("dq", "dk", "dv", "dg", "dbeta", "dR")
TOUCHED: dict[str, tuple[str, ...]] = {
    "chunk_factors_kernel": ("q", "k", "v", "g", "beta", "U", "X", "kk", *FACTORS),
    "state_pass_kernel": ("q", "k", "g", "U", *FACTORS, "initial", "final", "o", "starts", "Vn"),
    "segment_maps_kernel": ("k", "g", "U", "W", "Kt", "G_end", "maps"),
    "join_segments_kernel": ("maps", "starts", "initial", "final"),
    "state_pass_backward_kernel": ("q", "k", "g", *FACTORS, "do", "ends", "dVn"),
    "chunk_backward_kernel": (
        "q", "k", "v", "g", "beta", "P", "X", "kk", "starts", "Vn", "do", "ends", "dVn", *GRADIENTS,
    ),
    "chunk_backward_values_kernel": ("v", "beta", "P", "X", "kk", "Vn", "do", "dVn", "dv", "dR"),
    "single_chunk_kernel": ("q", "k", "v", "g", "beta", "U", "W", "P", "Kt", "Qe", "G_end", "initial", "final", "o"),
    "single_chunk_backward_kernel": (
        "q", "k", "v", "g", "beta", "U", "X", "kk", *FACTORS, "initial", "starts", "Vn", "do", "dstate", "dinitial",
        "ends", "dVn", *GRADIENTS,
    ),
    "decode_kernel": ("q", "k", "v", "g", "beta", "initial", "final", "o"),
}  # fmt: skip
"""The tensors that a kernel loads or stores, by name in its groups of arguments; each is counted once."""
STAGES = {
    "chunk_factors": ("chunk_factors_kernel",),
    "state_pass": ("segment_maps_kernel", "join_segments_kernel", "state_pass_kernel"),
    "state_pass_backward": ("state_pass_backward_kernel",),
    "chunk_backward": ("chunk_backward_values_kernel", "chunk_backward_kernel"),
    "decode": ("decode_kernel",),
    "single_chunk": ("single_chunk_kernel", "single_chunk_backward_kernel"),
}
"""The kernels of each stage of a plan."""
COPIES_AHEAD = ("segment_maps_kernel", "state_pass_kernel", "state_pass_backward_kernel")


def launches_of(row: Row, plan: TilePlan) -> list[Launch]:
    """The launches of the row's call with this plan."""
    key = row.key
    rule = KDA if key.channel else GATED_DELTA_RULE
    shape = Shape(B=row.batch, T=row.tokens, H=row.heads, HV=row.heads, K=key.width, V=key.width)
    with mock.patch.dict(TABLE, {key: plan}), on_device(key.capability):
        return record(rule, shape, key.precision, key.direction)


def kernels_of(stage: str, launches: list[Launch], key: Key) -> Iterator[tuple[Kernel, Compiled]]:
    """The compiled kernels of a stage."""
    for one in launches:
        if one.name in STAGES[stage]:
            made = compile_launch(one, abs(key.capability))
            counts = read(made.assembly).issued(trips(one))
            kernel = Kernel(
                one.programs, one.warps, made.registers, made.shared, counts, _bytes(one), _l2_bytes(one),
                one.name in COPIES_AHEAD and one.stages > 1,
            )  # fmt: skip
            yield kernel, made


def trips(launch: Launch) -> list[Trips]:
    """The loops of a kernel's source, in order."""
    arguments = launch.arguments
    dims, flags, sizes = arguments["DIMS"], arguments["FLAGS"], arguments.get("sizes")
    keys = dims.K // arguments.get("BK", dims.K)
    values = dims.V // arguments.get("BV", dims.V)
    levels = (Trips(4), Trips({16: 0, 32: 1, 64: 2}[dims.C])) if flags.GATE == 2 else ()
    chunks = Trips(-(-sizes.T // dims.C) if sizes else 1, unknown=True)
    factors = [Trips(keys, levels), Trips(keys), Trips(values)]
    by_keys = Trips(keys, (*levels, Trips(values)))
    return {
        "chunk_factors_kernel": factors,
        "segment_maps_kernel": [chunks],
        "join_segments_kernel": [Trips(arguments.get("segments", 1), unknown=True)],
        "state_pass_kernel": [chunks],
        "state_pass_backward_kernel": [chunks],
        "chunk_backward_values_kernel": [Trips(values)],
        "chunk_backward_kernel": [by_keys] if arguments.get("SPLIT") else [Trips(values), by_keys],
        "single_chunk_kernel": [*factors, Trips(values, (chunks,))],
        "single_chunk_backward_kernel": [*factors, Trips(values, (chunks, chunks)), Trips(values), by_keys],
        "decode_kernel": [Trips(sizes.T if sizes else 1, unknown=True)],
    }[launch.name]


def _bytes(launch: Launch) -> float:
    """Bytes of the tensors that a launch loads or stores."""
    arguments = launch.arguments
    skipped = {"q", "k"} if arguments["FLAGS"].GATE == 2 and launch.name in COPIES_AHEAD else set()
    if arguments.get("SPLIT"):
        skipped = {"v", "kk", "dVn", "dv"}
    total = 0.0
    for role, group in arguments.items():
        for name in getattr(group, "_fields", (role,)):
            value: Any = getattr(group, name, group)
            if isinstance(value, torch.Tensor) and name in TOUCHED[launch.name] and name not in skipped:
                total += value.numel() * value.element_size()
    return total


def _l2_bytes(launch: Launch) -> float:
    """Bytes that all programs of a state pass load: programs of one bh load the same keys."""
    if launch.name not in COPIES_AHEAD:
        return 0.0
    dims, flags, BV = launch.arguments["DIMS"], launch.arguments["FLAGS"], launch.arguments["BV"]
    tokens = launch.arguments["sizes"].T
    size = 2 if str(flags.DT) == "bf16" else 4
    output = flags.OUTPUT and launch.name != "segment_maps_kernel"
    rows = (3 if output else 2) * dims.K + 2 * BV + (dims.C if output else 0)
    return float(launch.programs * -(-tokens // dims.C) * dims.C * rows * size)


def compiled(row: Row) -> list[tuple[Kernel, Compiled]]:
    """The kernels of a candidate."""
    plan = replace(plan_in_table(row.key), chunk=row.chunk, **{row.stage: row.tile})
    return list(kernels_of(row.stage, launches_of(row, plan), row.key))


def predicted(row: Row) -> PlanCandidate:
    """A candidate with its predicted time and the reason in figures.

    Raises:
        ValueError: the machine code spills registers beyond the gate's budget.
    """
    found = compiled(row)
    total = sum(kernel.microseconds() for kernel, _ in found)
    figures = "; ".join(_figures(kernel, made) for kernel, made in found)
    return PlanCandidate(
        row.stage, row.tile.variant or "tile", row.key, row.chunk, row.tile, round(total, 1), f"{row.why}: {figures}",
        row.heads, row.tokens, row.batch,
    )  # fmt: skip


def _figures(kernel: Kernel, made: Compiled) -> str:
    parts = [
        f"{kernel.registers} registers", f"{kernel.shared // 1024} KB shared",
        f"{kernel.resident} CTAs of {kernel.warps} warps a multiprocessor", f"{kernel.rounds:.1f} rounds",
        f"{kernel.instructions:.0f} instructions and {kernel.of('BAR'):.0f} barriers a warp",
        f"{kernel.bytes / 1e6:.0f} MB",
    ]  # fmt: skip
    if kernel.l2_bytes:
        parts.append(f"{kernel.l2_bytes / 1e6:.0f} MB through L2")
    if made.spills:
        parts.append(f"{made.spills} spills")
    return ", ".join(parts)
