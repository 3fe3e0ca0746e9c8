"""The command of the training benchmark, its verdicts in words and its picture."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("transformers", reason="transformers, whose Llama is trained, is not installed")

from leanops.bench import cli
from leanops.bench.convergence import experiment, plot, summary
from leanops.bench.convergence.methods import METHODS
from leanops.bench.convergence.results import TrainingResults, TrainingRow


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "("], "argument --only: must be a regular expression, got (: missing )"),
        (["--only", "lion"], "--only matches none of adamw, adafactor, sm3-fp32"),
        (["--tokens", "100"], "--tokens must be at least 8192, got 100"),
        (["--threads", "1,2"], "--threads: must be one number"),
        (["--threads", "0"], "--threads: must be one number, 1 or more, got 0"),
        (["--seed", "-1"], "--seed must be in"),
        (["--csv", "x.csv"], "unrecognized arguments: --csv x.csv"),
        (["--seeds", "1,2"], "--seeds needs --rates"),
        (["--jobs", "2"], "--jobs needs --rates"),
        (["--quick", "--size", "small"], "--size small must not be given with --quick"),
        (["zo_axpy_"], "unrecognized arguments: zo_axpy_"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convergence", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert message in error
    assert "convergence: convergence" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_one_command_gives_table_json_picture_and_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["leanops", "convergence", "--quick"])
    arguments = ["--quick", "--threads", "1", "--tokens", "2048", "--only", "adamw|no momentum", "--folder", "f"]
    outputs = ["--json", "-", "--html", "out/c.html", "--svg", "out/c.svg", "--markdown", "out/c.md"]
    assert cli.main(["convergence", *arguments, *outputs]) == 0
    out, error = capsys.readouterr()
    results = json.loads(out)
    assert out.count("\n") == 1
    assert results["schema"] == TrainingResults.SCHEMA
    assert results["proves_nothing"]
    assert "PROVES NOTHING" in error
    assert "[1/32]" in error
    assert [row["key"] for row in results["rows"]] == ["adamw", "sm3-none"]
    adamw, none = results["rows"]
    assert adamw["state_bytes"] > 8 * adamw["parameters"]
    assert none["state_bytes_per_parameter"] < 0.2
    for row in results["rows"]:
        assert len(row["losses"]) == len(row["seconds"]) == results["steps"] == 8
        assert row["test_bits"] == pytest.approx(sum(row["test_windows"]) / len(row["test_windows"]))
        assert len(row["tuning"]) == 7
        assert row["lr"] in row["rates"]
        assert row["peak_bytes"] is None or row["peak_bytes"] > 4 * row["parameters"]
    assert none["against"]["test_bits"] == pytest.approx(none["test_bits"] - adamw["test_bits"])
    assert none["against"]["test_bits_low"] <= none["against"]["test_bits"] <= none["against"]["test_bits_high"]
    picture = (tmp_path / "out" / "c.svg").read_text()
    ElementTree.fromstring(picture)
    assert "AdamW (fused)" in picture
    assert "proves nothing" in picture
    page = (tmp_path / "out" / "c.html").read_text()
    assert picture.strip() in page
    assert not [mark for mark in ("<script", "<link", "<img", "src=", "@import", "url(") if mark in page]
    written = (tmp_path / "out" / "c.md").read_text()
    assert "`leanops convergence --quick`" in written
    assert "(c.svg)" in written
    assert "SM3, no momentum" in written


def row(label="SM3", loss=3.0, peak=100 << 20, state=100, step=0.1, windows=16):
    noise = [0.01 * math.sin(3.0 * i) for i in range(windows)]
    return TrainingRow(
        key="sm3-fp32", label=label, settings="", all_train=True, lr=0.1, rates=[0.1], edge=True, tuning=[],
        diverged=None, parameters=100, losses=[loss], curve=[(1, loss + 1), (2, loss)], train_bits=loss,
        test_bits=loss, test_windows=[loss + x for x in noise], seconds=[(step * (1 + x), 0.0) for x in noise],
        tokens_per_s=1.0 / step, tokens_per_s_quartiles=(1.0, 1.0), optimizer_s=0.01, forward_backward_s=step,
        peak_bytes=peak, state_bytes=state, state_bytes_per_parameter=1.0, resumed=0,
    )  # fmt: skip


def compared(own, base):
    return dataclasses.replace(own, against=experiment.against(own, base))


def test_losing_is_said_plainly_and_with_its_sign():
    base = row("AdamW")
    worse = compared(row(loss=3.05, peak=120 << 20, state=200, step=0.2), base)
    sentence = summary.verdict(worse, drift=0.0)
    lost = "held-out loss (+0.050 bits/byte), tokens/s (-50.0%), peak memory (+20 MiB), optimizer bytes (200% of"
    assert sentence.startswith(f"SM3, beside AdamW: worse in {lost}")
    assert "better" not in sentence
    assert "told apart" not in sentence
    assert summary.loss_difference(worse.against).startswith("+0.050 [")
    assert summary.loss_difference(worse.against).endswith("worse")
    better = compared(row(loss=2.95, peak=80 << 20, state=50, step=0.05), base)
    sentence = summary.verdict(better, drift=0.0)
    assert "worse" not in sentence
    assert "better in held-out loss (-0.050 bits/byte), tokens/s (+100.0%), peak memory (-20 MiB)" in sentence
    assert "50% of AdamW's" in sentence
    better.against_adafactor = experiment.against(better, row("Adafactor", loss=2.9))
    sentence = summary.verdict(better, drift=0.0)
    assert "beside Adafactor's: +0.050 [+0.050, +0.050] worse." in sentence


def test_what_is_within_the_noise_is_called_the_same():
    base = row("AdamW")
    own = compared(row(state=50, step=0.104), base)
    own.against = dataclasses.replace(own.against, test_bits=0.001, test_bits_low=-0.01, test_bits_high=0.01)
    sentence = summary.verdict(own, drift=0.06)
    assert "not told apart in held-out loss (+0.001 bits/byte), tokens/s (-3.8%), peak memory (+0 MiB)." in sentence
    assert "better in optimizer bytes (50%" in sentence
    assert summary.loss_difference(own.against).endswith("not told apart")


def test_a_diverged_method_loses():
    lost = dataclasses.replace(row(), diverged=7)
    assert "diverged at step 7: it loses" in summary.verdict(lost, drift=0.0)


def test_labels_stay_apart_and_ticks_are_round():
    placed = plot.apart([10.0, 12.0, 11.0, 200.0, 201.0], bottom=205.0)
    order = sorted(placed)
    assert all(b - a >= 15.0 for a, b in itertools.pairwise(order))
    assert order[-1] <= 205.0
    assert placed[0] < placed[2] < placed[1]
    assert plot.ticks(0.0, 460.8) == [0.0, 100.0, 200.0, 300.0, 400.0]
    assert plot.ticks(2.31, 3.02) == [2.4, 2.6, 2.8, 3.0]


def test_every_method_has_a_colour_and_as_many_rates():
    assert set(plot._COLOURS) == {m.key for m in METHODS}
    assert {len(m.rates) for m in METHODS} == {5}
    assert len({m.label for m in METHODS}) == len(METHODS)
