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
