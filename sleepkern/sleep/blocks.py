"""N passes of a stack of hybrid blocks over a window, in one call (arXiv 2605.26099).

h(0) = h;   (h(n), S(n)) = Blocks(h(n-1), S(n-1)),  n = 1..N
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as _module

from .. import settings
from ..backends.tensors import on_device_of
from . import packed as native
from . import packed_cuda
from .memory import Fast, Slow
from .packed import State
from .passes import normalised, relative_change

if TYPE_CHECKING:
    from ..nn import HybridBlock


class Slept(NamedTuple):
    """Result of `sleep_blocks`.

    h        [B,L,d] after the last pass
    states   what each block remembers: Fast(conv, state) of gated DeltaNet, Slow(keys, values) of attention
    changes  [N] for each pass the norm of what it changed in the fast weights, relative to their norm after it
    """

    h: Tensor
    states: list[Fast | Slow]
    changes: Tensor


def sleep_blocks(
    h: Tensor,
    blocks: Sequence[HybridBlock],
    states: Sequence[State] | None = None,
    passes: int = 1,
    feedback: Literal["raw", "reinject"] = "raw",
    conv_state: Literal["rewind", "carry"] = "rewind",
) -> Slept:
    """Run blocks `passes` times over a window, exactly as the modules do one by one.

    Args:
        h: [B,L,d] the window, embedded.
        blocks: of `sleepkern.nn`, one after the other.
        states: what each block remembers from before the window, default nothing. Attention sees its part in every
            pass; fast weights go on from pass to pass.
        passes: N.
        feedback: a pass after the first starts from "raw", what the one before left, or "reinject", that normalised,
            plus h.
        conv_state: before the window, the short convolutions of a pass after the first see "rewind", what preceded the
            window, or "carry", the window's own end.

    On the CPU all of it is one call of C++: groups of sequences go through all passes and blocks without leaving the
    caches. Products with weights multiply in bfloat16 where h is that, or float32 of which
    torch.set_float32_matmul_precision("medium") allows it, and the processor does it in one instruction; those of
    float32 go in part by Winograd's inner product where additions run beside multiplications, with the errors of
    plain ones (docs/sleep_blocks.md). On a GPU it is one launch, whose products multiply in bfloat16. With gradients
    h and the fast weights are kept between passes only, and each pass is run again in the backward. What `why_not`
    names runs module by module. Weights are packed once, and again when they have changed, but for writes that torch
    does not count: see `forget_packed`.

    Raises:
        ValueError: an argument out of range.
    """
    states = [None] * len(blocks) if states is None else list(states)
    _check(h, blocks, states, passes, feedback, conv_state)
    with on_device_of(h):
        return _run_where_it_may(h, blocks, states, passes, feedback, conv_state)


def _run_where_it_may(
    h: Tensor,
    blocks: Sequence[HybridBlock],
    states: list[State],
    passes: int,
    feedback: Literal["raw", "reinject"],
    conv_state: Literal["rewind", "carry"],
) -> Slept:
    if why_not(h, blocks) is not None:
        return one_by_one(h, blocks, passes, states, feedback, conv_state)
    _check_sizes(h, blocks, states)
    how = _How(passes, feedback == "reinject", conv_state == "carry")
    tensors = [t for state in states if state is not None for t in state]
    parameters = _parameters(blocks)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (h, *tensors, *parameters)):
        changes = h.new_empty(passes, dtype=torch.float32)
        made = _Recorded.apply(blocks, states, how, changes, h, *tensors, *parameters)
        return Slept(made[0], _paired(blocks, made[1:]), changes)
    return _run(h, blocks, states, how)


def forget_packed(blocks: Sequence[HybridBlock]) -> None:
    """Have `sleep_blocks` pack the weights of these blocks anew.

    It does so by itself after any change that torch counts; a write through a parameter's `.data` is not counted.
    """
    for block in blocks:
        native.forget(block)
        packed_cuda.forget(block)


def why_not(h: Tensor, blocks: Sequence[HybridBlock]) -> str | None:
    """None where `sleep_blocks` is one call of C++ or one launch, else the sentence why it runs module by module."""
    if native._C is None:
        return "the compiled module sleepkern._C is not there"
    device = h.device.type
    if settings.BACKEND not in (None, device):
        return f"backend {settings.BACKEND} was asked for"
    if device not in ("cpu", "cuda") or h.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"one call for {h.dtype} on {h.device} is not there, only for at most 32 bits on CPU and GPU"
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device) or torch._C._len_torch_dispatch_stack() > 0:
        return "a compiled graph, autocast or a dispatch mode wants to see the operators"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "a transform of torch.func or forward mode wants to see the operators"
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "modules have hooks, which want to be called"
    for block in blocks:
        reason = _why_not_packed(block, h)
        if reason is not None:
            return reason
    return packed_cuda.why_not(h, blocks) if device == "cuda" else native.why_not(blocks)


def _why_not_packed(block: HybridBlock, h: Tensor) -> str | None:
    """None where weights say all of what a block does."""
    from .. import nn

    ours = {
        nn.HybridBlock, nn.GatedDeltaNet, nn.WindowAttention, nn.MLP, nn.ShortConvolution, nn.GatedRMSNorm,
        torch.nn.Linear, torch.nn.RMSNorm,
    }  # fmt: skip
    if type(block) is not nn.HybridBlock:
        return f"a {type(block).__name__} is not a HybridBlock of sleepkern.nn"
    for m in block.modules():
        if m._forward_hooks or m._forward_pre_hooks:
            return "a module has hooks, which want to be called"
        if type(m) not in ours or getattr(m, "bias", None) is not None or "forward" in vars(m):
            return f"a {type(m).__name__} in a block is not as sleepkern.nn made it"
    for p in block.parameters():
        if p.device != h.device or p.dtype != h.dtype:
            return f"weights are {p.dtype} on {p.device}, h is {h.dtype} on {h.device}"
        if p.is_inference():
            return "weights made in inference mode do not say when they change"
    return None


class _How(NamedTuple):
    passes: int
    reinject: bool
    carry: bool


def _run(h: Tensor, blocks: Sequence[HybridBlock], states: Sequence[State], how: _How) -> Slept:
    """In one launch, or by C++, in float32 but for products with weights; results in the types that modules leave."""
    if h.device.type == "cuda":
        return Slept(*packed_cuda.run(h, blocks, states, *how))
    out, after, changes = native.packed(blocks, h.dtype).run(h.float(), blocks, states, *how)
    return Slept(out.to(h.dtype), [_like(x, h.dtype) for x in after], changes)


def _like(x: Fast | Slow, dtype: torch.dtype) -> Fast | Slow:
    if isinstance(x, Fast):
        return Fast(x.conv.to(dtype), x.state)
    return Slow(x.keys.to(dtype), x.values.to(dtype))


def one_by_one(
    h: Tensor,
    blocks: Sequence[HybridBlock],
    passes: int = 1,
    states: Sequence[State] | None = None,
    feedback: Literal["raw", "reinject"] = "raw",
    conv_state: Literal["rewind", "carry"] = "rewind",
) -> Slept:
    """`sleep_blocks` module by module, on any device, for any type, recorded by autograd as it comes."""
    states = [None] * len(blocks) if states is None else list(states)
    start, now, changes = h, states, []
    for n in range(passes):
        if n > 0:
            h = normalised(h) + start if feedback == "reinject" else h
            now = [_before_pass(old, new, conv_state == "carry") for old, new in zip(states, now, strict=True)]
        before = now
        h, now = _one_pass(h, blocks, before)
        changes.append(relative_change(_fast_weights(before, now)))
    return Slept(h, now, torch.stack(changes))  # type: ignore[arg-type]


def _one_pass(h: Tensor, blocks: Sequence[HybridBlock], states: Sequence[State]) -> tuple[Tensor, list[State]]:
    after: list[State] = []
    for block, state in zip(blocks, states, strict=True):
        h, kept = block(h, state)
        after.append(kept)
    return h, after


def _before_pass(old: State, new: State, carry: bool) -> State:
    """What a block sees before the window in a pass after the first: the fast weight of the pass before."""
    if not isinstance(new, Fast):
        return old
    if carry:
        return new
    return Fast(torch.zeros_like(new.conv) if old is None else old[0], new.state)


def _fast_weights(before: Sequence[State], after: Sequence[State]) -> list[tuple[Tensor | None, Tensor]]:
    pairs = zip(before, after, strict=True)
    return [(old.state if isinstance(old, Fast) else None, new.state) for old, new in pairs if isinstance(new, Fast)]


class _Recorded(torch.autograd.Function):
    """Passes of one call each; h and what blocks remember between them is kept, and each is run again backwards."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: Sequence[HybridBlock],
        states: list[State],
        how: _How,
        changes: Tensor,
        h: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        start, now, kept = h, list(states), []
        for n in range(how.passes):
            if n > 0:
                now = [_before_pass(old, new, how.carry) for old, new in zip(states, now, strict=True)]
            kept.append((h, now))
            entry = normalised(h) + start if how.reinject and n > 0 else h
            h, after, change = _run(entry, blocks, now, how._replace(passes=1))
            now = list(after)
            changes[n] = change[0]
        ctx.blocks, ctx.how = blocks, how
        # As saved tensors, and weights among them, so that torch sees it if they are written to before the backward.
        ctx.forms = [[None if s is None else type(s) for s in began] for _, began in [*kept, (h, states)]]
        began = [*kept, (start, states)]
        ctx.save_for_backward(*_parameters(blocks), *(t for x, before in began for t in (x, *_tensors_of(before))))
        return (h, *_tensors_of(now))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors[len(_parameters(ctx.blocks)) :])
        began = [(next(tensors), [None if f is None else f(next(tensors), next(tensors)) for f in forms])
                 for forms in ctx.forms]  # fmt: skip
        *kept, (_, states) = began
        with torch.autocast(grads[0].device.type, enabled=False):
            return (None, None, None, None, *_differentiate(ctx.blocks, states, ctx.how, kept, grads))


def _differentiate(
    blocks: Sequence[HybridBlock],
    states: list[State],
    how: _How,
    kept: list[tuple[Tensor, list[State]]],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of h, of all tensors in states, and of all parameters."""
    parameters = _parameters(blocks)
    wanted = [p for p in parameters if p.requires_grad]
    start = kept[0][0]
    dstart, dparameters = torch.zeros_like(start), [torch.zeros_like(p) for p in wanted]
    dstates = [None if s is None else [torch.zeros_like(t) for t in s] for s in states]
    dh, dafter = grads[0], list(grads[1:])
    for n in reversed(range(how.passes)):
        h, before = kept[n]
        leaves = [h, start, *(t for s in before if s is not None for t in s)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        with torch.enable_grad():
            entry = normalised(leaves[0]) + leaves[1] if how.reinject and n > 0 else leaves[0]
            out, after = _one_pass(entry, blocks, _filled(before, leaves[2:]))
        made = [out, *(t for s in after if s is not None for t in s)]
        found = torch.autograd.grad(made, [*leaves, *wanted], [dh, *dafter], allow_unused=True)
        dparameters = [a if b is None else a + b for a, b in zip(dparameters, found[len(leaves) :], strict=True)]
        dh = torch.zeros_like(h) if found[0] is None else found[0]
        dstart = dstart if found[1] is None else dstart + found[1]
        dafter = _pass_on(before, found[2 : len(leaves)], after, states, dstates, n, how.carry)
    by_parameter = iter(dparameters)
    return [
        dh + dstart,
        *(t for s in dstates if s is not None for t in s),
        *(next(by_parameter) if p.requires_grad else None for p in parameters),
    ]


def _parameters(blocks: Sequence[HybridBlock]) -> list[Tensor]:
    """Each once, though blocks may share some."""
    return list(dict.fromkeys(p for block in blocks for p in block.parameters()))


def _tensors_of(states: Sequence[State]) -> list[Tensor]:
    return [t for state in states if state is not None for t in state]


def _filled(states: Sequence[State], tensors: list[Tensor]) -> list[State]:
    """The same states with other tensors in them."""
    fresh = iter(tensors)
    return [None if s is None else type(s)(next(fresh), next(fresh)) for s in states]


def _pass_on(
    before: Sequence[State],
    found: Sequence[Tensor | None],
    after: Sequence[State],
    states: Sequence[State],
    dstates: list[list[Tensor] | None],
    n: int,
    carry: bool,
) -> list[Tensor]:
    """Gradients of what a pass began with: to what the pass before left, and to what there was before the window."""
    grads, earlier = iter(found), []
    for i, (began, made) in enumerate(zip(before, after, strict=True)):
        pair = [None, None] if began is None else [next(grads), next(grads)]
        fast = isinstance(made, Fast)
        # From the pass before: the fast weight, and with `carry` the convolution's inputs; the rest from the window's.
        theirs = [n > 0 and fast and carry, n > 0 and fast]
        own = dstates[i]
        assert made is not None
        for place in range(2):
            found_here = pair[place]
            if not theirs[place] and own is not None and found_here is not None:
                own[place] += found_here
            passed = found_here if theirs[place] else None
            earlier.append(torch.zeros_like(made[place]) if passed is None else passed)
    return earlier


def _paired(blocks: Sequence[HybridBlock], tensors: Sequence[Tensor]) -> list[Fast | Slow]:
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [Fast(*pair) if block.recurrent else Slow(*pair) for block, pair in zip(blocks, pairs, strict=True)]


def _check(
    h: Tensor, blocks: Sequence[HybridBlock], states: Sequence[State], passes: int, feedback: str, conv_state: str
) -> None:
    if h.ndim != 3 or not h.is_floating_point() or 0 in h.shape:
        raise ValueError(f"h: got {h.dtype} {list(h.shape)}; expected floats [B,L,d], none of them 0")
    if not blocks or len(states) != len(blocks):
        raise ValueError(f"states: got {len(states)} for {len(blocks)} blocks; expected one each, at least one")
    if passes < 1:
        raise ValueError(f"passes: got {passes}; expected at least 1")
    if feedback not in ("raw", "reinject"):
        raise ValueError(f"feedback: got {feedback!r}; expected 'raw' or 'reinject'")
    if conv_state not in ("rewind", "carry"):
        raise ValueError(f"conv_state: got {conv_state!r}; expected 'rewind' or 'carry'")
    for i, (block, state) in enumerate(zip(blocks, states, strict=True)):
        if state is not None and isinstance(state, Fast) != block.recurrent:
            raise ValueError(f"states: got {type(state).__name__} for block {i}; expected that of its mixer")


def _check_sizes(h: Tensor, blocks: Sequence[HybridBlock], states: Sequence[State]) -> None:
    """What native code takes on trust; modules would see it by themselves."""
    for i, (block, state) in enumerate(zip(blocks, states, strict=True)):
        width = block.mixer_norm.weight.shape[0]
        if h.shape[2] != width:
            raise ValueError(f"h: got a width of {h.shape[2]}; expected {width}, that of block {i}")
        if state is None:
            continue
        for name, t, size in zip(state._fields, state, _sizes_of(block, h.shape[0], state), strict=True):
            if t.shape != size or t.device != h.device or not t.is_floating_point():
                raise ValueError(
                    f"states: got {name} {t.dtype} {list(t.shape)} on {t.device} for block {i}; expected floats "
                    f"{list(size)} on {h.device}"
                )


def _sizes_of(block: HybridBlock, B: int, state: Fast | Slow) -> list[tuple[int, ...]]:
    """Shapes of what a block remembers of B sequences; keys and values may be of any number of tokens."""
    mixer: Any = block.mixer
    if isinstance(state, Slow):
        size = (B, mixer.heads, state.keys.shape[-2] if state.keys.ndim > 1 else 0, mixer.q_norm.weight.shape[0])
        return [size, size]
    channels, W = mixer.convolution.weight.shape
    return [(B, W - 1, channels), (B, mixer.value_heads, mixer.key_width, mixer.value_width)]
