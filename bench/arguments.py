"""The arguments of the ``leanops`` command."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

DTYPES = {
    "fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16",
    "fp16": "float16", "float16": "float16", "fp64": "float64", "float64": "float64",
}  # fmt: skip
FORMATS = {
    "json": "results with every sample; - writes JSON alone to standard output",
    "csv": "one line for each row and peer",
    "html": "one page with plots, which needs no network",
    "svg": "the picture alone",
    "markdown": "a section with machine, command and table",
}


class CommandError(Exception):
    """An error that is printed as one line on standard error; the exit status is 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise CommandError(f"{self.prog}: {message}")


def _words(text: str) -> tuple[str, ...]:
    return tuple(part for word in text.split(",") if (part := word.strip()))


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(DTYPES.get(word, "") for word in _words(text)))
    if not names or "" in names:
        raise argparse.ArgumentTypeError(f"must be a list of fp32, bf16, fp16 and fp64, got {text}")
    return names


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be one number, 1 or more, got {text}")
    return int(text)


def _step(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be a number of steps, 0 or more, got {text}")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    words = _words(text)
    if not all(word.isascii() and word.isdecimal() and int(word) >= 1 for word in words):
        raise argparse.ArgumentTypeError(f"must be numbers, 1 or more, got {text}")
    return tuple(dict.fromkeys(map(int, words)))


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(dict.fromkeys(map(float, _words(text))))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"must be positive numbers, got {text}")
    return rates


def _seeds(text: str) -> tuple[int, ...]:
    words = _words(text)
    if not words or not all(word.isascii() and word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"must be numbers, 0 or more, got {text}")
    return tuple(dict.fromkeys(map(int, words)))


def _peers(text: str) -> tuple[str, ...] | None:
    return {"all": None, "none": ()}.get(text, _words(text))


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text}: {error}") from None
    return text


def _add_formats(parser: argparse.ArgumentParser, names: Sequence[str], usual: str = "") -> None:
    """``usual``: the files that are written where no option names one."""
    default = f"{usual} where none is named; " if usual else ""
    files = parser.add_argument_group("files", f"{default}missing folders are created")
    for name in names:
        files.add_argument(f"--{name}", metavar="FILE", help=FORMATS[name])


def _add_measuring(parser: argparse.ArgumentParser, quick: str) -> None:
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure (cpu)")
    parser.add_argument(
        "--dtype",
        type=_dtypes,
        default=("float32", "bfloat16"),
        metavar="DTYPES",
        help="comma-separated: fp32, bf16, fp16, fp64 (fp32,bf16)",
    )
    parser.add_argument("--peers", type=_peers, default=None, help="all, none, or comma-separated parts of names (all)")
    parser.add_argument("--quick", action="store_true", help=quick)


def parser(version: str) -> Parser:
    whole = Parser(prog="leanops", description="Operators and optimizers for training with less memory.")
    whole.add_argument("--version", action="version", version=f"leanops {version}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")

    bench = commands.add_parser("bench", help="measure the operators against their peers and the roofline")
    bench.add_argument("ops", nargs="*", metavar="op", help="operators to measure (all by default)")
    _add_measuring(bench, "fewer and smaller cases, as many as two minutes allow on this machine")
    bench.add_argument("--threads", type=_counts, default=(), help="comma-separated thread counts (1 and all cores)")
    bench.add_argument(
        "--case", type=_pattern, default="", metavar="REGEX", help="only cases with a match in their key"
    )
    _add_formats(bench, ("json", "csv", "html", "markdown"), "results/bench.json and .html")

    step = commands.add_parser("mezo-step", help="measure a whole MeZO step against its forward passes")
    _add_measuring(step, "fewer rounds")
    step.add_argument("--threads", type=_counts, default=(), help="comma-separated thread counts (all cores)")
    step.add_argument(
        "--size",
        choices=("5.5K", "37K", "1.2M", "8.3M", "29.6M", "101M"),
        default="101M",
        help="parameters of the transformer (101M)",
    )
    _add_formats(step, ("json", "csv", "html", "markdown"), "results/mezo-step.json and .html")

    training = commands.add_parser(
        "convergence",
        help="train a language model with each optimizer",
        description="Train one language model with each optimizer. A killed run continues and gives the same bits.",
    )
    training.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to train (cpu)")
    training.add_argument("--quick", action="store_true", help="a small model for under two minutes; it proves nothing")
    training.add_argument("--threads", type=_count, metavar="N", help="threads of each run (all cores; 1 with --quick)")
    training.add_argument(
        "--only", type=_pattern, default="", metavar="REGEX", help="only methods with a match in their key or label"
    )
    training.add_argument("--tokens", type=int, metavar="N", help="tokens that each method trains on")
    training.add_argument("--seed", type=int, metavar="N", help="seed of the weights and of the order of the text (0)")
    training.add_argument(
        "--size", choices=("small", "usual"), default="usual", help="0.86M parameters and 400 steps, or 10.8M (usual)"
    )
    training.add_argument(
        "--rates",
        type=_rates,
        default=(),
        metavar="RATES",
        help="comma-separated: train SM3's momenta and AdamW at each rate with each seed, without tuning",
    )
    training.add_argument("--seeds", type=_seeds, help="with --rates, comma-separated (0)")
    training.add_argument(
        "--jobs", type=_count, metavar="N", help="with --rates, processes that train at the same time (1)"
    )
    training.add_argument(
        "--folder", help="finished work, from which a killed run continues (results/convergence; with --rates ...-grid)"
    )
    _add_formats(training, ("json", "html", "svg", "markdown"), "results/convergence.json, .html and .svg")

    agreement = commands.add_parser(
        "agreement",
        help="compare the optimizers with the published updates, on the same noise and data",
        description="Largest differences of weights to the published updates; exit status 1 where one is not rounding.",
    )
    _add_formats(agreement, ("json", "markdown"))

    compare = commands.add_parser(
        "compare",
        help="compare two result files case by case",
        description="Compare two result files case by case. The exit status is 1 when a case became slower.",
    )
    compare.add_argument("base", metavar="BASE.json")
    compare.add_argument("new", metavar="NEW.json")

    info = commands.add_parser("info", help="versions, devices, and which backend serves each operator and why")
    info.add_argument("--json", action="store_true", help="the same as JSON")

    replay = commands.add_parser("replay", help="the weights of a run from its start weights and its log")
    replay.add_argument(
        "base", metavar="BASE", help="start weights: a safetensors file, or the folder or index of sharded ones"
    )
    replay.add_argument("log", metavar="RUN.zolog")
    replay.add_argument("-o", "--out", required=True, metavar="OUT", help="a file, or a new folder where BASE is one")
    replay.add_argument("--fused", action="store_true", help="all seeds in one pass: faster; equal except for rounding")
    replay.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="LOG=BASE",
        help="a parameter's name in the log and in BASE where they differ, as of a tied weight; may be repeated",
    )
    replay.add_argument("--names", metavar="FILE.json", help="the same as a JSON object of names; --name overrides it")
    replay.add_argument(
        "--stop",
        type=_step,
        metavar="STEP",
        help="the weights after so many steps, for an intermediate checkpoint (all)",
    )
    return whole
