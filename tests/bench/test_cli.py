"""The command line as a user meets it: in a process of its own, in an empty folder."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from leanops import _native, info
from leanops.bench import cli, html, report, runner, text
from leanops.bench.results import Gate, OperatorResults, PeerResult, Row, StepResults, load
from leanops.bench.typed_json import from_json
from leanops.optim import MeZO


def leanops(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "leanops.bench.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=170, env=os.environ | environment)


def one_line_error(status, out, error):
    assert status == 2
    assert out == ""
    assert error.startswith("leanops")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "zo_nothing"], "no operator named zo_nothing; there are "),
        (["bench", "--dtype", "int8"], "argument --dtype: must be a list of fp32, bf16, fp16 and fp64, got int8"),
        (["bench", "--dtype", ","], "argument --dtype: must be a list of fp32, bf16, fp16 and fp64, got ,"),
        (["bench", "--threads", "two"], "argument --threads: must be numbers, 1 or more, got two"),
        (["bench", "--threads", "1,0"], "argument --threads: must be numbers, 1 or more, got 1,0"),
        (["bench", "--case", "("], "argument --case: must be a regular expression, got (: missing )"),
        (["bench", "--case", "matches nothing at all"], "no case matches"),
        (["bench", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["bench", "--json", "."], "is a folder"),
        (["compare", "only-one.json"], "required: NEW.json"),
        (["compare", "a.json", "b.json"], "No such file"),
        (["replay", "a.safetensors", "b.zolog", "-o", "c.safetensors"], "no file a.safetensors"),
        (["tune"], "invalid choice: 'tune'"),
        ([], "required: command"),
    ],
)
def test_an_error_is_one_line_on_standard_error_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = cli.main(arguments)
    assert message in one_line_error(status, *capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_process_of_its_own(tmp_path):
    done = leanops("compare", "a.json", "b.json", cwd=tmp_path)
    assert "No such file" in one_line_error(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_takes_no_more_is_no_traceback(unbuffered, tmp_path):
    line = f"{sys.executable} -m leanops.bench.cli info"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}

    def run(rest):
        command = ["bash", "-c", f"{line} {rest}"]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=170, env=environment)

    full = run("> /dev/full")
    assert "No space left" in one_line_error(full.returncode, full.stdout, full.stderr)
    closed = run(">&-")
    assert (closed.returncode, closed.stderr) == (0, "")
    gone = run("| true; exit ${PIPESTATUS[0]}")  # the reader leaves before the first line
    assert (gone.returncode, gone.stderr) == (141, "")  # as of a program that SIGPIPE ends


def test_info_says_who_serves_each_operator_and_why_a_backend_is_absent(tmp_path):
    done = leanops("info", "--json", cwd=tmp_path, LEANOPS_DISABLE="cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["backends"]["cpu"] == {
        "loaded": False,
        "state": "absent",
        "detail": "switched off by LEANOPS_DISABLE",
    }
    assert found["operators"]["zo_axpy_"]["cpu"] == "reference"
    for name in ("cpu", "cuda", "triton", "nvrtc"):
        assert found["backends"][name]["detail"]
    assert found["software"]["torch"]
    assert found["cpu"]["name"]
    assert found["cpu"]["cores"] >= 1
    plain = leanops("info", cwd=tmp_path, LEANOPS_DISABLE="cpu")
    assert plain.returncode == 0
    assert "absent: switched off by LEANOPS_DISABLE" in plain.stdout
    assert re.search(r"zo_axpy_ +cpu: reference", plain.stdout)


@pytest.mark.parametrize(
    ("built", "version", "disabled", "line"),
    [
        (True, None, "", "compiled in: this torch (2.0) is built without CUDA"),
        (True, "13.0", "", "compiled in: torch sees no CUDA device"),
        (False, None, "", "absent: the reason"),
        (True, None, "cuda", "absent: the reason"),
    ],
)
def test_info_says_of_a_cuda_library_that_it_is_compiled_in(built, version, disabled, line, monkeypatch):
    found = dict(_native.backends()) | {"cuda": _native.Backend("cuda", "absent", "the reason")}
    monkeypatch.setattr(_native, "backends", lambda: found)
    monkeypatch.setattr(_native, "build_report", lambda: {"cuda": {"built": built}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch, "__version__", "2.0")
    monkeypatch.setenv("LEANOPS_DISABLE", disabled)
    assert f"  cuda         {line}" in info.lines(info.collect())


@pytest.mark.parametrize("option", ["--json", "--csv", "--html", "--markdown"])
def test_a_folder_that_is_missing_is_made(option, tmp_path, monkeypatch):
    published = load(Path(__file__).parents[2] / "docs" / "results" / "cpu" / "sm3-small.json", OperatorResults)
    monkeypatch.setattr(runner, "run", lambda *_: published)
    assert cli.main(["bench", option, str(tmp_path / "a" / "b" / "results")]) == 0
    assert (tmp_path / "a" / "b" / "results").stat().st_size > 1000


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One small real run: (results, folder, process)."""
    if not _native.backends()["cpu"].loaded:
        pytest.skip(f"needs the CPU library: {_native.backends()['cpu'].detail}")
    folder = tmp_path_factory.mktemp("bench")
    done = leanops(
        "bench", "zo_axpy_into_", "--quick", "--dtype", "bf16", "--threads", 1, "--case", "gaussian-16M",
        "--json", "-", "--csv", "out/r.csv", "--html", "out/r.html", "--peers", "alpha",
        "--markdown", "out/r.md", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder, done


def test_json_on_standard_output_is_only_json_and_complete(measured):
    results, _, done = measured
    assert done.stdout.count("\n") == 1
    assert results["schema"] == OperatorResults.SCHEMA
    assert set(results) == {
        "schema", "created", "leanops", "command", "settings", "fingerprint", "backends", "roofline", "noise_floor",
        "drift", "peak_how", "rows",
    }  # fmt: skip
    (row,) = results["rows"]
    assert set(row) == {f.name for f in dataclasses.fields(Row)}
    assert row["key"] == "zo_axpy_into_/gaussian-16M/bfloat16/cpu/1t"
    assert row["status"] == "ok", row["reason"]
    assert row["elements"] == 1 << 24
    assert len(row["samples_s"]) >= 5
    assert row["low_s"] <= row["median_s"] <= row["high_s"]
    assert row["ns_per_element"] == pytest.approx(row["median_s"] * 1e9 / row["elements"])
    assert row["gb_per_s"] == pytest.approx(4 * row["elements"] / row["median_s"] * 1e-9)
    assert row["bound"] == "memory (copy)"
    floor = 4 * row["elements"] / results["roofline"][0]["bandwidth"]["copy"]
    assert row["percent_of_roofline"] == pytest.approx(100 * floor / row["median_s"])
    (peer,) = row["peers"]
    assert set(peer) == {f.name for f in dataclasses.fields(PeerResult)}
    assert peer["name"] == "torch.add alpha"
    assert len(peer["samples_s"]) == len(row["samples_s"])
    assert results["fingerprint"]["sources"]["zo_axpy_into_"]
    # one pass takes no memory to speak of; where the high-water mark cannot be reset, nothing is claimed
    assert row["peak_bytes"] is None or row["peak_bytes"] < 8 << 20


def test_a_run_compared_with_itself_is_the_same(measured, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(measured[0]))
    done = leanops("compare", "r.json", "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 slower, 0 faster, 1 the same" in done.stdout


def test_csv_has_a_line_for_each_peer(measured):
    results, folder, _ = measured
    with (folder / "out" / "r.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert float(line["median_s"]) == results["rows"][0]["median_s"]
    assert float(line["peer_ratio"]) == results["rows"][0]["peers"][0]["ratio"]


def test_markdown_says_machine_command_spread_and_ratio(measured):
    results, folder, _ = measured
    written = (folder / "out" / "r.md").read_text(encoding="utf-8")
    row = from_json(Row, results["rows"][0])
    assert "leanops bench zo_axpy_into_ --quick" in written
    assert f"torch {results['fingerprint']['software']['torch']}" in written
    (line,) = [line for line in written.splitlines() if line.startswith("| gaussian-16M")]
    assert text.spread(row) in line
    assert f"{row.peers[0].ratio:.2f}x" in line
    assert line.count("|") == 10


def test_a_mezo_step_is_measured_beside_its_forward_passes(tmp_path):
    from leanops.bench import markdown, mezo_step

    tiny = mezo_step.Transformer(vocabulary=64, width=32, layers=1, heads=2)
    case = mezo_step.measure(torch.float32, 1, tokens=32, rounds=3, model=tiny)
    names = [row.name for row in case.rows]
    assert names[0] == "two forward passes"
    assert case.rows[0].ratio == 1.0
    assert all(row.median_s > 0 for row in case.rows)
    rounds = {len(row.samples_s) for row in case.rows}
    assert len(rounds) == 1  # the rows take turns
    assert min(rounds) >= 3
    mark = {"cpu": {"name": "a processor"}, "software": {"torch": torch.__version__}}
    results = StepResults(command=["x", "mezo-step"], created="2026-01-01", fingerprint=mark, cases=[case])
    markdown.write_steps(results, str(tmp_path / "step.md"))
    written = (tmp_path / "step.md").read_text(encoding="utf-8")
    assert written.startswith("`leanops mezo-step`, 2026-01-01")
    assert all(name in written for name in names)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.outside = set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.outside += [(tag, name, value) for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_html_needs_nothing_from_outside(measured):
    written = (measured[1] / "out" / "r.html").read_text(encoding="utf-8")
    page = Links()
    page.feed(written)
    assert page.outside == []
    assert {"svg", "table"} <= page.tags
    assert not {"script", "link", "iframe", "img", "object"} & page.tags
    assert "url(" not in written
    assert "@import" not in written
    assert len(written) < 5 << 20
    plots = re.findall(r"<svg.*?</svg>", written, re.S)
    assert len(plots) == 3
    for plot in plots:
        ElementTree.fromstring(plot)


def test_a_wrong_row_has_no_time_in_any_report(measured, capsys, tmp_path):
    results = from_json(OperatorResults, measured[0])
    gate = Gate(False, 0.5, 0.0, "reference", "off")
    results.rows = [Row("op/<case>", "wrong", "zo_axpy_", "<case>", "float32", reason="off by <b>", gate=gate)]
    page = html.operators(results)
    assert "WRONG" in page
    assert "off by &lt;b&gt;" in page
    assert "<svg" not in page
    report.print_operators(results, sys.stdout)
    lines = [line for line in capsys.readouterr().out.splitlines() if "<case>" in line]
    assert lines
    assert not re.search(r"\d (ms|µs|s)\b|GB/s|%", lines[0])


def test_replay_gives_the_bits_of_the_run_and_a_bad_log_leaves_nothing(tmp_path, monkeypatch, capsys):
    files = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(7, 3)
    files.save_file(dict(model.named_parameters()), "base.safetensors")
    optimizer = MeZO(model.parameters(), lr=1e-2, seed=5, model=model)
    x = torch.randn(4, 7)
    for _ in range(3):
        optimizer.step(lambda: model(x).square().mean())
    optimizer.log.save("run.zolog")
    assert cli.main(["replay", "base.safetensors", "run.zolog", "-o", "end.safetensors"]) == 0
    assert capsys.readouterr() == ("wrote end.safetensors\n", "")  # in no time, so no line of progress
    end = files.load_file("end.safetensors")
    for name, p in model.named_parameters():
        assert torch.equal(end[name], p)
    there = sorted(tmp_path.iterdir())
    for arguments, message in (
        (["-o", "run.zolog"], "out must be another file than the log, got run.zolog"),
        (["-o", "."], "Is a directory: '.'"),
        (["-o", "missing/end.safetensors"], "No such file or directory: 'missing/end.safetensors'"),
        (["-o", "other.safetensors", "--name", "weight"], "--name must be LOG=BASE, got weight"),
        (["-o", "other.safetensors", "--name", "typo=weight"], "names must be of parameters of the log, got typo"),
    ):
        status = cli.main(["replay", "base.safetensors", "run.zolog", *arguments])
        assert message in one_line_error(status, *capsys.readouterr())
    good = (tmp_path / "run.zolog").read_bytes()
    for bad in (b"no log", good[:-16], good[:-20] + bytes([good[-20] ^ 1]) + good[-19:]):
        (tmp_path / "run.zolog").write_bytes(bad)
        status = cli.main(["replay", "base.safetensors", "run.zolog", "-o", "other.safetensors"])
        one_line_error(status, *capsys.readouterr())
    assert sorted(tmp_path.iterdir()) == there


def test_replay_maps_names_and_tells_of_an_unfinished_log_in_one_line(tmp_path, monkeypatch, capsys):
    files = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(7, 3)
    renamed = {"head.weight": model.weight.detach(), "head.bias": model.bias.detach()}
    files.save_file(renamed, "base.safetensors")
    optimizer = MeZO(model.parameters(), lr=1e-2, model=model, log_file="run.zolog")
    for _ in range(2):
        optimizer.step(lambda: model(torch.ones(7)).square().mean())
    names = ["--name", "weight=head.weight", "--name", "bias=head.bias"]
    assert cli.main(["replay", "base.safetensors", "run.zolog", "-o", "end.safetensors", *names]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "close" in line]
    assert told == ["leanops: run.zolog: the run did not close its log; 2 steps were recovered"]
    end = files.load_file("end.safetensors")
    assert torch.equal(end["head.weight"], model.weight)
    assert torch.equal(end["head.bias"], model.bias)
