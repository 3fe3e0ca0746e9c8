"""Results as a table, as CSV, as JSON, and progress while they are made.

Results with ``cases`` are those of ``leanops bench mezo-step``.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

Results = dict[str, Any]
Row = dict[str, Any]

_CSV = ("key", "op", "case", "dtype", "device", "threads", "backend", "status", "reason", "median_s", "low_s", "high_s",
        "noise", "elements", "ns_per_element", "gb_per_s", "gflop_per_s", "percent_of_roofline", "bound", "peak_bytes",
        "dispatch_s")  # fmt: skip
_PEER_CSV = ("name", "available", "reason", "median_s", "ratio", "ratio_low", "ratio_high", "error")
_CASE_CSV = ("dtype", "distribution", "threads", "parameters", "tokens", "noise")
_STEP_CSV = ("name", "median_s", "ratio", "ratio_low", "ratio_high")


def seconds(value: float | None) -> str:
    """Three digits with a unit."""
    if value is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def size(value: int | None) -> str:
    if value is None:
        return "n/a"
    return f"{value / 2**30:.2f} GiB" if value >= 1 << 30 else f"{value / 2**20:.1f} MiB"


def rate(row: Row) -> str:
    if row["gflop_per_s"] is not None:
        return f"{row['gflop_per_s']:.4g} GFLOP/s"
    return f"{row['gb_per_s']:.3g} GB/s"


def spread(row: Row) -> str:
    return f"±{50 * (row['high_s'] - row['low_s']) / row['median_s']:.1f}%"


def peer_text(peer: Row) -> str:
    if not peer["available"]:
        return f"{peer['name']}: {peer['reason']}"
    text = f"{peer['ratio']:.2f}x {peer['name']} [{peer['ratio_low']:.2f}, {peer['ratio_high']:.2f}]"
    if peer["error"] is not None:
        text += f", error {peer['error']:.1g}"
    return text + (f" ({peer['reason']})" if peer["reason"] else "")


def gate_text(row: Row) -> str:
    gate = row["gate"]
    if gate is None:
        return ""
    if not gate["passed"]:
        return "WRONG"
    return "exact" if gate["bound"] == 0 else f"{gate['error']:.1g} of {gate['bound']:.1g}"


COLUMNS = (
    "case",
    "dtype",
    "thr",
    "time",
    "spread",
    "ns/el",
    "rate",
    "roofline",
    "bound by",
    "accuracy",
    "peak",
    "call",
)


def cells(row: Row) -> list[str]:
    """The row's columns; of a row that is not ``ok`` the reason instead of any time."""
    head = [row["case"], row["dtype"], str(row["threads"])]
    if row["status"] != "ok":
        return [*head, row["status"], *[""] * 5, gate_text(row), "", ""]
    return [
        *head,
        seconds(row["median_s"]),
        spread(row),
        f"{row['ns_per_element']:.3g}" if row["ns_per_element"] is not None else "",
        rate(row),
        f"{row['percent_of_roofline']:.0f}%",
        row["bound"],
        gate_text(row),
        size(row["peak_bytes"]),
        seconds(row["dispatch_s"]),
    ]


def processor(results: Results) -> str:
    mark = results["fingerprint"]
    name: str = mark["gpu"]["name"] if "gpu" in mark else mark["cpu"]["name"]
    return name


def machine_lines(results: Results) -> list[str]:
    software = results["fingerprint"]["software"]
    lines = [f"{processor(results)}, torch {software['torch']}, leanops {results['leanops']}"]
    if "cases" in results:
        return lines
    for roof in results["roofline"]:
        bandwidth = ", ".join(f"{k} {v * 1e-9:.3g}" for k, v in roof["bandwidth"].items())
        gemm = ", ".join(f"{k} {v * 1e-9:.4g}" for k, v in roof["gemm"].items())
        lines.append(f"roofline, {roof['threads']} threads: GB/s {bandwidth}; GEMM GFLOP/s {gemm}; "
                     f"one torch call {seconds(roof['dispatch_s'])}")  # fmt: skip
    noise = results["noise_floor"]
    lines.append(
        f"noise floor (an operator against itself) {'n/a' if noise is None else f'{100 * noise:.1f}%'}; "
        f"the machine drifted {100 * results['drift']:.1f}% during the run"
    )
    return lines


def _plain(results: Results, stream: TextIO) -> None:
    by_op: dict[str, list[Row]] = {}
    for row in results["rows"]:
        by_op.setdefault(row["op"], []).append(row)
    for op, rows in by_op.items():
        table = [list(COLUMNS), *(cells(row) for row in rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
        print(f"\n{op} ({rows[0]['backend']})", file=stream)
        for line, row in zip(table, [None, *rows], strict=True):
            print("  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip(), file=stream)
            if row is not None:
                for text in _notes(row):
                    print("      " + text, file=stream)


def case_text(case: Row) -> str:
    return (
        f"{case['parameters'] / 1e6:.1f}M parameters, {case['tokens']} tokens, {case['dtype']}, "
        f"{case['distribution']}, {case['threads']} threads, A/A noise {100 * case['noise']:.1f}%"
    )


def _steps(results: Results, stream: TextIO) -> None:
    for case in results["cases"]:
        print(case_text(case), file=stream)
        for row in case["rows"]:
            interval = f"[{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
            print(f"  {row['name']:28} {row['median_s']:8.3f} s  {row['ratio']:6.3f} x {interval}", file=stream)


def _notes(row: Row) -> list[str]:
    return ([row["reason"]] if row["reason"] else []) + [peer_text(peer) for peer in row["peers"]]


def _rich(results: Results, stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream)
    by_op: dict[str, list[Row]] = {}
    for row in results["rows"]:
        by_op.setdefault(row["op"], []).append(row)
    for op, rows in by_op.items():
        table = Table(title=f"{op} ({rows[0]['backend']})", title_justify="left", show_lines=True)
        for column in (*COLUMNS, "peers: how many times slower [95%]"):
            table.add_column(column, overflow="fold")
        for row in rows:
            style = {"wrong": "red", "skipped": "dim"}.get(row["status"])
            table.add_row(*cells(row), "\n".join(_notes(row)), style=style)
        console.print(table)


def has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def print_table(results: Results, stream: TextIO) -> None:
    """A rich table on a wide terminal; plain lines elsewhere. Ratios are the peer's time over the operator's."""
    for line in machine_lines(results):
        print(line, file=stream)
    if "cases" in results:
        _steps(results, stream)
    elif stream.isatty() and has_rich():
        _rich(results, stream)
    else:
        _plain(results, stream)


def _finite(value: Any) -> Any:
    """NaN and the infinities, for which JSON has no word, as None."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(results: Results, target: str) -> None:
    """One JSON object into a file, or onto standard output for ``-``; null for a number that is not finite."""
    text = json.dumps(_finite(results), indent=None if target == "-" else 1, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_csv(results: Results, target: str) -> None:
    """A line for each row and peer; a row without peers has one line with the peer's columns empty.

    Of mezo-step a line for each row of each case.
    """
    lines: list[list[Any]]
    if "cases" in results:
        lines = [[*_CASE_CSV, *_STEP_CSV]]
        for case in results["cases"]:
            shared = [case[name] for name in _CASE_CSV]
            lines += [[*shared, *(row[name] for name in _STEP_CSV)] for row in case["rows"]]
    else:
        lines = [[*_CSV, *(f"peer_{name}" for name in _PEER_CSV)]]
        for row in results["rows"]:
            own = [row[name] for name in _CSV]
            for peer in row["peers"] or [dict.fromkeys(_PEER_CSV)]:
                lines.append([*own, *(peer[name] for name in _PEER_CSV)])
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)


class Lines:
    """Progress as plain lines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.total, self.done, self.started = stream, 0, 0, time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, total: int) -> None:
        self.total = total

    def step(self, text: str) -> None:
        self.done += 1
        elapsed = time.monotonic() - self.started
        print(f"[{self.done}/{self.total}] {elapsed:5.0f} s  {text}", file=self.stream, flush=True)


class Bar:
    """Progress as a bar on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
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

    def step(self, text: str) -> None:
        self.bar.update(self.task, advance=1, description=text)
        self.bar.refresh()


def progress(stream: TextIO) -> Bar | Lines:
    return Bar(stream) if stream.isatty() and has_rich() else Lines(stream)


class Portions:
    """Turns a count of bytes done into twenty steps of progress."""

    def __init__(self, progress: Bar | Lines, text: str, portions: int = 20) -> None:
        self.progress, self.text, self.portions, self.done = progress, text, portions, 0
        progress.start(portions)

    def __call__(self, done: int, total: int) -> None:
        while self.done < self.portions * done // max(total, 1):
            self.done += 1
            self.progress.step(self.text)
