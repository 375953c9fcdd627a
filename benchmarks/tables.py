"""Write the number tables and the support matrix of README and docs: `python -m benchmarks.tables`, or `make tables`.

A page has a pair of markers, `<!-- table: name -->` and `<!-- end table -->`; what is between them is written here,
from the files of benchmarks/results and from what the backends declare. `tests/repo/test_number_tables.py` compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.support import support
from sleepkern.files import read_json, read_rows, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ZEN4, ZEN4_BLOCKS = "2026-11-26-amd-epyc-avx512", "2026-11-26-amd-epyc-avx512-blocks"
AVX2_PEERS = "2026-11-30-amd-epyc-avx2-peers"
H200, H200_BLOCKS = "2026-11-26-nvidia-h200", "2026-11-26-nvidia-h200-blocks"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end table -->)", re.S)
USUAL, SMALL = "H=16 K=128 V=128 float32", "H=4 K=64 V=64 float32"

Row = dict[str, Any]
Table = list[Sequence[str]]
"""The head of a table and its rows, as cells."""


def rows_of(file: str) -> dict[tuple[str, int], Row]:
    """The rows of a stored report by case and threads."""
    return {(row["case"], row["threads"]): row for row in read_rows(RESULTS / f"{file}.json")}


def figure(x: float) -> str:
    """Three digits that count, more where they stand before the point."""
    if x >= 100:
        return f"{x:.0f}"
    return f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3g}"


def ratio(x: float) -> str:
    """The same, and two digits of what is slower."""
    return figure(x) if x >= 1 else f"{x:.2f}"


def percent(row: Row, mark: str = "") -> str:
    """The share of the peak."""
    return f"{100 * row['share_of_peak']:.0f} %{mark}"


def peer(row: Row, name: str) -> Row:
    """A peer of a row."""
    return next(found for found in row["peers"] if found["name"] == name)


def times(row: Row, name: str, missing: str = "") -> str:
    """How many times faster than a peer, or the word for why there is no such figure."""
    found = peer(row, name)
    if found["ratio"] is None:
        return missing
    return ratio(found["ratio"]) + (" (1)" if found.get("turns") == 1 else "")


CPU_ROWS: tuple[tuple[str, str, str], ...] = (
    ("gated delta rule, T = 512", f"forward gated_delta_rule T=512 {USUAL}", ""),
    ("T = 2048", f"forward gated_delta_rule T=2048 {USUAL}", ""),
    ("T = 8192", f"forward gated_delta_rule T=8192 {USUAL}", ""),
    ("T = 2048, K = V = 64", "forward gated_delta_rule T=2048 H=16 K=64 V=64 float32", ""),
    ("T = 2048, K = 96, V = 256", "forward gated_delta_rule T=2048 H=16 K=96 V=256 float32", ""),
    ("T = 2048, bfloat16", "forward gated_delta_rule T=2048 H=16 K=128 V=128 bfloat16", " (+)"),
    ("KDA, T = 2048", f"forward kda T=2048 {USUAL}", ""),
    ("delta rule, T = 2048", f"forward delta_rule T=2048 {USUAL}", ""),
    ("simple GLA (SSD), T = 2048", f"forward simple_gla T=2048 {USUAL}", ""),
    ("GLA, T = 2048", f"forward gla T=2048 {USUAL}", ""),
    ("decode, T = 1", f"decode gated_delta_rule T=1 {USUAL}", ""),
    ("decode, T = 4", f"decode gated_delta_rule T=4 {USUAL}", ""),
    ("decode, T = 16", f"decode gated_delta_rule T=16 {USUAL}", ""),
    ("KDA decode, T = 1", f"decode kda T=1 {USUAL}", ""),
    ("decode, T = 1, the same state each time, which L2 holds", f"decode gated_delta_rule T=1 {USUAL} cached", ""),
    ("replay, T = 64, N = 4, state only", f"ingest gated_delta_rule T=64 {USUAL} N=4", " (*)"),
    ("replay, T = 512, N = 4, state only", f"ingest gated_delta_rule T=512 {USUAL} N=4", " (*)"),
    ("replay, T = 64, N = 16, state only", f"ingest gated_delta_rule T=64 {USUAL} N=16", " (*)"),
    ("replay, T = 512, N = 16, state only", f"ingest gated_delta_rule T=512 {USUAL} N=16", " (*)"),
    ("replay, T = 2048, N = 16, state only", f"ingest gated_delta_rule T=2048 {USUAL} N=16", " (*)"),
    ("replay, T = 64, N = 16, state only, by wy", f"ingest gated_delta_rule T=64 {USUAL} N=16 wy", ""),
    ("replay, T = 512, N = 16, state only, by wy", f"ingest gated_delta_rule T=512 {USUAL} N=16 wy", ""),
    ("forward + backward, T = 2048", f"train gated_delta_rule T=2048 {USUAL}", ""),
    ("forward + backward, KDA, T = 2048", f"train kda T=2048 {USUAL}", ""),
    ("forward, B = 6, T = 1024, H = 4, K = V = 64", f"forward gated_delta_rule B=6 T=1024 {SMALL}", ""),
    ("forward, B = 256, T = 24, H = 4, K = V = 64", f"forward gated_delta_rule B=256 T=24 {SMALL}", ""),
    ("forward + backward, B = 6, T = 1024, H = 4, K = V = 64", f"train gated_delta_rule B=6 T=1024 {SMALL}", ""),
    ("forward + backward, B = 256, T = 24, H = 4, K = V = 64", f"train gated_delta_rule B=256 T=24 {SMALL}", ""),
    ("forward + backward, B = 256, T = 17, H = 4, K = V = 64", f"train gated_delta_rule B=256 T=17 {SMALL}", ""),
)  # fmt: skip
"""What a row says, its case, and the mark behind its share of peak."""
TWO_THREADS = (
    ("T = 2048, two threads", f"forward gated_delta_rule T=2048 {USUAL} threads=2"),
    ("T = 2048, H = 1, two threads", "forward gated_delta_rule T=2048 H=1 K=128 V=128 float32 threads=2"),
    ("forward + backward, T = 2048, two threads", f"train gated_delta_rule T=2048 {USUAL} threads=2"),
)
NO_GGML = {
    "forward gated_delta_rule T=2048 H=16 K=96 V=256 float32": "it wants K = V",
    "forward gated_delta_rule T=2048 H=16 K=128 V=128 bfloat16": "it wants float32",
}


def no_ggml(case: str) -> str:
    """Why ggml has no figure of a case."""
    return NO_GGML.get(case, "no gradient" if case.startswith("train") else "no such op")


def cpu() -> Table:
    """Operators on one core, beside the token loop, transformers and ggml."""
    stored = rows_of(ZEN4)
    table: Table = [("work", "ms", "of peak", "x token loop", "x transformers (torch)", "x ggml's fused op")]
    for says, case, mark in CPU_ROWS:
        row = stored[case, 1]
        share = "" if case.startswith("decode") else percent(row, mark)
        torch_peer = times(row, "transformers", "no such function")
        ggml = times(row, "ggml", no_ggml(case))
        table.append((says, figure(row["milliseconds"]), share, times(row, "token loop"), torch_peer, ggml))
    for says, case in TWO_THREADS:
        row = stored[case, 2]
        faster = f"{times(row, 'ours, 1 thread')} x one thread"
        table.append((says, figure(row["milliseconds"]), percent(row), faster, "", ""))
    return table


def cpu_peers() -> Table:
    """A few calls beside every peer on a CPU, in the order of the run; rows lost to a peer are there too."""
    names = ("token loop", "transformers", "ggml", "bitsandbytes")
    table: Table = [("call", "ms", *(f"x {name}" for name in names))]
    for row in rows_of(AVX2_PEERS).values():
        cells = [times(row, name) if any(p["name"] == name for p in row["peers"]) else "" for name in names]
        if any(cells):
            table.append((row["case"], figure(row["milliseconds"]), *cells))
    return table


STACKS = (
    ("Rule 110: L = 24, d = 256, 4 blocks, B = 1", "blocks rule 110 L=24 d=256 x4 B=1 N=4"),
    ("Rule 110, B = 64", "blocks rule 110 L=24 d=256 x4 B=64 N=4"),
    ("Rule 110, B = 1, bfloat16", "blocks rule 110 L=24 d=256 x4 B=1 N=4 bfloat16"),
    ("Rule 110, B = 64, bfloat16", "blocks rule 110 L=24 d=256 x4 B=64 N=4 bfloat16"),
    ("Depo: L = 75, d = 512, 10 blocks, B = 1", "blocks depo L=75 d=512 x10 B=1 N=4"),
    ("Depo, B = 64", "blocks depo L=75 d=512 x10 B=64 N=4"),
    ("Depo, B = 1, bfloat16", "blocks depo L=75 d=512 x10 B=1 N=4 bfloat16"),
)
STACKS_TWO_THREADS = (
    ("Rule 110, B = 1", "blocks rule 110 L=24 d=256 x4 B=1 N=4 threads=2"),
    ("Rule 110, B = 64", "blocks rule 110 L=24 d=256 x4 B=64 N=4 threads=2"),
    ("Depo, B = 1", "blocks depo L=75 d=512 x10 B=1 N=4 threads=2"),
    ("Depo, B = 64", "blocks depo L=75 d=512 x10 B=64 N=4 threads=2"),
)


def cpu_blocks() -> Table:
    """`sleep_blocks` beside the same modules, milliseconds; shares of the float32 peak of a core."""
    stored = rows_of(ZEN4_BLOCKS)
    table: Table = [("stack", "threads", "ms", "of peak", "x modules", "x torch.compile")]
    for threads, stacks in ((1, STACKS), (2, STACKS_TWO_THREADS)):
        for says, case in stacks:
            row = stored[case, threads]
            ratios = (times(row, "ours, modules"), times(row, "ours, compiled"))
            table.append((says, str(threads), figure(row["milliseconds"]), percent(row), *ratios))
    return table


BF16_PEAK = 233.4
"""GFLOP/s of one core in bfloat16 on the day of the file, which does not have it. It was noted as 233, and the shares
of the three rows as 61, 76 and 82 %, which 233.4 to 233.5 gives."""


def cpu_blocks_rate() -> Table:
    """The same on one thread, GFLOP/s and the share of the peak of its type."""
    stored = rows_of(ZEN4_BLOCKS)
    table: Table = [("stack", "type", "GFLOP/s", "of peak", "x modules", "x torch.compile")]
    for says, case in STACKS:
        row = stored[case, 1]
        paired = case.endswith("bfloat16")
        share = f"{100 * row['gflops'] / BF16_PEAK:.0f} %" if paired else percent(row)
        cells = ("bfloat16" if paired else "float32", f"{row['gflops']:.0f}", share)
        ratios = (times(row, "ours, modules"), times(row, "ours, compiled"))
        table.append((says.removesuffix(", bfloat16"), *cells, *ratios))
    return table


HEADS, NARROW = "H=32 K=128 V=128 bfloat16", "H=32 K=64 V=64 bfloat16"
WINDOWS = "gated_delta_rule B=256 T=24 H=4 K=64 V=64 bfloat16"
GPU_ROWS: tuple[tuple[str, str, str], ...] = (
    ("gated delta rule, T = 2048", f"forward gated_delta_rule T=2048 {HEADS}", ""),
    ("T = 8192", f"forward gated_delta_rule T=8192 {HEADS}", ""),
    ("T = 8192, B = 4", f"forward gated_delta_rule B=4 T=8192 {HEADS}", ""),
    ("T = 8192, heads of 64", f"forward gated_delta_rule T=8192 {NARROW}", ""),
    ("T = 8192, state only", f"ingest gated_delta_rule T=8192 {HEADS}", ""),
    ("T = 8192, forward and gradients", f"train gated_delta_rule T=8192 {HEADS}", "fla refuses on this Triton"),
    ("T = 8192, heads of 64, forward and gradients", f"train gated_delta_rule T=8192 {NARROW}", "the same"),
    ("KDA, T = 8192", f"forward kda T=8192 {HEADS}", ""),
    ("KDA, T = 8192, forward and gradients", f"train kda T=8192 {HEADS}", ""),
    ("simple GLA, T = 8192", f"forward simple_gla T=8192 {HEADS}", ""),
    ("replay, T = 64, N = 8", f"ingest gated_delta_rule T=64 {HEADS} N=8", ""),
    ("replay, T = 512, N = 8", f"ingest gated_delta_rule T=512 {HEADS} N=8", ""),
    ("replay, T = 2048, N = 16", f"ingest gated_delta_rule T=2048 {HEADS} N=16", ""),
    ("decode, 16 states of 128 x 128", "decode gated_delta_rule T=1 H=16 K=128 V=128 bfloat16", ""),
    ("decode, 1024 states", f"decode gated_delta_rule B=32 T=1 {HEADS}", ""),
    ("windows of sleep: B = 256, T = 24, 4 heads of 64", f"forward {WINDOWS}", ""),
    ("windows of sleep, forward and gradients", f"train {WINDOWS}", ""),
)  # fmt: skip
GPU_PEERS = (
    ("ours, prepared once", "{} x prepared once and N launches"),
    ("ours, Triton", "{} x one launch of Triton's"),
    ("ours, with readouts", "{} x our own with outputs"),
)


def gpu() -> Table:
    """Operators on an H200."""
    stored = rows_of(H200)
    table: Table = [("call", "ms", "x fla", "and against")]
    for says, case, instead in GPU_ROWS:
        row = stored[case, 1]
        others = [
            form.format(figure(p["ratio"]))
            for name, form in GPU_PEERS
            for p in row["peers"]
            if p["name"] == name and p["ratio"]
        ]
        fla = [ratio(p["ratio"]) for p in row["peers"] if p["name"] == "fla" and p["ratio"]]
        passes = (
            " (N launches)" if " N=" in case else " (its forward with outputs)" if case.startswith("ingest") else ""
        )
        table.append((says, figure(row["milliseconds"]), fla[0] + passes if fla else instead, ", ".join(others)))
    return table  # fmt: skip


def sleeps() -> Iterator[tuple[str, int, Row]]:
    """Name, batch and stored times of a sleep of N = 4 in one launch, microseconds."""
    for row in read_json(RESULTS / f"{H200_BLOCKS}.json")["times"]:
        if row["N"] == 4:
            yield {"rule 110": "Rule 110", "depo": "Depo"}[row["size"]], row["B"], row


def milliseconds(x: float) -> str:
    """Microseconds as milliseconds."""
    return figure(x / 1000)


def gpu_blocks() -> Table:
    """A sleep in one launch beside the modules, and both in CUDA graphs."""
    head = (
        "",
        "B",
        "one launch",
        "modules",
        "one launch, graph",
        "modules, graph",
        "one launch is ahead, no graph",
        "in graphs",
    )
    table: Table = [head]
    for size in ("Rule 110", "Depo"):
        for name, batch, x in sleeps():
            if name != size:
                continue
            ours, graph = x["ours"], x["ours, graph"]
            drifted = " (*)" if (size, batch) == ("Rule 110", 16) else ""
            table.append((
                name, str(batch), milliseconds(ours), milliseconds(x["modules"]) + drifted, milliseconds(graph),
                milliseconds(x["modules, graph"]), f"{ratio(x['modules'] / ours)} x{drifted}",
                f"{x['modules, graph'] / graph:.2f} x",
            ))  # fmt: skip
    return table


def gpu_sleep() -> Table:
    """A sleep at batches of 1 and 16."""
    table: Table = [
        ("sleep, N = 4, SleepLM in bfloat16", "ms", "x modules", "ms in a CUDA graph", "x modules in a CUDA graph")
    ]
    sizes = {"Rule 110": "Rule 110 (L = 24, d = 256, 4 blocks)", "Depo": "Depo (L = 75, d = 512, 10 blocks)"}
    for size, says in sizes.items():
        for name, batch, x in sleeps():
            if name == size and batch <= 16:
                table.append((
                    f"{says}, B = {batch}", milliseconds(x["ours"]), figure(x["modules"] / x["ours"]),
                    milliseconds(x["ours, graph"]), f"{x['modules, graph'] / x['ours, graph']:.2f}",
                ))  # fmt: skip
    return table


def numbers() -> Table:
    """README's eight rows."""
    core, card, stack = rows_of(ZEN4), rows_of(H200), rows_of(ZEN4_BLOCKS)
    forward = core[f"forward gated_delta_rule T=2048 {USUAL}", 1]
    train = core[f"train gated_delta_rule T=2048 {USUAL}", 1]
    decode = core[f"decode gated_delta_rule T=1 {USUAL}", 1]
    replay = core[f"ingest gated_delta_rule T=512 {USUAL} N=16", 1]
    sleep = stack["blocks rule 110 L=24 d=256 x4 B=64 N=4", 1]
    fast = card[f"forward gated_delta_rule T=8192 {HEADS}", 1]
    kda = card[f"forward kda T=8192 {HEADS}", 1]
    again = card[f"ingest gated_delta_rule T=64 {HEADS} N=8", 1]

    def line(says: str, row: Row, *peers: tuple[str, str]) -> tuple[str, str, str]:
        return says, figure(row["milliseconds"]), ", ".join(f"{times(row, p)} x {name}" for p, name in peers)

    both, fla = (("transformers", "transformers"), ("ggml", "ggml")), ("fla", "flash-linear-attention")
    modules = (("ours, modules", "the modules"), ("ours, compiled", "torch.compile"))
    prepared = ("ours, prepared once", "prepared once")
    return [
        ("work", "ms", "times as fast as"),
        line("one core: gated delta rule, T = 2048", forward, *both),
        line("one core: forward + backward, T = 2048", train, both[0]),
        line("one core: decode of one token", decode, *both),
        line("one core: replay of 512 tokens, N = 16", replay, *both),
        line("one core: a sleep, N = 4, batch of 64 (Rule 110's model)", sleep, *modules),
        line("H200: gated delta rule, T = 8192, bfloat16", fast, fla),
        line("H200: KDA, T = 8192, bfloat16", kda, fla),
        line("H200: replay of 64 tokens, N = 8, bfloat16", again, ("fla", f"N launches of {fla[1]}"), prepared),
    ]


TABLES: dict[str, Callable[[], Table]] = {
    "cpu": cpu, "cpu-blocks": cpu_blocks, "cpu-blocks-rate": cpu_blocks_rate, "cpu-peers": cpu_peers, "gpu": gpu,
    "gpu-blocks": gpu_blocks, "gpu-sleep": gpu_sleep, "numbers": numbers, "support": support,
}  # fmt: skip


def text_of(name: str) -> str:
    """A table as text, with an empty line before and after.

    Raises:
        KeyError: no table has this name.
    """
    head, *rows = TABLES[name]()
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n" + "".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) + "\n" for line in lines) + "\n"
    )


def written(page: str) -> str:
    """The text of a page with each of its tables written anew."""
    return MARKED.sub(lambda found: found.group(1) + text_of(found.group(2)) + found.group(3), page)


def pages() -> list[Path]:
    """README and the pages of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


if __name__ == "__main__":
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = written(before)
        if after != before:
            write_text(path, after)
            print(f"{path.relative_to(ROOT)}: {len(MARKED.findall(after))} tables")
