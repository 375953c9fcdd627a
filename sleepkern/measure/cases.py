"""A case of the bench table, its inputs, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops import recurrence as ops
from ..problems.recurrence import Problem
from ..rules import Rule
from ..testing import Shape, call, make_inputs, type_name
from . import flops
from .block_cases import BlocksCase
from .model_cases import ModelCase

Op = Literal["forward", "train", "decode", "ingest"]
Result = tuple[Tensor | None, Tensor | None]
"""(outputs or None, final state or None)"""

CACHE_BYTES = 64 << 20
"""Sets of inputs are made until they take as much, so that no cache holds them all."""
MOST_SETS = 64
"""The most sets of inputs; those of a tiny case do stay in a cache."""
MOST_CHECKED = 4
"""Sequences of a case whose result is checked."""
MOST_DRAWN = 1024
"""Tokens of an input on a GPU that are drawn."""


@dataclass(frozen=True)
class Case:
    """One thing to time.

    op       forward: rule with initial and final state; train: forward and all gradients; decode:
             recurrent_step in place; ingest: sleep_ingest, state only
    passes   of ingest
    method   of ingest
    threads  None takes the bench's own; a number overrides it, and the case is compared with ours
             on one thread
    cached   always the same inputs, which a cache then holds if they fit into one
    """

    op: Op
    rule: Rule
    shape: Shape
    dtype: torch.dtype = torch.float32
    passes: int = 1
    method: str = "auto"
    threads: int | None = None
    cached: bool = False

    @property
    def name(self) -> str:
        """Unique, e.g. "forward gated_delta_rule T=2048 H=16 K=128 V=128 float32"."""
        s = self.shape
        heads = f"H={s.H}" + (f" HV={s.HV}" if s.HV != s.H else "")
        batch = f"B={s.B} " if s.B > 1 else ""
        size = f"{batch}T={s.T} {heads} K={s.K} V={s.V}"
        name = f"{self.op} {self.rule.name} {size} {type_name(self.dtype)}"
        if self.passes > 1:
            name += f" N={self.passes}"
        if self.method != "auto":
            name += f" {self.method}"
        name += " cached" if self.cached else ""
        return name + (f" threads={self.threads}" if self.threads is not None else "")

    @property
    def flops(self) -> int:
        """Useful operations (flops.py)."""
        if self.op == "train":
            return flops.train_flops(self.rule, self.shape, self.passes)
        return flops.forward_flops(self.rule, self.shape, self.passes, outputs=self.op != "ingest")

    @property
    def bytes(self) -> int:
        """Bytes that must cross memory (flops.py)."""
        if self.op == "train":
            return flops.train_bytes(self.rule, self.shape, self.dtype, self.passes)
        return flops.forward_bytes(self.rule, self.shape, self.dtype, outputs=self.op != "ingest")

    def problem(self, device: str = "cpu") -> Problem:
        """What the checks would make of the call; `dispatch.explain_problem` says who would compute
        it."""
        s = self.shape
        return Problem(
            rule=self.rule, device=torch.device(device).type, dtype=self.dtype, B=s.B, T=s.T, H=s.H,
            HV=s.HV, K=s.K, V=s.V, sequences=s.sequences, packed=s.lengths is not None,
            output=self.op != "ingest", normalize=False, scale=s.K**-0.5, passes=self.passes,
            method=self.method,
        )  # fmt: skip

    def shortened(self, tokens: int) -> Case:
        """The same case with at most `tokens` tokens and few sequences, for the check of its result."""
        s = self.shape
        return replace(self, shape=replace(s, B=min(s.B, MOST_CHECKED), T=min(tokens, s.T)))

    def inputs(self, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """One set of inputs; `do`, the gradient of the outputs, among them for train."""
        inputs = self._drawn(seed, device)
        if self.op == "train":
            v, generator = inputs["v"], torch.Generator().manual_seed(seed)
            inputs["do"] = torch.randn(v.shape, generator=generator).to(v)
        return inputs

    def _drawn(self, seed: int, device: str) -> dict[str, Any]:
        """Random where they are few; more than MOST_DRAWN tokens repeat the first ones, for a CPU draws slowly."""
        s = self.shape
        times = s.T // MOST_DRAWN
        if torch.device(device).type == "cpu" or times < 2 or s.T % MOST_DRAWN:
            return make_inputs(self.rule, s, self.dtype, seed=seed, device=device)
        few = make_inputs(self.rule, replace(s, T=MOST_DRAWN), self.dtype, seed=seed, device=device)
        rows = ("q", "k", "v", "g", "beta")
        return {
            n: t.repeat(1, times, *[1] * (t.dim() - 2)) if n in rows and t is not None else t for n, t in few.items()
        }

    def rotation(self, device: str = "cpu") -> list[dict[str, Any]]:
        """Sets of inputs to rotate through."""
        first = self.inputs(0, device)
        return [first, *(self.inputs(i, device) for i in range(1, self.sets(first)))]

    def sets(self, inputs: dict[str, Any]) -> int:
        """How many sets of such inputs to rotate through."""
        size = sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, Tensor))
        return 1 if self.cached else min(MOST_SETS, -(-CACHE_BYTES // size))


def run(case: Case, inputs: dict[str, Any], backend: str | None = None) -> Result:
    """The case by sleepkern's public functions. Train returns (dv, gradient of the initial
    state)."""
    if case.op == "forward":
        return call(case.rule, inputs, backend=backend)
    if case.op == "train":
        return gradients(inputs, lambda x: _outputs(case, x, backend))
    q, k, v, g, beta, state, _ = inputs.values()
    if case.op == "decode":
        return ops.recurrent_step(q, k, v, g, beta, state, rule=case.rule, backend=backend)
    method = "auto" if backend is not None else case.method
    result = ops.sleep_ingest(
        k, v, g, beta, passes=case.passes, initial_state=state, rule=case.rule, method=method, backend=backend
    )
    return None, result.final_state


def _outputs(case: Case, inputs: dict[str, Any], backend: str | None) -> Tensor | None:
    if case.passes == 1:
        return call(case.rule, inputs, backend=backend, output_final_state=False)[0]
    method = "auto" if backend is not None else case.method
    return ops.sleep_ingest(**inputs, passes=case.passes, rule=case.rule, method=method, backend=backend).output


def gradients(inputs: dict[str, Any], forward: Any) -> Result:
    """Gradients of all tensors through `forward(inputs) -> o` for inputs["do"]; (dv, gradient of
    the state)."""
    names = [n for n in ("q", "k", "v", "g", "beta", "initial_state") if inputs[n] is not None]
    leaves = {n: inputs[n].detach().requires_grad_() for n in names}
    rest = {n: x for n, x in inputs.items() if n != "do"}
    o = forward({**rest, **leaves})
    grads = dict(zip(names, torch.autograd.grad(o, list(leaves.values()), inputs["do"]), strict=True))
    return grads["v"], grads["initial_state"]


AnyCase = Case | ModelCase | BlocksCase
