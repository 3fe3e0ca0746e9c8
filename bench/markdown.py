"""Results as a Markdown section: machine, versions and command first, then a table, each figure with its spread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from leanops.bench import report, text
from leanops.bench.results import OperatorResults, Results, Row, StepResults

_TITLES = ("case", "dtype", "threads", "time", "ns/element", "rate", "of roofline", "accuracy", "peers")


def head(results: Results, lines: Iterable[str]) -> list[str]:
    """Command, date, then a list of facts that ends with the versions."""
    software = ", ".join(f"{name} {version}" for name, version in results.software.items())
    return [
        f"`{text.command_line(results)}`, {results.created[:10]}",
        "",
        *(f"- {line}" for line in lines),
        f"- {software}",
        "",
    ]


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _cells(row: Row) -> list[str]:
    head = [row.case, row.dtype, str(row.threads)]
    if row.status != "ok":
        return [*head, f"{row.status}: {row.reason}", "", "", "", text.gate(row), ""]
    peers = "; ".join(text.ratio(peer) for peer in row.peers if peer.available)
    time, share = f"{text.seconds(row.median_s)} {text.spread(row)}", f"{text.percent(row)} ({row.bound})"
    return [*head, time, text.per_element(row), text.rate(row), share, text.gate(row), peers]


def operators(results: OperatorResults) -> str:
    """The rows of ``leanops bench``. Ratios are the peer's time over the operator's, with a 95% interval."""
    lines = head(results, [text.machine(results), *text.rooflines(results)])
    for op, rows in report.by_operator(results.rows).items():
        lines += [
            f"`{op}`, {rows[0].backend}",
            "",
            *table(_TITLES, map(_cells, rows)),
            "",
        ]
    if skipped := text.skipped(results.rows):
        lines += [skipped, ""]
    return "\n".join(lines)


def steps(results: StepResults) -> str:
    """The cases of ``leanops mezo-step``. Ratios are to the two forward passes, with a 95% interval."""
    lines = head(results, [results.processor])
    lines += ["| dtype, noise | threads | | time | of two forward passes |", "| --- | --- | --- | --- | --- |"]
    for case in results.cases:
        first = f"| {case.dtype}, {case.distribution} | {case.threads} "
        for row in case.rows:
            lines.append(f"{first}| {row.name} | {text.seconds(row.median_s)} | {text.step_ratio(row)} |")
    model = results.cases[0]
    noise = ", ".join(f"{100 * case.noise:.1f}%" for case in results.cases)
    lines += ["", f"{text.parameters(model)} parameters, {model.tokens} tokens; A/A noise {noise}.", ""]
    return "\n".join(lines)


def write_operators(results: OperatorResults, target: str) -> None:
    report.write_text(target, operators(results))


def write_steps(results: StepResults, target: str) -> None:
    report.write_text(target, steps(results))
