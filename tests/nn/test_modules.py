"""Our own modules against loops written out, and SleepLM asleep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sleepkern.nn import GatedDeltaNet, GatedRMSNorm, HybridBlock, ShortConvolution, SleepLM, WindowAttention
from sleepkern.sleep import InsertedMixer, RecurrentState, SleepSession
from sleepkern.testing import relative_error
from sleepkern.testing.tolerances import BLOCK_GRADIENTS

CLOSE = 1e-5
L = 12


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def awake(**changes: Any) -> SleepLM:
    """A SleepLM whose head says something."""
    model = SleepLM(20, **{"width": 32, "blocks": 4, "window": 40, **changes})
    torch.nn.init.normal_(model.lm_head.weight)
    torch.nn.init.normal_(model.positions.weight)
    return model


def test_short_convolution() -> None:
    conv, x = ShortConvolution(6, width=4), normal(2, 9, 6)
    y, past = conv(x)
    for t in range(9):
        total = sum(conv.weight[:, 3 - j] * x[:, t - j] for j in range(4) if t >= j)
        assert relative_error(y[:, t], F.silu(total)) < CLOSE
    first, state = conv(x[:, :2])
    second, state = conv(x[:, 2:], state)
    assert relative_error(torch.cat([first, second], dim=1), y) < CLOSE and torch.equal(state, past)


def test_gated_norm() -> None:
    norm, x, gate = GatedRMSNorm(8), normal(3, 8), normal(3, 8, seed=1)
    expected = x / x.square().mean(-1, keepdim=True).sqrt() * gate * gate.sigmoid()
    assert relative_error(norm(x, gate), expected) < CLOSE


@pytest.mark.parametrize(
    "options", [{}, {"value_heads": 4, "value_width": 6, "negative": True, "key_width": 5}], ids=str
)
def test_mixer_is_a_token_loop(options: dict[str, Any]) -> None:
    mixer, x = GatedDeltaNet(16, heads=2, **options), normal(2, 11, 16)
    y, (_, state) = mixer(x)
    H, HV, K, V = mixer.heads, mixer.value_heads, mixer.key_width, mixer.value_width
    qkv, _ = mixer.convolution(mixer.qkv(x))
    q, k, v = qkv.double().split([H * K, H * K, HV * V], dim=-1)
    q, k = (F.normalize(t.view(2, 11, H, K), dim=-1).repeat_interleave(HV // H, dim=2) for t in (q, k))
    v = v.view(2, 11, HV, V)
    a, b = mixer.rates(x).double().chunk(2, dim=-1)
    S, outs = torch.zeros(2, HV, K, V, dtype=torch.float64), []
    for t in range(11):
        S = S * torch.sigmoid(a[:, t] + 4)[..., None, None]
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        strength = torch.sigmoid(b[:, t]) * (2 if options.get("negative") else 1)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], error * strength[..., None])
        outs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * K**-0.5)
    expected = mixer.norm(torch.stack(outs, dim=1).float(), mixer.gate(x).view(2, 11, HV, V))
    assert relative_error(y, mixer.out(expected.flatten(-2))) < CLOSE and relative_error(state, S) < CLOSE


@pytest.mark.parametrize("kind", ["mixer", "attention"])
def test_text_may_be_cut_anywhere(kind: str) -> None:
    module = GatedDeltaNet(16, heads=2) if kind == "mixer" else WindowAttention(16, heads=2)
    x, memory, parts = normal(2, 11, 16), None, []
    whole, _ = module(x)
    for part in x.split([1, 4, 6], dim=1):
        y, memory = module(part, memory)
        parts.append(y)
    assert relative_error(torch.cat(parts, dim=1), whole) < CLOSE
    assert relative_error(module(x[:, 5:])[0], whole[:, 5:]) > 0.01  # what came before matters


def test_attention_is_softmax() -> None:
    attention, x = WindowAttention(16, heads=2), normal(2, 7, 16)
    q, k, v = (t.view(2, 7, 2, 8).transpose(1, 2) for t in attention.qkv(x).chunk(3, dim=-1))
    scores = attention.q_norm(q) @ attention.k_norm(k).transpose(-1, -2) * 8**-0.5
    weights = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1)
    expected = attention.out((weights @ v).transpose(1, 2).flatten(-2))
    assert relative_error(attention(x)[0], expected) < CLOSE


@torch.no_grad()
def looped(model: SleepLM, ids: Tensor, passes: int, reinject: bool = False) -> list[Any]:
    """What the recurrent blocks remember after each window's passes, written out."""
    memory: list[Any] = [None] * len(model.layers)
    for window in ids.split(L, dim=1):
        h = start = model.embed(window)
        first = list(memory)
        for n in range(passes):
            if n > 0 and reinject:
                h = F.rms_norm(h, h.shape[-1:]) + start
            for i, block in enumerate(model.blocks()):
                before = memory[i] if block.recurrent else None
                if block.recurrent and n > 0:  # the convolution sees again what preceded the window
                    conv = torch.zeros_like(memory[i].conv) if first[i] is None else first[i].conv
                    before = memory[i]._replace(conv=conv)
                h, memory[i] = block(h, before)
    return [m.state for m, block in zip(memory, model.blocks(), strict=True) if block.recurrent]


@pytest.mark.parametrize("feedback", ["raw", "reinject"])
def test_sleep_is_a_loop(feedback: str) -> None:
    model, ids = awake(), torch.randint(0, 20, (3, 3 * L))
    expected = looped(model, ids, 3, feedback == "reinject")
    with torch.no_grad():
        session = SleepSession(model, L, passes=3, feedback=feedback).ingest(ids)
    found = [x.state for _, x in sorted(session.memory.fast().items())]
    assert len(found) == 2 and max(map(relative_error, found, expected)) < CLOSE
    assert min(map(relative_error, looped(model, ids, 1), expected)) > 0.01


@torch.no_grad()
def test_replay_repeats_the_recurrences_alone() -> None:
    """Against a loop over passes of each mixer's own tokens; blocks that are not looped do not repeat."""
    model, ids = awake(), torch.randint(0, 20, (3, 2 * L))
    memory: list[Any] = [None] * len(model.layers)
    for window in ids.split(L, dim=1):
        h = model.embed(window)
        for i, block in enumerate(model.blocks()):
            before = memory[i] if block.recurrent else None
            out, memory[i] = block(h, before)
            for _ in range(2 if i == 1 else 0):  # the same input, from the state that the pass before left
                conv = torch.zeros_like(memory[i].conv) if before is None else before.conv
                out, memory[i] = block(h, memory[i]._replace(conv=conv))
            h = out
    session = SleepSession(model, L, passes=3, feedback="replay", blocks=slice(0, 3)).ingest(ids)
    found = session.memory.fast()
    assert max(relative_error(found[i].state, memory[i].state) for i in (1, 3)) < CLOSE
    once = SleepSession(model, L).ingest(ids).memory.fast()
    assert min(relative_error(once[i].state, memory[i].state) for i in (1, 3)) > 0.01
    assert len(session.reports[0].changes) == 1


def test_a_sleep_ends_when_the_fast_weights_have_settled() -> None:
    model, ids = awake(), torch.randint(0, 20, (3, 2 * L))
    changes = SleepSession(model, L, passes=6, feedback="reinject").ingest(ids[:, :L]).reports[0].changes
    assert bool((changes[1:] < changes[:-1]).all())
    limit = float((changes[2] + changes[3]) / 2)
    options = {"feedback": "reinject", "differentiable": True}
    session = SleepSession(model, L, passes=6, tol=limit, **options).ingest(ids[:, :L])
    expected = SleepSession(model, L, passes=4, **options).ingest(ids[:, :L])
    assert len(session.reports[0].changes) == 4
    for mine, other in zip(session.memory.fast().values(), expected.memory.fast().values(), strict=True):
        assert torch.equal(mine.state, other.state)
    weight = model.layers[1].mixer.out.weight
    pair = [torch.autograd.grad(s.read(ids[:, :4]).square().sum(), weight)[0] for s in (session, expected)]
    assert torch.equal(*pair)
    never = SleepSession(model, L, passes=3, tol=0.0).ingest(ids[:, :L])
    assert len(never.reports[0].changes) == 3


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_a_session_answers_goes_to_disk_and_forks(eviction: str) -> None:
    model, ids, question = awake(), torch.randint(0, 20, (2, 2 * L + 5)), torch.randint(0, 20, (2, 3))
    session = SleepSession(model, L, passes=2, eviction=eviction).ingest(ids)
    manual = question
    for _ in range(6):
        manual = torch.cat([manual, session.read(manual)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(session.generate(question, max_new_tokens=6), manual)
    other = SleepSession(model, L, passes=2, eviction=eviction)
    other.load_state_dict(session.state_dict())
    assert torch.equal(other.read(question), session.read(question))
    session.fork().sleep()
    assert torch.equal(other.read(question), session.read(question))
    with pytest.raises(ValueError, match="options: got num_beams; expected max_new_tokens"):
        session.generate(question, num_beams=2)
    with pytest.raises(ValueError, match="ids: got 65 tokens of a window; expected at most 40"):
        session.read(torch.zeros(2, 60, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_padding_writes_nothing(eviction: str) -> None:
    """A row behind a window of padding ends as alone; so does one padded within its first window."""
    model, question = awake(), torch.randint(0, 20, (1, 3))
    text = torch.randint(0, 20, (1, 2 * L))
    alone = SleepSession(model, L, passes=2, eviction=eviction).ingest(text)
    batch = torch.cat([torch.cat([torch.zeros(1, L, dtype=torch.long), text], dim=1), torch.randint(0, 20, (1, 3 * L))])
    mask = torch.ones_like(batch)
    mask[0, :L] = 0
    session = SleepSession(model, L, passes=2, eviction=eviction).ingest(batch, attention_mask=mask)
    assert relative_error(session.read(question.expand(2, -1))[0], alone.read(question)[0]) < CLOSE
    h, padding = model.embed(text[:, :L]), torch.ones(1, L, dtype=torch.long)
    padding[:, :5] = 0
    block = HybridBlock(32, WindowAttention(32, 2))
    assert relative_error(block(h, None, padding)[0][:, 5:], block(h[:, 5:])[0]) < CLOSE


PADDED = {  # 1 for a token of the text, 0 for padding; as many tokens as there are, and fewer than a convolution sees
    "right": [1] * 7 + [0] * 4,
    "left": [0] * 4 + [1] * 7,
    "both": [0, 0] + [1] * 5 + [0] * 4,
    "inside": [0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0],
    "two tokens": [0] * 3 + [1, 0, 0, 1] + [0] * 4,
    "all": [0] * 11,
}


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("padded", list(PADDED))
@pytest.mark.parametrize("kind", [GatedDeltaNet, InsertedMixer, HybridBlock])
def test_a_row_is_as_if_its_padding_were_not_there(kind: Any, padded: str, continued: bool) -> None:
    """Outputs, memory, what follows it, and gradients, with nan as padding."""
    norm = {"index": 0, "width": 16, "heads": 2} if kind is InsertedMixer else {"width": 16}
    module = kind(**norm, **({"heads": 2} if kind is GatedDeltaNet else {}),
                  **({"mixer": GatedDeltaNet(16, 2)} if kind is HybridBlock else {}))  # fmt: skip
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    mask, x, after = torch.tensor([PADDED[padded], [1] * 11]), normal(2, 11, 16), normal(2, 3, 16, seed=1)
    before = module(normal(2, 5, 16, seed=2))[1] if continued else None
    before = before and RecurrentState(*(t.detach() for t in before))
    x[mask == 0] = torch.nan

    def run(
        x: Tensor, before: RecurrentState | None, after: Tensor, mask: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        out, memory = module(x, before, mask)
        out = out if mask is None else out[mask != 0]
        made = [out.flatten(0, -2), *memory, module(after, memory)[0]]
        return made, list(torch.autograd.grad(sum(t.square().sum() for t in made), list(module.parameters())))

    found, gradients = run(x, before, after, mask)
    alone = [
        run(
            x[i : i + 1, mask[i] != 0],
            before and RecurrentState(*(t[i : i + 1] for t in before)),
            after[i : i + 1],
            None,
        )
        for i in range(2)
    ]
    for got, *rows in zip(found, *(made for made, _ in alone), strict=True):
        expected = torch.cat(rows)
        assert got.shape == expected.shape and relative_error(got, expected.double()) < CLOSE
    for a, *b in zip(gradients, *(grads for _, grads in alone), strict=True):
        assert relative_error(a, sum(b).double()) < BLOCK_GRADIENTS  # type: ignore[union-attr]


def test_attention_does_not_see_padding() -> None:
    attention, x, mask = HybridBlock(16, WindowAttention(16, 2)), normal(2, 6, 16), torch.ones(2, 6)
    mask[0, :2], mask[1, 4:] = 0, 0
    x[mask == 0] = torch.nan
    out, kept = attention(x, None, mask)
    assert relative_error(out[0, 2:], attention(x[:1, 2:])[0][0].double()) < CLOSE
    assert relative_error(out[1, :4], attention(x[1:, :4])[0][0].double()) < CLOSE
    assert kept.keys.isfinite().all()
    weights = list(attention.parameters())
    assert all(g.isfinite().all() for g in torch.autograd.grad(out[mask != 0].sum(), weights))


@pytest.mark.parametrize("kind", ["mixer", "attention", "block", "inserted"])
def test_masks_that_are_none(kind: str) -> None:
    module: Any = {
        "mixer": GatedDeltaNet(16, 2), "attention": WindowAttention(16, 2),
        "block": HybridBlock(16, GatedDeltaNet(16, 2)), "inserted": InsertedMixer(0, 16, 2),
    }[kind]  # fmt: skip
    x, (_, memory) = normal(2, 5, 16), module(normal(2, 3, 16))
    kept = 3 if kind == "attention" else 0
    for mask, error, message in (
        (torch.ones(2, 4 + kept), ValueError, rf"mask: got \[2, {4 + kept}\]; expected \[2, {5 + kept}\]"),
        (torch.ones(5 + kept), ValueError, "mask: got"),
        (torch.ones(2, 5 + kept, dtype=torch.complex64), TypeError, "mask: got torch.complex64"),
        ([[1] * 5] * 2, TypeError, "mask: got list; expected a tensor"),
    ):
        with pytest.raises(error, match=message):
            module(x, memory, mask)
    assert torch.equal(module(x, memory, torch.ones(2, 5 + kept).bool())[0].isfinite().all(), torch.tensor(True))


def test_gradients_with_and_without_checkpoints() -> None:
    model, ids = awake(), torch.randint(0, 20, (2, 2 * L))

    def gradients(dtype: torch.dtype, checkpoint: bool, eviction: str) -> list[Tensor]:
        same = awake().to(dtype)
        same.load_state_dict(model.state_dict())
        options = {"checkpoint": checkpoint, "differentiable": not checkpoint, "eviction": eviction}
        session = SleepSession(same, L, passes=3, **options).ingest(ids)
        loss = F.cross_entropy(session.read(ids[:, :5]).flatten(0, 1), ids[:, 1:6].flatten())
        return list(torch.autograd.grad(loss, list(same.parameters())))

    for eviction in ("hard", "sliding"):
        exact = gradients(torch.float64, False, eviction)
        for checkpoint in (False, True):
            found = gradients(torch.float32, checkpoint, eviction)
            assert max(map(relative_error, found, exact)) < BLOCK_GRADIENTS


def test_starts_near_the_identity_and_learns() -> None:
    model = SleepLM(20, width=32, blocks=4, window=40)
    assert not model.lm_head.weight.any()
    out, up = model.layers[0].mlp.out.weight, model.layers[0].mlp.up.weight
    ratio = float((out.std() * out.shape[1] ** 0.5 / (up.std() * up.shape[1] ** 0.5)).detach())
    assert ratio == pytest.approx(8**-0.5, rel=0.1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, losses = torch.randint(0, 20, (16, L)), []
    for _ in range(30):  # say again what was slept over
        session = SleepSession(model, L, passes=2, feedback="reinject", differentiable=True).ingest(ids)
        loss = F.cross_entropy(session.read(ids[:, :6]).flatten(0, 1), ids[:, 1:7].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(float(torch.tensor(20.0).log()), rel=1e-3) and losses[-1] < 0.7 * losses[0]


def test_model_of_no_tokens_and_on_meta() -> None:
    model, ids = awake(), torch.randint(0, 20, (2, L))
    logits = model(ids[:, :0])
    assert logits.shape == (2, 0, 20)
    logits.sum().backward()
    with torch.no_grad():
        assert model(ids[:, :0]).shape == (2, 0, 20)
        assert model.to("meta")(ids.to("meta")).shape == (2, L, 20)
    assert model(ids.to("meta")).requires_grad


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SleepLM(20, pattern="AX"), "pattern: got 'AX'; expected letters A and G"),
        (lambda: SleepLM(20, pattern="A"), "pattern: got 'A'; expected .* a G among the first 2"),
        (lambda: GatedDeltaNet(16, 2, value_heads=3), "value_heads: got 3; expected a multiple of heads = 2"),
        (lambda: SleepSession(awake(), L, tol=-1.0), "tol: got -1.0 with feedback 'raw'; expected >= 0"),
        (lambda: SleepSession(awake(), L, tol=0.1, feedback="replay"), "tol: got 0.1 with feedback 'replay'"),
        (lambda: WindowAttention(15, 2), "width: got 15; expected a multiple of heads = 2"),
        (lambda: WindowAttention(16, 0), "heads: got 0; expected at least 1"),
        (lambda: GatedDeltaNet(64, 7), "heads: got 7; expected a divisor of width = 64, or key_width"),
        (lambda: GatedDeltaNet(64, 2.0), "heads: got 2.0; expected a whole number"),  # type: ignore[arg-type]
        (lambda: GatedDeltaNet(64, 2, key_width=0), "key_width: got 0; expected at least 1"),
        (lambda: GatedDeltaNet(64, 2, convolution=0), "convolution: got 0; expected at least 1"),
        (lambda: GatedDeltaNet(16, 2)(normal(1, 3, 16), replays=0), "replays: got 0; expected a whole number from 1"),
        (lambda: GatedDeltaNet(16, 2)(normal(1, 3, 16), replays=True), "replays: got True"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        build()
