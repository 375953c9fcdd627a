"""Step 2 of a call, CHECK: the one place that rejects input, and the description every later step reads."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import settings, transforms
from ..addresses import check_memory
from ..rules import Rule

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
METHODS = ("auto", "repeat", "wy", "affine", "rank")
MOST_PASSES = 2**31 - 1
_INT64_MAX = 2**63 - 1


class Tensors(NamedTuple):
    """The tensors of a call as the caller gave them (shapes: rules.py); None where absent."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    state: Tensor | None
    cu_seqlens: Tensor | None


class RecurrenceResult(NamedTuple):
    """Result of a forward.

    o         [B,T,HV,V] outputs of the last pass, in the type of v; None when q is None
    state     [sequences,HV,K,V] state after the last pass
    residual  [sequences,HV] estimated distance to the fixed point over |S|; None without tol
    passes    [sequences,HV] int32, passes that each head made; None without tol
    states    [B,n,HV,K,V] states along the way (states.py), None without state_every
    """

    o: Tensor | None
    state: Tensor
    residual: Tensor | None = None
    passes: Tensor | None = None
    states: Tensor | None = None


class Problem(NamedTuple):
    """Sizes and types of one call; together with the tensors it is all that a backend is given.

    sequences is the number of states: B, or the number of packed sequences. T counts the tokens of a row
    of the batch (all packed tokens when packed). output says whether outputs are wanted. With state_every = n the
    states after every n tokens are wanted too. With state_bf16 the state, which is updated in place, is bfloat16.
    """

    rule: Rule
    device: str
    dtype: torch.dtype
    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    sequences: int
    packed: bool
    output: bool
    normalize: bool
    scale: float
    passes: int = 1
    tol: float | None = None
    method: str = "auto"
    state_every: int | None = None
    state_bf16: bool = False

    @property
    def state_dtype(self) -> torch.dtype:
        """Type of the state and of accumulation: float32, or float64 for float64 inputs."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def describe(
    rule: Rule,
    x: Tensors,
    scale: float,
    normalize: bool,
    passes: int = 1,
    tol: float | None = None,
    method: str = "auto",
    state_every: int | None = None,
) -> Problem:
    """The Problem of tensors that are known to fit."""
    _, k, v, _, _, _, cu_seqlens = x
    B, T, H, K = k.shape
    _, _, HV, V = v.shape
    return Problem(
        rule, k.device.type, k.dtype, B, T, H, HV, K, V,
        B if cu_seqlens is None else cu_seqlens.numel() - 1, cu_seqlens is not None, x.q is not None,
        normalize, scale, passes, tol, method, state_every,
    )  # fmt: skip


def check(
    rule: Rule,
    x: Tensors,
    scale: float | None,
    normalize: bool,
    passes: int = 1,
    tol: float | None = None,
    method: str = "auto",
    outputs: bool = True,
    state_name: str = "initial_state",
    state_every: int | None = None,
) -> Problem:
    """Check everything that shapes, types and devices can tell; values are checked by check_values.

    outputs says that q is required; state_name is what the caller's signature calls the state. The name "state" is that
    of a state which is updated in place, and which may be bfloat16.

    Raises:
        TypeError: an argument is not a tensor, or has the wrong type.
        ValueError: a wrong shape, device or option. Messages name the argument, what it got, what it expects.
    """
    q, k, v, g, beta, state, cu_seqlens = x
    _check_tensors(x, outputs, state_name)
    _check_key_value(q, k, v)
    scale = k.shape[3] ** -0.5 if scale is None else finite("scale", scale)
    check_flag("use_qk_l2norm_in_kernel", normalize)
    if type(passes) is not int or passes != 1 or tol is not None or type(method) is not str or method != "auto":
        passes = _check_replay(passes, tol, method)
    if state_every is not None:
        state_every = check_state_every(state_every)
    problem = describe(rule, x, scale, normalize, passes, tol, method, state_every)
    rows = (problem.B, problem.T, problem.HV)
    _check_gate(rule, g, rows, problem.K)
    if rule.delta and beta is None:
        raise ValueError(f"beta: {rule.name} needs it, got None; expected a tensor {list(rows)}")
    if beta is not None and beta.shape != rows:
        raise wrong_shape("beta", beta, rows)
    if cu_seqlens is not None:
        check_packing(cu_seqlens, problem.B)
    if state is not None and state.shape != (expected := (problem.sequences, problem.HV, problem.K, problem.V)):
        raise wrong_shape(state_name, state, expected)
    _check_types(x, problem)
    return problem if state is None else check_state_type(problem, state, state_name, state_name == "state")


def check_values(problem: Problem, x: Tensors, state_name: str = "initial_state") -> None:
    """Check what only memory and the values can tell, before a kernel runs and outside of any graph capture.

    Values on the CPU always; on a GPU, where reading one would stall the stream, only with SLEEPKERN_DEBUG=1, which
    also looks for NaN and infinities. A log decay of -inf is none of these: a = exp(g) = 0 forgets the state.

    Raises:
        ValueError: a tensor without memory, cu_seqlens that fall, g > 0, NaN, or a replay that would diverge.
    """
    debug = settings.DEBUG
    cu_seqlens, g = x.cu_seqlens, x.g
    names = ("q", "k", "v", "g", "beta", state_name, "cu_seqlens")
    transformed = transforms.active()
    if not transformed:
        check_memory(names, x)
    if cu_seqlens is not None and (debug or cu_seqlens.device.type == "cpu"):
        check_offsets(transforms.offsets_of(cu_seqlens) if transformed else cu_seqlens.tolist(), problem.T)
    if problem.device != "cpu" and not debug:
        return
    if debug:
        for name, t in zip(names, x, strict=True):
            if t is not None:
                check_numbers(name, transforms.plain(t))
    if (
        g is not None and g.numel() and not (g := transforms.plain(g) if transformed else g).amax().item() <= 0
    ):  # NaN may hide what is above
        largest = torch.where(g > 0, g, 0).amax().item()
        if largest > 0:
            raise ValueError(f"g: got a log decay of {largest:.9g}; expected g <= 0 (a = exp(g) <= 1)")
    if problem.passes > 1 and problem.rule.delta and x.beta is not None and x.k.numel():
        _check_contraction(problem, x.k, x.beta)


def _check_tensors(x: Tensors, outputs: bool, state_name: str) -> None:
    names = ("q", "k", "v", "g", "beta", state_name, "cu_seqlens")
    device = x.k.device if isinstance(x.k, Tensor) else None
    for name, t in zip(names, x, strict=True):
        if t is None and not (name in ("k", "v") or (name == "q" and outputs)):
            continue
        if not isinstance(t, Tensor) or t.layout != torch.strided:
            t = check_dense(name, t)
        if t.device != device and device is not None and (name != "cu_seqlens" or t.device.type != "cpu"):
            raise ValueError(f"{name}: got device {t.device}; expected {device}, where k is")


def _check_key_value(q: Tensor | None, k: Tensor, v: Tensor) -> None:
    if k.dim() != 4:
        raise ValueError(f"k: got shape {list(k.shape)}; expected [B, T, H, K]")
    if v.dim() != 4:
        raise ValueError(f"v: got shape {list(v.shape)}; expected [B, T, HV, V]")
    B, T, H, K = k.shape
    v_B, v_T, HV, V = v.shape
    if H == 0 or K == 0:
        raise ValueError(f"k: got shape {list(k.shape)}; expected H and K of at least 1")
    if q is not None and q.shape != k.shape:
        raise wrong_shape("q", q, k.shape)
    if v_B != B or v_T != T or V == 0:
        raise ValueError(f"v: got shape {list(v.shape)}; expected {sizes_of(B, T, 'HV', 'V')} with V of at least 1")
    if HV == 0 or HV % H != 0:
        raise ValueError(f"v: got HV = {HV} value heads; expected a multiple of H = {H}")


def _check_gate(rule: Rule, g: Tensor | None, rows: tuple[int, int, int], K: int) -> None:
    if rule.gate == "none":
        if g is not None:
            raise ValueError(f"g: {rule.name} has no decay, got a tensor {list(g.shape)}; expected None")
        return
    shape = rows if rule.gate == "head" else (*rows, K)
    if g is None:
        raise ValueError(f"g: {rule.name} needs it, got None; expected a tensor {list(shape)}")
    if g.shape != shape:
        raise wrong_shape("g", g, shape)


def sizes_of(*sizes: int | str) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def wrong_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> ValueError:
    return ValueError(f"{name}: got shape {list(x.shape)}; expected {list(shape)}")


def check_packing(cu_seqlens: Tensor, B: int) -> None:
    check_dense("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: got {cu_seqlens.dtype}; expected torch.int32 or torch.int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: got shape {list(cu_seqlens.shape)}; expected [n + 1] with n >= 1")
    if B != 1:
        raise ValueError(f"cu_seqlens: got a batch of B = {B}; expected B = 1 for packed sequences")


def _check_types(x: Tensors, problem: Problem) -> None:
    q, k, v, g, beta, _, _ = x
    dtype = problem.dtype
    if dtype not in FLOATS:
        raise wrong_type("k", k, f"one of {FLOATS}")
    if q is not None and q.dtype != dtype:
        raise wrong_type("q", q, f"{dtype}, the type of k")
    if v.dtype != dtype:
        raise wrong_type("v", v, f"{dtype}, the type of k")
    if g is not None and g.dtype not in FLOATS:
        raise wrong_type("g", g, f"one of {FLOATS}")
    if beta is not None and beta.dtype not in FLOATS:
        raise wrong_type("beta", beta, f"one of {FLOATS}")


def check_state_type(problem: Problem, state: Tensor, name: str, in_place: bool) -> Problem:
    """The problem with the type of its state; a state that is updated in place may be bfloat16.

    Raises:
        TypeError: a state of another type.
    """
    if state.dtype == problem.state_dtype:
        return problem
    narrow = in_place and problem.dtype != torch.float64
    if narrow and state.dtype == torch.bfloat16:
        return problem._replace(state_bf16=True)
    expected = f"{problem.state_dtype}{' or torch.bfloat16' if narrow else ''} for {problem.dtype} inputs"
    raise wrong_type(name, state, expected)


def check_state_every(value: Any) -> int:
    """state_every as an int.

    Raises:
        TypeError, ValueError: it is no integer of at least 1.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"state_every: got {type(value).__name__}; expected None or an integer of at least 1")
    every = operator.index(value)
    if every < 1:
        raise ValueError(f"state_every: got {every}; expected None or an integer of at least 1")
    if every > _INT64_MAX:
        raise ValueError(f"state_every: got {every}; expected an integer below 2^63")
    return every


def wrong_type(name: str, x: Tensor, expected: str) -> TypeError:
    return TypeError(f"{name}: got {x.dtype}; expected {expected}")


def _check_replay(passes: Any, tol: Any, method: Any) -> int:
    """passes as an int."""
    try:
        count = passes if type(passes) is int else operator.index(passes)
    except TypeError:
        count = 0
    if isinstance(passes, bool) or not 1 <= count <= MOST_PASSES:
        raise ValueError(f"passes: got {passes!r}; expected an integer of at least 1 and at most {MOST_PASSES}")
    if tol is not None and not _is_number(tol):
        raise TypeError(f"tol: got {type(tol).__name__}; expected None or a number above 0")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol: got {tol!r}; expected None or a number above 0")
    if not isinstance(method, str):
        raise TypeError(f"method: got {type(method).__name__}; expected one of {', '.join(METHODS)}")
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; expected one of {', '.join(METHODS)}")
    return count


def check_dense(name: str, t: object) -> Tensor:
    """The tensor, if it is one whose numbers lie at strides.

    Raises:
        TypeError, ValueError: as `check`.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}; expected a torch.Tensor")
    if t.layout != torch.strided:
        raise ValueError(f"{name}: got layout {t.layout}; expected torch.strided")
    return t


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        TypeError: names the argument.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}; expected a bool")


def finite(name: str, value: Any) -> float:
    """A number of Python or numpy as a float.

    Raises:
        TypeError: it is none.
        ValueError: it is NaN or infinite.
    """
    if not _is_number(value):
        raise TypeError(f"{name}: got {type(value).__name__}; expected a number")
    number = float(value)
    if not abs(number) < math.inf:
        raise ValueError(f"{name}: got {number}; expected a finite number")
    return number


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Real)) and not isinstance(value, bool)


def check_numbers(name: str, t: Tensor) -> None:
    if bool(torch.isnan(t).any()):
        raise ValueError(f"{name}: got NaN; expected numbers")
    if bool(torch.isposinf(t).any()) or (name != "g" and bool(torch.isneginf(t).any())):
        raise ValueError(f"{name}: got an infinity; expected finite numbers{' or -inf' if name == 'g' else ''}")


def check_offsets(offsets: list[int], T: int) -> None:
    if offsets[0] != 0 or offsets[-1] != T or offsets != sorted(offsets):
        raise ValueError(
            f"cu_seqlens: got {offsets if len(offsets) <= 8 else [*offsets[:4], '...', *offsets[-3:]]}; "
            f"expected offsets that start at 0, never fall and end at T = {T}"
        )


def _check_contraction(problem: Problem, k: Tensor, beta: Tensor) -> None:
    """A pass is a contraction while beta |k|^2 <= 2; beyond, the passes of a replay grow without bound."""
    norm = torch.ones((), device=k.device)
    if not problem.normalize:
        norm = torch.linalg.vector_norm(k.detach(), dim=-1, dtype=problem.state_dtype).square()
        if problem.HV != problem.H:
            norm = norm.repeat_interleave(problem.HV // problem.H, dim=2)
    gains = transforms.plain(norm * beta.detach().to(problem.state_dtype))
    most = 2 * (1 + 4 * torch.finfo(problem.dtype).eps)
    if gains.amax().item() <= most:
        return
    gain = torch.where(gains > most, gains, 0).amax().item()  # a NaN is not above anything and may hide what is
    if gain > most:
        raise ValueError(
            f"beta: got beta * |k|^2 up to {gain:.9g}; expected at most 2, beyond which {problem.passes} "
            "passes diverge (normalise k, e.g. use_qk_l2norm_in_kernel=True, or lower beta)"
        )
