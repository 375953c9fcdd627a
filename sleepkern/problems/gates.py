"""Raw gates: a call may take the projections that g and beta are made of, and not g and beta themselves.

    g = -exp(A_log) softplus(g_raw + dt_bias), or with a lower bound L: L sigmoid(exp(A_log) (g_raw + dt_bias))
    beta = beta_scale sigmoid(beta_raw)

backends/torch_gates.py is the definition, in torch; kernels that make gates themselves are compared with it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import settings
from ..addresses import check_memory
from .recurrence import FLOATS, Problem, Tensors, check_dense, check_flag, check_numbers, check_values, finite


class RawGates(NamedTuple):
    """The raw gates of a call, and what they are made with.

    A_log        [HV] logarithm of each value head's rate; None for rates of 1
    dt_bias      [HV], or [HV,K] or [HV * K] where the rule decays by key channel; None for 0
    lower_bound  log decay that g approaches where the raw g is large; None for softplus, which has no bound
    decay        whether g is raw
    beta_scale   1 or 2, the factor of the sigmoid of a raw beta; 0 where beta is not raw
    """

    A_log: Tensor | None
    dt_bias: Tensor | None
    lower_bound: float | None
    decay: bool
    beta_scale: float


GateOptions = tuple[bool, Tensor | None, Tensor | None, bool, bool, float | None]
"""use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound of a call."""


def read_gates(options: GateOptions) -> RawGates | None:
    """What the options of a call say of its gates; None where neither gate is raw.

    Raises:
        TypeError: a flag that is not a bool, or a bound that is not a number.
        ValueError: options that do not belong together.
    """
    use_gate, A_log, dt_bias, use_sigmoid, doubled, lower_bound = options
    if not type(use_gate) is type(use_sigmoid) is type(doubled) is bool:
        check_flag("use_gate_in_kernel", use_gate)
        check_flag("use_beta_sigmoid_in_kernel", use_sigmoid)
        check_flag("allow_neg_eigval", doubled)
    if doubled and not use_sigmoid:
        raise ValueError("allow_neg_eigval: got True; expected use_beta_sigmoid_in_kernel=True beside it")
    if not use_gate:
        _refuse_given(A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound)
    if lower_bound is not None and (lower_bound := finite("lower_bound", lower_bound)) >= 0:
        raise ValueError(f"lower_bound: got {lower_bound}; expected a log decay below 0")
    if use_gate and A_log is None and lower_bound is None:
        raise ValueError("A_log: got None; expected a tensor [HV] beside use_gate_in_kernel=True")
    if not use_gate and not use_sigmoid:
        return None
    return RawGates(A_log, dt_bias, lower_bound, use_gate, (2.0 if doubled else 1.0) if use_sigmoid else 0.0)


def _refuse_given(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: got {type(value).__name__}; expected use_gate_in_kernel=True beside it, or None")


def check_gates(problem: Problem, x: Tensors, gates: RawGates) -> None:
    """Check what A_log and dt_bias are beside the tensors of a call, which `check` accepted.

    Raises:
        TypeError, ValueError: as `check`.
    """
    rule, HV, K = problem.rule, problem.HV, problem.K
    if gates.decay and rule.gate == "none":
        raise ValueError(f"use_gate_in_kernel: {rule.name} has no decay, got True; expected False")
    if gates.beta_scale and x.beta is None:
        rows = [problem.B, problem.T, HV]
        raise ValueError(f"beta: got None; expected a tensor {rows} beside use_beta_sigmoid_in_kernel=True")
    shapes = {"A_log": ((HV,),), "dt_bias": ((HV,),) if rule.gate == "head" else ((HV, K), (HV * K,))}
    for name, t in (("A_log", gates.A_log), ("dt_bias", gates.dt_bias)):
        if t is None:
            continue
        check_dense(name, t)
        if t.device != x.k.device:
            raise ValueError(f"{name}: got device {t.device}; expected {x.k.device}, where k is")
        if tuple(t.shape) not in shapes[name]:
            expected = " or ".join(str(list(shape)) for shape in shapes[name])
            raise ValueError(f"{name}: got shape {list(t.shape)}; expected {expected}")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: got {t.dtype}; expected one of {FLOATS}")


def check_raw_values(problem: Problem, x: Tensors, gates: RawGates, state_name: str = "initial_state") -> None:
    """`check_values` for a call with raw gates, whose values may have any sign.

    Raises:
        ValueError: as `check_values`.
    """
    check_values(problem, x._replace(g=None) if gates.decay else x, state_name)
    names, raw = ("g", "A_log", "dt_bias"), (x.g, gates.A_log, gates.dt_bias)
    check_memory(names, raw)
    if settings.DEBUG:
        for name, t in zip(names, raw, strict=True):
            if t is not None:
                check_numbers(name, t)
