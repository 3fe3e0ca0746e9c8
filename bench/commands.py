"""The commands that measure: what each runs, prints and writes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

from leanops.autotune import fingerprint
from leanops.bench import html, markdown, mezo_step, plan, progress, report, runner
from leanops.bench.arguments import CommandError
from leanops.bench.convergence.settings import Settings as TrainingSettings
from leanops.bench.results import OperatorResults, Results, StepResults

R = TypeVar("R", bound=Results)
Writers = Mapping[str, Callable[[R, str], None]]


@dataclass(frozen=True)
class Task(Generic[R]):
    """How a measuring command runs, shows its results and writes them, in a format for each entry of ``writers``."""

    name: str
    run: Callable[[progress.Progress], R]
    show: Callable[[R, TextIO], None]
    writers: Writers[R]
    usual: Sequence[str]  # formats that are written into results/ by default

    def perform(self, options: argparse.Namespace) -> R:
        """Measure, write the files, then print, so that an error while printing loses no result."""
        targets = self._targets(options)
        stream = sys.stderr if options.json == "-" else sys.stdout
        with progress.show(sys.stderr) as bar:
            results = self.run(bar)
        try:
            for name, target in targets.items():
                self.writers[name](results, target)
        finally:
            self.show(results, stream)
        for name, target in targets.items():
            if target != "-":
                print(f"{name.upper()}: {Path(target).resolve()}", file=stream)
        return results

    def _targets(self, options: argparse.Namespace) -> dict[str, str]:
        """The file of each format on the command line, or of each usual one. Raises where one cannot be written."""
        targets: dict[str, str] = {name: target for name in self.writers if (target := getattr(options, name))}
        for name, target in targets.items():
            if target == "-" and name != "json":
                raise CommandError(f"--{name} must be a file, got -; only --json writes to standard output")
        files = [Path(target).resolve() for target in targets.values()]
        if repeated := [target for target, file in zip(targets.values(), files, strict=True) if files.count(file) > 1]:
            raise CommandError(f"each format needs a file of its own, got {' and '.join(repeated)}")
        targets = targets or {name: f"results/{self.name}.{name}" for name in self.usual}
        for target in targets.values():
            _check_writable(target)
        return targets


def _check_writable(target: str) -> None:
    if target == "-":
        return
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise CommandError(f"{target} is a folder")
    existed = path.exists()
    path.open("a").close()
    if not existed:
        path.unlink()


def _settings(options: argparse.Namespace, ops: Sequence[str] = (), case: str = "") -> plan.Settings:
    return plan.Settings(tuple(ops), options.device, options.dtype, options.threads, options.peers, case, options.quick)


def bench(options: argparse.Namespace) -> int:
    settings = _settings(options, options.ops, options.case)
    jobs = plan.plan(settings)  # a mistake in the arguments is found before anything is written
    writers: Writers[OperatorResults] = {
        "json": report.write_json,
        "csv": report.write_operators_csv,
        "html": html.write_operators,
        "markdown": markdown.write_operators,
    }
    task = Task(
        name="bench",
        run=lambda bar: runner.run(jobs, settings, bar, sys.argv),
        show=report.print_operators,
        writers=writers,
        usual=("json", "html"),
    )
    wrong = [row.key for row in task.perform(options).rows if row.status == "wrong"]
    if wrong:
        print(f"leanops bench: wrong results, no speed shown: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def step(options: argparse.Namespace) -> int:
    settings = replace(_settings(options), size=options.size)
    pairs = mezo_step.plan(settings)
    writers: Writers[StepResults] = {
        "json": report.write_json,
        "csv": report.write_steps_csv,
        "html": html.write_steps,
        "markdown": markdown.write_steps,
    }
    task = Task(
        name="mezo-step",
        run=lambda bar: mezo_step.run(pairs, settings, bar, sys.argv),
        show=report.print_steps,
        writers=writers,
        usual=("json", "html"),
    )
    task.perform(options)
    return 0


def _training_settings(options: argparse.Namespace, **chosen: Any) -> TrainingSettings:
    if options.quick and options.size == "small":
        raise CommandError("leanops convergence: --size small must not be given with --quick, which has its own model")
    if options.quick:
        return TrainingSettings.quick(device=options.device, **chosen)
    make = TrainingSettings.small if options.size == "small" else TrainingSettings
    return make(device=options.device, **chosen)


def _grid(options: argparse.Namespace) -> int:
    """``convergence --rates``."""
    from leanops.bench.convergence import experiment, grid
    from leanops.bench.convergence.methods import GRID_METHODS

    formats = "results are written as JSON and Markdown"
    for name, why in (("html", formats), ("svg", formats), ("seed", "the seeds are those of --seeds")):
        if getattr(options, name) is not None:
            raise CommandError(f"leanops convergence: --{name} must not be given with --rates: {why}")
    tokens = {} if options.tokens is None else {"tokens": options.tokens}
    settings = _training_settings(options, threads=options.threads or 1, **tokens)
    seeds = options.seeds or (0,)
    for seed in seeds:
        replace(settings, seed=seed).check()
    experiment.chosen(options.only, GRID_METHODS)
    work = grid.Work(settings, options.only, seeds, options.rates, options.jobs or 1)
    folder = Path(options.folder or "results/convergence-grid")
    writers: Writers[grid.GridResults] = {"json": report.write_json, "markdown": grid.write_markdown}
    task = Task(
        name="convergence-grid",
        run=lambda bar: grid.run(work, folder, bar, sys.argv),
        show=grid.print_table,
        writers=writers,
        usual=("json", "markdown"),
    )
    task.perform(options)
    return 0


def convergence(options: argparse.Namespace) -> int:
    from leanops.bench.convergence import experiment, plot, summary
    from leanops.bench.convergence.results import TrainingResults

    if options.rates:
        return _grid(options)
    for name in ("seeds", "jobs"):
        if getattr(options, name) is not None:
            raise CommandError(f"leanops convergence: --{name} needs --rates, which trains without tuning")
    chosen = {name: getattr(options, name) for name in ("tokens", "seed") if getattr(options, name) is not None}
    threads = 1 if options.quick else fingerprint.cores()  # a small model is not faster with two
    settings = _training_settings(options, threads=options.threads or threads, **chosen)
    settings.check()
    experiment.chosen(options.only)
    folder = Path(options.folder or ("results/convergence-quick" if options.quick else "results/convergence"))
    picture = Path(options.svg).name if options.svg else None
    writers: Writers[TrainingResults] = {
        "json": report.write_json,
        "html": plot.write_html,
        "svg": plot.write_svg,
        "markdown": partial(summary.write_markdown, picture=picture),
    }
    task = Task(
        name="convergence",
        run=lambda bar: experiment.run(settings, options.only, folder, bar, sys.argv),
        show=summary.print_table,
        writers=writers,
        usual=("json", "html", "svg"),
    )
    task.perform(options)
    return 0


def agreement(options: argparse.Namespace) -> int:
    """Exit status 1 where an optimizer and the published update differ by more than rounding."""
    from leanops.bench import agreement as compared

    task = Task(
        name="agreement",
        run=lambda bar: compared.run(bar, sys.argv),
        show=compared.print_table,
        writers={"json": report.write_json, "markdown": compared.write_markdown},
        usual=(),
    )
    wrong = [f"{row.name}, {row.compared}" for row in task.perform(options).rows if not row.agrees]
    if wrong:
        print(f"leanops agreement: differs by more than rounding: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0
