"""Results as one HTML file that needs no network: hand-made SVG, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from leanops.bench import report

Row = dict[str, Any]

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


def _name(row: Row) -> str:
    return f"{row['case']}, {row['dtype']}, {row['threads']} thr"


def roofline_plot(rows: list[Row]) -> str:
    """A bar for each case: how much of what the machine can do."""
    top = max(100.0, *(row["percent_of_roofline"] for row in rows))
    height = 30 + _STEP * len(rows)
    body = []
    for percent in (0, 25, 50, 75, 100):
        x = _LABEL + _WIDTH * percent / top
        body += [
            _line(x, 18, x, height, "one" if percent == 100 else "line"),
            _text(x, 12, f"{percent}%", "middle", "soft"),
        ]
    for i, row in enumerate(rows):
        y, value = 24 + _STEP * i, row["percent_of_roofline"]
        bar = max(_WIDTH * value / top, 1)
        body += [
            _text(_LABEL - 8, y + 12, _name(row), "end"),
            f'<rect x="{_LABEL}" y="{y}" width="{bar:.1f}" height="{_STEP - 8}" class="own">'
            f"<title>{escape(row['key'])}: {value:.1f}%, {escape(row['bound'])}</title></rect>",
            _text(_LABEL + bar + 6, y + 12, f"{value:.0f}%, {report.rate(row)}", "start", "soft"),
        ]
    return _svg("percent of roofline", height, body)


def ratio_plot(rows: list[Row], title: str = "time of each peer over the operator's") -> str:
    """For each case and peer the ratio with its interval, on a logarithmic axis."""
    pairs = [(row, peer) for row in rows for peer in row["peers"] if peer["available"]]
    if not pairs:
        return ""
    low = min(0.5, *(p["ratio_low"] for _, p in pairs))
    high = max(2.0, *(p["ratio_high"] for _, p in pairs))
    left, right = math.log(low) - 0.1, math.log(high) + 0.1

    def at(ratio: float) -> float:
        return _LABEL + _WIDTH * (math.log(ratio) - left) / (right - left)

    height = 34 + _STEP * len(pairs) + 22 * len(rows)
    body = []
    for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000):
        if low <= tick <= high:
            body += [
                _line(at(tick), 18, at(tick), height, "one" if tick == 1 else "line"),
                _text(at(tick), 12, f"{tick:g}x", "middle", "soft"),
            ]
    y = 22.0
    for row in rows:
        peers = [peer for peer in row["peers"] if peer["available"]]
        if not peers:
            continue
        y += 16
        body.append(_text(4, y, _name(row)))
        y += 6
        for peer in peers:
            middle = y + _STEP / 2 - 4
            body += [
                _text(_LABEL - 8, middle + 4, peer["name"], "end", "soft"),
                _line(at(peer["ratio_low"]), middle, at(peer["ratio_high"]), middle, "whisker"),
                f'<circle cx="{at(peer["ratio"]):.1f}" cy="{middle:.1f}" r="4.5" class="peer">'
                f"<title>{escape(report.peer_text(peer))}</title></circle>",
                _text(at(peer["ratio_high"]) + 8, middle + 4, f"{peer['ratio']:.2f}x", "start", "soft"),
            ]
            y += _STEP
    return _svg(title, int(y) + 8, body)


def sample_plot(rows: list[Row]) -> str:
    """Every sample over its case's median: how noisy the run was."""
    height = 30 + _STEP * len(rows)
    reach = 0.25

    def at(ratio: float) -> float:
        return _LABEL + _WIDTH * (min(max(ratio - 1, -reach), reach) + reach) / (2 * reach)

    body = []
    for percent in (-20, -10, 0, 10, 20):
        x = at(1 + percent / 100)
        body += [
            _line(x, 18, x, height, "one" if percent == 0 else "line"),
            _text(x, 12, f"{percent:+d}%", "middle", "soft"),
        ]
    for i, row in enumerate(rows):
        y = 24 + _STEP * i + 7
        body.append(_text(_LABEL - 8, y + 5, _name(row), "end"))
        dot = f'cy="{y}" r="2.5" class="own" fill-opacity=".35" stroke="none"/>'
        body += [f'<circle cx="{at(s / row["median_s"]):.1f}" {dot}' for s in row["samples_s"]]
    return _svg("samples over the median", height, body)


def _table(head: Sequence[str], lines: Sequence[str]) -> str:
    top = "".join(f"<th>{escape(c)}</th>" for c in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def _operators_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        notes = ([escape(row["reason"])] if row["reason"] else []) + [escape(report.peer_text(p)) for p in row["peers"]]
        kind = ' class="wrong"' if row["status"] == "wrong" else ""
        lines.append(f"<tr{kind}>{_cells(report.cells(row))}<td>{'<br>'.join(notes)}</td></tr>")
    return _table((*report.COLUMNS, "peers (their time over the operator's, 95%)"), lines)


def facts(results: dict[str, Any]) -> str:
    """Fingerprint and backends as a table."""
    items = []

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}" if name else key, inner)
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            items.append(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>")

    walk("", results["fingerprint"])
    walk(
        "backend",
        {k: ("in use: " if b["loaded"] else "absent: ") + b["detail"] for k, b in results["backends"].items()},
    )
    return f'<div class="scroll"><table><tbody>{"".join(items)}</tbody></table></div>'


def page(title: str, parts: list[str]) -> str:
    """A whole file, its style within it."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _head(title: str, results: dict[str, Any], lines: Sequence[str] = ()) -> list[str]:
    facts = "".join(f"<li>{escape(line)}</li>" for line in (*report.machine_lines(results), *lines))
    return [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(results["created"])}</p>', f"<ul>{facts}</ul>"]


def _operators(results: dict[str, Any]) -> str:
    by_op: dict[str, list[Row]] = {}
    for row in results["rows"]:
        by_op.setdefault(row["op"], []).append(row)
    parts = _head("leanops benchmark", results, [f"peak memory: {results['peak_how']}"])
    for op, rows in by_op.items():
        good = [row for row in rows if row["status"] == "ok"]
        parts.append(f"<h2>{escape(op)}</h2><p class='soft'>served by {escape(rows[0]['backend'])}</p>")
        if good:
            parts += ["<h3>Percent of roofline</h3>", roofline_plot(good)]
            if ratios := ratio_plot(good):
                parts += [
                    "<h3>Peers: their time over the operator's (right of 1x: the operator is faster)</h3>",
                    ratios,
                ]
            parts += ["<h3>Samples around their median</h3>", sample_plot(good)]
        parts += ["<h3>All cases</h3>", _operators_table(rows)]
    parts += ["<h2>Fingerprint</h2>", facts(results)]
    return page("leanops benchmark", parts)


def _steps(results: dict[str, Any]) -> str:
    parts = _head("A MeZO step beside its forward passes", results)
    for case in results["cases"]:
        place = {"dtype": case["dtype"], "threads": case["threads"]}
        bars = [{"available": True, "reason": "", "error": None, **row} for row in case["rows"]]
        lines = []
        for row in case["rows"]:
            ratio = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
            lines.append(f"<tr>{_cells([row['name'], report.seconds(row['median_s']), ratio])}</tr>")
        parts += [
            f"<h2>{escape(report.case_text(case))}</h2>",
            "<h3>Time over that of two forward passes</h3>",
            ratio_plot([{"case": "step", **place, "peers": bars}], "time over that of two forward passes"),
            "<h3>Samples around their median</h3>",
            sample_plot([{"case": row["name"], **place, **row} for row in case["rows"]]),
            _table(("", "time", "of two forward passes [95%]"), lines),
        ]
    parts += ["<h2>Fingerprint</h2>", facts(results)]
    return page("leanops: a MeZO step", parts)


def render(results: dict[str, Any]) -> str:
    return _steps(results) if "cases" in results else _operators(results)


def write(results: dict[str, Any], target: str) -> None:
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(results), encoding="utf-8")
