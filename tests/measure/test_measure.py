"""Measurement: work counted right, times taken in turns, and nothing wrong passes as right."""

import importlib
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

import sleepkern
from sleepkern import dispatch, rules, settings
from sleepkern.backends import chunked
from sleepkern.backends.cpu import recurrence as cpu
from sleepkern.measure import bench, bench_cases, flops, gpu_cases, peers, timing, verify
from sleepkern.measure import cases as cases_module
from sleepkern.measure import peaks as ceilings
from sleepkern.measure.cases import Case, run
from sleepkern.measure.environment import native_module
from sleepkern.measure.suites import QUICK, SUITES, select
from sleepkern.rules import RULES
from sleepkern.testing import Shape, relative_error

bench_module = importlib.import_module("sleepkern.measure.bench")
verify_module = importlib.import_module("sleepkern.testing.verify")

TINY = Case("forward", rules.GATED_DELTA_RULE, Shape(T=33, H=1, HV=1, K=16, V=16))


def brute_force(rule, shape, passes, outputs):
    """Multiply-adds of the chunk form, one by one over the pairs of tokens, times two."""
    macs = 0
    dots = shape.HV if rule.gate == "channel" else shape.H
    for length in shape.lengths or [shape.T] * shape.B:
        for first in range(0, length, flops.CHUNK):
            c = min(flops.CHUNK, length - first)
            for i in range(c):
                below = sum(1 for j in range(c) if j < i)
                upto = sum(1 for j in range(c) if j <= i)
                if rule.delta:
                    macs += dots * shape.K * below  # M
                    macs += shape.HV * (shape.K + shape.V) * below  # solve
                    macs += shape.HV * passes * shape.K * shape.V  # W S
                macs += shape.HV * (passes if rule.delta else 1) * shape.K * shape.V  # Kt^T Vn
                if outputs:
                    macs += dots * shape.K * upto  # P
                    macs += shape.HV * (shape.V * upto + shape.K * shape.V)  # P Vn, Qe S
    return 2 * macs


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("passes", "outputs"), [(1, True), (1, False), (4, False)])
@pytest.mark.parametrize(
    "shape",
    [Shape(B=2, T=70, H=2, HV=4, K=3, V=5), Shape(H=1, HV=1, K=4, V=2, lengths=(1, 64, 0, 9))],
    ids=["batch", "packed"],
)
def test_flops_equal_a_brute_force_count(rule, shape, passes, outputs):
    expected = brute_force(rule, shape, passes, outputs)
    assert flops.forward_flops(rule, shape, passes, outputs) == expected


def test_flops_of_the_usual_head_and_of_training():
    shape = Shape(T=64, H=1, HV=1, K=128, V=128)
    count = flops.forward_flops(rules.GATED_DELTA_RULE, shape)
    assert count / 64 == pytest.approx(119e3, rel=0.01)
    assert flops.train_flops(rules.GATED_DELTA_RULE, shape) == 3 * count


def test_bytes_count_each_tensor_once():
    shape = Shape(B=2, T=10, H=2, HV=4, K=8, V=6)
    tokens = 2 * 10 * (2 * 2 * 8 + 2 * 4 * 6 + 4)  # q, k; v, o; beta
    fixed = 4 * 2 * 10 * 4 + 2 * 4 * 2 * 4 * 8 * 6  # g; state in and out
    assert flops.forward_bytes(rules.GATED_DELTA_RULE, shape, torch.bfloat16) == 2 * tokens + fixed


def test_candidates_take_turns_and_inputs_rotate():
    log = []
    candidates = {name: timing.Candidate([lambda n=name, i=i: log.append((n, i)) for i in range(2)]) for name in "ab"}
    times = timing.time_in_turns(candidates, seconds=0.1, turns=(3, 3))
    assert [len(times[name].samples) for name in "ab"] == [3, 3]
    names = [name for name, _ in log]
    turns = "".join(name for i, name in enumerate(names) if i == 0 or name != names[i - 1])
    assert turns == "ab" * 4  # the warm-up, then three turns
    assert {i for _, i in log} == {0, 1}


def test_slow_candidates_take_few_turns():
    took = {"quick": 0.001, "slow": 0.05, "slowest": 0.15}
    candidates = {name: timing.Candidate([lambda s=s: time.sleep(s)]) for name, s in took.items()}
    times = timing.time_in_turns(candidates, seconds=0.1, turns=(3, 5))
    assert [len(times[name].samples) for name in took] == [3, 3, 1]


def test_ratio_is_the_median_of_the_turns():
    ours, theirs = timing.Timing((1.0, 2.0, 4.0)), timing.Timing((3.0, 6.0, 4.0))
    assert timing.ratio(ours, theirs) == 3.0
    assert (ours.median, ours.minimum) == (2.0, 1.0)


def test_a_sample_of_a_gpu_is_taken_on_that_gpu(monkeypatch):
    """Events measure the current device, which another GPU's calls do not touch."""
    current, seen = ["cuda:0"], []

    @contextmanager
    def entered(device):
        current.append(device)
        yield
        current.pop()

    event = SimpleNamespace(record=lambda: seen.append(current[-1]), elapsed_time=lambda last: 8.0)
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = timing.time_in_turns({"a": timing.Candidate([lambda: None])}, "cuda:1", turns=(1, 1))
    assert set(seen) == {"cuda:1"} and times["a"].median == 0.008 and current == ["cuda:0"]


def test_threads_are_restored_after_a_failure():
    before = torch.get_num_threads()
    inside = []

    def fail():
        with timing.threads(before + 1):
            inside.append(torch.get_num_threads())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert inside == [before + 1]
    assert torch.get_num_threads() == before


def faulty(forward, spoil):
    """`forward` with one value of its outputs spoiled."""

    def wrapped(problem, x):
        out = forward(problem, x)
        if out.o is not None and out.o.numel():
            flat = out.o.view(-1)
            spoil(flat, flat.abs().argmax())
        return out

    return wrapped


def one_percent(flat, i):
    flat[i] *= 1.01


def not_a_number(flat, i):
    flat[i] = float("nan")


def test_verify_is_green_and_covers_what_it_says():
    rows = verify(
        backends=["chunked"],
        rules=["gated_delta_rule"],
        dtypes=[torch.float32],
        shapes=["T=15", "T=65"],
        quick=True,
    )
    assert all(row.passed and row.errors for row in rows)
    assert {row.op for row in rows} == {"rule", "step", "sleep"}
    assert set(rows[0].errors) == {"o", "state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state"}
    assert "strong decay" in {row.variant for row in rows}


@pytest.mark.parametrize("spoil", [one_percent, not_a_number])
@pytest.mark.parametrize("backend", [cpu, chunked], ids=lambda module: module.NAME)
@pytest.mark.parametrize("rule", RULES)
def test_verify_goes_red_for_one_wrong_value(monkeypatch, rule, backend, spoil):
    if backend is cpu and native_module() is None:
        pytest.skip("sleepkern._C is not built")
    monkeypatch.setattr(backend, "forward", faulty(backend.forward, spoil))
    rows = verify(backends=[backend.NAME], rules=[rule], dtypes=[torch.float32], shapes=["T=17"])
    red = [row for row in rows if not row.passed]
    assert red
    assert all(not row.errors["o"] <= row.tolerance for row in red)


def test_verify_says_why_a_backend_refused(monkeypatch):
    monkeypatch.setattr(chunked, "why_not", lambda problem: "on strike")
    rows = verify(backends=["chunked"], rules=["gla"], dtypes=[torch.float32], shapes=["T=15"])
    assert {row.refused for row in rows} == {"on strike"}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [({"backends": ["x"]}, "backend"), ({"rules": ["x"]}, "rules"), ({"shapes": ["x"]}, "shapes")],
)
def test_verify_names_what_is_unknown(argument, expected):
    with pytest.raises(ValueError, match=f"{expected}: got 'x'; expected one of"):
        verify(**argument)


def test_bench_of_a_tiny_case_times_ours_and_the_peers():
    report = bench_cases([TINY, Case("train", rules.GLA, TINY.shape)], quick=True)
    assert report.passed
    assert report.environment["threads"] == 1
    forward, train = report.rows
    assert forward.milliseconds > 0
    assert forward.gflops > 0
    assert forward.error < forward.tolerance
    loop = next(peer for peer in forward.peers if peer.name == "token loop")
    assert loop.ratio > 0
    assert loop.error < 1e-5
    assert loop.note is None
    fla = next(peer for peer in train.peers if peer.name == "fla")
    assert fla.ratio is None
    assert fla.note == "runs on a GPU only"
    assert report.to_dict()["rows"][0]["passed"] is True


def test_cases_measured_apart_are_measured_in_fresh_processes(monkeypatch):
    monkeypatch.setattr(settings, "BACKEND", "chunked")  # these two of this process alone
    monkeypatch.setattr(chunked, "forward", faulty(chunked.forward, one_percent))
    apart, here = (bench_cases([TINY], quick=True, threads=2, apart=apart) for apart in (True, False))
    assert apart.passed and not here.passed
    assert apart.rows[0].milliseconds > 0 and apart.rows[0].threads == 2


def test_bench_reports_no_time_and_no_ratio_on_a_red_check(monkeypatch):
    monkeypatch.setattr(settings, "BACKEND", "chunked")
    monkeypatch.setattr(chunked, "forward", faulty(chunked.forward, one_percent))
    report = bench_cases([TINY], quick=True)
    (row,) = report.rows
    assert not report.passed
    assert not row.passed
    assert (row.milliseconds, row.gflops, row.share_of_peak, row.peers) == (None, None, None, ())


def test_bench_checks_what_it_times(monkeypatch):
    """Right on the first tokens, wrong in the rest."""
    right = cases_module.call

    def spoiled(rule, inputs, **options):
        o, S = right(rule, inputs, **options)
        if options.get("backend") is None and o.shape[1] > bench_module.CHECKED_TOKENS:
            o[:, -1] *= 2
        return o, S

    monkeypatch.setattr(cases_module, "call", spoiled)
    (row,) = bench_cases([Case("forward", TINY.rule, Shape(T=400, H=1, HV=1, K=8, V=8))], quick=True).rows
    assert not row.passed and row.milliseconds is None


def test_a_wrong_peer_is_named_wrong_and_not_compared_with(monkeypatch):
    def doubled(case, inputs, threads):
        return lambda: tuple(2 * x for x in run(case, inputs))

    peer = peers.Peer("doubled", lambda case, device: None, doubled)
    monkeypatch.setattr(bench_module, "peers_of", lambda case, device: (peer,))
    (row,) = bench_cases([TINY], quick=True).rows
    (result,) = row.peers
    assert result.ratio is None
    assert result.milliseconds > 0
    assert result.error == pytest.approx(1)
    assert result.note.startswith("wrong")


def test_suites_are_known_and_named_once():
    assert set(QUICK) == set(SUITES)
    for quick in (False, True):
        names = [case.name for case in select("all", quick)]
        assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="suite: got 'x'; expected all or one of forward"):
        bench("x")
    with pytest.raises(ValueError, match="threads: got 0"):
        bench(threads=0)


PEER_CASES = [
    Case("forward", rules.GATED_DELTA_RULE, Shape(B=2, T=70, H=2, HV=4, K=32, V=32)),
    Case("forward", rules.KDA, Shape(T=70, H=2, HV=2, K=32, V=32)),
    Case("forward", rules.DELTA_RULE, Shape(T=70, H=2, HV=2, K=32, V=32)),
    Case("forward", rules.SIMPLE_GLA, Shape(T=70, H=2, HV=2, K=32, V=48)),
    Case("decode", rules.GATED_DELTA_RULE, Shape(B=2, T=1, H=2, HV=4, K=32, V=32)),
    Case("decode", rules.KDA, Shape(T=1, H=2, HV=2, K=32, V=32)),
    Case("ingest", rules.GATED_DELTA_RULE, Shape(B=2, T=20, H=2, HV=4, K=32, V=32), passes=3),
    Case("train", rules.GATED_DELTA_RULE, Shape(T=70, H=2, HV=2, K=32, V=32)),
]


@pytest.mark.parametrize(("name", "package"), [("ggml", "ggml"), ("transformers", "transformers")])
@pytest.mark.parametrize("case", PEER_CASES, ids=lambda case: case.name)
def test_peers_agree_with_the_reference(name, package, case):
    pytest.importorskip(package)
    peer = next(p for p in peers.PEERS if p.name == name)
    reason = peer.why_not(case, "cpu")
    if reason is not None:
        assert name == "ggml"
        assert case.op == "train" or not case.rule.delta
        return
    actual = peer.prepare(case, case.inputs(), 1)()
    expected = run(case, case.inputs(), backend="reference")
    for a, e in zip(actual, expected, strict=True):
        assert e is None or relative_error(a, e) < 1e-5


def test_a_patched_function_is_not_taken_for_transformers(monkeypatch):
    pytest.importorskip("transformers")
    family = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    monkeypatch.setattr(family, "torch_chunk_gated_delta_rule", lambda *args, **options: None)
    peer = next(p for p in peers.PEERS if p.name == "transformers")
    with pytest.raises(RuntimeError, match="is patched"):
        peer.prepare(TINY, TINY.inputs(), 1)


def test_inputs_are_rotated_and_repeatable():
    sets = TINY.rotation()
    assert len(sets) == cases_module.MOST_SETS and len(replace(TINY, cached=True).rotation()) == 1
    few = Case("forward", TINY.rule, Shape(T=1000, H=4, HV=4, K=128, V=128)).rotation()
    size = sum(x.numel() * x.element_size() for x in few[0].values() if x is not None)
    assert cases_module.CACHE_BYTES <= size * len(few) < cases_module.CACHE_BYTES + size
    assert not torch.equal(sets[0]["k"], sets[1]["k"])
    train = Case("train", TINY.rule, TINY.shape)
    assert torch.equal(train.inputs()["do"], train.inputs()["do"])


def test_gpu_suites_ask_the_same_questions_and_fit_the_time():
    assert set(gpu_cases.QUICK) == set(gpu_cases.SUITES)
    quick, full = select("all", True, "cuda"), select("all", False, "cuda")
    assert len({case.name for case in full}) == len(full)
    assert all(case.dtype == torch.bfloat16 for case in full)
    assert len(quick) * gpu_cases.SECONDS_PER_CASE <= 180
    for case in quick:  # what runs there, seen from here
        assert dispatch.explain_problem(case.problem("cuda")).reasons["triton"] in (None, "Triton is not installed")


def test_ceilings_are_measured():
    found = ceilings.measured("cpu", matrix=64, copied=1 << 16)
    assert found.gflops > 0 and found.gigabytes_per_second > 0


@pytest.mark.parametrize("op", ["forward", "train", "decode"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_fla_is_called_as_its_functions_are_named(monkeypatch, rule, op):
    """A stand-in with fla's names and keywords, which computes by the reference."""
    case = Case(op, rule, Shape(T=1 if op == "decode" else 20, H=2, HV=2, K=8, V=8))

    def function(q, k, v, g=None, gk=None, beta=None, initial_state=None, output_final_state=False):
        assert (beta is not None) == rule.delta
        decay = g if gk is None else gk
        names = {"q": q, "k": k, "v": v, "initial_state": initial_state}
        names |= {} if decay is None else {"g": decay}
        names |= {} if beta is None else {"beta": beta}
        options = {"output_final_state": output_final_state, "backend": "reference"}
        return getattr(sleepkern, rule.name)(**names, **options)

    module = ModuleType(f"fla.ops.{rule.name}")
    setattr(module, f"{'fused_recurrent' if op == 'decode' else 'chunk'}_{rule.name}", function)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    theirs = peers.fla.prepare(case, case.inputs(), 1)()
    ours = run(case, case.inputs(), backend="reference")
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(theirs, ours, strict=True))


def test_ours_in_other_forms_agree():
    replay = Case("ingest", rules.KDA, Shape(T=20, H=2, HV=2, K=8, V=8), passes=3)
    once = Case("ingest", rules.KDA, Shape(T=20, H=2, HV=2, K=8, V=8))
    forward = Case("forward", rules.GATED_DELTA_RULE, Shape(T=20, H=1, HV=1, K=8, V=8))  # few operators to compile
    forms = ((peers.ours.pass_by_pass, replay), (peers.ours.with_outputs, once), (peers.ours.by_compiler, forward))
    for form, case in forms:
        state = form(case, case.inputs(), 1)()[1]
        assert relative_error(state, run(case, case.inputs())[1]) < 1e-5


def test_a_peer_that_fails_is_a_note(monkeypatch):
    def fails(case, inputs, threads):
        raise RuntimeError("not on this device")

    peer = peers.Peer("broken", lambda case, device: None, fails)
    monkeypatch.setattr(bench_module, "peers_of", lambda case, device: (peer,))
    (row,) = bench_cases([TINY], quick=True).rows
    assert row.passed and row.peers[0].note == "failed: RuntimeError: not on this device"
