"""Output is readable on a terminal of 60 to 200 columns, and in an encoding that lacks its characters."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from leanops.bench import compare, progress, report, terminal, text
from leanops.bench.convergence import summary
from leanops.bench.convergence.results import TrainingResults
from leanops.bench.results import OperatorResults, StepResults, load
from leanops.bench.terminal import Entry, Table

CPU = Path(__file__).parents[2] / "docs" / "results" / "cpu"
WIDTHS = (60, 80, 100, 120, 200)


def _operators(name):
    return lambda width: report.operator_lines(load(CPU / name, OperatorResults), width)


def _compared(width):
    base, new = (load(CPU / name, OperatorResults) for name in ("bench.json", "zo-avx2.json"))
    return compare.lines(base, new, compare.compare(base, new), width)


SHOWN = {
    "bench": _operators("bench.json"),
    "sm3": _operators("sm3.json"),
    "mezo-step": lambda width: report.step_lines(load(CPU / "mezo-step.json", StepResults), width),
    "convergence": lambda width: summary.lines(load(CPU / "convergence.json", TrainingResults), width),
    "compare": _compared,
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", SHOWN)
def test_no_line_is_too_long_and_no_word_is_broken(name, width):
    whole = {word for line in SHOWN[name](None) for word in line.text.split()}
    whole |= {f"{word}," for word in whole} | {"columns", "that", "need", "a", "wider", "terminal:"}
    for line in SHOWN[name](width):
        assert len(line.text) <= width, line.text
        assert whole.issuperset(line.text.split()), line.text


@pytest.mark.parametrize("width", WIDTHS)
def test_every_case_is_shown_with_its_time_and_its_peers_below_it(width):
    results = load(CPU / "bench.json", OperatorResults)
    text = "\n".join(line.text for line in report.operator_lines(results, width))
    flat = " ".join(text.split())
    for row in results.rows:
        if row.status == "ok":
            assert row.case in flat
            for peer in row.peers:
                if peer.available:
                    assert f"{peer.ratio:.2f}x {peer.name}" in flat
    assert re.search(r"^case +dtype +thr +time", text, re.MULTILINE)


def test_a_wider_terminal_shows_more_columns_and_says_what_a_narrow_one_leaves_out():
    results = load(CPU / "bench.json", OperatorResults)
    counts = []
    for width in WIDTHS:
        lines = [line.text for line in report.operator_lines(results, width)]
        headings = [line for line in lines if line.startswith("case")]
        counts.append(min(sum(f" {title}" in heading for title in report.COLUMNS[1:]) for heading in headings))
        left_out = " ".join(lines).split("columns that need a wider terminal:")
        assert (len(left_out) == 2) is (counts[-1] < len(report.COLUMNS) - 1)
    assert counts == sorted(counts)
    assert counts[0] >= 4
    assert counts[-1] == len(report.COLUMNS) - 1


def test_a_name_too_long_for_its_column_stands_on_a_line_of_its_own():
    table = Table(("case", "time", "rate", "peak"), ("case", "time", "rate", "peak"), [
        Entry(("a-name-of-thirty-characters-xx", "1.25 ms", "12 GB/s", "0.0 MiB"), ["2.00x a peer [1.90, 2.10]"])
    ])  # fmt: skip
    lines = [line.text for line in table.lines(40)]
    assert lines == [
        "case",
        "    time     rate     peak",
        "a-name-of-thirty-characters-xx",
        "    1.25 ms  12 GB/s  0.0 MiB",
        "    2.00x a peer [1.90, 2.10]",
    ]
    assert len(table.lines(80)) == 3


def test_a_long_line_of_info_hangs_under_its_value():
    texts = ["  cpu          a processor with a long name", "               avx2 fma f16c avx512f", "operators"]
    assert [line.text for line in terminal.hanging(texts, 34)] == [
        "  cpu          a processor with a",
        "               long name",
        "               avx2 fma f16c",
        "               avx512f",
        "operators",
    ]
    assert [line.text for line in terminal.hanging(texts, None)] == texts


def test_a_single_thread_is_no_threads():
    results = load(CPU / "bench.json", OperatorResults)
    single, *_ = [roof for roof in results.roofline if roof.threads == 1]
    results.roofline = [single, dataclasses.replace(single, threads=2)]
    assert [line.split(":")[0] for line in text.rooflines(results)[:2]] == ["roofline, 1 thread", "roofline, 2 threads"]


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        raise OSError("no descriptor")


def test_the_width_is_the_terminals(monkeypatch):
    monkeypatch.setenv("COLUMNS", "93")
    assert terminal.width_of(Terminal()) == 93
    monkeypatch.delenv("COLUMNS")
    assert terminal.width_of(Terminal()) == 80
    assert terminal.width_of(io.StringIO()) is None
    assert terminal.width_of(None) is None


def test_styles_change_no_text(monkeypatch):
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setenv("COLUMNS", "60")
    stream, results = Terminal(), load(CPU / "bench.json", OperatorResults)
    report.print_operators(results, stream)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert plain.splitlines() == [line.text for line in report.operator_lines(results, 60)]


@pytest.mark.parametrize(
    ("encoding", "written"),
    [("ascii", "1 us +-2 x ?"), ("gbk", "1 us ±2 × 文"), ("cp932", "1 us ±2 × 文"), ("utf-8", "1 µs ±2 × 文")],
)
def test_a_character_that_the_encoding_lacks_becomes_a_plain_one(encoding, written):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    terminal.make_printable(stream)
    print("1 µs ±2 × 文", file=stream, flush=True)
    assert raw.getvalue().decode(encoding).strip() == written


BENCH = """
import copy, pathlib, sys
from leanops.bench import cli, runner
from leanops.bench.results import OperatorResults, load
results = load(sys.argv[1], OperatorResults)
results.rows[0].peers[0].reason = "µ ± 文"
runner.run = lambda *_: results
sys.exit(cli.main(["bench", "--json", "out/r.json", "--csv", "out/r.csv", "--html", "out/r.html",
                   "--markdown", "out/r.md"]))
"""


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "cp932"])
def test_a_terminal_that_lacks_characters_takes_no_result_along(encoding, tmp_path):
    environment = os.environ | {
        "PYTHONIOENCODING": encoding,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    (tmp_path / "run.py").write_text(BENCH, encoding="utf-8")
    command = [sys.executable, "run.py", str(CPU / "bench.json")]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, timeout=170)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode(encoding)
    assert "zo_axpy_" in shown
    assert " us " in shown
    assert ("±" in shown) is (encoding != "ascii")
    assert ("+-" in shown) is (encoding == "ascii")
    for name in ("r.json", "r.csv", "r.html", "r.md"):
        content = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "zo_axpy_" in content
    assert "±" in (tmp_path / "out" / "r.md").read_text(encoding="utf-8")


def test_progress_in_a_file_is_a_line_now_and_then():
    seconds = iter([0.0, 0.0, 3.0, 12.0, 13.0, 23.0])
    stream = io.StringIO()
    lines = progress.Lines(stream, every_s=10.0, now=lambda: next(seconds))
    lines.start(5)
    for i in range(5):
        lines.step(f"part {i}")
    assert stream.getvalue().splitlines() == ["[3/5]    12 s  part 2", "[5/5]    23 s  part 4"]


def test_a_row_is_not_changed_by_being_shown():
    results = load(CPU / "bench.json", OperatorResults)
    before = dataclasses.asdict(results)
    report.operator_lines(results, 60)
    assert dataclasses.asdict(results) == before
