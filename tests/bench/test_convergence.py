"""The training benchmark: equal text and batches for all methods, equal bits after a kill, and plain verdicts."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("transformers", reason="transformers, whose Llama is trained, is not installed")

from leanops.bench import cli, progress
from leanops.bench.convergence import corpus, experiment, plot, summary, worker
from leanops.bench.convergence.experiment import Settings
from leanops.bench.convergence.methods import METHODS, state_bytes
from leanops.bench.convergence.results import TrainingResults, TrainingRow

TINY = Settings.quick(
    tokens=12 * 64, hidden=32, intermediate=48, heads=2, context=32, batch=2, rounds=((6, 2), (3, 1)),
    points=4, draws=4, test_windows=12, memory_steps=2,
)  # fmt: skip
BY_KEY = {m.key: m for m in METHODS}


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(TINY.threads)


@pytest.fixture(scope="module")
def text():
    return corpus.load()


# --- the text ---------------------------------------------------------------------------------------------------------


def test_a_file_belongs_to_a_part_by_its_path_alone():
    parts = {path: corpus.part_of(path) for path in ("shutil.py", "ssl.py", "inspect.py", "ast.py")}
    assert parts == {"shutil.py": "test", "ssl.py": "test", "inspect.py": "validation", "ast.py": "train"}


def test_text_is_whole_files_in_order_without_tests_and_generated_tables(tmp_path):
    names = ["shutil.py", "inspect.py", "b.py", "a.py", "test/x.py", "encodings/x.py", "_sysconfigdata_x.py", "a.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    assert [f.as_posix() for f in corpus.files(tmp_path)] == ["a.py", "b.py", "inspect.py", "shutil.py"]
    text = corpus.load(tmp_path)
    assert bytes(text.train) == b"# a.py\n\0# b.py\n\0"
    assert bytes(text.validation) == b"# inspect.py\n\0"
    assert bytes(text.test) == b"# shutil.py\n\0"
    assert text.facts().train == corpus.Size(files=2, bytes=16)
    (tmp_path / "b.py").write_text("# B.py\n")
    assert corpus.load(tmp_path).sha256 != text.sha256
    (tmp_path / "shutil.py").unlink()
    with pytest.raises(ValueError, match="no test text among"):
        corpus.load(tmp_path)


def test_the_librarys_text_is_large_enough_and_the_same_each_time(text):
    assert text.train.numel() > 3_000_000
    assert min(text.validation.numel(), text.test.numel()) > 100_000
    assert corpus.load().sha256 == text.sha256


def test_an_epoch_takes_every_window_once_and_a_batch_is_a_function_of_its_step():
    text = torch.arange(201, dtype=torch.uint8)
    batches = corpus.Batches(text, context=10, batch=4, seed=1)
    epoch = torch.cat([batches(step) for step in range(5)])
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 200, 10))
    assert torch.equal(epoch[:, 1:] - epoch[:, :-1], torch.ones(20, 10, dtype=torch.int64))
    again = corpus.Batches(text, context=10, batch=4, seed=1)
    for step in (7, 2, 5, 0):
        assert torch.equal(again(step), batches(step))
    assert not torch.equal(torch.cat([batches(step) for step in range(5, 10)]), epoch)
    assert not torch.equal(corpus.Batches(text, 10, 4, seed=2)(0), batches(0))


# --- training ---------------------------------------------------------------------------------------------------------


def train(training, until):
    while training.step < until:
        training.advance()
        if training.step % 3 == 0:
            training.curve.append([training.step, training.validation_loss(4)])
    return training


def tensors(value, name=""):
    """Every tensor in nested state, by its place."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: t for key, part in inner for k, t in tensors(part, f"{name}/{key}").items()}


@pytest.mark.parametrize("key", BY_KEY)
def test_a_run_that_goes_on_from_a_checkpoint_gives_the_same_bits(key, text, tmp_path):
    def begin():
        return worker.Training(TINY, BY_KEY[key], text, BY_KEY[key].rates[1], 12)

    whole = train(begin(), 12)
    train(begin(), 5).save(tmp_path / "checkpoint.pt")
    torch.manual_seed(99)
    resumed = begin()
    resumed.load(tmp_path / "checkpoint.pt")
    assert (resumed.step, resumed.resumed) == (5, 1)
    train(resumed, 12)
    assert resumed.losses == whole.losses
    assert resumed.curve == whole.curve
    assert resumed.state_bytes == whole.state_bytes > 0
    for part in ("model", "optimizer"):
        mine, theirs = (tensors(getattr(t, part).state_dict()) for t in (resumed, whole))
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), f"{part}{name}"
    assert resumed.test_losses() == whole.test_losses()


def test_every_method_starts_from_the_same_weights_and_sees_the_same_batches(text):
    first = {}
    for key, method in BY_KEY.items():
        training = worker.Training(TINY, method, text, 1e-3, 4)
        first[key] = [p.clone() for p in training.parameters], training.batches(3)
    for weights, batch in first.values():
        assert all(torch.equal(p, q) for p, q in zip(weights, first["adamw"][0], strict=True))
        assert torch.equal(batch, first["adamw"][1])


def test_each_method_learns(text):
    for key, lr in {"adamw": 3e-3, "adafactor": 0.1, "sm3-none": 0.03, "sm3-int8": 0.1, "sm3-lisa": 0.03}.items():
        training = train(worker.Training(TINY, BY_KEY[key], text, lr, 24), 24)
        assert training.losses[0] == pytest.approx(8.0, abs=0.1)
        assert training.losses[-1] < 7.0, key


def test_the_rate_warms_up_linearly_and_falls_to_a_tenth(text):
    training = worker.Training(TINY, BY_KEY["adamw"], text, 2.0, 40)
    rates = []
    for training.step in range(40):
        rates.append(training.rate())
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[22] == pytest.approx(0.55 * 2.0, rel=1e-3)
    assert 0.2 < rates[-1] < 0.21


def test_a_state_with_lisa_is_that_of_what_trains(text):
    kept = {}
    for key in ("sm3-none", "sm3-fp32", "sm3-lisa", "sm3-hft"):
        kept[key] = train(worker.Training(TINY, BY_KEY[key], text, 0.01, 12), 12).state_bytes
    assert kept["sm3-none"] < kept["sm3-hft"] < kept["sm3-lisa"] < kept["sm3-fp32"]
    # embeddings and head, 16 of 52 units here, and two blocks of four
    assert kept["sm3-lisa"] < 0.8 * kept["sm3-fp32"]


def test_state_bytes_count_shared_memory_once_and_whatever_nests():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([p], lr=0.1)
    shared = torch.zeros(10, dtype=torch.bfloat16)
    optimizer.state[p] = {"a": shared, "b": {"c": [shared[:5], torch.zeros(3, dtype=torch.int8)]}, "d": torch.empty(0)}
    assert state_bytes(optimizer) == 23


def worker_of(tmp_path, settings=TINY, key="adamw"):
    experiment.write_atomically(tmp_path / "run.json", json.dumps({"settings": dataclasses.asdict(settings)}).encode())
    lines = []
    return worker.Worker(tmp_path, BY_KEY[key], 0.0, lines.append, lambda: False), lines


def test_tuning_takes_the_best_on_and_a_diverged_rate_last(tmp_path, monkeypatch):
    adamw, _ = worker_of(tmp_path, dataclasses.replace(TINY, rounds=((6, 4), (3, 2))))
    found = {(0, 3e-4): 5.0, (0, 1e-3): None, (0, 3e-3): 4.0, (0, 1e-2): 4.5, (1, 3e-3): 3.5, (1, 1e-2): 3.0}
    asked = []
    monkeypatch.setattr(adamw, "_trial", lambda n, lr, steps: asked.append((n, lr, steps)) or found[n, lr])
    assert adamw.tune() == 1e-2
    assert asked == [(0, 3e-4, 2), (0, 1e-3, 2), (0, 3e-3, 2), (0, 1e-2, 2), (1, 3e-3, 4), (1, 1e-2, 4)]


def test_a_run_that_diverges_ends_and_says_so(tmp_path):
    adamw, lines = worker_of(tmp_path)
    adamw.memory()
    adamw.train(1e18)
    result = json.loads((tmp_path / "adamw" / "train.json").read_text())
    assert 0 < result["diverged"] <= 12
    assert result["losses"][-1] is None
    assert result["test_windows"] is None
    row = experiment.result(tmp_path / "adamw", BY_KEY["adamw"])
    assert row.test_bits is None
    assert "diverged at step" in " ".join(summary.cells(row))
    assert lines


# --- the whole run ----------------------------------------------------------------------------------------------------


def lock_is_free(folder):
    with (folder / "lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def wait(until, seconds=120.0):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


DRIVER = """
import json, sys
from pathlib import Path
from leanops.bench import progress
from leanops.bench.convergence import experiment
settings = experiment.Settings.load(Path(sys.argv[1]))
experiment.run(settings, "sm3-lisa", Path(sys.argv[1]), progress.Lines(sys.stderr), checkpoint_s=0)
"""
LONG = dataclasses.replace(TINY, tokens=120 * 64, points=6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbs: (results, folder)."""
    folder = tmp_path_factory.mktemp("whole")
    lines = io.StringIO()
    results = experiment.run(LONG, "sm3-lisa", folder, progress.Lines(lines))
    assert lines.getvalue().count("\n") == experiment.units(LONG)
    return results, folder


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param("command", marks=pytest.mark.ci), "worker"])
def test_a_killed_run_goes_on_to_the_same_bits(victim, whole, text, tmp_path):
    experiment.claim(tmp_path, experiment.identity(LONG, text))
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    if victim == "worker":
        (tmp_path / "lock").touch()
        command = experiment.command(tmp_path, BY_KEY["sm3-lisa"], 0)
    own = tmp_path / "sm3-lisa"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait(lambda: (own / "checkpoint.pt").exists() or process.poll() is not None)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait(lambda: lock_is_free(tmp_path))  # a worker whose command was killed ends by itself
    assert not (own / "train.json").exists()
    lines = io.StringIO()
    results = experiment.run(LONG, "sm3-lisa", tmp_path, progress.Lines(lines))
    assert "(kept)" in lines.getvalue()
    assert not (own / "checkpoint.pt").exists()
    (mine,), (theirs,) = results.rows, whole[0].rows
    assert mine.resumed == 1
    for name in ("lr", "losses", "curve", "test_windows", "state_bytes"):
        assert getattr(mine, name) == getattr(theirs, name), name


@pytest.mark.slow
def test_what_is_done_is_not_done_again(whole):
    lines = io.StringIO()
    results = experiment.run(LONG, "sm3-lisa", whole[1], progress.Lines(lines))
    assert lines.getvalue() == ""
    assert results.rows == whole[0].rows


@pytest.mark.slow
def test_a_folder_of_other_settings_or_versions_is_refused_by_name(whole):
    for settings in (dataclasses.replace(LONG, seed=7), dataclasses.replace(LONG, tokens=LONG.tokens + 64)):
        with pytest.raises(ValueError, match=r"cannot continue \(settings\.(seed: 0 -> 7|tokens: 7680 -> 7744)\)"):
            experiment.run(settings, "", whole[1], progress.Lines(io.StringIO()))
    found = json.loads((whole[1] / "run.json").read_text())
    other = json.loads(json.dumps(found))
    other["fingerprint"]["software"]["torch"] = "1.0"
    with pytest.raises(ValueError, match=r"fingerprint\.software\.torch: .* -> 1\.0"):
        experiment.claim(whole[1], other)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        experiment.run(TINY, "adamw", tmp_path, progress.Lines(io.StringIO()))
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_two_runs_do_not_share_a_folder(tmp_path):
    with experiment.locked(tmp_path), pytest.raises(ValueError, match="in use by another run"):
        experiment.run(TINY, "adamw", tmp_path, progress.Lines(io.StringIO()))


def test_a_worker_that_fails_is_one_line_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(
        experiment,
        "command",
        lambda *_: [sys.executable, "-c", "import sys; print('a\\nthe end', file=sys.stderr); sys.exit(3)"],
    )
    with pytest.raises(ValueError, match=r"adamw ended with status 3: the end \(see .*log.txt\)"):
        experiment.run(TINY, "adamw", tmp_path, progress.Lines(io.StringIO()))


# --- the command and its reports --------------------------------------------------------------------------------------


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


def test_the_default_run_is_a_real_one():
    settings = Settings()
    assert not settings.proves_nothing
    with torch.device("meta"), contextlib.suppress(NotImplementedError):
        model = worker.make_model(dataclasses.replace(settings, device="meta"))
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 11e6
    assert settings.steps >= 400
    assert settings.points_of(settings.steps)[-1] == settings.steps
    assert Settings.quick().proves_nothing


def test_labels_stay_apart_and_ticks_are_round():
    placed = plot.apart([10.0, 12.0, 11.0, 200.0, 201.0], bottom=205.0)
    order = sorted(placed)
    assert all(b - a >= 15.0 for a, b in itertools.pairwise(order))
    assert order[-1] <= 205.0
    assert placed[0] < placed[2] < placed[1]
    assert plot.ticks(0.0, 460.8) == [0.0, 100.0, 200.0, 300.0, 400.0]
    assert plot.ticks(2.31, 3.02) == [2.4, 2.6, 2.8, 3.0]


def test_every_method_has_a_colour_and_as_many_rates():
    assert set(plot._COLOURS) == set(BY_KEY)
    assert {len(m.rates) for m in METHODS} == {5}
    assert len({m.label for m in METHODS}) == len(METHODS)
