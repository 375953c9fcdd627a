"""Whom sleepkern is compared with: one adapter each, imported only when asked.

    name                                 column of the table
    why_not(case, device) -> str | None  None, or the sentence why it cannot do the case
    prepare(case, inputs, threads)       a callable for one set of inputs, returning (o, state), or
                                         for train the gradients of v and of the initial state

Work that the peer's own interface makes a caller do (a zero decay, beta * v) is inside the call;
what it does not (layouts, uploads) is done before. A peer that gives wrong results is reported as
wrong and not compared with.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from ..backends import chunked, triton
from ..backends.native.views import on_device_of
from ..problems.recurrence import Tensors
from .cases import Case, Result, gradients, run

Prepared = Callable[[], Result]
Forward = Callable[[dict[str, Any]], Result]


@dataclass(frozen=True)
class Peer:
    """An adapter; see the module docstring. `threads` overrides the threads it is timed with."""

    name: str
    why_not: Callable[[Case, str], str | None]
    prepare: Callable[[Case, dict[str, Any], int], Prepared]
    threads: int | None = None


def peers_of(case: Case, device: str = "cpu") -> tuple[Peer, ...]:
    """The peers to try on a case, and ours under other settings where that is the question."""
    if torch.device(device).type == "cuda":
        return GPU_PEERS
    if case.threads is not None:
        return (Peer("ours, 1 thread", _always, _ours, threads=1),)
    if case.dtype != torch.float32:
        return (*PEERS, Peer("ours, float32", _always, _ours_float32))
    return PEERS


def _always(case: Case, device: str) -> str | None:
    return None


def _ours(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    return lambda: run(case, inputs)


def _ours_float32(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    wide = {n: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs.items()}
    return lambda: run(replace(case, dtype=torch.float32), wide)


# The token loop: sleepkern's reference backend in the type of the inputs.


def _token_loop(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    return lambda: run(case, inputs, backend="reference")


# transformers: the torch functions its models fall back to.


def _transformers_why_not(case: Case, device: str) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if case.rule.name == "gla":
        return "transformers has no model with this rule"
    if case.rule.name == "simple_gla" and case.op == "decode":
        return "Mamba-2's step in transformers has another interface"
    if case.rule.name == "kda" and case.shape.H != case.shape.HV:
        return "transformers' function wants as many key as value heads"
    return None


def _transformers(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    if case.rule.name == "simple_gla":
        return _passes(case, inputs, _mamba2)
    if case.rule.name == "kda":
        functions = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
        module = "kimi_linear.modeling_kimi_linear"
    else:
        functions = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
        module = "qwen3_next.modeling_qwen3_next"
    function = _torch_function(module, functions[case.op == "decode"])

    def forward(x: dict[str, Any]) -> Result:
        g = torch.zeros_like(x["beta"]) if x["g"] is None else x["g"]
        result: Result = function(
            x["q"],
            x["k"],
            x["v"],
            g=g,
            beta=x["beta"],
            initial_state=x["initial_state"],
            output_final_state=True,
        )
        return result

    return _passes(case, inputs, forward)


def _mamba2(x: dict[str, Any]) -> Result:
    """Mamba-2's scan with dt = 1 and A = g: x = beta v, B = k, C = scaled q, its state [B,HV,V,K];
    chunk as in its configuration."""
    scan = _torch_function("mamba2.modeling_mamba2", "mamba2_chunk_scan")
    value = x["v"] * x["beta"][..., None]
    query = x["q"] * x["q"].shape[-1] ** -0.5
    state = x["initial_state"].transpose(-1, -2)
    o, final = scan(
        value, torch.ones_like(x["g"]), x["g"], x["k"], query, chunk_size=256,
        initial_states=state, return_final_states=True,
    )  # fmt: skip
    return o.to(x["v"].dtype), final.transpose(-1, -2)


def _torch_function(module: str, name: str) -> Callable[..., Any]:
    """The torch function itself: the module's attribute may be wrapped to call fla, or patched to
    call sleepkern."""
    family = importlib.import_module(f"transformers.models.{module}")
    function: Callable[..., Any] = inspect.unwrap(getattr(family, name))
    if function.__module__ != family.__name__:
        raise RuntimeError(f"{name} of {family.__name__} is patched; undo the patch before measuring")
    return function


def _passes(case: Case, inputs: dict[str, Any], forward: Forward) -> Prepared:
    """A call of `forward` in the shape the case wants: gradients, or several passes with the state
    carried."""
    if case.op == "train":
        return lambda: gradients(inputs, lambda x: forward(x)[0])

    def repeated() -> Result:
        x = inputs
        for _ in range(case.passes):
            o, state = forward(x)
            x = {**x, "initial_state": state}
        return o, state

    return repeated


# ggml


def _ggml_why_not(case: Case, device: str) -> str | None:
    if importlib.util.find_spec("ggml") is None:
        return "ggml-python is not installed"
    if torch.device(device).type != "cpu" or case.dtype != torch.float32:
        return "its op runs on the CPU in float32"
    if not case.rule.delta:
        return "its op has the delta rule"
    if case.op == "train":
        return "its op has no gradient"
    if case.shape.K != case.shape.V:
        return "its op wants K = V"
    return None


def _ggml(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    from . import peer_ggml

    return peer_ggml.prepare(case, inputs, threads)


# flash-linear-attention, on a GPU


def _fla_why_not(case: Case, device: str) -> str | None:
    if torch.device(device).type != "cuda":
        return "runs on a GPU only"
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    if case.shape.H != case.shape.HV and case.rule.name != "gated_delta_rule":
        return "wants as many key as value heads"
    return None


def _fla(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    form = "fused_recurrent" if case.op == "decode" else "chunk"
    module: ModuleType = importlib.import_module(f"fla.ops.{case.rule.name}")
    function = getattr(module, f"{form}_{case.rule.name}")

    def forward(x: dict[str, Any]) -> Result:
        options: dict[str, Any] = {} if x["g"] is None else {"g": x["g"]}
        value = x["v"]
        if case.rule.delta:
            options["beta"] = x["beta"]
        else:
            value = value * x["beta"][..., None]
        if case.rule.name == "gla" and case.op == "decode":
            options["gk"] = options.pop("g")
        result = function(
            x["q"],
            x["k"],
            value,
            initial_state=x["initial_state"],
            output_final_state=True,
            **options,
        )
        return result[0], result[1]

    return _passes(case, inputs, forward)


# Ours in other forms, on a GPU. Of a replay: N calls; chunks prepared once by Triton, then a launch a pass; all passes
# in one launch of Triton's. Of one pass: with outputs.


def _pass_by_pass_why_not(case: Case, device: str) -> str | None:
    return None if case.op == "ingest" and case.passes > 1 else "one pass"


def _pass_by_pass(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    once = replace(case, passes=1)
    return _passes(case, inputs, lambda x: run(once, x))


def _triton_why_not(case: Case, device: str) -> str | None:
    reason = triton.why_not(case.problem(device))
    return reason or _pass_by_pass_why_not(case, device)


def _triton(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    return lambda: run(case, inputs, backend="triton")


def _relaunched(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    """The state after all passes of one launch each, with the chunk factors computed once.

    It is the baseline of kernels that keep a replay on chip.
    """
    from ..backends.triton.chunk_factors import chunk_factors_kernel  # imports Triton
    from ..backends.triton.common import States
    from ..backends.triton.launch import Job
    from ..backends.triton.state_pass import state_pass_kernel

    problem, x = case.problem(str(inputs["k"].device)), Tensors(*inputs.values())
    precision = triton.precision_of(problem)

    def relaunched() -> Result:
        p = problem._replace(passes=1)
        job = Job(p, x, False, precision, "forward")
        final = job.empty(p.sequences, p.HV, p.K, p.V, dtype=torch.float32)
        factors, tile = job.factors(save=False), job.plan.state_pass
        more = {"factors": factors, "REPLAY": False, "SAVE": False}
        with on_device_of(x.k):
            if job.has_factors:
                grid = (job.slots, p.HV)
                job.launch(chunk_factors_kernel, grid, job.plan.chunk_factors, **more)
            for done in range(problem.passes):
                state = final if done else x.state
                states = States(state, final, None, None, None)
                job.launch(
                    state_pass_kernel, job.columns(tile), tile, **more,
                    states=states, HAS_STATE=state is not None,
                )  # fmt: skip
        return None, final

    return relaunched


def _with_outputs_why_not(case: Case, device: str) -> str | None:
    return None if case.op == "ingest" and case.passes == 1 else "has outputs"


def _with_outputs(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    full = replace(case, op="forward")
    return lambda: (None, run(full, inputs)[1])


def _compiled_why_not(case: Case, device: str) -> str | None:
    if case.op != "forward" or case.shape.T > COMPILED_TOKENS:
        return f"unrolled over chunks, so only compiled for a forward of at most {COMPILED_TOKENS} tokens"
    return None


def _compiled(case: Case, inputs: dict[str, Any], threads: int) -> Prepared:
    """The readable chunk form by torch.compile, for which it has to be called past the operator."""
    forward = torch.compile(chunked.forward)
    problem, tensors = case.problem(str(inputs["k"].device)), Tensors(*inputs.values())

    def compiled() -> Result:
        out = forward(problem, tensors)
        return out.o, out.state

    return compiled


COMPILED_TOKENS = 512
GPU_PEERS = (
    Peer("fla", _fla_why_not, _fla),
    Peer("torch.compile", _compiled_why_not, _compiled),
    Peer("ours, pass by pass", _pass_by_pass_why_not, _pass_by_pass),
    Peer("ours, prepared once", _triton_why_not, _relaunched),
    Peer("ours, Triton", _triton_why_not, _triton),
    Peer("ours, with outputs", _with_outputs_why_not, _with_outputs),
)
PEERS = (
    Peer("token loop", _always, _token_loop),
    Peer("transformers", _transformers_why_not, _transformers),
    Peer("ggml", _ggml_why_not, _ggml),
    Peer("fla", _fla_why_not, _fla),
)
"""The peers in the order of the table's columns."""
