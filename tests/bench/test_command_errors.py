"""What the command line refuses, what it says of a failure, and the formats that every benchmark writes."""

from __future__ import annotations

import copy
import csv
import json
import math
from functools import partial
from pathlib import Path

import pytest

from leanops.bench import cli, measurement, mezo_step, plan, runner
from leanops.bench.convergence import summary
from leanops.bench.convergence.results import TrainingResults
from leanops.bench.results import Gate, OperatorResults, StepCase, load

PUBLISHED = Path(__file__).parents[2] / "docs" / "results" / "cpu" / "bench.json"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEANOPS_TRACEBACK", raising=False)
    return tmp_path


@pytest.fixture
def measured(monkeypatch):
    """``leanops bench`` without the measuring: what the published run found."""
    results = load(PUBLISHED, OperatorResults)
    monkeypatch.setattr(runner, "run", lambda *_: copy.deepcopy(results))
    return results


@pytest.fixture
def tiny(monkeypatch):
    model = partial(mezo_step.Transformer, vocabulary=64, width=32, layers=1, heads=2)
    monkeypatch.setattr(mezo_step, "Transformer", model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mezo-step --device cuda", "leanops mezo-step: --device cuda, but torch sees no CUDA device"),
        ("mezo-step zo_axpy_", "leanops: unrecognized arguments: zo_axpy_"),
        ("mezo-step --case x", "leanops: unrecognized arguments: --case x"),
        ("mezo-step --peers foreach", "no peer named foreach; there are MeZO eager (re-expressed); HiZOO eager"),
        ("bench zo_axpy_ --peers nosuch", "leanops bench: --peers: no peer named nosuch; there are mezo eager"),
        ("bench zo_axpy_ --peers alpha,randn", "no peer named randn; there are"),  # a peer of zo_noise_
        ("bench zo_axpy_ mezo-step", "no operator named mezo-step; there are "),
        ("bench zo_axpy_ --tokens 5", "leanops: unrecognized arguments: --tokens 5"),
        ("convergence --threads ²", "leanops convergence: argument --threads: must be one number, 1 or more, got ²"),
        ("bench --csv -", "leanops bench: --csv must be a file, got -; only --json writes to standard output"),
        ("bench --json - --html -", "--html must be a file, got -"),
        ("bench --markdown - --html new/page.html", "--markdown must be a file, got -"),
        ("mezo-step --csv -", "leanops mezo-step: --csv must be a file, got -"),
        ("bench --json a --csv b --html ./a", "each format needs a file of its own, got a and ./a"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(arguments.split()) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert message in error
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("option", ["--html", "--svg", "--markdown"])
def test_convergence_writes_no_file_named_minus(option, folder, capsys):
    pytest.importorskip("transformers", reason="convergence needs transformers")
    assert cli.main(["convergence", "--quick", "--json", "-", option, "-"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert f"{option} must be a file, got -" in error
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("command", "files"), [("bench", "bench.json and .html"), ("mezo-step", "mezo-step.json and")])
def test_help_names_the_files_that_are_written_by_default(command, files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert f"results/{files}" in capsys.readouterr().out


def test_a_failure_of_any_kind_is_one_line_and_its_traceback_can_be_had(folder, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("something\nof torch")

    monkeypatch.setattr(runner, "run", fail)
    assert cli.main(["bench", "--json", "-"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error == "leanops bench: RuntimeError: something of torch (LEANOPS_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("LEANOPS_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="something"):
        cli.main(["bench", "--json", "-"])


def test_the_error_of_a_wrong_row_is_strict_json(measured, folder, capsys):
    row = measured.rows[0]
    row.status, row.reason, row.gate = "wrong", "off", Gate(False, math.inf, 0.0, "reference", "off")
    for target in ("-", "r.json"):
        assert cli.main(["bench", "--json", target]) == 1
    out, _ = capsys.readouterr()
    texts = out.splitlines()[0], (folder / "r.json").read_text()
    for text in texts:
        results = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert results["rows"][0]["gate"] == {
            "passed": False, "error": None, "bound": 0.0, "against": "reference", "reason": "off"
        }  # fmt: skip
        assert results["rows"][1:] == measured.to_json()["rows"][1:]


def test_a_peer_is_found_by_a_name_with_a_space():
    (settings,) = captured(["zo_axpy_", "--peers", "torch foreach, ALPHA", "--dtype", "fp32, bf16"])
    assert settings.peers == ("torch foreach", "ALPHA")
    assert settings.dtypes == ("float32", "bfloat16")
    job = plan.plan(settings)[0]
    taken = measurement.Measurement(job, settings, plan.device_of(settings.device), {})._peers()
    assert [peer.label for peer in taken] == ["torch foreach", "torch.add alpha"]


def captured(arguments):
    """The settings with which ``leanops bench`` would measure."""
    found = []

    def stop(settings):
        found.append(settings)
        raise ValueError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "plan", stop)
        cli.main(["bench", *arguments])
    return found


@pytest.mark.parametrize("command", ["bench zo_noise_", "mezo-step"])
def test_a_run_is_planned_once(command, folder, monkeypatch):
    planned = []
    for module in (plan, mezo_step):
        monkeypatch.setattr(module, "check_wanted", lambda *_: planned.append(1))
    monkeypatch.setattr(runner.Session, "measure", lambda _: None)
    monkeypatch.setattr(mezo_step, "measure", lambda *_, **__: StepCase("float32", "gaussian", 1, 1, 1, 0.0, []))
    assert cli.main([*command.split(), "--dtype", "fp32", "--json", "-"]) == 0
    assert len(planned) == 1


def test_what_is_named_twice_is_measured_once():
    (settings,) = captured(["zo_axpy_", "--dtype", "fp32,bf16,float32", "--threads", "2,1,2"])
    assert (settings.dtypes, settings.threads) == (("float32", "bfloat16"), (2, 1))


def test_mezo_step_writes_what_the_others_write(tiny, folder, capsys):
    outputs = ["--json", "-", "--csv", "out/s.csv", "--html", "out/s.html", "--markdown", "out/s.md"]
    arguments = ["mezo-step", "--quick", "--dtype", "fp32,fp64", "--threads", "1", "--peers", "hizoo"]
    assert cli.main([*arguments, *outputs]) == 0
    out, error = capsys.readouterr()
    assert out.count("\n") == 1
    results = json.loads(out)
    assert "[2/2]" in error
    assert [case["dtype"] for case in results["cases"]] == ["float32", "float64"]
    names = [row["name"] for row in results["cases"][0]["rows"]]
    assert "HiZOO eager (re-expressed)" in names
    assert "MeZO eager (re-expressed)" not in names
    assert all(name in error for name in names)
    with (folder / "out" / "s.csv").open() as file:
        lines = list(csv.DictReader(file))
    rows = [(case, row) for case in results["cases"] for row in case["rows"]]
    for line, (case, row) in zip(lines, rows, strict=True):
        assert (line["dtype"], line["name"]) == (case["dtype"], row["name"])
        assert float(line["median_s"]) == row["median_s"]
        assert float(line["ratio"]) == row["ratio"]
    page, text = (folder / "out" / "s.html").read_text(), (folder / "out" / "s.md").read_text()
    assert page.count("<svg") == 4
    for name in names:
        assert name in page
        assert name in text


def test_mezo_step_writes_json_and_html_where_nothing_is_asked(tiny, folder, capsys):
    words = ["--quick", "--dtype", "bf16", "--threads", "1", "--peers", "none"]
    assert cli.main(["bench", "mezo-step", *words]) == 0  # as results written before name the command
    out, _ = capsys.readouterr()
    assert sorted(path.name for path in (folder / "results").iterdir()) == ["mezo-step.html", "mezo-step.json"]
    assert "two forward passes" in out
    assert "eager" not in out


def test_the_published_training_run_is_what_its_json_gives():
    results = load(PUBLISHED.parent / "convergence.json", TrainingResults)
    assert summary.markdown(results) == (PUBLISHED.parents[1] / "convergence.md").read_text()
