"""The convergence benchmark's results as a table, as Markdown, and in words: where SM3 loses and where it wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TextIO

from leanops.bench.markdown import command_line
from leanops.bench.report import has_rich, seconds, size

Results = dict[str, Any]
Row = dict[str, Any]

COLUMNS = (
    "method",
    "rate",
    "held-out bits/byte",
    "against AdamW [95%]",
    "train bits/byte",
    "tokens/s",
    "optimizer",
    "peak",
    "state",
    "B/param",
)
CLOSE = 0.02  # times, and shares of memory, that differ by less are called the same


def _meaning(low: float, high: float, same: float = 0.0) -> str:
    """Of a difference where more is worse, by its interval; within ``same`` of 0 it says nothing."""
    return "worse" if low > same else "better" if high < -same else "not told apart"


def loss_difference(versus: dict[str, Any] | None) -> str:
    """Signed, with its interval and what the sign means."""
    if versus is None:
        return ""
    low, high = versus["test_bits_low"], versus["test_bits_high"]
    return f"{versus['test_bits']:+.3f} [{low:+.3f}, {high:+.3f}] {_meaning(low, high)}"


def cells(row: Row) -> list[str]:
    rate = f"{row['lr']:g}" + (" (edge)" if row["edge"] else "")
    if row["diverged"]:
        loss = [f"diverged at step {row['diverged']}", "", ""]
    else:
        loss = [f"{row['test_bits']:.3f}", loss_difference(row["against"]), f"{row['train_bits']:.3f}"]
    return [
        row["label"],
        rate,
        *loss,
        f"{row['tokens_per_s']:.0f}",
        seconds(row["optimizer_s"]),
        size(row["peak_bytes"]),
        size(row["state_bytes"]),
        f"{row['state_bytes_per_parameter']:.3f}",
    ]


def facts(results: Results) -> list[str]:
    """Machine, model, text and procedure; the figures' reach."""
    s, mark, text = results["settings"], results["fingerprint"], results["text"]
    machine = mark["gpu"]["name"] if "gpu" in mark else f"{mark['cpu']['name']}, {s['threads']} threads"
    versions = ", ".join(f"{name} {v}" for name, v in mark["software"].items() if v)
    trials = ", then ".join(f"{count} rates for {results['steps'] // part} steps" for part, count in s["rounds"])
    mega = {part: text[part]["bytes"] / 1e6 for part in ("train", "validation", "test")}
    lines = [
        f"{machine}, leanops {results['leanops']}, {versions}",
        f"Llama, {(results['parameters'] or 0) / 1e6:.1f}M parameters, fp32: {s['layers']} layers of {s['hidden']}, "
        f"MLP {s['intermediate']}, {s['heads']} heads; bytes as tokens, {s['batch']} windows of {s['context']} a step, "
        f"{results['steps']} steps, {s['tokens']} tokens",
        f"text: {text['what']}, {mega['train']:.2f} MB to train on, {mega['validation']:.2f} MB for the rates, "
        f"{mega['test']:.2f} MB held out; sha256 {text['sha256'][:16]}",
        f"same start (seed {s['seed']}), same batches, gradient norm clipped at {s['clip']:g}, no weight decay; "
        f"warm-up of {100 * s['warmup']:g}%, cosine to {s['floor']:g} of the rate; rates tuned by {trials}",
        "one seed: the intervals are over the held-out text, not over other starts or orders",
        f"peak: {results['peak_how']}; with weights, gradients and activations, over {s['memory_steps']} steps",
    ]
    if results["drift"] is not None:
        lines.append(
            "tokens/s come from a run of its own for each method: forward and backward passes, the same work in all "
            f"methods that train everything, differ by {100 * results['drift']:.1f}% between the fastest and the "
            "slowest run"
        )
    if results["sm3_served_by"] == "reference":
        lines.append("SM3's operator is served by its reference here (see `leanops info`): its times say nothing")
    if results["proves_nothing"]:
        lines.append("SO SMALL A RUN PROVES NOTHING about the methods: it shows that the command works")
    return lines


def verdict(row: Row, results: Results) -> str:
    """In what the method is worse than the baseline, in what better, and in what the run cannot tell."""
    versus = row["against"]
    if row["diverged"]:
        return f"{row['label']} diverged at step {row['diverged']}: it loses to AdamW."
    lists: dict[str, list[str]] = {"worse": [], "better": [], "not told apart": []}
    meaning = _meaning(versus["test_bits_low"], versus["test_bits_high"])
    lists[meaning].append(f"held-out loss ({versus['test_bits']:+.3f} bits/byte)")
    noise = max(CLOSE, results["drift"] or 0.0)
    meaning = _meaning(1 - versus["tokens_per_s_high"], 1 - versus["tokens_per_s_low"], noise)
    lists[meaning].append(f"tokens/s ({100 * (versus['tokens_per_s'] - 1):+.1f}%)")
    if versus["peak_bytes"] is not None:
        share = versus["peak_bytes"] / max(row["peak_bytes"] - versus["peak_bytes"], 1)
        lists[_meaning(share, share, CLOSE)].append(f"peak memory ({versus['peak_bytes'] / 2**20:+.0f} MiB)")
    meaning = _meaning(versus["state_bytes"], versus["state_bytes"])
    lists[meaning].append(f"optimizer bytes ({100 * versus['state_ratio']:.3g}% of AdamW's)")
    told = [f"{meaning} in {', '.join(items)}" for meaning, items in lists.items() if items]
    text = f"{row['label']}, beside AdamW: {'; '.join(told)}."
    if row["against_adafactor"] is not None:
        text += f" Held-out loss beside Adafactor's: {loss_difference(row['against_adafactor'])}."
    return text


def verdicts(results: Results) -> list[str]:
    return [verdict(row, results) for row in results["rows"] if row["against"] is not None or row["diverged"]]


def print_table(results: Results, stream: TextIO) -> None:
    """A rich table on a terminal, plain lines elsewhere, then the sentences."""
    for line in facts(results):
        print(line, file=stream)
    if stream.isatty() and has_rich():
        from rich.console import Console
        from rich.table import Table

        table = Table(show_lines=True)
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for row in results["rows"]:
            table.add_row(*cells(row))
        Console(file=stream).print(table)
    else:
        table_lines = [list(COLUMNS), *(cells(row) for row in results["rows"])]
        widths = [max(len(cell[i]) for cell in table_lines) for i in range(len(COLUMNS))]
        for line_cells in table_lines:
            padded = (cell.ljust(width) for cell, width in zip(line_cells, widths, strict=True))
            print("  " + "  ".join(padded).rstrip(), file=stream)
    for line in verdicts(results):
        print(line, file=stream)


def markdown(results: Results, picture: str | None = None) -> str:
    lines = [f"`{command_line(results)}`, {results['created'][:10]}", "", *(f"- {x}" for x in facts(results)), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"| --- | ---: |{' --- |' * (len(COLUMNS) - 2)}"]
    lines += [f"| {' | '.join(cells(row))} |" for row in results["rows"]]
    lines += ["", *(f"- {x}" for x in verdicts(results)), ""]
    if picture:
        lines += [
            f"![validation loss of each method over its tokens, and final loss over optimizer bytes]({picture})",
            "",
        ]
    return "\n".join(lines)


def write_markdown(results: Results, target: str, picture: str | None = None) -> None:
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(results, picture))
