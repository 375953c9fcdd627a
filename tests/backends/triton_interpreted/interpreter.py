"""Make Triton's interpreter round bfloat16 and tf32 as a GPU does. For tests only.

The interpreter keeps bfloat16 as its 16-bit pattern in a uint16 array and computes on the patterns, and multiplies tf32
operands as full float32. `install` replaces the five operations of its builder through which such numbers pass:
products take operands rounded to their type and add up in float32; arithmetic and casts round to nearest even. It also
keeps the interpreter from patching Triton's language anew at every call in a launch, which is about half of its time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
_dot, _binary, _unary = Builder.create_dot, Builder.binary_op, Builder.unary_op
_cast, _fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp
_patch_language = interpreter._patch_lang


def install() -> None:
    """Replace the operations; for the life of the process."""
    Builder.create_dot = dot
    Builder.binary_op = binary_op
    Builder.unary_op = unary_op
    Builder.cast_impl = cast
    Builder.create_fp_to_fp = fp_to_fp
    interpreter._patch_lang = patch_language


def patch_language(fn: Any) -> Any:
    """Let Triton's functions that `fn` sees be interpreted; returns what undoes it.

    The launch has done so before the kernel calls a function of its own, and doing it again changes nothing. Functions
    of Triton's own library see tl.core instead of tl, which is patched by the first of them.
    """
    visible = [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]
    if visible and not any(tl.core.is_builtin(module.load) for module in visible):
        return interpreter._LangPatchScope()
    return _patch_language(fn)


def widen(pattern: NDArray[Any]) -> NDArray[np.float32]:
    """float32 values of bfloat16 patterns."""
    wide: NDArray[np.float32] = (pattern.astype(np.uint32) << 16).view(np.float32)
    return wide


def narrow(x: NDArray[Any]) -> NDArray[np.uint16]:
    """bfloat16 patterns of float32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def to_tf32(x: NDArray[Any]) -> NDArray[np.float32]:
    """float32 values with 10 bits of mantissa, the rest cut off, as the matrix units do."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    cut: NDArray[np.float32] = (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return cut


def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """a @ b + d."""
    precision = str(input_precision).upper()
    tf32 = "TF32" in precision and "X3" not in precision
    return _dot(self, _operand(a, tf32), _operand(b, tf32), d, input_precision, max_num_imprecise_acc)


def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
    """Arithmetic and comparisons of two bfloat16 tensors; all else as it was."""
    if not (_is_bfloat16(lhs) and _is_bfloat16(rhs)) or op in _BITWISE:
        return _binary(self, lhs, rhs, op)
    return _rounded(op(widen(lhs.data), widen(rhs.data)))


def unary_op(self: Any, arg: Any, op: Callable[..., Any]) -> Any:
    """Arithmetic of one bfloat16 tensor; all else as it was."""
    return _rounded(op(widen(arg.data))) if _is_bfloat16(arg) else _unary(self, arg, op)


def cast(self: Any, src: Any, dst_type: Any) -> Any:
    """Casts from and to bfloat16; all else as it was."""
    target = dst_type.scalar
    if _is_bfloat16(src) == (target == tl.bfloat16):
        return _cast(self, src, dst_type)
    if target == tl.bfloat16:
        return Handle(narrow(src.data.astype(np.float32)), target)
    return Handle(widen(src.data).astype(interpreter._get_np_dtype(dst_type)), target)


def fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    """Rounding to nearest between bfloat16 and float32; all else as it was."""
    nearest = rounding_mode is None or "RTNE" in str(rounding_mode)
    if nearest and {src.dtype.scalar, dst_type.scalar} == {tl.float32, tl.bfloat16}:
        return cast(self, src, dst_type)
    return _fp_to_fp(self, src, dst_type, rounding_mode)


def _operand(x: Any, tf32: bool) -> Any:
    if _is_bfloat16(x):
        return Handle(widen(x.data), tl.float32)
    if tf32 and x.dtype.scalar == tl.float32:
        return Handle(to_tf32(x.data), tl.float32)
    return x


def _is_bfloat16(x: Any) -> bool:
    return bool(x.dtype.scalar == tl.bfloat16)


def _rounded(x: NDArray[Any]) -> Any:
    return Handle(x, tl.int1) if x.dtype == np.bool_ else Handle(narrow(x), tl.bfloat16)
