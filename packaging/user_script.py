"""A user's script, which mypy --strict and pyright check against the installed wheel: every public name, and its type.

assert_type fails where a type is Any, so the file shows that no public result is untyped. It also runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import sleepkern
from sleepkern import Explanation, SleepResult, rules
from sleepkern.integrations import fla
from sleepkern.nn import (
    MLP,
    GatedDeltaNet,
    GatedRMSNorm,
    HybridBlock,
    ShortConvolution,
    SleepLM,
    WindowAttention,
    gated_rms_norm,
    short_convolution,
    short_convolution_step,
)
from sleepkern.sleep import (
    CausalLMAdapter,
    FusedModelAdapter,
    InsertedMixer,
    KVState,
    LayerCache,
    ModelAdapter,
    RecurrentState,
    SleepReport,
    SleepSession,
    Slept,
    explain_blocks,
    forget_packed,
    load_retrofitted,
    retrofit,
    sleep_blocks,
)

B, T, H, K, V = 1, 20, 2, 16, 16


def rule_calls() -> None:
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    g, channel_g, beta = -torch.rand(B, T, H), -torch.rand(B, T, H, K), torch.rand(B, T, H)
    output, state = sleepkern.gated_delta_rule(q, k, v, g, beta, output_final_state=True)
    assert_type(output, Tensor)
    assert_type(state, Tensor | None)
    assert state is not None
    assert_type(sleepkern.kda(q, k, v, channel_g, beta), tuple[Tensor, Tensor | None])
    assert_type(sleepkern.delta_rule(q, k, v, beta), tuple[Tensor, Tensor | None])
    assert_type(sleepkern.simple_gla(q, k, v, g), tuple[Tensor, Tensor | None])
    assert_type(sleepkern.ssd(q, k, v, g), tuple[Tensor, Tensor | None])
    assert_type(sleepkern.gla(q, k, v, channel_g), tuple[Tensor, Tensor | None])
    step = sleepkern.recurrent_step(q[:, :1], k[:, :1], v[:, :1], g[:, :1], beta[:, :1], state)
    assert_type(step, tuple[Tensor, Tensor])
    slept = sleepkern.sleep_ingest(k, v, g, beta, passes=2, rule="gated_delta_rule", use_qk_l2norm_in_kernel=True)
    assert_type(slept, SleepResult)
    assert_type(slept.final_state, Tensor)
    assert_type(slept.passes, int | Tensor)
    explanation = sleepkern.explain(rules.KDA, q, k, v, channel_g, beta)
    assert_type(explanation, Explanation)
    assert_type(explanation.chosen, str | None)
    assert_type(sleepkern.__version__, str)
    assert_type(fla.chunk_gated_delta_rule(q, k, v, g, beta), tuple[Tensor, Tensor | None])


def modules() -> None:
    x = torch.randn(B, T, 32)
    assert_type(MLP(32).forward(x), Tensor)
    output, recurrent = GatedDeltaNet(32, 2).forward(x)
    assert_type(output, Tensor)
    assert_type(recurrent, RecurrentState)
    attended, kept = WindowAttention(32, 2).forward(x)
    assert_type(attended, Tensor)
    assert_type(kept, KVState)
    assert_type(GatedRMSNorm(32).forward(x, x), Tensor)
    assert_type(ShortConvolution(32).forward(x), tuple[Tensor, Tensor])
    weight = torch.randn(32, 4)
    assert_type(short_convolution(x, weight), tuple[Tensor, Tensor])
    assert_type(short_convolution_step(x[:, 0], torch.zeros(B, 32, 4), weight), Tensor)
    assert_type(gated_rms_norm(x, x, torch.ones(32)), Tensor)
    block = HybridBlock(32, WindowAttention(32, 2))
    assert_type(block.recurrent, bool)


def sleeping() -> None:
    model = SleepLM(64, 32, 2, 2)
    blocks = model.blocks()
    assert_type(blocks, list[HybridBlock])
    h = torch.randn(B, T, 32)
    slept = sleep_blocks(h, blocks, passes=2)
    assert_type(slept, Slept)
    assert_type(slept.states, list[RecurrentState | KVState])
    assert_type(explain_blocks(h, blocks).chosen, str | None)
    forget_packed(blocks)
    session = SleepSession(model, window=8, passes=2)
    ids = torch.randint(0, 64, (1, 20))
    assert_type(session.ingest(ids), SleepSession)
    assert_type(session.fork(), SleepSession)
    assert_type(session.state_dict(), dict[str, Tensor])
    assert_type(session.read(ids[:, :2]), Tensor)
    assert_type(session.sleep(), SleepSession)
    assert_type(session.reports, list[SleepReport])


def models(
    model: nn.Module, causal: CausalLMAdapter, adapter: ModelAdapter, fused: FusedModelAdapter, cache: LayerCache
) -> None:
    """Calls that need a model of a library: checked, not run."""
    with sleepkern.patch(model):
        assert_type(sleepkern.patched(model), tuple[str, ...])
    sleepkern.unpatch()
    assert_type(retrofit(model, layers=[1]), nn.Module)
    assert_type(causal.memory(), LayerCache)
    assert_type(adapter.memory(), LayerCache)
    assert_type(fused.explain(4, range(2), None), str)
    assert_type(cache.fast(), dict[int, RecurrentState])
    assert_type(InsertedMixer(1, 32, 2).forward(torch.randn(B, T, 32)), tuple[Tensor, RecurrentState])
    load_retrofitted("folder")
    for row in sleepkern.verify(quick=True):
        assert_type(row.passed, bool)
    assert_type(sleepkern.bench(quick=True).passed, bool)


if __name__ == "__main__":
    rule_calls()
    modules()
    sleeping()
