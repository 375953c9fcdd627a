"""The worker of `bench --against`: a script that times calls of the sleepkern that its process imports.

Its parent (against.py) runs it by its path, in one process for each build, so it is no module of the build that it
times. It calls public functions only, so it times builds that are older than this file. Orders come as lines of JSON
on stdin, answers go as lines of JSON to what stdout was. Two of them exist:

    {"load": file, "result": file or null, "threads": n, "device": d}   prepare a call, and write its result
    {"burst": seconds}                                                  time it, answer with the median of the samples
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]  # Python puts a script's folder there, whose modules would hide others of the same name

import torch
from torch import Tensor

SHORTEST_SAMPLE = {"cpu": 5e-4, "cuda": 2e-3}
"""Seconds a sample lasts at least. On a CPU it is short, so that a sample that another process interrupts is one among
many, which a median leaves out."""
LEAST_SAMPLES = 3
"""Samples of a burst at least, whatever a call takes."""
LONGEST_WARM_UP = 0.5
"""Seconds after which no further set of inputs is warmed up."""

Call = Callable[[], Sequence[Tensor | None]]


class Timed:
    """Calls on copies of one set of inputs, rotated, and how many of them make a sample."""

    device: str
    kind: str
    first: Call
    calls: itertools.cycle[Call]
    repeats: int
    result: list[Tensor | None]

    def __init__(self, request: dict[str, Any], threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.device, self.kind = device, torch.device(device).type
        self.first = _call(request, device)
        calls = [self.first, *(_call(request, device) for _ in range(request["sets"] - 1))]
        self.calls, self.repeats = itertools.cycle(calls), 1
        self.result = [None if x is None else x.detach().cpu().clone() for x in self.first()]
        start = time.perf_counter()
        for _ in calls:
            self._sample()
            if time.perf_counter() - start > LONGEST_WARM_UP:
                break
        took = min(self._sample() for _ in range(LEAST_SAMPLES))
        self.repeats = max(1, round(SHORTEST_SAMPLE[self.kind] / max(took, 1e-7)))

    def burst(self, seconds: float) -> float:
        """The median of samples for about `seconds`, in seconds a call. The first sample finds caches that the other
        process has filled, and does not count."""
        self._sample()
        samples, start = [self._sample()], time.perf_counter()
        while len(samples) < LEAST_SAMPLES or time.perf_counter() - start < seconds:
            samples.append(self._sample())
        return statistics.median(samples)

    def _sample(self) -> float:
        calls = [next(self.calls) for _ in range(self.repeats)]
        self._wait()
        start = time.perf_counter()
        for call in calls:
            call()
        self._wait()
        return (time.perf_counter() - start) / self.repeats

    def _wait(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize(self.device)


def _call(request: dict[str, Any], device: str) -> Call:
    """The call that a request describes, on inputs of its own."""
    inputs = {name: x.to(device, copy=True) for name, x in request["inputs"].items()}
    return {"train": _train, "decode": _decode, "ingest": _ingest, "blocks": _blocks}.get(request["op"], _forward)(
        request, inputs
    )


def _module(name: str = "") -> Any:
    """sleepkern or a module of it, by name. The path of this process decides which build it is of."""
    return importlib.import_module("sleepkern" + name)


def _forward(request: dict[str, Any], inputs: dict[str, Tensor]) -> Call:
    function = getattr(_module(), request["rule"])
    return lambda: function(**inputs, output_final_state=True)


def _train(request: dict[str, Any], inputs: dict[str, Tensor]) -> Call:
    function, do = getattr(_module(), request["rule"]), inputs.pop("do")

    def gradients() -> Sequence[Tensor]:
        leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
        o = function(**leaves)[0]
        return torch.autograd.grad(o, [x for x in leaves.values() if x.requires_grad], do)

    return gradients


def _decode(request: dict[str, Any], inputs: dict[str, Tensor]) -> Call:
    step, rule = _module().recurrent_step, _module(".rules").RULES[request["rule"]]
    arguments = [inputs.get(name) for name in ("q", "k", "v", "g", "beta", "initial_state")]
    return lambda: step(*arguments, rule=rule)


def _ingest(request: dict[str, Any], inputs: dict[str, Tensor]) -> Call:
    ingest, rule = _module().sleep_ingest, _module(".rules").RULES[request["rule"]]
    arguments = [inputs.get(name) for name in ("k", "v", "g", "beta")]
    options = {"passes": request["passes"], "method": request["method"], "rule": rule}
    return lambda: (ingest(*arguments, initial_state=inputs["initial_state"], **options).final_state,)


def _blocks(request: dict[str, Any], inputs: dict[str, Tensor]) -> Call:
    h = inputs.pop("h")
    model = _module(".nn").SleepLM(*request["sizes"], factor=request["factor"]).to(h)
    model.load_state_dict(inputs)
    blocks, function = model.blocks(), _module(".sleep").sleep_blocks

    def passes() -> Sequence[Tensor]:
        with torch.no_grad():
            return (function(h, blocks, passes=request["passes"]).h,)

    return passes


def _load(order: dict[str, Any]) -> Timed:
    timed = Timed(torch.load(order["load"], weights_only=True), order["threads"], order["device"])
    if order["result"] is not None:
        torch.save(timed.result, order["result"])
    return timed


def _hello() -> dict[str, Any]:
    """Tells which sleepkern this process imports, and whether it has its compiled module."""
    found = _module()
    try:
        native = _module("._C").isa()
    except ImportError:
        native = None
    python = ".".join(map(str, sys.version_info[:2]))
    versions = {"version": found.__version__, "python": python, "torch": torch.__version__}
    return {"file": found.__file__, "native": native, **versions}


def main() -> None:
    """Answer orders until stdin ends. What the build prints goes to stderr, for stdout carries the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers.write(json.dumps(_hello()) + "\n")
    answers.flush()
    timed: Timed | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if "load" in order:
                timed = None  # frees the case before
                timed = _load(order)
                answer: dict[str, Any] = {}
            else:
                assert timed is not None
                answer = {"seconds": timed.burst(order["burst"])}
        except Exception as error:  # whatever a build raises is the answer, and the next case is another call
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
