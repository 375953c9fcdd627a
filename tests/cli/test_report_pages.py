"""`--report`: pages of HTML that load nothing, and that show everything which was measured."""

import importlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.reports import ENVIRONMENT, case_row, peer_row
from typer.testing import CliRunner

from sleepkern.cli import app
from sleepkern.cli.report import check, write_bench, write_verify
from sleepkern.cli.report.bench_page import bench_page, summary
from sleepkern.cli.report.page import number
from sleepkern.cli.report.verify_page import verify_page
from sleepkern.measure import Report
from sleepkern.testing import Shape
from sleepkern.testing.verify import Row

bench_module = importlib.import_module("sleepkern.cli.bench")
verify_module = importlib.import_module("sleepkern.cli.verify")

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """A page's elements in order, its text, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words, self.loads = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.loads += re.findall(r"(?:url\(|@import )([^)\s]*)", text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [found[name] for name in ("src", "href", "xlink:href", "srcset") if name in found]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def timed_rows():
    """Cases for every plot; one of them is lost to a peer."""
    peers = (
        peer_row("transformers", 3.0, 3.0),
        peer_row("fla", 0.5, 0.5),
        peer_row("ggml", None, None, "is [not] here"),
    )
    modules = (peer_row("ours, modules", 6.0, 2.0),)
    return (
        *(case_row("forward", Shape(T=T, H=4, HV=4), milliseconds=T / 300, peers=peers) for T in (512, 2048)),
        *(case_row("decode", Shape(B=B, T=1), milliseconds=0.1 * B, peers=peers[:1]) for B in (1, 4, 16)),
        *(case_row("ingest", Shape(T=64), passes=N, milliseconds=1.5 * N) for N in (4, 16)),
        case_row("blocks", Shape(T=24), milliseconds=3.0, gigabytes_per_second=None, peers=modules),
    )  # fmt: skip


def report_of(*rows, bandwidth=None):
    return Report(ENVIRONMENT, 90.5, bandwidth, rows)


@pytest.mark.parametrize("bandwidth", [None, 3e3])
def test_the_bench_page_has_every_case_number_and_plot(bandwidth):
    report = report_of(*timed_rows(), bandwidth=bandwidth)
    page = Page(bench_page(report))
    assert loads_nothing(page)
    for row in report.rows:
        values = (row.milliseconds, row.best_milliseconds, row.tokens_per_second, row.gflops, row.gigabytes_per_second)
        for text in (row.case, row.kernel, *(number(value).text for value in values)):
            assert text in page.text
        for peer in row.peers:
            assert peer.name in page.text
            assert peer.milliseconds is None or number(peer.milliseconds).text in page.text
    plots = page.all("svg")
    assert {plot["data-plot"] for plot in plots} == {
        "throughput", "decode", "passes", "roofline", "ratios-forward", "ratios-decode", "ratios-blocks"
    }  # fmt: skip
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names)) and {place[1:] for place in page.loads if place[0] == "#"} <= set(names)
    assert all(plot["role"] == "img" and len(plot["aria-label"]) > 40 for plot in plots)
    assert len(page.all("figcaption")) == len(plots)
    assert "Not drawn" not in page.text and "AMD EPYC" in page.text and "torch" in page.text


def loads_nothing(page):
    """Only what the page itself holds is referred to."""
    return all(place.startswith(("#", "data:")) for place in page.loads)


def test_a_lost_comparison_is_in_the_summary_and_in_the_table():
    report = report_of(*timed_rows())
    text = Page(bench_page(report)).text
    assert "faster than the peer in 5 of 7 comparisons and slower in 2, at worst 0.50 x as fast as fla" in text
    assert text.count("slower 0.50") == 2
    assert "ggml: is [not] here (2 cases)" in text


def test_a_wrong_case_is_shown_as_wrong():
    report = report_of(case_row("forward", Shape(), error=0.25, milliseconds=None))
    page = Page(bench_page(report))
    assert "Failed. 0 of 1 cases have the right result" in page.text and "WRONG – – 7" in page.text
    assert "2.5e-01 / 2e-05" in page.text
    assert page.all("svg") == [] and "Not drawn" in page.text


def test_an_empty_report_is_a_page():
    page = Page(bench_page(report_of()))
    assert summary(report_of()) in page.text and page.text.count("--suite") == 4
    page = Page(verify_page([], ENVIRONMENT, False))
    assert "Nothing was compared." in page.text and "Failed." in page.text


def test_special_characters_are_escaped():
    name = "<script>alert('&')</script>"
    row = case_row(
        "forward", Shape(), milliseconds=1.0, peers=(peer_row(name, 2.0, 2.0), peer_row("x", None, None, name))
    )
    row = replace(row, case=f'{name} $x^2$ "quoted"', kernel=name)
    text = bench_page(replace(report_of(row), environment={**ENVIRONMENT, "device": name}))
    page = Page(text)
    assert page.all("script") == [] and name in page.text and row.case in page.text
    failed = Row(name, name, "float32", "rule", name, "", 1e-5, {"o": 1.0})
    page = Page(verify_page([failed], {**ENVIRONMENT, "device": name}, False))
    assert page.all("script") == [] and name in page.text


VERIFIED = [
    Row("cpu", "kda", "float32", "rule", "T=17", "slow decay", 2e-5, {"o": 4e-6, "dk": 5e-6}),
    Row("cpu", "kda", "bfloat16", "rule", "T=17", "no decay", 1e-2, {"o": 3.21e-3}),
    Row("chunked", "gla", "float32", "step", "one token", "slow decay", 2e-5, {"o": 1e-6, "state": 7.7e-4}),
    Row("chunked", "gla", "bfloat16", "step", "T=9", "slow decay", 1e-2, {"o": float("nan")}),
    Row("cuda", "gla", "float32", "step", "T=9", "slow decay", 2e-5, {}, "runs on a GPU"),
]


def test_the_verify_page_has_every_check_and_shows_failures():
    page = Page(verify_page(VERIFIED, ENVIRONMENT, False))
    assert loads_nothing(page)
    for row in VERIFIED[:4]:
        for text in (row.backend, row.rule, row.shape, row.variant, *(f"{error:.1e}" for error in row.errors.values())):
            assert text in page.text
    assert "4 comparisons with the float64 reference, 2 above the limit" in page.text
    assert "2e-05 for float32, 1e-02 for bfloat16" in page.text
    assert "cpu kda 0.250 0.321 2" in page.text
    assert "chunked gla 38 FAIL inf FAIL 2" in page.text
    assert page.text.count("one token slow decay FAIL 38 2e-05") == 2  # among the failed, and among all
    assert "cuda: runs on a GPU (1)" in page.text
    assert [dict(page.all("h1")[0])] == [{}] and len(page.all("caption")) == len(page.all("table")) == 4


def test_a_page_takes_the_place_of_the_old_one_whole(tmp_path):
    (tmp_path / "bench.html").write_text("old")
    write_bench(report_of(*timed_rows()), tmp_path)
    write_verify(VERIFIED, "cpu", False, tmp_path)
    write_bench(report_of(), None)
    assert {path.name for path in tmp_path.iterdir()} == {"bench.html", "verify.html"}
    assert (tmp_path / "bench.html").read_text().rstrip().endswith("</html>")


def test_the_templates_are_part_of_the_package():
    """pyproject.toml names the endings; MANIFEST.in takes what it names."""
    folder = Path(check.__code__.co_filename).parent
    endings = {path.suffix for path in folder.iterdir() if path.is_file()} - {".py"}
    assert endings == {".html", ".css"}
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"sleepkern.cli.report" = ["*.html", "*.css"]' in text


@pytest.mark.parametrize("command", ["bench", "verify"])
def test_a_folder_that_cannot_be_written_to_is_wrong_usage_before_the_work(monkeypatch, tmp_path, command):
    for module in (bench_module, verify_module):
        monkeypatch.setattr(module, "run", lambda *args, **options: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "taken" / f"{command}.html").mkdir(parents=True)
    for place, reason in (("file", "Not a directory"), ("file/x", "Not a directory"), ("taken", "Is a directory")):
        result = CliRunner().invoke(app, [command, "--report", str(tmp_path / place)], env={"COLUMNS": "300"})
        assert result.exit_code == 2, result.output
        assert "Invalid value for --report: got" in result.output and reason in result.output
    result = CliRunner().invoke(app, [command, "--report", ""], env={"COLUMNS": "300"})
    assert result.exit_code == 2 and "got an empty name" in result.output
    check(None, "bench.html")


def test_both_commands_write_their_page(tmp_path):
    small = ["--rule", "gla", "--T", "9", "--H", "1", "--K", "8", "--V", "8"]
    for command, more in (("verify", ["--backend", "chunked"]), ("bench", ["--quick"])):
        result = CliRunner().invoke(
            app,
            [command, *small, *more, "--report", str(tmp_path / "out"), "--json", str(tmp_path / f"{command}.json")],
        )
        assert result.exit_code == 0, result.output
        text = Page((tmp_path / "out" / f"{command}.html").read_text()).text
        for row in json.loads((tmp_path / f"{command}.json").read_text())["rows"]:
            assert row.get("case", row["rule"]) in text
            assert number(row.get("milliseconds")).text in text
