"""Results as one HTML file that needs no network: hand-made SVG, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from leanops.bench import report, text
from leanops.bench.results import OperatorResults, Results, Row, StepCase, StepResults

_STYLE = """
:root { --ink: #1b1f24; --soft: #5b6570; --line: #d8dde3; --paper: #fff;
  --own: #2866c7; --peer: #b8651b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --line: #363d46; --paper: #15181c;
    --own: #74a7f5; --peer: #e0a165; --bad: #ff8a80; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
p, li { max-width: 60rem; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .soft { fill: var(--soft); }
svg .line { stroke: var(--line); } svg .own { fill: var(--own); stroke: var(--own); }
svg .peer { fill: var(--peer); stroke: var(--peer); }
svg .whisker { stroke: var(--ink); stroke-width: 1.5; } svg .one { stroke: var(--soft); stroke-dasharray: 4 3; }
.wrong { color: var(--bad); font-weight: 600; }
"""
_LABEL, _WIDTH, _STEP = 330, 560, 22  # pixels: width of the labels, of the plot, height of a bar with its gap


def _svg(title: str, height: int, body: list[str]) -> str:
    width = _LABEL + _WIDTH + 150
    return (
        f'<div class="scroll"><svg role="img" aria-label="{escape(title)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{"".join(body)}</svg></div>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


@dataclass(frozen=True)
class Ratio:
    """A point with its interval on the plot of ratios."""

    name: str
    value: float
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Group:
    """Ratios under one heading on the plot of ratios."""

    name: str
    ratios: Sequence[Ratio]


@dataclass(frozen=True)
class Spread:
    """A line of points on the plot of samples."""

    name: str
    samples_s: Sequence[float]
    median_s: float


def _name(case: str, row: Row | StepCase) -> str:
    return f"{case}, {row.dtype}, {row.threads} thr"


def roofline_plot(rows: Sequence[Row]) -> str:
    """A bar for each case: its percent of the roofline."""
    values = [row.percent_of_roofline or 0.0 for row in rows]
    top = max(100.0, *values)
    height = 30 + _STEP * len(rows)
    body = []
    for percent in (0, 25, 50, 75, 100):
        x = _LABEL + _WIDTH * percent / top
        body += [
            _line(x, 18, x, height, "one" if percent == 100 else "line"),
            _text(x, 12, f"{percent}%", "middle", "soft"),
        ]
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        y = 24 + _STEP * i
        bar = max(_WIDTH * value / top, 1)
        body += [
            _text(_LABEL - 8, y + 12, _name(row.case, row), "end"),
            f'<rect x="{_LABEL}" y="{y}" width="{bar:.1f}" height="{_STEP - 8}" class="own">'
            f"<title>{escape(row.key)}: {value:.1f}%, {escape(row.bound)}</title></rect>",
            _text(_LABEL + bar + 6, y + 12, f"{value:.0f}%, {text.rate(row)}", "start", "soft"),
        ]
    return _svg("percent of roofline", height, body)


def peer_groups(rows: Sequence[Row]) -> list[Group]:
    """The peers that could run, in a group for each row."""
    groups = []
    for row in rows:
        ratios = [
            Ratio(peer.name, peer.ratio, peer.ratio_low, peer.ratio_high, text.peer(peer))
            for peer in row.peers
            if peer.ratio is not None and peer.ratio_low is not None and peer.ratio_high is not None
        ]
        groups.append(Group(_name(row.case, row), ratios))
    return [group for group in groups if group.ratios]


def ratio_plot(groups: Sequence[Group], title: str) -> str:
    """The ratios of each group with their intervals, on a logarithmic axis."""
    ratios = [ratio for group in groups for ratio in group.ratios]
    low, high = min(0.5, *(r.low for r in ratios)), max(2.0, *(r.high for r in ratios))
    left, right = math.log(low) - 0.1, math.log(high) + 0.1

    def across(ratio: float) -> float:
        return _LABEL + _WIDTH * (math.log(ratio) - left) / (right - left)

    height = 34 + _STEP * len(ratios) + 22 * len(groups)
    body = []
    for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000):
        if low <= tick <= high:
            body += [
                _line(across(tick), 18, across(tick), height, "one" if tick == 1 else "line"),
                _text(across(tick), 12, f"{tick:g}x", "middle", "soft"),
            ]
    y = 22.0
    for group in groups:
        y += 16
        body.append(_text(4, y, group.name))
        y += 6
        for ratio in group.ratios:
            middle = y + _STEP / 2 - 4
            body += [
                _text(_LABEL - 8, middle + 4, ratio.name, "end", "soft"),
                _line(across(ratio.low), middle, across(ratio.high), middle, "whisker"),
                f'<circle cx="{across(ratio.value):.1f}" cy="{middle:.1f}" r="4.5" class="peer">'
                f"<title>{escape(ratio.title)}</title></circle>",
                _text(across(ratio.high) + 8, middle + 4, f"{ratio.value:.2f}x", "start", "soft"),
            ]
            y += _STEP
    return _svg(title, int(y) + 8, body)


def sample_plot(spreads: Sequence[Spread]) -> str:
    """Every sample over the median of its case, which shows the noise of the run."""
    height = 30 + _STEP * len(spreads)
    reach = 0.25

    def across(ratio: float) -> float:
        return _LABEL + _WIDTH * (min(max(ratio - 1, -reach), reach) + reach) / (2 * reach)

    body = []
    for percent in (-20, -10, 0, 10, 20):
        x = across(1 + percent / 100)
        body += [
            _line(x, 18, x, height, "one" if percent == 0 else "line"),
            _text(x, 12, f"{percent:+d}%", "middle", "soft"),
        ]
    for i, spread in enumerate(spreads):
        y = 24 + _STEP * i + 7
        body.append(_text(_LABEL - 8, y + 5, spread.name, "end"))
        dot = f'cy="{y}" r="2.5" class="own" fill-opacity=".35" stroke="none"/>'
        body += [f'<circle cx="{across(s / spread.median_s):.1f}" {dot}' for s in spread.samples_s]
    return _svg("samples over the median", height, body)


def _table(head: Sequence[str], lines: Sequence[str]) -> str:
    top = "".join(f"<th>{escape(c)}</th>" for c in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def _operators_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        notes = "<br>".join(map(escape, text.notes(row)))
        kind = ' class="wrong"' if row.status == "wrong" else ""
        lines.append(f"<tr{kind}>{_cells(report.cells(row))}<td>{notes}</td></tr>")
    return _table((*report.COLUMNS, "peers (their time over the operator's, 95%)"), lines)


def facts(results: Results) -> str:
    """Fingerprint and backends as a table."""
    items = []

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}" if name else key, inner)
        else:
            words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            items.append(f"<tr><th>{escape(name)}</th><td>{escape(words)}</td></tr>")

    walk("", results.fingerprint)
    for name, backend in results.backends.items():
        walk(f"backend.{name}", ("in use: " if backend.loaded else "absent: ") + backend.detail)
    return f'<div class="scroll"><table><tbody>{"".join(items)}</tbody></table></div>'


def page(title: str, parts: list[str]) -> str:
    """A whole page, with its style."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _head(title: str, results: Results, lines: Sequence[str]) -> list[str]:
    items = "".join(f"<li>{escape(line)}</li>" for line in (text.machine(results), *lines))
    return [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(results.created)}</p>', f"<ul>{items}</ul>"]


def operators(results: OperatorResults) -> str:
    """The page of ``leanops bench``."""
    lines = [*text.rooflines(results), f"peak memory: {results.peak_how}"]
    parts = _head("leanops benchmark", results, lines)
    for op, rows in report.by_operator(results.rows).items():
        good = [row for row in rows if row.status == "ok"]
        parts.append(f"<h2>{escape(op)}</h2><p class='soft'>served by {escape(rows[0].backend)}</p>")
        if good:
            parts += ["<h3>Percent of roofline</h3>", roofline_plot(good)]
            if groups := peer_groups(good):
                parts.append("<h3>Peers: their time over the operator's (right of 1x: the operator is faster)</h3>")
                parts.append(ratio_plot(groups, "time of each peer over the operator's"))
            spreads = [Spread(_name(row.case, row), row.samples_s, row.median_s or math.nan) for row in good]
            parts += ["<h3>Samples around their median</h3>", sample_plot(spreads)]
        parts += ["<h3>All cases</h3>", _operators_table(rows)]
    if skipped := text.skipped(results.rows):
        parts.append(f"<p>{escape(skipped)}</p>")
    parts += ["<h2>Fingerprint</h2>", facts(results)]
    return page("leanops benchmark", parts)


def steps(results: StepResults) -> str:
    """The page of ``leanops mezo-step``."""
    title = "time over that of two forward passes"
    parts = _head("A MeZO step beside its forward passes", results, ())
    for case in results.cases:
        ratios = [
            Ratio(row.name, row.ratio, row.ratio_low, row.ratio_high, f"{row.name}: {text.step_ratio(row)}")
            for row in case.rows
        ]
        lines = [
            f"<tr>{_cells([row.name, text.seconds(row.median_s), text.step_ratio(row)])}</tr>" for row in case.rows
        ]
        parts += [
            f"<h2>{escape(text.step_case(case))}</h2>",
            "<h3>Time over that of two forward passes</h3>",
            ratio_plot([Group(_name("step", case), ratios)], title),
            "<h3>Samples around their median</h3>",
            sample_plot([Spread(_name(row.name, case), row.samples_s, row.median_s) for row in case.rows]),
            _table(("", "time", "of two forward passes [95%]"), lines),
        ]
    parts += ["<h2>Fingerprint</h2>", facts(results)]
    return page("leanops: a MeZO step", parts)


def write_operators(results: OperatorResults, target: str) -> None:
    report.write_text(target, operators(results))


def write_steps(results: StepResults, target: str) -> None:
    report.write_text(target, steps(results))
