"""A user's script, which mypy --strict and pyright check against the installed wheel: every public name, and its type.

assert_type fails where a type is Any, so the file shows that no public result is untyped. It also runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import sleepkern
from sleepkern import Explanation, SleepResult, measure, rules, testing
from sleepkern.experiments import tasks, training
from sleepkern.integrations import fla, serving, transformers
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
    PrefixCache,
    PrefixHit,
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
    for along in (
        sleepkern.gated_delta_rule(q, k, v, g, beta, state_every=16),
        sleepkern.kda(q, k, v, channel_g, beta, state_every=16, output_final_state=True),
        sleepkern.delta_rule(q, k, v, beta, state_every=16),
        sleepkern.simple_gla(q, k, v, g, state_every=16),
        sleepkern.gla(q, k, v, channel_g, state_every=16),
    ):
        assert_type(along, tuple[Tensor, Tensor | None, Tensor])
    assert_type(sleepkern.state_offsets(torch.tensor([0, 4, T]), 16), Tensor)
    slots = torch.tensor([[0]])
    assert_type(sleepkern.commit(torch.zeros(2, H, K, V), slots, torch.tensor([1]), torch.tensor([1])), Tensor)
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


def serving_calls() -> None:
    """Prefill, decode and a draft on a pool of states, in the words of serving engines."""
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    g, channel_g, beta = -torch.rand(B, T, H), -torch.rand(B, T, H, K), torch.rand(B, T, H)
    pool, rows, offsets = torch.zeros(4, H, K, V), torch.tensor([1]), torch.tensor([0, T])
    call: dict[str, Tensor] = {"ssm_states": pool, "cache_indices": rows, "query_start_loc": offsets}
    kernel = serving.LinearAttnKernel("gated_delta_rule")
    rates = (torch.zeros(H), torch.zeros(H))
    extended = kernel.extend(q, k, v, g, beta, ssm_states=pool, cache_indices=rows, query_start_loc=offsets)
    assert_type(extended, tuple[Tensor, None, None])
    assert_type(kernel.decode(q, k, v, g[0], beta[0], A_log=rates[0], dt_bias=rates[1], **call), Tensor)
    few = (q[:, :2], k[:, :2], v[:, :2], g[0, :2], beta[0, :2])
    call["query_start_loc"] = torch.tensor([0, 2])
    buffer = torch.zeros(1, 2, H, K, V)
    slots = torch.tensor([0])
    verified = kernel.target_verify(
        *rates, *few, **call, intermediate_states_buffer=buffer, intermediate_state_indices=slots, cache_steps=2
    )
    assert_type(verified, Tensor)
    assert_type(serving.chunk_gated_delta_rule(q, k, v, g, beta), tuple[Tensor, Tensor | None])
    assert_type(serving.chunk_kda(q, k, v, channel_g, beta), tuple[Tensor, Tensor | None])
    step = serving.fused_recurrent_gated_delta_rule(q, k, v, g, beta, initial_state=pool, ssm_state_indices=rows)
    assert_type(step, tuple[Tensor, Tensor])
    step = serving.fused_recurrent_kda(q, k, v, channel_g, beta, initial_state=pool, ssm_state_indices=rows)
    assert_type(step, tuple[Tensor, Tensor])


def fla_calls() -> None:
    """flash-linear-attention's functions: the rules by head, by channel and without a gate, and the gates."""
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    g, channel_g, beta = -torch.rand(B, T, H), -torch.rand(B, T, H, K), torch.rand(B, T, H)
    for gated in (fla.chunk_gated_delta_rule, fla.chunk_gdn):
        assert_type(gated(q, k, v, g, beta), fla.Result)
    for stepwise in (fla.fused_recurrent_gated_delta_rule, fla.fused_recurrent_gdn):
        assert_type(stepwise(q, k, v, g, beta=beta), fla.Result)
    for channelled in (fla.chunk_kda, fla.fused_recurrent_kda):
        assert_type(channelled(q, k, v, channel_g, beta), fla.Result)
    for plain in (
        fla.chunk_delta_rule,
        fla.fused_chunk_delta_rule,
        fla.fused_recurrent_delta_rule,
        fla.parallel_delta_rule,
    ):
        assert_type(plain(q, k, v, beta), fla.Result)
    for decayed in (fla.chunk_simple_gla, fla.fused_chunk_simple_gla, fla.fused_recurrent_simple_gla):
        assert_type(decayed(q, k, v, g), fla.Result)
    assert_type(fla.parallel_simple_gla(q, k, v, g), fla.Result)
    for gated_by_channel in (fla.chunk_gla, fla.fused_chunk_gla, fla.fused_recurrent_gla):
        assert_type(gated_by_channel(q, k, v, channel_g), fla.Result)
    for fixed in (fla.chunk_retention, fla.fused_chunk_retention, fla.fused_recurrent_retention):
        assert_type(fixed(q, k, v), fla.Result)
    assert_type(fla.parallel_retention(q, k, v), fla.Result)
    for layered in (fla.chunk_lightning_attn, fla.fused_recurrent_lightning_attn):
        assert_type(layered(q, k, v, layer_idx=0, num_layers=2), fla.Result)
    for ungated in (fla.chunk_linear_attn, fla.fused_chunk_linear_attn, fla.fused_recurrent_linear_attn):
        assert_type(ungated(q, k, v)[0], Tensor)
    rates = torch.zeros(H)
    assert_type(fla.fused_gdn_gate(g, rates), Tensor)
    assert_type(fla.fused_kda_gate(channel_g, rates), Tensor)
    assert_type(fla.replacement_of(torch.relu) is None, bool)
    assert_type(sorted(fla.FUNCTIONS), list[str])


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
    assert_type(transformers.FAMILIES[0], str)
    tree = transformers.TokenTree([[1, 2], [3], [4]], parents=[-1, 0, 0])
    assert_type(tree.path(2), Tensor)
    assert_type(tree.attention_mask(), Tensor)
    assert_type(transformers.TokenTree.from_texts([[1, 2], [1, 3]]).ends, tuple[int, ...])
    memory = transformers.RollbackCache(model, keep=32)
    assert_type(memory.copy(), transformers.RollbackCache)
    memory.crop(-1)
    prefixes = PrefixCache(model, max_bytes=2**30, every=64)
    hit = prefixes.lookup([1, 2, 3])
    assert_type(hit, PrefixHit)
    assert_type(prefixes.insert([1, 2, 3], hit.cache), int)
    fla.register()


def numerics() -> None:
    """Inputs and errors, as the tests of the package make and measure them."""
    shape: testing.Shape = testing.AWKWARD_SHAPES["packed"]
    decay: testing.Decay = "slow"
    inputs: dict[str, object] = testing.make_inputs(rules.KDA, shape, decay=decay)
    assert_type(testing.call(rules.KDA, inputs), tuple[Tensor, Tensor | None])
    exact: dict[str, object] = testing.to_float64(inputs)
    output, expected = testing.call(rules.KDA, inputs)[0], testing.call(rules.KDA, exact, backend="reference")[0]
    assert_type(testing.relative_error(output, expected), float)
    assert testing.relative_error(output, expected) < testing.TOLERANCE[output.dtype]
    assert_type(testing.rules_of("cpu"), dict[str, rules.Rule])
    assert_type(testing.type_name(torch.float32), str)
    assert_type(measure.environment(), dict[str, Any])


def measuring() -> None:
    """Minutes of work: checked, not run."""
    for row in measure.verify(quick=True):
        assert_type(row.passed, bool)
    assert_type(measure.bench(quick=True), measure.Report)
    assert_type(measure.bench_cases(()).passed, bool)
    builds: measure.AgainstReport = measure.bench_against((), Path("../before"))
    assert_type(builds.passed, bool)
    measured: measure.ModelReport = measure.bench_model("mamba2", lengths=[64], quick=True)
    for length in measured.rows:
        assert_type(length, measure.LengthRow)
        assert_type(length.prefill, measure.Phase | None)
        assert_type(length.sleep, tuple[measure.SleepCost, ...])


def experimenting() -> None:
    """A task, and a training of two steps."""
    task: tasks.Task = tasks.Depo(nodes=4, hops=(1,), queries=2)
    others: list[tasks.Task] = [tasks.NamedDepo(), tasks.Rule110(), tasks.Arithmetic()]
    assert_type(others[0].levels, tuple[int, ...])
    batch = task.batch(2, 0, 0, tasks.SPLITS[0])
    assert_type(batch, tasks.Batch)
    assert_type((batch.targets == tasks.IGNORED).any(), Tensor)
    small = training.Configuration(task, width=32, heads=2, blocks=2, batch=2, steps=2, problems=2)
    assert_type(training.configuration("depo", "mini"), training.Configuration)
    assert_type(training.CONFIGURATIONS, dict[str, dict[str, training.Configuration]])
    placement = training.current_placement()
    assert_type(placement, training.Placement)
    trained = training.Training(training.Run(small), placement)
    trained.train()
    assert_type(trained.sleep_module, training.SleepModule)
    logits = trained.sleep_module.forward(batch.context, batch.question)
    assert_type(training.loss_of(logits, batch), Tensor)
    assert_type(training.correct_answers(logits, batch), Tensor)


if __name__ == "__main__":
    rule_calls()
    fla_calls()
    serving_calls()
    modules()
    sleeping()
    numerics()
    experimenting()
