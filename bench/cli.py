"""The ``leanops`` command."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from leanops.bench import terminal
from leanops.bench.arguments import CommandError, parser

# older results name the commands that made them so
_RENAMED = {("bench", "mezo-step"): "mezo-step", ("bench", "convergence"): "convergence"}
_REPLAY_LINE_S = 10.0  # seconds between two lines of progress in a file


def _bench(options: argparse.Namespace) -> int:
    from leanops.bench import commands

    return commands.bench(options)


def _step(options: argparse.Namespace) -> int:
    from leanops.bench import commands

    return commands.step(options)


def _convergence(options: argparse.Namespace) -> int:
    from leanops.bench import commands

    return commands.convergence(options)


def _agreement(options: argparse.Namespace) -> int:
    from leanops.bench import commands

    return commands.agreement(options)


def _compare(options: argparse.Namespace) -> int:
    from leanops.bench import compare

    return compare.main(options.base, options.new, sys.stdout)


def _info(options: argparse.Namespace) -> int:
    from leanops import info

    found = info.collect()
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        terminal.show(terminal.hanging(info.lines(found), terminal.width_of(sys.stdout)), sys.stdout)
    return 0


def _replay(options: argparse.Namespace) -> int:
    from leanops.bench import progress
    from leanops.optim.zo.replay_file import replay_file

    if not Path(options.base).exists():
        raise CommandError(f"no file {options.base}")
    if Path(options.log).is_dir():
        raise CommandError(f"RUN.zolog must be a log, got the folder {options.log}; BASE comes first")
    if not Path(options.log).is_file():
        raise CommandError(f"no file {options.log}")
    if wrong := [pair for pair in options.name if "=" not in pair]:
        raise CommandError(f"--name must be LOG=BASE, got {wrong[0]}")
    names = _names(options.names) | dict(pair.split("=", 1) for pair in options.name)
    with warnings.catch_warnings(), progress.show(sys.stderr, every_s=_REPLAY_LINE_S) as shown:
        warnings.showwarning = _one_line
        steps = progress.Portions(shown, f"replay of {options.log}")
        how: dict[str, Any] = {"fused": options.fused, "names": names, "stop": options.stop}
        replay_file(options.base, options.log, options.out, progress=steps, **how)
    print(f"wrote {options.out}")
    return 0


def _names(path: str | None) -> dict[str, str]:
    """The names in the file of ``--names``."""
    if path is None:
        return {}
    try:
        names: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"--names must be a file of JSON, got {path} ({error})") from None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CommandError(f'--names must hold an object of names, {{"LOG": "BASE"}}, got {path}')
    return names


def _one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"leanops: {message}", file=sys.stderr)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "bench": _bench,
    "mezo-step": _step,
    "convergence": _convergence,
    "agreement": _agreement,
    "compare": _compare,
    "info": _info,
    "replay": _replay,
}


def main(arguments: Sequence[str] | None = None) -> int:
    name = "leanops"
    try:
        for stream in (sys.stdout, sys.stderr):
            terminal.make_printable(stream)
        words = list(sys.argv[1:] if arguments is None else arguments)
        if renamed := _RENAMED.get(tuple(words[:2])):  # type: ignore[arg-type]
            words[:2] = [renamed]
        options = _parse(words)
        name = f"leanops {options.command}"
        status = COMMANDS[options.command](options)
        print(end="", flush=True)  # a full disk is an error too
        return status
    except BrokenPipeError:  # the reader closed the pipe, as `leanops info | head` does
        return 128 + signal.SIGPIPE
    except Exception as error:
        if os.environ.get("LEANOPS_TRACEBACK"):
            raise
        text = " ".join(str(error).split())
        if not isinstance(error, (CommandError, ValueError, OSError)):
            text = ": ".join(filter(None, (type(error).__name__, text))) + " (LEANOPS_TRACEBACK=1 shows where)"
        print(text if text.startswith("leanops") else f"{name}: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("leanops: interrupted", file=sys.stderr)
        return 130
    finally:
        _drop_output()


def _parse(words: Sequence[str]) -> argparse.Namespace:
    from leanops import _native

    return parser(_native.version()).parse_args(words)


def _drop_output() -> None:
    """Drop text that standard output does not accept. Python would write it again at exit, and print another error."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
