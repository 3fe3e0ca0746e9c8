"""The convergence benchmark's picture, one hand-made SVG that stands alone, and the HTML file around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from leanops.bench import html
from leanops.bench.convergence import summary
from leanops.bench.convergence.results import TrainingResults
from leanops.bench.report import write_text

Axis = Callable[[float], float]

# colours that colour-blind readers can tell apart, with dashes where two are close
_COLOURS = {
    "adamw": ("var(--ink)", ""), "adafactor": ("#8a8f98", "7 4"), "sm3-fp32": ("#0072b2", ""),
    "sm3-bf16": ("#3aa6e0", "2 3"), "sm3-int8": ("#009e73", "9 3"), "sm3-none": ("#c4649b", ""),
    "sm3-lisa": ("#d99400", ""), "sm3-hft": ("#d55e00", "7 4"),
}  # fmt: skip
_STYLE = """
svg.convergence { --ink: #1b1f24; --soft: #5b6570; --line: #d8dde3; --paper: #fff; background: var(--paper); }
@media (prefers-color-scheme: dark) {
  svg.convergence { --ink: #e6e9ed; --soft: #9aa4af; --line: #363d46; --paper: #15181c; }
}
svg.convergence text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg.convergence .soft { fill: var(--soft); } svg.convergence .head { font-weight: 600; }
svg.convergence .line { stroke: var(--line); fill: none; }
"""
# pixels: the picture's width and height, its left margin, a panel's width and height
_WIDTH, _HEIGHT, _LEFT, _PLOT, _TALL = 1080, 880, 60, 740, 340


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _stroke(key: str, width: float = 2.0) -> str:
    colour, dash = _COLOURS[key]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'style="stroke:{colour}" stroke-width="{width}" fill="none"{dashes}'


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers within [low, high]."""
    raw = (high - low) / about
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def apart(wanted: Sequence[float], bottom: float, gap: float = 15.0) -> list[float]:
    """Heights of labels near those wanted, none closer than ``gap`` to another and none below ``bottom``."""
    placed = list(wanted)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    last = -math.inf
    for i in order:
        last = placed[i] = max(wanted[i], last + gap)
    last = bottom + gap
    for i in reversed(order):
        last = placed[i] = min(placed[i], last - gap)
    return placed


def _grid(top: float, across: Axis, up: Axis, xs: list[float], ys: list[float], name: str, kind: str) -> list[str]:
    body = [_text(_LEFT, top - 14, name, kind="head"), _text(_LEFT + _PLOT, top + _TALL + 34, kind, "end", "soft")]
    for y in ys:
        body.append(f'<path class="line" d="M{_LEFT} {up(y):.1f}H{_LEFT + _PLOT}"/>')
        body.append(_text(_LEFT - 8, up(y) + 4, f"{y:g}", "end", "soft"))
    body += [_text(across(x), top + _TALL + 18, f"{x:g}", "middle", "soft") for x in xs]
    return body


def curves(results: TrainingResults, top: float) -> list[str]:
    """Validation loss of each method over the tokens it has seen."""
    s, rows = results.settings, [row for row in results.rows if row.curve]
    values = [value for row in rows for _, value in row.curve]
    low = min(values) - 0.05
    # the first points, much higher and alike, set no limit; a curve that leaves the panel runs along its edge
    high = max(value for row in rows for _, value in row.curve[1:] or row.curve)
    high = max(min(high, low + 4), low + 0.1) + 0.05
    last = s.tokens / 1e3

    def across(x: float) -> float:
        return _LEFT + _PLOT * x / last

    def up(y: float) -> float:
        return top + _TALL * (high - min(y, high)) / (high - low)

    name = "Validation loss, bits a byte"
    body = _grid(top, across, up, ticks(0, last), ticks(low, high), name, "thousand tokens")
    scale = s.batch * s.context / 1e3
    labels = apart([up(row.curve[-1][1]) for row in rows], top + _TALL)
    for row, y in zip(rows, labels, strict=True):
        path = "L".join(f"{across(step * scale):.1f} {up(value):.1f}" for step, value in row.curve)
        body.append(f'<path d="M{path}" {_stroke(row.key)}><title>{escape(row.label)}</title></path>')
        x = _LEFT + _PLOT
        body.append(f'<path d="M{x + 8} {y:.1f}h22" {_stroke(row.key)}/>')
        body.append(_text(x + 36, y + 4, f"{row.label}: {row.curve[-1][1]:.3f}"))
    return body


def trade(results: TrainingResults, top: float) -> list[str]:
    """Held-out loss of each method over the bytes of its optimizer."""
    rows = [(row, row.test_bits) for row in results.rows if row.test_bits is not None]
    if not rows:
        return []
    losses, sizes = [loss for _, loss in rows], [row.state_bytes_per_parameter for row, _ in rows]
    margin = max(0.02, 0.1 * (max(losses) - min(losses)))
    low, high, most = min(losses) - margin, max(losses) + margin, max(1.0, 1.05 * max(sizes))

    def across(x: float) -> float:
        return _LEFT + 12 + (_PLOT - 12) * x / most

    def up(y: float) -> float:
        return top + _TALL * (high - y) / (high - low)

    name = "Held-out loss after the run, bits a byte: low and left is better"
    body = _grid(top, across, up, ticks(0, most), ticks(low, high), name, "bytes of optimizer state a parameter")
    labels = apart([up(loss) for loss in losses], top + _TALL)
    for (row, loss), size, y in zip(rows, sizes, labels, strict=True):
        x, point = across(size), up(loss)
        body.append(f'<path d="M{x:.1f} {point:.1f}L{x + 14:.1f} {y:.1f}" class="line"/>')
        body.append(
            f'<circle cx="{x:.1f}" cy="{point:.1f}" r="5" style="fill:{_COLOURS[row.key][0]}">'
            f"<title>{escape(row.label)}: {loss:.3f} bits a byte, {size:.3f} bytes a parameter</title></circle>"
        )
        body.append(_text(x + 17, y + 4, f"{row.label}: {loss:.3f}, {size:.3g} B"))
    return body


def svg(results: TrainingResults) -> str:
    body = curves(results, 40) if any(row.curve for row in results.rows) else []
    body += trade(results, 480)
    if results.proves_nothing:
        body.append(_text(_WIDTH - 12, 20, "so small a run proves nothing", "end", "soft"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="convergence" role="img" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-label="loss curves, and loss over optimizer bytes">'
        f"<style>{_STYLE}</style>{''.join(body)}</svg>"
    )


def _table(rows: list[list[str]], head: Sequence[str]) -> str:
    top = "".join(f"<th>{escape(c)}</th>" for c in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def render(results: TrainingResults) -> str:
    trials = []
    for row in results.rows:
        for t in sorted(row.tuning, key=lambda t: (t.round, t.lr)):
            found = "diverged" if t.validation_bits is None else f"{t.validation_bits:.3f}"
            taken = "taken" if t.lr == row.lr and t.round == len(results.settings.rounds) - 1 else ""
            trials.append([row.label, f"{t.lr:g}", str(t.steps), found, taken])
    parts = ["<h1>Training by each method</h1>", f'<p class="soft">{escape(results.created)}</p><ul>']
    parts += [f"<li>{escape(line)}</li>" for line in summary.facts(results)]
    parts += ["</ul>", f'<div class="scroll">{svg(results)}</div>']
    parts.append(_table([summary.cells(row) for row in results.rows], summary.COLUMNS))
    if verdicts := summary.verdicts(results):
        parts.append("<h2>Beside AdamW</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in verdicts) + "</ul>")
    parts.append("<h2>How the rates were chosen</h2>")
    parts.append(_table(trials, ("method", "rate", "steps", "validation bits/byte", "")))
    parts += ["<h2>Fingerprint</h2>", html.facts(results)]
    return html.page("leanops: training by each method", parts)


def write_html(results: TrainingResults, target: str) -> None:
    write_text(target, render(results))


def write_svg(results: TrainingResults, target: str) -> None:
    write_text(target, svg(results) + "\n")
