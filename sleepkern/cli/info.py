"""`sleepkern info`: what is installed, what was built, which devices are there."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from .. import settings
from ..backends import triton
from ..backends.triton.ptxas import assembler_fault, assembler_of
from ..dispatch import explain_problem, other_families
from ..measure.cases import Case
from ..measure.environment import environment, native_module
from ..nn.attention import capability_of, explain_attention
from ..rules import GATED_DELTA_RULE
from ..testing import Shape
from .output import console, named_path, writable, write_json


def command(
    json: Annotated[Path | None, typer.Option(parser=named_path, metavar="PATH", help="write it to this file")] = None,
) -> None:
    """Versions, processor, instruction sets, GPUs, and what each backend says to a plain call."""
    writable(json, "--json")
    facts = gather()
    table = Table(title="sleepkern", show_header=False)
    for name, value in flatten(facts):
        table.add_row(name, str(value))
    console.print(table)
    write_json(json, {"command": "info", **facts})


def gather() -> dict[str, Any]:
    """Everything `info` knows."""
    native = native_module()
    problem = Case("forward", GATED_DELTA_RULE, Shape(T=2048, H=16, HV=16, K=128, V=128)).problem()
    return {
        "environment": environment(),
        "native": None if native is None else {
            "isas": native.isas(),
            "cuda": getattr(native, "has_cuda", False),
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "assembler": assemblers(),
        "warnings": known_faults(),
        "backends": {name: reason or "ready" for name, reason in
        explain_problem(problem).reasons.items()},
        "attention": attention_here(),
        "SLEEPKERN_BACKEND": {"recurrence": settings.BACKEND, **other_families()},
    }  # fmt: skip


def attention_here() -> str:
    """The attention of sleepkern.nn in bfloat16, heads of 64, on the first GPU or without one."""
    first = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return explain_attention(torch.bfloat16, 64, capability_of(first))


def assemblers() -> dict[str, str]:
    """The ptxas of the Triton kernels on each kind of GPU here, or on a Hopper where there is none."""
    if not triton.installed():
        return {}
    devices = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())} or {(9, 0)}
    chosen = {device: assembler_of(device) for device in sorted(devices)}
    return {f"on {a}.{b}": f"{one.source}'s ptxas {one.version}, {one.path}" for (a, b), one in chosen.items()}


def known_faults() -> list[str]:
    """What is known to be wrong with the versions and devices here."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return []
    devices = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    found = [triton.known_fault(version, device) for device in devices]
    found += [assembler_fault(assembler_of(device).version, device) for device in devices]
    return [fault for fault in found if fault is not None]


def flatten(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested facts as lines: ("environment / versions / torch", "2.13.0")."""
    lines: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += flatten(value, f"{prefix}{name} / ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append((prefix + name, "none" if shown in (None, "") else shown))
    return lines
