"""The C++ kernels on every instruction set and thread count; and a broken kernel is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.build import Mutation, build, build_with_faults, run_with, shared
from torch import Tensor

import sleepkern
from sleepkern.backends.native.module import _C
from sleepkern.rules import Rule
from sleepkern.testing import AWKWARD_SHAPES, Shape, call, make_inputs, relative_error
from sleepkern.testing.tolerances import SAME_GRADIENTS, SAME_SUMS

Results = dict[str, tuple[Tensor, float]]
"""Tensors by name, each with how far it may be from another machine code's."""
SHAPES = [Shape(T=300, H=2, HV=4, K=128, V=128), Shape(B=2, T=70, K=37, V=51), AWKWARD_SHAPES["packed"]]
ADJOINT_SHAPES = [
    Shape(T=20, K=32, V=32),  # last chunks of 17 to 24 tokens: more than a panel of one machine code, not of another
    Shape(T=50, H=1, HV=2, K=48, V=40),
    Shape(T=130, H=1, HV=1, K=128, V=128),
    AWKWARD_SHAPES["packed"],
]


def gradients(rule: Rule, x: dict[str, Any]) -> Results:
    """Gradients of one pass, under the sine of outputs and final state."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in x.items() if t is not None and t.is_floating_point()}
    o, S = call(rule, {**x, **leaves}, "cpu")
    assert S is not None
    (o.sin().sum() + S.sin().sum()).backward()
    return {"d" + n: (t.grad, SAME_GRADIENTS) for n, t in leaves.items() if t.grad is not None}


def replays(rule: Rule, x: dict[str, Any], T: int) -> Results:
    """Three passes by every method, and as many as tol asks for."""
    results: Results = {}
    for method in ("wy", "affine", *(["rank"] if rule.gate != "channel" and T <= _C.rank_limit else [])):
        for tol in (None, 0.3) if method != "rank" else (None,):
            r = sleepkern.sleep_ingest(**x, passes=3, rule=rule, backend="cpu", method=method, tol=tol)
            assert r.output is not None
            results |= {f"o {method} {tol}": (r.output, SAME_SUMS), f"S {method} {tol}": (r.final_state, SAME_SUMS)}
    return results


@pytest.mark.computed_by("cpu")
@pytest.mark.usefixtures("restore_isa")
def test_instruction_sets_and_threads_agree(rule: Rule) -> None:
    for shape in SHAPES:
        x = make_inputs(rule, shape, seed=1)
        results = []
        for isa in _C.isas():
            for threads in (1, 2):
                _C.set_isa(isa)
                torch.set_num_threads(threads)
                results.append(call(rule, x, "cpu"))
        expected_o, expected_S = results[0]
        for o, S in results[1:]:
            assert S is not None and expected_S is not None
            assert relative_error(o, expected_o) < SAME_SUMS
            assert relative_error(S, expected_S) < SAME_SUMS


@pytest.mark.computed_by("cpu")
@pytest.mark.usefixtures("restore_isa")
@pytest.mark.parametrize("shape", ADJOINT_SHAPES, ids=str)
def test_instruction_sets_and_threads_agree_on_gradients_and_replay(rule: Rule, shape: Shape) -> None:
    x = make_inputs(rule, shape, seed=4)
    first: Results = {}
    for isa in _C.isas():
        for threads in (1, 2):
            _C.set_isa(isa)
            torch.set_num_threads(threads)
            results = {**gradients(rule, x), **replays(rule, x, shape.T)}
            first = first or results
            assert results.keys() == first.keys()
            for name, (value, tolerance) in results.items():
                assert relative_error(value, first[name][0]) < tolerance, (name, isa, threads)


@pytest.mark.computed_by("cpu")
@pytest.mark.usefixtures("restore_isa")
def test_two_threads_give_the_same_bits(rule: Rule) -> None:
    x = make_inputs(rule, Shape(B=2, T=100, H=2, HV=4), seed=2)
    results: list[list[Tensor | None]] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([*call(rule, x, "cpu"), *(d for d, _ in gradients(rule, x).values())])
    for one, two in zip(*results, strict=True):
        assert one is not None and two is not None and torch.equal(one, two)


@pytest.mark.computed_by("cpu")
def test_gradients_do_not_depend_on_the_call_before(rule: Rule) -> None:
    """State alone after outputs: what the pairs of tokens left in the thread's arrays is none of its own."""
    x = make_inputs(rule, Shape(T=40, H=1, HV=1, K=16, V=16), seed=6)
    results: list[list[Tensor]] = []
    for scale in (1.0, 100.0):
        gradients(rule, {**x, "q": scale * x["q"]})
        leaves = [t.clone().requires_grad_() for n, t in x.items() if n not in ("q", "cu_seqlens") and t is not None]
        names = [n for n, t in x.items() if n not in ("q", "cu_seqlens") and t is not None]
        state = sleepkern.sleep_ingest(**dict(zip(names, leaves, strict=True)), rule=rule, backend="cpu").final_state
        results.append(list(torch.autograd.grad(state.sin().sum(), leaves)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.usefixtures("restore_isa")
def test_setting_the_instruction_set() -> None:
    assert "baseline" in _C.isas()
    for isa in _C.isas():
        _C.set_isa(isa)
        assert _C.isa() == isa
    with pytest.raises(ValueError, match="isa: got 'avx9'; expected one this machine runs: .*baseline"):
        _C.set_isa("avx9")


def test_threads_are_torchs_own() -> None:
    assert _C.threads_source() == "torch"


AVX512_AGREES = """
import sleepkern
from sleepkern.backends import cpu
from sleepkern.testing import AWKWARD_SHAPES, TOLERANCE, Shape, call, make_inputs
from sleepkern.testing.tolerances import SAME_GRADIENTS, SAME_SUMS
from sleepkern.testing import relative_error, rules_of, to_float64
assert _C.isas()[:2] == ["avx512bf16", "avx512"], _C.isas()
shapes = {**AWKWARD_SHAPES, "wide": Shape(T=200, H=1, HV=2, K=128, V=128)}
shapes |= {f"T={T}": Shape(T=T, H=1, HV=2, K=48, V=40) for T in (20, 50)}

def results(rule, x, T):
    leaves = {n: t.detach().requires_grad_() for n, t in x.items() if t is not None and t.is_floating_point()}
    o, S = call(rule, {**x, **leaves}, "cpu")
    (o.sin().sum() + S.sin().sum()).backward()
    found = {"o": (o, SAME_SUMS), "S": (S, SAME_SUMS)}
    found |= {"d" + n: (t.grad, SAME_GRADIENTS) for n, t in leaves.items() if t.grad is not None}
    for method in ("wy", "rank") if rule.gate != "channel" and T <= _C.rank_limit else ("wy",):
        r = sleepkern.sleep_ingest(**x, passes=3, rule=rule, backend="cpu", method=method)
        found |= {"o " + method: (r.output, SAME_SUMS), "S " + method: (r.final_state, SAME_SUMS)}
    return found

for rule in rules_of("cpu").values():
    for name, shape in shapes.items():
        for decay, threads in (("mixed", 1), ("mixed", 2), ("slow", 1)):
            x = make_inputs(rule, shape, seed=3, decay=decay)
            torch.set_num_threads(threads)
            _C.set_isa("avx512")
            actual = results(rule, x, shape.T)
            _C.set_isa("baseline")
            expected = results(rule, x, shape.T)
            for what, (value, tolerance) in expected.items():
                error = relative_error(actual[what][0], value)
                assert error < tolerance, (rule.name, name, decay, what, error)

# Products of bfloat16, which only inputs of that type take.
for rule in rules_of("cpu").values():
    for name, shape in shapes.items():
        for options in ({}, {"decay": "slow"}, {"decay": "slow", "beta_max": 2.0, "correlation": 0.9}):
            x = make_inputs(rule, shape, torch.bfloat16, seed=3, **options)
            truth, found = call(rule, to_float64(x), "reference"), {}
            for isa in ("avx512", "avx512bf16"):
                _C.set_isa(isa)
                found[isa] = call(rule, x, "cpu")
                for got, true in zip(found[isa], truth):
                    assert relative_error(got, true) < TOLERANCE[torch.bfloat16], (rule.name, name, options, isa)
            longest = shape.T if shape.lengths is None else max(shape.lengths)
            differ = relative_error(found["avx512bf16"][1], found["avx512"][1]) > 1e-4
            taken = rule.gate == "head" and longest > _C.decode_limit
            assert differ == taken or (taken and "beta_max" in options), (rule.name, name, options)
print("agrees")
"""


ROUNDINGS_DO_NOT_ADD_UP = """
import sleepkern
from sleepkern.backends import cpu
from sleepkern.rules import GATED_DELTA_RULE, SIMPLE_GLA
from sleepkern.testing import Shape, call, make_inputs, relative_error, to_float64
_C.set_isa("avx512bf16")
wrong = []

def compare(what, rule, x, normalize=True):
    truth = call(rule, to_float64(x), "reference", use_qk_l2norm_in_kernel=normalize)
    for name, got, true in zip("oS", call(rule, x, "cpu", use_qk_l2norm_in_kernel=normalize), truth):
        wrong.extend([(what, name)] * (not relative_error(got, true) < 1e-2))

def drawn(T, K, **options):
    return make_inputs(GATED_DELTA_RULE, Shape(T=T, H=1, HV=1, K=K, V=40), torch.bfloat16, seed=2, **options)

x = drawn(512, 64, decay="zero", correlation=1.0)
x["beta"] = torch.full_like(x["beta"].float(), 2.0)
compare("nothing forgotten", GATED_DELTA_RULE, x)
compare("one of two panels", GATED_DELTA_RULE, x | {"v": torch.cat([x["v"][..., :32], 0 * x["v"][..., 32:]], -1)})
slept = {b: sleepkern.sleep_ingest(**x, passes=3, backend=b, use_qk_l2norm_in_kernel=True) for b in ("cpu", "chunked")}
for name in ("output", "final_state"):
    one, two = (getattr(slept[b], name) for b in slept)
    wrong += [("slept", name)] * (not relative_error(one, two) < 1e-2)

x = drawn(200, 17, decay="zero", correlation=1.0, beta_max=1.999)
truth, state = call(GATED_DELTA_RULE, to_float64(x), "reference")[1], x["initial_state"].clone()
for first in range(0, 200, 20):
    part = [x[n][:, first : first + 20] for n in ("q", "k", "v", "g", "beta")]
    o, state = sleepkern.recurrent_step(*part, state)
wrong += [("in place and in pieces", "S")] * (not relative_error(state, truth) < 1e-2)

x = drawn(300, 32, decay="slow", correlation=0.5)
compare("a state that is forgotten", GATED_DELTA_RULE, x | {"initial_state": 1000 * x["initial_state"]}, False)
compare("nothing new", GATED_DELTA_RULE, x | {"v": 0 * x["v"]}, False)
x = drawn(1024, 32, decay="zero", correlation=1.0, initial_state=False) | {"beta": None}
x["k"][:] = x["k"][:, :1]
x["v"][:, 1::2] = -x["v"][:, ::2] * 1.02
compare("values that cancel", SIMPLE_GLA, x)
print(*wrong)
"""


@pytest.fixture(scope="module")
def avx512(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module where the machine has AVX-512 with bfloat16, else one of the same source compiled for AVX2."""
    if "avx512bf16" in _C.isas():
        return Path(str(_C.__file__))
    return build(tmp_path_factory.mktemp("avx512"), "-DSLEEPKERN_EMULATE_AVX512=ON")


@pytest.mark.hardening
def test_avx512_source_agrees(avx512: Path) -> None:
    """And what is rounded to bfloat16 keeps to 1e-2 where errors would add up: those panels are done in float32."""
    done = run_with(avx512, AVX512_AGREES)
    assert done.stdout.strip() == "agrees", done.stderr
    done = run_with(avx512, ROUNDINGS_DO_NOT_ADD_UP)
    assert done.returncode == 0 and not done.stdout.split(), done.stdout + done.stderr


@pytest.mark.hardening
def test_mixers_and_blocks_of_avx512(avx512: Path) -> None:
    suites = ["-q", "tests/ops/test_mixer.py", "tests/ops/test_blocks.py"]
    done = run_with(avx512, f"import pytest\nassert not pytest.main({suites})")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.hardening
def test_states_of_avx512(avx512: Path) -> None:
    suites = [f"tests/backends/cpu/test_cpu_{name}_states.py" for name in ("kept", "decode")]
    done = run_with(avx512, f"import pytest\nassert not pytest.main({['-q', '-m', 'not hardening', *suites]})")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.hardening
@pytest.mark.mutation
def test_verify_finds_a_broken_kernel(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A state that is not decayed: the kernel runs, and `verify` ends red."""
    mutation = Mutation("state-without-decay")
    module = build_with_faults(shared(tmp_path_factory), tmp_path, (mutation,))
    command = "sys.argv[1:] = ['verify', '--quick', '--backend', 'cpu']\nfrom sleepkern.cli import main\nmain()"
    done = run_with(module, command)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "fail" in done.stdout.lower()


GRADIENTS_AND_REPLAY = """
import sleepkern
from sleepkern.nn import SleepLM, short_convolution
from sleepkern.sleep.blocks import one_by_one, sleep_blocks
from sleepkern.rules import GATED_DELTA_RULE as rule
from sleepkern.testing import Shape, call, make_inputs, relative_error
x = make_inputs(rule, Shape(T=60, H=1, HV=1, K=32, V=32), seed=5)
grads = {}
for backend in ("cpu", "chunked"):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in x.items() if t is not None}
    o, S = call(rule, leaves, backend)
    (o.sin().sum() + S.sin().sum()).backward()
    grads[backend] = {n: t.grad for n, t in leaves.items()}
wrong = ["d" + n for n, d in grads["chunked"].items() if not relative_error(grads["cpu"][n], d) < 2e-5]
expected = sleepkern.sleep_ingest(**x, passes=3, rule=rule, backend="chunked", method="repeat").final_state
for method in ("wy", "rank", "affine"):
    state = sleepkern.sleep_ingest(**x, passes=3, rule=rule, backend="cpu", method=method).final_state
    wrong += [method] if not relative_error(state, expected) < 2e-5 else []
x = make_inputs(rule, Shape(T=60, H=1, HV=1, K=32, V=128), seed=5, decay="slow") | {"initial_state": None}
del x["q"]  # no outputs: 24 passes are whole strides, no single one forgets what those got wrong
one, two = (sleepkern.sleep_ingest(**x, passes=24, rule=rule, backend="cpu", method=m) for m in ("rank", "affine"))
wrong += ["strides"] if not relative_error(one.final_state, two.final_state) < 2e-5 else []
u, weight = torch.randn(1, 9, 8, requires_grad=True), torch.randn(8, 4)
one, two = (torch.autograd.grad(short_convolution(t, weight.to(t))[1].sum(), u)[0] for t in (u, u.double()))
wrong += ["dlast"] if not relative_error(one, two.double()) < 2e-5 else []
blocks, h = SleepLM(8, 32, 2).blocks(), torch.randn(1, 9, 32)
with torch.no_grad():
    one, two = sleep_blocks(h, blocks).h, one_by_one(h, blocks).h
wrong += ["blocks"] if not relative_error(one, two.double()) < 2e-5 else []
x = make_inputs(rule, Shape(T=60, H=1, HV=1, K=32, V=32), seed=5)
x["g"] = torch.full_like(x["g"], -50.0)
dg = []
for backend in ("cpu", "chunked"):
    g = x["g"].clone().requires_grad_()
    dg += torch.autograd.grad(call(rule, {**x, "g": g}, backend)[0].sin().sum(), g)
wrong += ["differences"] if not relative_error(*dg) < 2e-5 else []
print(*wrong)
"""


MUTATIONS = (
    Mutation("gate-gradient-without-final-state", r", .*\);$", ", Vec{});"),
    Mutation("gate-gradient-with-cancellation", r"sum\(.*\)", r"(\g<0> + 1.0f) - 1.0f"),
    Mutation("first-state-without-decay", r" \* \w+;$", ";"),
    Mutation("stride-without-a-pass", r" \+ \w+;$", ";"),
    Mutation("gradient-without-oldest-input", "1 - ", "2 - "),
    Mutation("attention-without-own-token", ">=", ">"),
)


@pytest.mark.hardening
@pytest.mark.mutation
def test_broken_gradients_and_replay_are_found(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every mutation is found: a gate whose gradient forgets the state at the chunk's end; a gate whose gradient adds a
    number and takes it away; a rank form that does not decay the first state, and one whose several passes at once
    leave one out; a convolution that forgets a gradient of its last inputs; attention in which a token does not see
    itself.

    What the faults do not touch stays right, so the check does not just fail.
    """
    done = run_with(build_with_faults(shared(tmp_path_factory), tmp_path, MUTATIONS), GRADIENTS_AND_REPLAY)
    assert done.stdout.split() == ["dg", "rank", "strides", "dlast", "blocks", "differences"], done.stdout + done.stderr
    sound = run_with(Path(str(_C.__file__)), GRADIENTS_AND_REPLAY)
    assert sound.stdout.split() == [] and sound.returncode == 0, sound.stdout + sound.stderr
