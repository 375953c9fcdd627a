"""The five parts of the demo: each shows what it finds, writes its files, and returns its outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.markup import escape
from rich.table import Table

from ...measure import Report, environment
from ...measure.model_cases import CLOSE
from ...measure.timing import threads
from ...testing.verify import Row
from .. import bench as bench_command
from .. import verify as verify_command
from ..output import console, status, write_json
from ..report import BENCH, VERIFY, write_bench, write_verify
from .patched_model import same_model

GROWTH = 1.01
"""Memory at the end of a text over memory after a quarter of it, up to which the memory counts as constant."""


class Outcome(NamedTuple):
    """The result of a part: what was found in one sentence, and the files it has written."""

    passed: bool
    found: str
    files: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Part:
    """A part of the demo; seconds: about the time it takes on two idle cores."""

    name: str
    title: str
    seconds: int
    run: Callable[[Path, Path], Outcome]
    """Takes the text to read and the folder to write to."""


def _verify(text: Path, out: Path) -> Outcome:
    with threads(1):
        rows = verify_command.run(quick=True)
    console.print(verify_command.table(rows))
    verify_command.print_details(rows)
    write_json(out / "verify.json", verify_command.to_dict(rows, "cpu"))
    passed = verify_command.passed(rows)
    write_verify(rows, "cpu", passed, out)
    return Outcome(passed, verified(rows), ("verify.json", VERIFY))


def verified(rows: list[Row]) -> str:
    """How many comparisons there were, and how near to its tolerance the worst came."""
    ran = [row for row in rows if row.refused is None]
    red = sum(not row.passed for row in ran)
    backends = len({row.backend for row in ran})
    worst = max((row.worst / row.tolerance for row in ran), default=0.0)
    return (
        f"{len(ran)} comparisons of {backends} backends with float64: {red} wrong, worst error {worst:.2g} x its limit"
    )


def _bench(text: Path, out: Path) -> Outcome:
    report = bench_command.run(quick=True)
    bench_command.show(report)
    write_json(out / "bench.json", bench_command.to_dict(report))
    bench_command.draw(report, out / "bench.png")
    write_bench(report, out)
    drawn = any(row.milliseconds is not None for row in report.rows)
    return Outcome(report.passed, benched(report), ("bench.json", *["bench.png"] * drawn, BENCH))


def benched(report: Report) -> str:
    """How many cases were timed, and how often sleepkern was faster than a peer."""
    timed = sum(row.milliseconds is not None for row in report.rows)
    ratios = [ratio for ratio, _, _ in report.comparisons]
    found = f"{timed} of {len(report.rows)} cases timed"
    if not ratios:
        return found + ", no peer was timed"
    faster = sum(ratio >= 1 for ratio in ratios)
    most = f"{min(ratios):.2g} to {max(ratios):.3g} x"
    return f"{found}; faster than a peer in {faster} of {len(ratios)} comparisons ({most})"


def _model(text: Path, out: Path) -> Outcome:
    from .patched_model import run_patched_model

    with status("loading transformers") as change:
        result = run_patched_model(text.read_bytes(), progress=change)
    console.print(result["model"])
    console.print(patched_model_table(result, text.name))
    same = same_model(result)
    if not same:
        console.print(f"[red]not the same model: expected the same bytes, and logits within {CLOSE:.0e}[/]")
    content = {"command": "dropin", "environment": environment(), "passed": same, **result}
    write_json(out / "dropin.json", content)
    reads, generates = (
        result[f"{work}_tokens_per_second"]["patched"] / result[f"{work}_tokens_per_second"]["stock"]
        for work in ("read", "generate")
    )
    agree = "the same" if same else "other"
    found = (
        f"with sleepkern a model reads {reads:.2f} x and generates {generates:.2f} x as fast, and says {agree} bytes"
    )
    return Outcome(same, found, ("dropin.json",))


def patched_model_table(result: dict[str, Any], source: str) -> Table:
    """Tokens a second with and without sleepkern, and the largest difference of the logits."""
    table = Table(title=f"{result['tokens']} bytes of {escape(source)}, {torch.get_num_threads()} thread(s)")
    for heading in ("", "stock", "with sleepkern", "faster"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, key in (("reading", "read"), ("generating", "generate")):
        rates = result[f"{key}_tokens_per_second"]
        stock, patched = rates["stock"], rates["patched"]
        table.add_row(f"{label}, tokens/s", f"{stock:.0f}", f"{patched:.0f}", f"{patched / stock:.2f}x")
    difference, relative = result["max_logit_difference"], result["relative_logit_difference"]
    table.add_row("largest difference of logits", "", f"{difference:.1e}", f"{relative:.1e} of the largest")
    table.add_row("same bytes generated", "", "yes" if result["same_tokens"] else "no", "")
    return table


def _asleep(text: Path, out: Path) -> Outcome:
    from .sleeping import run_sleep

    with status("building the model") as change:
        result = run_sleep(text.read_bytes(), progress=change)
    console.print(sleep_table(result, text.name))
    constant = all(last <= GROWTH * first for first, last in (row["memory_bytes"] for row in result["rows"]))
    write_json(out / "sleep.json", {"command": "sleep", "environment": environment(), "passed": constant, **result})
    last = result["rows"][-1]
    found = (
        f"{result['tokens']} bytes in {last['memory_bytes'][1] / 1e6:.2f} MB, which {'stay' if constant else 'grow'}; "
        f"N = {last['passes']} passes: {last['tokens_per_second']:.0f} tokens/s, {100 * last['overhead']:+.0f} % over "
        "plain forwards"
    )
    return Outcome(constant, found, ("sleep.json",))


def sleep_table(result: dict[str, Any], source: str) -> Table:
    """Tokens a second and memory for each number of passes."""
    tokens, window = result["tokens"], result["window"]
    table = Table(
        title=f"sleep over {tokens} bytes of {escape(source)}, {window} at a time, {torch.get_num_threads()} thread(s)"
    )
    for heading in ("passes", "tokens/s", "memory after a quarter", "at the end", "over N plain forwards"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        memory = (f"{size / 1e6:.2f} MB" for size in row["memory_bytes"])
        table.add_row(str(row["passes"]), f"{row['tokens_per_second']:.0f}", *memory, f"{100 * row['overhead']:+.0f} %")
    table.caption = f"keys and values of the whole text would take {result['kept_bytes'] / 1e6:.1f} MB"
    return table


def _thinking(text: Path, out: Path) -> Outcome:
    from .training import FOLDER, run_training

    console.print("two small models learn to follow chains x, f(x), f(f(x)), ... through what they slept over")
    found = run_training(out / FOLDER)
    gaps = found["gap_of_N4_to_N1_at_equal_steps"].values()
    lead = ", ".join(f"{100 * gap:+.0f}" for gap in gaps)
    wanted = f"{100 * found['wanted_gap']:+.0f}"
    said = f"right answers to longer chains: N = 4 passes {lead} % ahead of N = 1, wanted {wanted} %"
    files = tuple(f"{FOLDER}/study.{kind}" for kind in ("json", "md", "png"))
    return Outcome(found["passed"], said, files)


PARTS = (
    Part("verify", "Is it right?", 30, _verify),
    Part("bench", "Is it fast?", 80, _bench),
    Part("model", "In a model", 30, _model),
    Part("asleep", "Asleep", 30, _asleep),
    Part("thinking", "Does it think?", 160, _thinking),
)
