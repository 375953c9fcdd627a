"""The support matrix: the answer of each backend to a plain problem of each function and type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from sleepkern.backends import BACKENDS, BLOCK_BACKENDS, MIXER_BACKENDS
from sleepkern.backends import triton as triton_backend
from sleepkern.backends.cuda import device as cuda_device
from sleepkern.backends.interface import blocks_refusal, mixer_refusal, refusal
from sleepkern.backends.native.module import _C
from sleepkern.nn import SleepLM
from sleepkern.problems import blocks as blocks_problem
from sleepkern.problems.mixer import ConvolutionProblem, ConvolutionStepProblem, GatedNormProblem
from sleepkern.problems.recurrence import Problem
from sleepkern.rules import GATED_DELTA_RULE, RULES, Rule

TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
COLUMNS = ("cpu", "triton", "cuda", "torch")
"""Backends of the table; "torch" stands for what runs anywhere: chunked, reference, modules."""
ANYWHERE = ("chunked", "reference", "modules", "torch")
Ask = Callable[[Any, torch.dtype, str], bool]
"""Tells whether a backend does a plain problem of a type on a device."""


@contextmanager
def gpu_there() -> Iterator[None]:
    """Backends of a GPU answer as if the machine had one."""

    def why_not_on(device: str) -> str | None:
        return None if device == "cuda" else f"runs on a GPU, the tensors are on {device}"

    def capturing() -> bool:
        return False

    with (
        mock.patch.object(triton_backend, "why_not_on", why_not_on),
        mock.patch.object(cuda_device, "why_not_on", why_not_on),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", capturing),
    ):
        yield


def recurrence(rule: Rule, tokens: int = 1024, passes: int = 1) -> Ask:
    """A call of a rule's function; few tokens are a decode, several passes a replay."""

    def ask(backend: Any, dtype: torch.dtype, device: str) -> bool:
        sizes = {"B": 1, "T": tokens, "H": 4, "HV": 4, "K": 64, "V": 64, "sequences": 1}
        how = {"packed": False, "output": True, "normalize": True, "scale": 1.0, "passes": passes}
        return refusal(backend, Problem(rule, device, dtype, **sizes, **how)) is None

    return ask


def mixer(problem: Callable[[torch.dtype, str], Any]) -> Ask:
    """A call of an operator around the recurrence."""
    return lambda backend, dtype, device: mixer_refusal(backend, problem(dtype, device)) is None


def blocks(backend: Any, dtype: torch.dtype, device: str) -> bool:
    """A call of `sleep_blocks` on the blocks of a SleepLM of this type."""
    model = SleepLM(8, 64).to(dtype)
    problem = blocks_problem.describe(torch.zeros(1, 24, 64, dtype=dtype), model.blocks())
    return blocks_refusal(backend, problem._replace(device=device)) is None


def _convolution(dtype: torch.dtype, device: str) -> ConvolutionProblem:
    return ConvolutionProblem(device, (dtype, dtype), 4, True)


def _convolution_step(dtype: torch.dtype, device: str) -> ConvolutionStepProblem:
    return ConvolutionStepProblem(device, (dtype, dtype), 4, True, True, None)


def _norm(dtype: torch.dtype, device: str) -> GatedNormProblem:
    return GatedNormProblem(device, (dtype, dtype, dtype), 1e-6, True, False, 128)


FUNCTIONS: tuple[tuple[str, Any, Ask], ...] = (
    *((f"`{name}`", BACKENDS, recurrence(rule)) for name, rule in RULES.items()),
    ("`recurrent_step`", BACKENDS, recurrence(GATED_DELTA_RULE, tokens=1)),
    ("`sleep_ingest`", BACKENDS, recurrence(GATED_DELTA_RULE, tokens=64, passes=4)),
    ("`short_convolution`", MIXER_BACKENDS, mixer(_convolution)),
    ("`gated_rms_norm`", MIXER_BACKENDS, mixer(_norm)),
    ("`short_convolution_step`", MIXER_BACKENDS, mixer(_convolution_step)),
    ("`sleep_blocks`", BLOCK_BACKENDS, blocks),
)
"""A public function, its backends, and the question."""
FORWARD_ONLY = {
    ("`short_convolution_step`", "cpu"), ("`short_convolution_step`", "triton"), ("`recurrent_step`", "cuda"),
}  # fmt: skip
"""Calls that a backend does where no gradient is wanted; another one does them where one is."""


def _types(backends: Any, ask: Ask, column: str) -> list[str]:
    """The types in which some backend of a column does the call."""
    device = "cpu" if column in ("cpu", "torch") else "cuda"
    chosen = [b for b in backends if (b.NAME in ANYWHERE if column == "torch" else b.NAME == column)]
    return [says for dtype, says in TYPES.items() if any(ask(b, dtype, device) for b in chosen)]


def support() -> list[tuple[str, ...]]:
    """The head of the table and its rows."""
    if not (_C and _C.has_cuda):
        raise SystemExit(
            "the support matrix needs sleepkern._C built with CUDA, which declares the limits of its kernels"
        )
    table: list[tuple[str, ...]] = [("function", "`cpu`", "`triton`", "`cuda`", "torch, any device")]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # so that every type that a user can allow is told
    try:
        with gpu_there():
            for name, backends, ask in FUNCTIONS:
                cells = []
                for column in COLUMNS:
                    found = " ".join(_types(backends, ask, column))
                    only = " (forward)" if (name, column) in FORWARD_ONLY else ""
                    cells.append(found + only if found else "-")
                if table[-1][1:] == tuple(cells):  # functions in a row with the same cells share a line
                    name, _ = f"{table[-1][0]}, {name}", table.pop()
                table.append((name, *cells))
    finally:
        torch.set_float32_matmul_precision(before)
    return table
