"""``leanops convergence``: one language model trained by each method, from the same weights on the same bytes.

A Llama of 10.8M parameters learns the standard library's source text byte by byte. A process for each method measures
peak memory, then chooses the learning rate, then trains. Finished work is kept in a folder, from which a killed run
continues and gives the same bits.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leanops import _native, _registry, info
from leanops.autotune import fingerprint
from leanops.autotune.measure import unpaired_ratio
from leanops.bench import memory
from leanops.bench.compare import differences
from leanops.bench.convergence import corpus
from leanops.bench.convergence.methods import BASELINE, METHODS, Method
from leanops.bench.convergence.process import last_line, run_worker
from leanops.bench.convergence.results import Against, TrainingResults, TrainingRow, Trial
from leanops.bench.convergence.settings import Settings
from leanops.bench.progress import Progress
from leanops.bench.results import header
from leanops.bench.typed_json import from_json

CHECKPOINT_S = 120.0


def chosen(only: str, methods: Sequence[Method] = METHODS) -> list[Method]:
    """The methods whose key or label matches somewhere."""
    try:
        matches = re.compile(only).search
    except re.error as error:
        raise ValueError(f"leanops convergence: --only must be a regular expression, got {only}: {error}") from None
    found = [m for m in methods if matches(m.key) or matches(m.label)]
    if not found:
        raise ValueError(f"leanops convergence: --only matches none of {', '.join(m.key for m in methods)}, got {only}")
    return found


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a killed process leaves the whole new content or what was there before."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def identity(settings: Settings, text: corpus.Text, schema: str = TrainingResults.SCHEMA) -> dict[str, Any]:
    """All that must be the same when a run is continued."""
    import leanops.optim

    here, optim = Path(__file__).parent, Path(leanops.optim.__file__).parent
    sources = {
        "leanops.bench": [here / f"{name}.py" for name in ("methods", "corpus", "worker")],
        "leanops.optim": [*optim.rglob("*.py")],
        "operators": [*Path(_native.__file__).parent.glob("sm3/*.py"), *_native.FOLDER.glob("*.so")],
    }
    hashes = {name: fingerprint.source_hash(files) for name, files in sources.items()}
    mark: dict[str, Any] = fingerprint.fingerprint(settings.device, hashes)
    mark["software"] = {**mark["software"], "transformers": fingerprint.package_version("transformers")}
    whole = {"schema": schema, "settings": asdict(settings), "text": asdict(text.facts()), "fingerprint": mark}
    return dict(json.loads(json.dumps(whole)))  # lists for tuples, as a file gives them back


def claim(folder: Path, wanted: dict[str, Any]) -> None:
    """Write the identity of this run into an empty folder, or check that the folder's run has the same one."""
    path = folder / "run.json"
    if not path.exists():
        if any(p.name != "lock" for p in folder.iterdir()):
            raise ValueError(f"leanops convergence: {folder} holds something else; give another --folder")
        write_atomically(path, json.dumps(wanted, indent=1).encode())
        return
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"leanops convergence: {path} is not JSON: {error}") from None
    if lines := differences(found, wanted):
        shown = "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")
        raise ValueError(
            f"leanops convergence: {folder} holds a run that this one cannot continue ({shown}); "
            "give another --folder, or delete that one"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keeps a second run out of the folder. The worker gets the descriptor, since it may outlive this process."""
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    try:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"leanops convergence: {folder} is in use by another run") from None
        yield descriptor
    finally:
        os.close(descriptor)


def command(folder: Path, method: Method, checkpoint_s: float = CHECKPOINT_S) -> list[str]:
    worker = [sys.executable, "-m", "leanops.bench.convergence.worker"]
    return [*worker, str(folder.resolve()), method.key, str(checkpoint_s)]


def units(settings: Settings) -> int:
    """Lines that a worker writes: its memory, each trial of a learning rate, each point of the curve."""
    return 1 + sum(rates for _, rates in settings.rounds) + len(settings.points_of(settings.steps))


def work(folder: Path, method: Method, settings: Settings, progress: Progress, lock: int, checkpoint_s: float) -> None:
    """Train one method in a process of its own."""
    own = folder / method.key
    own.mkdir(exist_ok=True)
    log, units_done = own / "log.txt", 0

    def count(line: str) -> None:
        nonlocal units_done
        progress.step(f"{method.label}: {line}")
        units_done += 1

    status = run_worker(command(folder, method, checkpoint_s), log, lock, count)
    if status or not (own / "train.json").exists():
        end = f"ended with status {status}: {last_line(log)} (see {log})"
        raise ValueError(f"leanops convergence: {method.key} {end}")
    for _ in range(units(settings) - units_done):
        progress.step(f"{method.label}: stopped early")


def run(
    settings: Settings,
    only: str,
    folder: Path,
    progress: Progress,
    argv: Sequence[str] = (),
    checkpoint_s: float = CHECKPOINT_S,
) -> TrainingResults:
    """Train the chosen methods that the folder lacks. The results are of all methods in the folder."""
    settings.check()
    methods = chosen(only)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        wanted = identity(settings, corpus.load())
    finally:
        torch.set_num_threads(before)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as lock:
        claim(folder, wanted)
        left = [m for m in methods if not (folder / m.key / "train.json").exists()]
        progress.start(len(left) * units(settings))
        for method in left:
            work(folder, method, settings, progress, lock, checkpoint_s)
        return collect(folder, wanted, argv)


# --- the results ----------------------------------------------------------------------------------------------------


def collect(folder: Path, wanted: dict[str, Any], argv: Sequence[str] = ()) -> TrainingResults:
    """The results of all methods that the folder has."""
    rows = [result(folder / m.key, m) for m in METHODS if (folder / m.key / "train.json").exists()]
    good = {row.key: row for row in rows if not row.diverged}
    for row in rows:
        row.against = _against(row, good, BASELINE)
        row.against_adafactor = _against(row, good, "adafactor")
    settings = Settings.load(folder)
    device = torch.device(settings.device)
    same_work = [row.forward_backward_s for row in rows if row.all_train and row.forward_backward_s]
    serving = {spec.name: info.serving(spec, device.type) for spec in _registry.specs()}
    return TrainingResults(
        **{**header(device, argv), "fingerprint": wanted["fingerprint"]},
        settings=settings,
        text=from_json(corpus.Facts, wanted["text"], "text"),
        sm3_served_by=serving.get("sm3_step_", "nothing"),
        proves_nothing=settings.proves_nothing,
        steps=settings.steps,
        parameters=rows[0].parameters if rows else None,
        baseline=BASELINE,
        peak_how=memory.HOW[device.type],
        drift=max(same_work) / min(same_work) - 1 if same_work else None,
        rows=rows,
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def result(own: Path, method: Method) -> TrainingRow:
    """One method's row from its files."""
    train = _read(own / "train.json")
    steps = np.asarray([whole for whole, _ in train["seconds"]])
    optimizer = np.asarray([part for _, part in train["seconds"]])
    tail = train["losses"][-max(1, len(train["losses"]) // 20) :]
    tokens = train["tokens_per_step"]
    fast, slow = (float(tokens / np.quantile(steps, q)) for q in (0.25, 0.75))
    return TrainingRow(
        key=method.key,
        label=method.label,
        settings=method.settings,
        all_train=method.all_train,
        lr=train["lr"],
        rates=list(method.rates),
        edge=train["lr"] in (min(method.rates), max(method.rates)),
        tuning=[from_json(Trial, _read(path), path.name) for path in sorted(own.glob("tune-*.json"))],
        diverged=train["diverged"],
        parameters=train["parameters"],
        losses=train["losses"],
        curve=[(step, bits) for step, bits in train["curve"]],
        train_bits=None if train["diverged"] else float(np.mean(tail)),
        test_bits=None if train["diverged"] else float(np.mean(train["test_windows"])),
        test_windows=train["test_windows"],
        seconds=[(whole, part) for whole, part in train["seconds"]],
        tokens_per_s=float(tokens / np.median(steps)),
        tokens_per_s_quartiles=(slow, fast),
        optimizer_s=float(np.median(optimizer)),
        forward_backward_s=float(np.median(steps - optimizer)),
        peak_bytes=_read(own / "memory.json")["peak_bytes"],
        state_bytes=train["state_bytes"],
        state_bytes_per_parameter=train["state_bytes"] / train["parameters"],
        resumed=train["resumed"],
    )


def _against(row: TrainingRow, good: dict[str, TrainingRow], key: str) -> Against | None:
    comparable = key in good and row.key in good and row.key not in (BASELINE, key)
    return against(row, good[key]) if comparable else None


def against(row: TrainingRow, base: TrainingRow) -> Against:
    """How a method that did not diverge compares with another."""
    difference = np.asarray(row.test_windows) - np.asarray(base.test_windows)
    picks = np.random.default_rng(0).integers(0, len(difference), (4000, len(difference)))
    low, high = np.quantile(difference[picks].mean(axis=1), (0.025, 0.975))
    speed = unpaired_ratio([s for s, _ in base.seconds], [s for s, _ in row.seconds])
    known = row.peak_bytes is not None and base.peak_bytes is not None
    return Against(
        test_bits=float(difference.mean()),
        test_bits_low=float(low),
        test_bits_high=float(high),
        tokens_per_s=speed.value,
        tokens_per_s_low=speed.low,
        tokens_per_s_high=speed.high,
        peak_bytes=row.peak_bytes - base.peak_bytes if known else None,  # type: ignore[operator]
        state_bytes=row.state_bytes - base.state_bytes,
        state_ratio=row.state_bytes / base.state_bytes,
    )
