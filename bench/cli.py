"""The ``leanops`` command."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

DTYPES = {
    "fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16",
    "fp16": "float16", "float16": "float16", "fp64": "float64", "float64": "float64",
}  # fmt: skip


Writers = Mapping[str, Callable[..., None]]
CONVERGENCE = ("only", "tokens", "seed", "folder", "svg")


class CommandError(Exception):
    """What the user reads as one line on standard error, with exit status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise CommandError(f"{self.prog}: {message}")


def _split(text: str) -> tuple[str, ...]:
    return tuple(part for word in text.split(",") if (part := word.strip()))


def _parser() -> Parser:
    parser = Parser(prog="leanops", description="Operators and optimizers for training with less memory.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    bench = commands.add_parser("bench", help="measure the operators against their peers and the roofline")
    bench.add_argument(
        "ops",
        nargs="*",
        metavar="op",
        help="operators to measure (all by default); or mezo-step: a whole step beside its forward passes; or "
        "convergence: a language model trained by each optimizer",
    )
    bench.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    bench.add_argument("--dtype", default="fp32,bf16", help="comma-separated: fp32, bf16, fp16, fp64 (fp32,bf16)")
    bench.add_argument("--threads", default="", help="comma-separated thread counts (1 and all)")
    bench.add_argument("--peers", default="all", help="all, none, or comma-separated parts of peers' names")
    bench.add_argument("--case", default="", metavar="REGEX", help="only cases whose key matches somewhere")
    bench.add_argument("--quick", action="store_true", help="fewer and smaller cases, under two minutes")
    bench.add_argument("--json", metavar="F", help="results with raw samples; - writes only JSON to standard output")
    bench.add_argument("--csv", metavar="F")
    bench.add_argument(
        "--markdown", metavar="F", help="the table with its machine and command, as a section of Markdown"
    )
    bench.add_argument("--html", metavar="F", help="one file with plots, readable without a network")
    training = bench.add_argument_group("convergence only", "from where it was killed, it goes on to the same bits")
    training.add_argument("--only", metavar="REGEX", help="only methods whose key or label matches somewhere")
    training.add_argument("--tokens", type=int, metavar="N", help="tokens that each method trains on")
    training.add_argument("--seed", type=int, metavar="N", help="of the weights and of the order of the text (0)")
    training.add_argument("--folder", metavar="F", help="where what is done lies (results/convergence)")
    training.add_argument("--svg", metavar="F", help="the picture alone")

    compare = commands.add_parser("compare", help="exit status 1 when a case became slower")
    compare.add_argument("base", metavar="BASE.json")
    compare.add_argument("new", metavar="NEW.json")

    info = commands.add_parser("info", help="versions, devices, and which backend serves each operator and why")
    info.add_argument("--json", action="store_true")

    replay = commands.add_parser("replay", help="the weights of a run from its start weights and its log")
    replay.add_argument("base", metavar="BASE.safetensors")
    replay.add_argument("log", metavar="RUN.zolog")
    replay.add_argument("-o", "--out", required=True, metavar="OUT.safetensors")
    replay.add_argument("--fused", action="store_true", help="all seeds in one pass: faster, equal to rounding only")
    replay.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="LOG=BASE",
        help="a parameter's name in the log and in BASE where they differ, as of a tied weight; may be given again",
    )
    return parser


def _bench(options: argparse.Namespace) -> int:
    from leanops.bench import html, markdown, mezo_step, report, runner

    if "convergence" in options.ops:
        return _convergence(options)
    if given := [f"--{name}" for name in CONVERGENCE if getattr(options, name) is not None]:
        raise CommandError(f"leanops bench: {given[0]} belongs to convergence")
    try:
        dtypes = tuple(dict.fromkeys(DTYPES[name] for name in _split(options.dtype)))
    except KeyError as error:
        raise CommandError(f"leanops bench: --dtype knows fp32, bf16, fp16 and fp64, got {error.args[0]}") from None
    try:
        threads = tuple(dict.fromkeys(int(text) for text in _split(options.threads)))
    except ValueError:
        raise CommandError(f"leanops bench: --threads must be numbers, got {options.threads}") from None
    if not dtypes or any(t < 1 for t in threads):
        raise CommandError("leanops bench: --dtype must name a dtype and --threads must be 1 or more")
    try:
        re.compile(options.case)
    except re.error as error:
        raise CommandError(f"leanops bench: --case is no regular expression: {error}") from None
    if "mezo-step" in options.ops and (len(options.ops) > 1 or options.case):
        known = "--device, --dtype, --threads, --peers, --quick, --json F, --csv F, --html F, --markdown F"
        raise CommandError(f"leanops bench: mezo-step stands alone, with {known}")
    measured, stem = (mezo_step, "mezo-step") if "mezo-step" in options.ops else (runner, "bench")
    peers = {"all": None, "none": ()}.get(options.peers, _split(options.peers))
    settings = runner.Settings(tuple(options.ops), options.device, dtypes, threads, peers, options.case, options.quick)
    measured.plan(settings)  # a mistake in the arguments is found before anything is written
    targets = _targets(options, stem, ("json", "csv", "html", "markdown"), usual=("json", "html"))
    told = sys.stderr if options.json == "-" else sys.stdout
    with report.progress(sys.stderr) as progress:
        results = measured.run(settings, progress, sys.argv)
    report.print_table(results, told)
    writers = {"json": report.write_json, "csv": report.write_csv, "html": html.write, "markdown": markdown.write}
    _write(results, targets, writers, told)
    wrong = [row["key"] for row in results.get("rows", ()) if row["status"] == "wrong"]
    if wrong:
        print(f"leanops bench: wrong results, no speed shown: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _convergence(options: argparse.Namespace) -> int:
    from leanops.autotune import fingerprint
    from leanops.bench import report
    from leanops.bench.convergence import experiment, plot, summary

    if len(options.ops) > 1 or options.csv or options.case or options.peers != "all" or options.dtype != "fp32,bf16":
        known = "--device, --threads, --quick, --json F, --html F, --markdown F"
        known = ", ".join([known, *(f"--{name}" for name in CONVERGENCE)])
        raise CommandError(f"leanops bench: convergence stands alone, with {known}")
    if options.threads and not options.threads.isdecimal():
        raise CommandError(f"leanops bench: --threads must be one number for convergence, got {options.threads}")
    given = {name: getattr(options, name) for name in ("tokens", "seed") if getattr(options, name) is not None}
    threads = 1 if options.quick else fingerprint.cores()  # a small model gains nothing from a second
    given |= {"threads": int(options.threads or threads), "device": options.device}
    settings = experiment.Settings.quick(**given) if options.quick else experiment.Settings(**given)
    settings.check()
    only = options.only or ""
    experiment.chosen(only)  # a mistake in the arguments is found before anything is written
    folder = Path(options.folder or ("results/convergence-quick" if options.quick else "results/convergence"))
    targets = _targets(options, "convergence", ("json", "html", "svg", "markdown"), usual=("json", "html", "svg"))
    told = sys.stderr if options.json == "-" else sys.stdout
    with report.progress(sys.stderr) as progress:
        results = experiment.run(settings, only, folder, progress, sys.argv)
    summary.print_table(results, told)
    markdown = partial(summary.write_markdown, picture=options.svg and Path(options.svg).name)
    writers: Writers = {"json": report.write_json, "html": plot.write_html, "svg": plot.write_svg, "markdown": markdown}
    _write(results, targets, writers, told)
    return 0


def _targets(options: argparse.Namespace, stem: str, formats: Sequence[str], usual: Sequence[str]) -> dict[str, str]:
    """The file for each format asked for, or for the usual ones; found to be writable before an hour of measuring."""
    targets = {name: target for name in formats if (target := getattr(options, name))}
    for name, target in targets.items():
        if target == "-" and name != "json":
            raise CommandError(f"leanops bench: --{name} must be a file, got -; only --json writes to standard output")
    files = [Path(target).resolve() for target in targets.values()]
    if twice := [target for target, file in zip(targets.values(), files, strict=True) if files.count(file) > 1]:
        raise CommandError(f"leanops bench: each format needs a file of its own, got {' and '.join(twice)}")
    targets = targets or {name: f"results/{stem}.{name}" for name in usual}
    for target in targets.values():
        _writable(target)
    return targets


def _write(results: dict[str, Any], targets: dict[str, str], writers: Writers, told: TextIO) -> None:
    for name, target in targets.items():
        writers[name](results, target)
        if target != "-":
            print(f"{name.upper()}: {Path(target).resolve()}", file=told)


def _writable(target: str) -> None:
    if target != "-":
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise CommandError(f"leanops bench: {target} is a folder")
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()


def _compare(options: argparse.Namespace) -> int:
    from leanops.bench import compare

    return compare.main(options.base, options.new, sys.stdout)


def _info(options: argparse.Namespace) -> int:
    from leanops import info

    report = info.collect()
    print(json.dumps(report, indent=1) if options.json else "\n".join(info.lines(report)))
    return 0


def _replay(options: argparse.Namespace) -> int:
    from leanops.bench import report
    from leanops.optim.zo.replay import replay_file

    for name in (options.base, options.log):
        if not Path(name).is_file():
            raise CommandError(f"leanops replay: no file {name}")
    if wrong := [pair for pair in options.name if "=" not in pair]:
        raise CommandError(f"leanops replay: --name must be LOG=BASE, got {wrong[0]}")
    names = dict(pair.split("=", 1) for pair in options.name)
    with warnings.catch_warnings(), report.progress(sys.stderr) as progress:
        warnings.showwarning = _one_line
        steps = report.Portions(progress, f"replay of {options.log}")
        replay_file(options.base, options.log, options.out, progress=steps, fused=options.fused, names=names)
    print(f"wrote {options.out}")
    return 0


def _one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"leanops: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    commands = {"bench": _bench, "compare": _compare, "info": _info, "replay": _replay}
    try:
        options = _parser().parse_args(arguments)
        status = commands[options.command](options)
        print(end="", flush=True)  # a full disk is an error too
        return status
    except BrokenPipeError:  # who reads has enough, as `leanops info | head` has
        return 128 + signal.SIGPIPE
    except Exception as error:
        if os.environ.get("LEANOPS_TRACEBACK"):
            raise
        text = " ".join(str(error).split())
        if not isinstance(error, (CommandError, ValueError, OSError)):
            text = ": ".join(filter(None, (type(error).__name__, text))) + " (LEANOPS_TRACEBACK=1 shows where)"
        print(f"leanops: {text}".replace("leanops: leanops", "leanops"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("leanops: interrupted", file=sys.stderr)
        return 130
    finally:
        _drop_output()


def _drop_output() -> None:
    """Forget what standard output does not take: Python would try again at its end, and fail with lines of its own."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
