"""Reports of `bench` that nothing was measured for."""

from dataclasses import fields

from sleepkern.measure.bench import BenchRow, PeerRow, Report


def bench_report(shares, peers, gigabytes=None):
    """A Report of one row a share, the last with all peers, the others with one less each."""
    rows = []
    for i, share in enumerate(shares):
        here = peers[: len(peers) - (len(shares) - 1 - i)]
        timed = [{"name": name, "milliseconds": 2.0, "ratio": 2.0 + j, "error": 0.0, "note": None}
                 for j, name in enumerate(here)]  # fmt: skip
        rows.append(_filled(BenchRow, case=f"case {i}", rule="kda", milliseconds=1.0, share_of_peak=share,
                            peers=tuple(_filled(PeerRow, **peer) for peer in timed)))  # fmt: skip
    where = {"versions": {"sleepkern": "0"}, "device": "a device", "threads": 1, "date": "2026-11-23T00:00"}
    return Report(where, 100.0, gigabytes, tuple(rows))


def _filled(made, **given):
    return made(**{field.name: given.get(field.name, 0) for field in fields(made)})


ENVIRONMENT = {
    "versions": {"sleepkern": "0", "torch": "2"}, "device": "AMD EPYC", "threads": 1, "isa": None,
    "date": "2026-11-23T00:00:00+00:00",
}  # fmt: skip


def case_row(op, shape, milliseconds, passes=1, peers=(), error=1e-7, gigabytes_per_second=2.5):
    """A row of `bench` with figures that belong to its time."""
    timed = milliseconds is not None
    tokens = shape.B * shape.T * passes
    return BenchRow(
        case=f"{op} kda B={shape.B} T={shape.T} N={passes}", op=op, rule="kda", dtype="float32", shape=shape,
        passes=passes, method="auto", cached=False, tokens=tokens, threads=1, backend="cpu", kernel="C++ avx2",
        error=error, tolerance=2e-5, milliseconds=milliseconds, best_milliseconds=0.9 * milliseconds if timed else None,
        turns=7, tokens_per_second=1e3 * tokens / milliseconds if timed else None, gflops=40.3 if timed else None,
        share_of_peak=0.4, gigabytes_per_second=gigabytes_per_second if timed else None, share_of_bandwidth=None,
        peers=peers,
    )  # fmt: skip


def peer_row(name, milliseconds, ratio, note=None):
    """A peer on such a row."""
    return PeerRow(name=name, milliseconds=milliseconds, turns=7, ratio=ratio, error=1e-6, note=note)
