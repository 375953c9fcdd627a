"""What wheel_check runs with an installed wheel: native kernels, gradients, a sleep, errors, and no compiler at all."""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import sleepkern
from sleepkern import nn, rules, testing
from sleepkern.backends.native.module import _C
from sleepkern.sleep import SleepSession


def installed(folder: Path) -> None:
    """The package comes from the folder, has types and a native module, and finds no compiler."""
    where = Path(sleepkern.__file__).resolve()
    assert where.is_relative_to(folder.resolve()), f"sleepkern comes from {where}, not from the wheel"
    assert (where.parent / "py.typed").exists() and (where.parent / "_C.pyi").exists()
    assert _C is not None, "sleepkern._C could not be imported"
    assert not any(map(shutil.which, ("cc", "gcc", "g++", "clang", "nvcc"))), "a compiler is on the path"


def kernels() -> None:
    """Every rule runs on the C++ kernels, and its output and gradients are those of the float64 reference."""
    for rule in rules.RULES.values():
        inputs = testing.make_inputs(rule, testing.Shape(T=100, K=64, V=96))
        assert sleepkern.explain(rule, **inputs).chosen == "cpu", rule
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if x is not None}
        output, _ = testing.call(rule, leaves)
        output.square().sum().backward()
        exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
        expected, _ = testing.call(rule, exact, backend="reference")
        expected.square().sum().backward()
        for name, (got, wanted) in {
            "output": (output, expected),
            **{f"gradient of {name}": (leaf.grad, exact[name].grad) for name, leaf in leaves.items()},
        }.items():
            error = testing.relative_error(got, wanted)
            assert error < 1e-4, f"{rule}: {name} is off by {error}"


def sleep() -> None:
    """A small model sleeps, and answers."""
    torch.manual_seed(0)
    model = nn.SleepLM(64, 64, 2, 2)
    session = SleepSession(model, window=16, passes=2)
    session.ingest(torch.randint(0, 64, (1, 40)))
    answer = session.generate(torch.randint(0, 64, (1, 3)), max_new_tokens=4)
    assert answer.shape[0] == 1


def message(function: Callable[..., object], argument: object) -> str:
    """The sentence that a wrong argument is answered with."""
    try:
        function(argument)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{function} took {argument}")


def errors() -> None:
    """C++ exceptions reach Python as sentences, however many there are."""
    for _ in range(100):
        assert "isa: got" in message(_C.set_isa, "none")
        assert "seconds: got" in message(_C.peak_gflops, -1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(sys.prefix), help="where the wheel was installed")
    installed(parser.parse_args().folder)
    for part in (kernels, sleep, errors):
        part()
    machine = f"{platform.machine()}, {_C.isa()}, Python {platform.python_version()}"
    print(f"sleepkern {sleepkern.__version__}, torch {torch.__version__}, {machine}: ok")
