"""The training benchmark: equal text and batches for all methods, equal bits after a kill, and plain verdicts."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers", reason="transformers, whose Llama is trained, is not installed")

from leanops.bench import progress
from leanops.bench.convergence import corpus, experiment, summary, worker
from leanops.bench.convergence.experiment import Settings
from leanops.bench.convergence.methods import METHODS, state_bytes

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


def test_the_default_run_is_a_real_one():
    settings = Settings()
    assert not settings.proves_nothing
    with torch.device("meta"), contextlib.suppress(NotImplementedError):
        model = worker.make_model(dataclasses.replace(settings, device="meta"))
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 11e6
    assert settings.steps >= 400
    assert settings.points_of(settings.steps)[-1] == settings.steps
    assert Settings.quick().proves_nothing
