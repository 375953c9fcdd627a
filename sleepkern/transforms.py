"""The transforms of torch.func (functorch): which are at work, and how to see the numbers through them.

Our operators have no rules for them. vmap alone runs an operator sample by sample; where a transform differentiates,
calls are made of torch's own operators, which have all rules.
"""

from __future__ import annotations

from torch import Tensor

from .eager import functorch as _functorch
from .eager import transform_stack

_GRAD, _JVP = _functorch.TransformType.Grad, _functorch.TransformType.Jvp


def active() -> bool:
    """Tells whether any transform is at work, vmap included."""
    return transform_stack() is not None


def differentiating() -> bool:
    """Tells whether one of the transforms at work differentiates, in reverse or in forward mode."""
    return active() and bool({_GRAD, _JVP} & _kinds())


def reversing() -> bool:
    """Tells whether an active transform differentiates in reverse mode; forward mode may be around it or in it."""
    return active() and _GRAD in _kinds()


# Dynamo enters the transforms while it traces, and makes sure that a graph runs under the same ones. This is
# torch.compiler.assume_constant_result, which would import Dynamo, seconds, here and now.
for _question in (active, differentiating, reversing):
    _question._dynamo_marked_constant = True  # type: ignore[attr-defined]


def plain(t: Tensor) -> Tensor:
    """The tensor under all wrappers of transforms, with the samples of vmap as dimensions somewhere in it."""
    while _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.get_unwrapped(t)
    return t


def offsets_of(cu_seqlens: Tensor) -> list[int]:
    """The numbers in cu_seqlens.

    Raises:
        ValueError: they differ between the samples of vmap.
    """
    shared = plain(cu_seqlens)
    if shared.dim() != cu_seqlens.dim():
        raise ValueError("cu_seqlens: got offsets for each sample of vmap; expected the same for all of them")
    numbers: list[int] = shared.tolist() if type(shared) is Tensor else [int(n) for n in shared.unbind()]
    return numbers


def _kinds() -> set[object]:
    stack = _functorch.get_interpreter_stack()
    return set() if stack is None else {level.key() for level in stack}
