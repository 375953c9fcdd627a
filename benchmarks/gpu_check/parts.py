"""The parts of `make gpu-check` as data: what each runs, its limit, and the files that it writes.

Parts of one group run side by side; the groups run one after the other. In a command, {python} is the interpreter,
{work} the folder of caches and results, and {seconds} what a part that stops by itself may take.
"""

from __future__ import annotations

from dataclasses import dataclass

TOTAL = 480
"""Seconds of one call, the build included."""
LEFT_OUT = 77
"""The exit status of a part that has nothing to run on; the last line of its log says why."""
MARGIN = 8
"""Seconds that a part with {seconds} has for its start and its last file."""


@dataclass(frozen=True)
class Part:
    """One part.

    group    parts of one group start together
    limit    seconds, after which it is ended
    what     one line on it
    command  the words of its command; () where the driver does it
    dry      those of its rehearsal without a GPU
    file     the JSON file in {work} that goes into the summary, written anew after each step
    worth    1 to 5, the order of the issue: right, tables, peers, profile, sanitizers; 0 for what they need
    """

    name: str
    group: str
    limit: int
    what: str
    command: tuple[str, ...]
    dry: tuple[str, ...]
    file: str = ""
    worth: int = 0


def _module(name: str, *words: str) -> tuple[str, ...]:
    return ("{python}", "-m", f"benchmarks.{name}", *words)


_INFO = ("{python}", "-m", "sleepkern", "info", "--json", "{work}/info.json")
_TIMED = ("--seconds", "{seconds}")

PARTS: tuple[Part, ...] = (
    Part("build", "build", 60, "the native module, by the nvcc that is there",
         ("{python}", "setup.py", "--quiet", "build_ext", "--inplace"), ("{python}", "setup.py", "--version")),
    Part("peers", "peers", 8, "flash-linear-attention, FlashQLA, TileLang and nvidia-cuda-nvcc from the folder WHEELS",
         (), ()),
    Part("info", "info", 10, "versions, devices, the assembler, what is known to be bad", _INFO, _INFO, "info.json"),
    Part("verify", "right", 135, "all rules by Triton, four types, forward and every gradient, against float64",
         _module("gpu_verify", "{work}", *_TIMED),
         _module("gpu_verify", "{work}", *_TIMED, "--device", "cpu", "--backend", "cpu", "--only", "gla-float32"),
         "verify.json", 1),
    Part("replays", "right", 135, "every CUDA kernel in every mode against float64",
         _module("gpu_checks", "replays", "--json", "{work}/replays.json"),
         _module("gpu_checks", "replays", "--dry", "--json", "{work}/replays.json"), "replays.json", 1),
    Part("graphs", "right", 135, "CUDA graphs of calls, steps and sleeps; torch.compile",
         _module("gpu_checks", "graphs", "--json", "{work}/graphs.json"),
         _module("gpu_checks", "graphs", "--dry", "--json", "{work}/graphs.json"), "graphs.json", 1),
    Part("mixer", "right", 135, "short convolution, its step and gated norm by Triton against float64",
         _module("gpu_mixer", "--json", "{work}/mixer.json"),
         _module("gpu_mixer", "--device", "cpu", "--json", "{work}/mixer.json"), "mixer.json", 1),
    Part("attention", "right", 135, "attention of sleepkern.nn, by flash-attn where it is installed, against float64",
         _module("gpu_attention", "--json", "{work}/attention.json"),
         _module("gpu_attention", "--device", "cpu", "--width", "16", "--json", "{work}/attention.json"),
         "attention.json", 1),
    Part("tables", "tables", 75, "the candidates timed, and the plans chosen, as a file to commit",
         _module("gpu_check.tables", "{work}/plans.json", *_TIMED),
         _module("gpu_check.tables", "{work}/plans.json", *_TIMED, "--dry"), "plans.json", 2),
    Part("times", "times", 90, "against flash-linear-attention and FlashQLA, in CUDA graphs and from Python",
         _module("gpu_check.times", "{work}/times.json", *_TIMED),
         _module("gpu_check.times", "{work}/times.json", *_TIMED, "--dry"), "times.json", 3),
    Part("mixer-times", "mixer-times", 15, "the same beside torch's operators and beside the bytes that they move",
         _module("gpu_mixer", "--times", "--json", "{work}/mixer-times.json"),
         _module("gpu_mixer", "--device", "cpu", "--json", "{work}/mixer-times.json"), "mixer-times.json", 3),
    Part("blocks", "blocks", 27, "sleep_blocks checked, then against a CUDA graph of the modules",
         _module("gpu_blocks", "{work}/blocks.json", *_TIMED),
         _module("gpu_blocks", "{work}/blocks.json", *_TIMED, "--device", "cpu", "--few"), "blocks.json", 3),
    Part("profile", "profile", 40, "stalls, bytes and products of the twelve slowest kernels, by ncu",
         _module("gpu_check.profile", "{work}/profile.json", *_TIMED),
         _module("gpu_check.profile", "{work}/profile.json", *_TIMED, "--dry"), "profile.json", 4),
    Part("memcheck", "sanitizers", 20, "every CUDA kernel under compute-sanitizer's memcheck",
         _module("gpu_check.sanitize", "memcheck", "{work}/memcheck.json"),
         _module("gpu_check.sanitize", "memcheck", "{work}/memcheck.json", "--dry"), "memcheck.json", 5),
    Part("racecheck", "sanitizers", 20, "and under its racecheck",
         _module("gpu_check.sanitize", "racecheck", "{work}/racecheck.json"),
         _module("gpu_check.sanitize", "racecheck", "{work}/racecheck.json", "--dry"), "racecheck.json", 5),
)  # fmt: skip


def groups(parts: tuple[Part, ...]) -> list[list[Part]]:
    """Parts that start together, in order."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.group, []).append(part)
    return list(found.values())


def total(parts: tuple[Part, ...] = PARTS) -> int:
    """Seconds of the limits: of a group its longest."""
    return sum(max(part.limit for part in group) for group in groups(parts))
