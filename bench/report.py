"""Results for a terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from leanops.bench import terminal, text
from leanops.bench.results import OperatorResults, Results, Row, StepResults
from leanops.bench.terminal import Entry, Line, Table

COLUMNS = ("case", "dtype", "thr", "time", "spread", "ns/el", "rate", "roofline", "bound by", "accuracy", "peak",
           "call")  # fmt: skip
_IMPORTANCE = ("case", "time", "dtype", "thr", "roofline", "spread", "rate", "accuracy", "ns/el", "bound by", "peak",
               "call")  # fmt: skip
_STEP_COLUMNS = ("", "time", "of two forward passes [95%]")

_CSV = ("key", "op", "case", "dtype", "device", "threads", "backend", "status", "reason", "median_s", "low_s", "high_s",
        "noise", "elements", "ns_per_element", "gb_per_s", "gflop_per_s", "percent_of_roofline", "bound", "peak_bytes",
        "dispatch_s")  # fmt: skip
_PEER_CSV = ("name", "available", "reason", "median_s", "ratio", "ratio_low", "ratio_high", "error")
_CASE_CSV = ("dtype", "distribution", "threads", "parameters", "tokens", "noise")
_STEP_CSV = ("name", "median_s", "ratio", "ratio_low", "ratio_high")


def cells(row: Row) -> list[str]:
    """The texts of the row's columns. A row that is not ``ok`` shows its status and no time."""
    head = [row.case, text.SHORT.get(row.dtype, row.dtype), str(row.threads)]
    if row.status != "ok":
        return [*head, row.status, *[""] * 5, text.gate(row), "", ""]
    return [
        *head,
        text.seconds(row.median_s),
        text.spread(row),
        text.per_element(row),
        text.rate(row),
        text.percent(row),
        row.bound,
        text.gate(row),
        text.size(row.peak_bytes),
        text.seconds(row.dispatch_s),
    ]


def by_operator(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that are shown, by operator. :func:`text.skipped` counts the others in one line."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.status != "skipped":
            groups.setdefault(row.op, []).append(row)
    return groups


def operator_lines(results: OperatorResults, width: int | None) -> list[Line]:
    """The machine, then a table for each operator. Ratios are the peer's time over the operator's."""
    lines = terminal.paragraphs([text.machine(results), *text.rooflines(results)], width)
    left_out: dict[str, None] = {}
    for op, rows in by_operator(results.rows).items():
        entries = [Entry(cells(row), text.notes(row), "red" if row.status == "wrong" else "") for row in rows]
        table = Table(COLUMNS, _IMPORTANCE, entries)
        lines += [Line(""), Line(f"{op} ({rows[0].backend})", "bold"), *table.lines(width)]
        left_out |= dict.fromkeys(table.left_out(width))
    last = [text.skipped(results.rows), *terminal.left_out_note(COLUMNS, left_out)]
    if any(last):
        lines += [Line(""), *terminal.paragraphs(filter(None, last), width)]
    return lines


def step_lines(results: StepResults, width: int | None) -> list[Line]:
    lines = terminal.paragraphs([text.machine(results)], width)
    for case in results.cases:
        entries = [Entry([row.name, text.seconds(row.median_s), text.step_ratio(row)]) for row in case.rows]
        lines += [Line(""), *terminal.paragraphs([text.step_case(case)], width, "bold")]
        lines += Table(_STEP_COLUMNS, _STEP_COLUMNS, entries).lines(width)
    return lines


def print_operators(results: OperatorResults, stream: TextIO) -> None:
    terminal.show(operator_lines(results, terminal.width_of(stream)), stream)


def print_steps(results: StepResults, stream: TextIO) -> None:
    terminal.show(step_lines(results, terminal.width_of(stream)), stream)


# --- files ------------------------------------------------------------------------------------------------------------


def write_text(target: str, content: str) -> None:
    """Write a file in UTF-8, whatever the terminal's encoding. A missing folder is created."""
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def write_json(results: Results, target: str) -> None:
    """Write one JSON object into a file, or to standard output for ``-``. A number that is not finite is null."""
    content = json.dumps(results.to_json(), indent=None if target == "-" else 1, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(content)
    else:
        write_text(target, content)


def _write_csv(lines: list[list[Any]], target: str) -> None:
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)


def write_operators_csv(results: OperatorResults, target: str) -> None:
    """A line for each row and peer; a row without peers has one line with the peer's columns empty."""
    lines: list[list[Any]] = [[*_CSV, *(f"peer_{name}" for name in _PEER_CSV)]]
    for row in results.rows:
        own = [getattr(row, name) for name in _CSV]
        for peer in row.peers:
            lines.append([*own, *(getattr(peer, name) for name in _PEER_CSV)])
        if not row.peers:
            lines.append([*own, *[None] * len(_PEER_CSV)])
    _write_csv(lines, target)


def write_steps_csv(results: StepResults, target: str) -> None:
    """A line for each row of each case."""
    lines: list[list[Any]] = [[*_CASE_CSV, *_STEP_CSV]]
    for case in results.cases:
        shared = [getattr(case, name) for name in _CASE_CSV]
        lines += [[*shared, *(getattr(row, name) for name in _STEP_CSV)] for row in case.rows]
    _write_csv(lines, target)
