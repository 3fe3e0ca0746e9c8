"""`leanops convergence --rates`: every method at every rate with every seed, and the table of means and spreads."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest

pytest.importorskip("transformers", reason="transformers, whose Llama is trained, is not installed")

import torch

from leanops.bench import cli, progress
from leanops.bench.convergence import grid
from leanops.bench.convergence.grid import GridResults, GridRow
from leanops.bench.convergence.methods import GRID_METHODS, METHODS
from leanops.bench.convergence.settings import Settings
from leanops.bench.results import load


def test_a_row_has_mean_and_standard_deviation_and_no_mean_where_a_run_diverged():
    row = GridRow("a", "A", 0.1, [0, 1, 2], [3.0, 4.0, 5.0])
    assert (row.mean, row.spread) == (4.0, 1.0)
    assert GridRow("a", "A", 0.1, [0, 1], [3.0, None]).mean is None
    assert GridRow("a", "A", 0.1, [0], [3.0]).spread == 0.0


def test_the_methods_differ_in_momentum_and_first_steps_alone():
    w = torch.nn.Parameter(torch.ones(3))
    options = {m.key: m.make([w], 0.1).defaults for m in GRID_METHODS if m.key != "adamw"}
    seen = {key: [o[name] for name in ("momentum", "momentum_on", "cover_warmup")] for key, o in options.items()}
    assert seen == {
        "sm3-none": [0.0, "update", 0],
        "sm3-fp32": [0.9, "update", 0],
        "sm3-none-covers": [0.0, "update", 10],
        "sm3-fp32-covers": [0.9, "update", 10],
        "sm3-gradient": [0.9, "gradient_unpublished", 0],
        "sm3-gradient-covers": [0.9, "gradient_unpublished", 10],
    }
    assert {m.key for m in GRID_METHODS} & {m.key for m in METHODS} == {"adamw", "sm3-none", "sm3-fp32"}


def test_the_small_run_has_400_steps_of_a_model_of_860_thousand_parameters():
    from leanops.bench.convergence.worker import make_model

    settings = Settings.small()
    assert settings.steps == 400
    assert sum(p.numel() for p in make_model(settings).parameters()) == 857_216


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "0.1,0"], "--rates: must be positive numbers, got 0.1,0"),
        (["--rates", "high"], "--rates: must be positive numbers, got high"),
        (["--rates", "0.1", "--seeds", "-1"], "--seeds: must be numbers, 0 or more, got -1"),
        (["--rates", "0.1", "--seeds", str(2**32)], "--seed must be in"),
        (["--rates", "0.1", "--seed", "3"], "--seed must not be given with --rates: the seeds are those of --seeds"),
        (["--rates", "0.1", "--svg", "x.svg"], "--svg must not be given with --rates"),
        (["--rates", "0.1", "--only", "int8"], "--only matches none of adamw, sm3-fp32, sm3-none, sm3-none-covers"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convergence", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_one_command_trains_all_and_another_adds_to_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["leanops", "convergence", "--rates", "0.1"])
    arguments = ["convergence", "--quick", "--threads", "1", "--tokens", "8192", "--only", "gradient$", "--folder", "f"]
    assert cli.main([*arguments, "--rates", "0.1", "--json", "a.json", "--markdown", "a.md"]) == 0
    first = load("a.json", GridResults)
    assert [(row.key, row.rate, row.seeds) for row in first.rows] == [("sm3-gradient", 0.1, [0])]
    assert math.isfinite(first.rows[0].test_bits[0])
    assert "| SM3, momentum fp32 of the gradient |" in (tmp_path / "a.md").read_text()
    lines = io.StringIO()
    settings = first.settings
    work = grid.Work(settings, "gradient$", [0, 1], [0.1], jobs=2)
    both = grid.run(work, tmp_path / "f", progress.Lines(lines))
    assert lines.getvalue().count("\n") == 1  # of the new seed
    assert both.rows[0].test_bits[0] == first.rows[0].test_bits[0]
    assert both.rows[0].test_bits[1] != both.rows[0].test_bits[0]
    shown = io.StringIO()
    grid.print_table(both, shown)
    assert "±" in shown.getvalue() or "+-" in shown.getvalue()
    assert json.loads((tmp_path / "f" / "sm3-gradient" / "1-0.1.json").read_text())["parameters"] == both.parameters
