"""Progress of a long command, on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    def start(self, total: int) -> None: ...
    def step(self, text: str) -> None: ...
    def skip(self, count: int) -> None:
        """Count steps as done that are left out."""


class Lines:
    """A plain line for each step, at most one every ``every_s`` seconds."""

    def __init__(self, stream: TextIO, every_s: float = 0.0, now: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.every_s, self.now = stream, every_s, now
        self.total, self.done, self.started = 0, 0, now()
        self.printed = self.started if every_s else -float("inf")

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, total: int) -> None:
        self.total = total

    def skip(self, count: int) -> None:
        self.done += count

    def step(self, text: str) -> None:
        self.done += 1
        now = self.now()
        if now - self.printed >= self.every_s:
            self.printed = now
            line = f"[{self.done}/{self.total}] {now - self.started:5.0f} s  {text}"
            print(line, file=self.stream, flush=True)


class Bar:
    """A bar on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        # redrawn only between cases: a thread that draws would disturb what is timed
        self.bar = Progress(*columns, console=Console(file=stream), auto_refresh=False, transient=True)
        self.task: Any = None

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self, total: int) -> None:
        self.task = self.bar.add_task("", total=total)

    def skip(self, count: int) -> None:
        self.bar.update(self.task, advance=count)

    def step(self, text: str) -> None:
        self.bar.update(self.task, advance=1, description=text)
        self.bar.refresh()


def has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def show(stream: TextIO, every_s: float = 0.0) -> Bar | Lines:
    return Bar(stream) if stream.isatty() and has_rich() else Lines(stream, every_s)


class Portions:
    """Turns a count of bytes done into twenty steps of progress."""

    def __init__(self, progress: Progress, text: str, portions: int = 20) -> None:
        self.progress, self.text, self.portions, self.done = progress, text, portions, 0
        progress.start(portions)

    def __call__(self, done: int, total: int) -> None:
        while self.done < self.portions * done // max(total, 1):
            self.done += 1
            self.progress.step(self.text)
