"""``leanops bench convergence``: one language model trained by each method, from the same weights on the same bytes.

A Llama of 10.8M parameters learns the standard library's source text byte by byte. For each method, in a process of its
own: peak memory, then the learning rate, then the run. What is done lies in a folder, from which a run that was killed
goes on to the same bits.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
from leanops.bench.runner import Progress, device_of

SCHEMA = "leanops-convergence/1"
CHECKPOINT_S = 120.0


@dataclass(frozen=True)
class Settings:
    """All that the numbers depend on, besides machine, software and text."""

    tokens: int = 460_800
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    hidden: int = 384
    intermediate: int = 1024
    layers: int = 6
    heads: int = 6
    context: int = 256
    batch: int = 4
    warmup: float = 0.1  # of the steps, linear
    floor: float = 0.1  # of the peak rate, where the cosine ends
    clip: float = 1.0  # global norm of the gradients
    rounds: tuple[tuple[int, int], ...] = ((8, 5), (4, 2))  # (a run's part, rates that take part), round by round
    draws: int = 15  # of blocks or matrices in a run, for the methods that select
    points: int = 20  # of the validation curve
    curve_windows: int = 24
    tuning_windows: int = 64
    test_windows: int = 256
    memory_steps: int = 12

    @classmethod
    def quick(cls, **given: Any) -> Settings:
        """The same path through the code with a small model and few steps. It proves nothing."""
        small = {
            "tokens": 8192, "hidden": 64, "intermediate": 160, "layers": 4, "heads": 4, "context": 64, "points": 8,
            "curve_windows": 8, "tuning_windows": 8, "test_windows": 32, "memory_steps": 3,
        }  # fmt: skip
        return cls(**(small | given))

    @classmethod
    def load(cls, folder: Path) -> Settings:
        given = json.loads((folder / "run.json").read_text())["settings"]
        return cls(**{**given, "rounds": tuple((part, rates) for part, rates in given["rounds"])})

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.context)

    @property
    def proves_nothing(self) -> bool:
        """Too small a model or too few steps for the order of the methods to mean anything."""
        return self.hidden < Settings.hidden or self.steps < 200

    def points_of(self, steps: int) -> list[int]:
        """After which steps the validation loss is taken."""
        return sorted({-(-steps * (i + 1) // self.points) for i in range(self.points)})

    def check(self) -> None:
        least = max(part for part, _ in self.rounds) * self.batch * self.context
        if self.tokens < least:
            raise ValueError(f"bench: convergence: --tokens must be at least {least}, got {self.tokens}")
        if self.threads < 1:
            raise ValueError(f"bench: convergence: --threads must be 1 or more, got {self.threads}")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"bench: convergence: --seed must be in [0, 2^32), got {self.seed}")
        device_of(self.device)
        if fingerprint.package_version("transformers") is None:
            raise ValueError("bench: convergence needs the package transformers: pip install transformers")


def chosen(only: str) -> list[Method]:
    """The methods whose key or label matches somewhere."""
    try:
        matches = re.compile(only).search
    except re.error as error:
        raise ValueError(f"bench: convergence: --only is no regular expression: {error}") from None
    found = [m for m in METHODS if matches(m.key) or matches(m.label)]
    if not found:
        raise ValueError(f"bench: convergence: --only matches none of {', '.join(m.key for m in METHODS)}, got {only}")
    return found


def write_atomically(path: Path, content: bytes) -> None:
    """Whole or not at all, whenever the process is killed."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def identity(settings: Settings, text: corpus.Text) -> dict[str, Any]:
    """What two parts of one run must have in common."""
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
    whole = {"schema": SCHEMA, "settings": asdict(settings), "text": text.facts(), "fingerprint": mark}
    return dict(json.loads(json.dumps(whole)))  # as it is read back


def claim(folder: Path, wanted: dict[str, Any]) -> None:
    """Make the folder this run's, or see that it is."""
    path = folder / "run.json"
    if not path.exists():
        if any(p.name != "lock" for p in folder.iterdir()):
            raise ValueError(f"bench: convergence: {folder} holds something else; give another --folder")
        write_atomically(path, json.dumps(wanted, indent=1).encode())
        return
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"bench: convergence: {path} is not JSON: {error}") from None
    if lines := differences(found, wanted):
        shown = "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")
        raise ValueError(
            f"bench: convergence: {folder} holds a run that this one cannot continue ({shown}); "
            "give another --folder, or delete that one"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keeps a second run out of the folder. The descriptor is handed to the worker, which may outlive this process."""
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    try:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"bench: convergence: {folder} is in use by another run") from None
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
    """One method, in a process of its own."""
    own = folder / method.key
    own.mkdir(exist_ok=True)
    log, said = own / "log.txt", 0
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command(folder, method, checkpoint_s),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            pass_fds=(lock,) if sys.platform != "win32" else (),
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                progress.step(f"{method.label}: {line.strip()}")
                said += 1
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()  # it writes a checkpoint first
                process.wait()
    if status or not (own / "train.json").exists():
        last = (log.read_text().strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"bench: convergence: {method.key} ended with status {status}: {last} (see {log})")
    for _ in range(units(settings) - said):
        progress.step(f"{method.label}: stopped early")


def run(
    settings: Settings,
    only: str,
    folder: Path,
    progress: Progress,
    argv: Sequence[str] = (),
    checkpoint_s: float = CHECKPOINT_S,
) -> dict[str, Any]:
    """What is not in the folder yet, and then all that is, as the JSON file holds it."""
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


def collect(folder: Path, wanted: dict[str, Any], argv: Sequence[str] = ()) -> dict[str, Any]:
    """The results of all methods that are done in the folder."""
    rows = [result(folder / m.key, m) for m in METHODS if (folder / m.key / "train.json").exists()]
    good = {row["key"]: row for row in rows if not row["diverged"]}
    settings = Settings.load(folder)
    for row in rows:
        for name, key in (("against", BASELINE), ("against_adafactor", "adafactor")):
            comparable = key in good and row["key"] in good and row["key"] not in (BASELINE, key)
            row[name] = against(row, good[key]) if comparable else None
    usual = [row["forward_backward_s"] for row in rows if row["all_train"] and row["forward_backward_s"]]
    serving = {spec.name: info.serving(spec, torch.device(settings.device).type) for spec in _registry.specs()}
    return {
        **wanted,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "leanops": _native.version(),
        "command": list(argv),
        "backends": {n: {"loaded": b.loaded, "detail": b.detail} for n, b in _native.backends().items()},
        "sm3_served_by": serving.get("sm3_step_", "nothing"),
        "proves_nothing": settings.proves_nothing,
        "steps": settings.steps,
        "parameters": rows[0]["parameters"] if rows else None,
        "baseline": BASELINE,
        "peak_how": memory.HOW[torch.device(settings.device).type],
        "drift": max(usual) / min(usual) - 1 if usual else None,
        "rows": rows,
    }


def result(own: Path, method: Method) -> dict[str, Any]:
    """One method's row from its files."""
    train = json.loads((own / "train.json").read_text())
    trials = [json.loads(path.read_text()) for path in sorted(own.glob("tune-*.json"))]
    steps = np.asarray([whole for whole, _ in train["seconds"]])
    optimizer = np.asarray([part for _, part in train["seconds"]])
    tail = train["losses"][-max(1, len(train["losses"]) // 20) :]
    tokens = train["tokens_per_step"]
    quick, slow = (float(tokens / np.quantile(steps, q)) for q in (0.25, 0.75))
    return {
        "key": method.key,
        "label": method.label,
        "settings": method.settings,
        "all_train": method.all_train,
        "lr": train["lr"],
        "rates": list(method.rates),
        "edge": train["lr"] in (min(method.rates), max(method.rates)),
        "tuning": trials,
        "diverged": train["diverged"],
        "parameters": train["parameters"],
        "losses": train["losses"],  # bits a byte, one a step
        "curve": train["curve"],  # [step, bits a byte of the validation text]
        "train_bits": None if train["diverged"] else float(np.mean(tail)),
        "test_bits": None if train["diverged"] else float(np.mean(train["test_windows"])),
        "test_windows": train["test_windows"],
        "seconds": train["seconds"],  # [the step, the optimizer's part of it]
        "tokens_per_s": float(tokens / np.median(steps)),
        "tokens_per_s_quartiles": [slow, quick],
        "optimizer_s": float(np.median(optimizer)),
        "forward_backward_s": float(np.median(steps - optimizer)),
        "peak_bytes": json.loads((own / "memory.json").read_text())["peak_bytes"],
        "state_bytes": train["state_bytes"],
        "state_bytes_per_parameter": train["state_bytes"] / train["parameters"],
        "resumed": train["resumed"],
    }


def against(row: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Differences to the baseline: the row's value minus the baseline's, and ratios of the row's to the baseline's.

    The interval of the loss is a bootstrap over the test text's windows, paired; it does not cover other seeds.
    """
    difference = np.asarray(row["test_windows"]) - np.asarray(base["test_windows"])
    picks = np.random.default_rng(0).integers(0, len(difference), (4000, len(difference)))
    low, high = np.quantile(difference[picks].mean(axis=1), (0.025, 0.975))
    speed = unpaired_ratio([s for s, _ in base["seconds"]], [s for s, _ in row["seconds"]])
    peaks = row["peak_bytes"], base["peak_bytes"]
    return {
        "test_bits": float(difference.mean()),
        "test_bits_low": float(low),
        "test_bits_high": float(high),
        "tokens_per_s": speed.value,
        "tokens_per_s_low": speed.low,
        "tokens_per_s_high": speed.high,
        "peak_bytes": None if None in peaks else peaks[0] - peaks[1],
        "state_bytes": row["state_bytes"] - base["state_bytes"],
        "state_ratio": row["state_bytes"] / base["state_bytes"],
    }
