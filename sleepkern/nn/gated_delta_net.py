"""Gated DeltaNet as a module (arXiv 2412.06464)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import recurrence as ops
from ..state import RecurrentState
from .gated_rms_norm import GatedRMSNorm
from .padding import Padding
from .short_convolution import ShortConvolution
from .sizes import residual, whole_numbers


class GatedDeltaNet(nn.Module):
    """Projections, short convolution, gated delta rule, gated norm, projection.

    Args:
        width: d of the residual stream.
        heads: H, the number of key heads.
        value_heads: HV, the number of value heads, a multiple of H, default H.
        key_width: K of a head, default width / heads, which then has to be whole.
        value_width: V of a head, default K.
        convolution: width of the short convolution of q, k and v, in tokens.
        decay_bias: added before the sigmoid of the decay: 4 keeps .982 of the state a token at the start, which has to
            last for window x passes tokens.
        negative: write strengths to 2 instead of 1, so that the transition may have negative eigenvalues.

    Raises:
        TypeError, ValueError: sizes that are not whole numbers from 1 on, or do not fit each other.
    """

    heads: int
    value_heads: int
    key_width: int
    value_width: int
    decay_bias: float
    strength: float
    split: tuple[int, int, int]
    qkv: nn.Linear
    gate: nn.Linear
    rates: nn.Linear
    convolution: ShortConvolution
    norm: GatedRMSNorm
    out: nn.Linear

    def __init__(
        self,
        width: int,
        heads: int,
        value_heads: int | None = None,
        key_width: int | None = None,
        value_width: int | None = None,
        convolution: int = 4,
        decay_bias: float = 4.0,
        negative: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(width, heads, value_heads, key_width, value_width, convolution)
        self.heads, self.value_heads = heads, value_heads or heads
        self.key_width = key_width or width // heads
        self.value_width = value_width or self.key_width
        if self.value_heads % heads:
            raise ValueError(f"value_heads: got {self.value_heads}; expected a multiple of heads = {heads}")
        self.decay_bias, self.strength = decay_bias, 2.0 if negative else 1.0
        keys, values = heads * self.key_width, self.value_heads * self.value_width
        self.split = (keys, keys, values)
        self.qkv = nn.Linear(width, 2 * keys + values, bias=False)
        self.gate = nn.Linear(width, values, bias=False)
        self.rates = nn.Linear(width, 2 * self.value_heads, bias=False)
        self.convolution = ShortConvolution(2 * keys + values, convolution)
        self.norm = GatedRMSNorm(self.value_width)
        self.out = nn.Linear(values, width, bias=False)

    def forward(
        self, x: Tensor, before: RecurrentState | None = None, mask: Tensor | None = None, replays: int = 1
    ) -> tuple[Tensor, RecurrentState]:
        """x [B,T,d] after `before`; mask [B,T] has 0 where there is padding.

        Each row is as if its padding were not there, wherever it stands: nothing is written for it, nothing of it is
        read, be it nan, and the convolution sees the tokens before and after it as neighbours. Its own outputs are 0.

        replays: passes of the recurrence over the same keys, values and gates; outputs are those of the last.

        Raises:
            TypeError, ValueError: another x, a mask that is no tensor [B,T] of real numbers, or replays below 1.
        """
        residual(x, self.qkv)
        if type(replays) is not int or replays < 1:
            raise ValueError(f"replays: got {replays!r}; expected a whole number from 1 on")
        padding = None if mask is None else Padding(mask, x)
        x = x if padding is None else padding.zeroed(x)
        conv, state = (None, None) if before is None else before
        qkv, conv = self._convolved(self.qkv(x), conv, padding)
        q, k, v = qkv.split(self.split, dim=-1)
        q, k = q.unflatten(-1, (-1, self.key_width)), k.unflatten(-1, (-1, self.key_width))
        v = v.unflatten(-1, (-1, self.value_width))
        decay, strength = self.rates(x).float().chunk(2, dim=-1)
        g, beta = F.logsigmoid(decay + self.decay_bias), strength
        raw = padding is None and self.strength in (1.0, 2.0)
        if not raw:  # padding has a beta of 0, which no raw beta gives
            beta = self.strength * torch.sigmoid(strength)
        if padding is not None:
            g, beta = padding.zeroed(g), padding.zeroed(beta)
        o, state = self._recur(q, k, v, g, beta, state, replays, raw)
        gate = self.gate(x).unflatten(-1, (-1, self.value_width))
        return self.out(self.norm(o, gate).flatten(-2)), RecurrentState(conv, state)

    def _convolved(self, qkv: Tensor, past: Tensor | None, padding: Padding | None) -> tuple[Tensor, Tensor]:
        """What the convolution makes of tokens after `past`, and the last of them that are no padding."""
        if padding is None:
            return self.convolution(qkv, past)  # type: ignore[no-any-return]
        W = self.convolution.weight.shape[1]
        past = qkv.new_zeros(len(qkv), W - 1, qkv.shape[2]) if past is None else past.to(qkv.dtype)
        # Padding first, then what came before the text, then the text: so neighbours stand beside each other.
        joined = padding.moved(torch.cat([past, qkv], dim=1), W - 1)
        mixed, last = self.convolution(joined)
        return padding.moved_back(mixed, W - 1), last

    def _recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor | None,
        replays: int,
        raw: bool,
    ) -> tuple[Tensor, Tensor]:
        doubled = raw and self.strength == 2.0
        if replays > 1:
            slept = ops.sleep_ingest(
                k, v, g, beta, passes=replays, q=q, initial_state=state, use_qk_l2norm_in_kernel=True,
                use_beta_sigmoid_in_kernel=raw, allow_neg_eigval=doubled,
            )  # fmt: skip
            assert slept.output is not None
            return slept.output, slept.final_state
        o, state = ops.gated_delta_rule(
            q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=raw, allow_neg_eigval=doubled,
        )  # fmt: skip
        assert state is not None
        return o, state


def _check_sizes(
    width: int, heads: int, value_heads: int | None, key_width: int | None, value_width: int | None, convolution: int
) -> None:
    given = {"width": width, "heads": heads, "convolution": convolution}
    chosen = {"value_heads": value_heads, "key_width": key_width, "value_width": value_width}
    whole_numbers(**given, **{name: n for name, n in chosen.items() if n is not None})
    if key_width is None and width % heads:
        raise ValueError(f"heads: got {heads}; expected a divisor of width = {width}, or key_width")
