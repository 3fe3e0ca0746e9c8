"""``leanops convergence --rates``: every method at every learning rate with several seeds, without tuning.

A process trains one method with one seed, rate after rate. What is done lies in a folder; the same command goes on, and
one with further rates, seeds or methods adds to it.

    python -m leanops.bench.convergence.grid FOLDER METHOD SEED RATE...
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from leanops import _registry, info
from leanops.bench import terminal, text
from leanops.bench.convergence import corpus
from leanops.bench.convergence.experiment import chosen, claim, identity, locked, write_atomically
from leanops.bench.convergence.methods import GRID_METHODS, Method
from leanops.bench.convergence.process import last_line, run_worker
from leanops.bench.convergence.settings import Settings
from leanops.bench.progress import Progress
from leanops.bench.report import write_text
from leanops.bench.results import Results, header
from leanops.bench.terminal import Entry, Line, Table
from leanops.bench.typed_json import from_json


@dataclass
class GridRow:
    """A method at a rate. Losses of the held-out text in bits a byte, one for each seed; null where a run diverged."""

    key: str
    label: str
    rate: float
    seeds: list[int]
    test_bits: list[float | None]

    @property
    def mean(self) -> float | None:
        known = [b for b in self.test_bits if b is not None]
        return statistics.fmean(known) if len(known) == len(self.seeds) else None

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds, of a sample; 0 for one seed."""
        known = [b for b in self.test_bits if b is not None]
        return statistics.stdev(known) if len(known) > 1 else 0.0


@dataclass(kw_only=True)
class GridResults(Results):
    SCHEMA = "leanops-convergence-grid/1"

    settings: Settings
    text: corpus.Facts
    sm3_served_by: str
    steps: int
    parameters: int
    rows: list[GridRow] = field(default_factory=list)


# --- the runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    settings: Settings
    only: str
    seeds: Sequence[int]
    rates: Sequence[float]
    jobs: int = 1  # processes at the same time


def _place(folder: Path, key: str, seed: int, rate: float) -> Path:
    return folder / key / f"{seed}-{rate:g}.json"


def run(work: Work, folder: Path, progress: Progress, argv: Sequence[str] = ()) -> GridResults:
    """Train what is not in the folder yet. The results are those of the work's methods, seeds and rates."""
    settings, seeds, rates = work.settings, work.seeds, work.rates
    methods = chosen(work.only, GRID_METHODS)
    wanted = identity(settings, corpus.load(), GridResults.SCHEMA)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as lock:
        claim(folder, wanted)
        left = [
            (m, seed, missing)
            for seed in seeds
            for m in methods
            if (missing := [r for r in rates if not _place(folder, m.key, seed, r).exists()])
        ]
        progress.start(sum(len(missing) for *_, missing in left))
        one_at_a_time = threading.Lock()
        with ThreadPoolExecutor(work.jobs) as pool:
            for future in [pool.submit(_train, folder, *unit, progress, one_at_a_time, lock) for unit in left]:
                future.result()
    rows = [
        GridRow(m.key, m.label, rate, list(seeds), [_bits(folder, m, seed, rate) for seed in seeds])
        for m in methods
        for rate in rates
    ]
    device = torch.device(settings.device)
    return GridResults(
        **{**header(device, argv), "fingerprint": wanted["fingerprint"]},
        settings=settings,
        text=from_json(corpus.Facts, wanted["text"], "text"),
        sm3_served_by=info.serving(_registry.spec("sm3_step_"), device.type),
        steps=settings.steps,
        parameters=_read(folder, methods[0], seeds[0], rates[0])["parameters"],
        rows=rows,
    )


def _read(folder: Path, method: Method, seed: int, rate: float) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_place(folder, method.key, seed, rate).read_text(encoding="utf-8"))
    return found


def _bits(folder: Path, method: Method, seed: int, rate: float) -> float | None:
    bits: float | None = _read(folder, method, seed, rate)["test_bits"]
    return bits


def _train(
    folder: Path, method: Method, seed: int, rates: Sequence[float], progress: Progress, one: threading.Lock, lock: int
) -> None:
    (folder / method.key).mkdir(exist_ok=True)
    log = folder / method.key / f"{seed}.txt"
    command = [sys.executable, "-m", "leanops.bench.convergence.grid", str(folder.resolve()), method.key, str(seed)]

    def show(line: str) -> None:
        with one:
            progress.step(f"{method.label}, seed {seed}: {line}")

    if status := run_worker([*command, *map(str, rates)], log, lock, show):
        end = f"ended with status {status}: {last_line(log)} (see {log})"
        raise ValueError(f"convergence: {method.key} with seed {seed} {end}")


def main(folder: str, key: str, seed: str, *rates: str) -> int:
    from leanops.bench.convergence.worker import Training, prepare

    parent = os.getppid()
    settings = replace(Settings.load(Path(folder)), seed=int(seed))
    method = {m.key: m for m in GRID_METHODS}[key]
    prepare(settings)
    whole = corpus.load()
    for rate in map(float, rates):
        training = Training(settings, method, whole, rate, settings.steps)
        while not training.done:
            if os.getppid() != parent:  # nobody waits for the result
                return 1
            training.advance()
        windows = [] if training.diverged else training.test_losses()
        result = {
            "test_bits": sum(windows) / len(windows) if windows else None,
            "diverged": training.step if training.diverged else None,
            "losses": [x if math.isfinite(x) else None for x in training.losses],
            "parameters": sum(p.numel() for p in training.parameters),
        }
        place = _place(Path(folder), key, settings.seed, rate)
        write_atomically(place, json.dumps(result).encode())
        bits = result["test_bits"]
        print(f"rate {rate:g}: " + ("diverged" if bits is None else f"{bits:.3f} bits a byte"), flush=True)
    return 0


# --- their report -----------------------------------------------------------------------------------------------------


def _cell(row: GridRow) -> str:
    if row.mean is None:
        count = sum(b is None for b in row.test_bits)
        return f"{count} of {len(row.seeds)} diverged"
    return f"{row.mean:.3f} ± {row.spread:.3f}"


def _table(results: GridResults) -> Table:
    """A line for each method, a column for each rate."""
    rates = list(dict.fromkeys(row.rate for row in results.rows))
    titles = ("method", *(f"{rate:g}" for rate in rates), "best rate")
    entries = []
    for key in dict.fromkeys(row.key for row in results.rows):
        rows = [row for row in results.rows if row.key == key]
        good = [(row.mean, row.rate) for row in rows if row.mean is not None]
        entries.append(Entry([rows[0].label, *map(_cell, rows), f"{min(good)[1]:g}" if good else ""]))
    return Table(titles, ("method", "best rate", *titles[1:-1]), entries)


def _facts(results: GridResults) -> list[str]:
    s = results.settings
    seeds = results.rows[0].seeds if results.rows else []
    versions = ", ".join(f"{name} {version}" for name, version in results.software.items())
    lines = [
        f"{results.processor}, {text.counted(s.threads, 'thread')} each, leanops {results.leanops}, {versions}",
        f"Llama, {results.parameters / 1e6:.2f}M parameters, fp32: {s.layers} layers of {s.hidden}, MLP "
        f"{s.intermediate}, {s.heads} heads; bytes as tokens, {s.batch} windows of {s.context} a step, {results.steps} "
        f"steps; {results.text.what}, sha256 {results.text.sha256[:16]}",
        f"warm-up of {100 * s.warmup:g}%, cosine to {s.floor:g} of the rate, gradient norm clipped at {s.clip:g}",
        f"bits a byte of {s.test_windows} held-out windows: mean and standard deviation over the seeds "
        f"{', '.join(map(str, seeds))}; no rate is tuned",
    ]
    if results.sm3_served_by == "reference":
        lines.append("SM3's operator is served by its reference here (see `leanops info`)")
    return lines


def print_table(results: GridResults, stream: TextIO) -> None:
    width = terminal.width_of(stream)
    facts = terminal.paragraphs(_facts(results), width)
    terminal.show([*facts, Line(""), *terminal.table_lines(_table(results), width)], stream)


def markdown(results: GridResults) -> str:
    table = _table(results)
    lines = [f"`{text.command_line(results)}`, {results.created[:10]}", "", *(f"- {x}" for x in _facts(results)), ""]
    lines += [f"| {' | '.join(table.titles)} |", "| --- |" + " ---: |" * (len(table.titles) - 1)]
    lines += [f"| {' | '.join(entry.cells)} |" for entry in table.entries]
    return "\n".join([*lines, ""])


def write_markdown(results: GridResults, target: str) -> None:
    write_text(target, markdown(results))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
