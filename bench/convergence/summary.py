"""The convergence benchmark's results as a table, as Markdown, and as sentences: where SM3 loses and where it wins."""

from __future__ import annotations

from typing import TextIO

from leanops.bench import terminal, text
from leanops.bench.convergence.results import Against, TrainingResults, TrainingRow
from leanops.bench.report import write_text
from leanops.bench.terminal import Entry, Line, Table

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
_IMPORTANCE = (
    "method",
    "held-out bits/byte",
    "rate",
    "tokens/s",
    "B/param",
    "against AdamW [95%]",
    "peak",
    "state",
    "train bits/byte",
    "optimizer",
)
CLOSE = 0.02  # times, and shares of memory, that differ by less are called the same


def _meaning(low: float, high: float, same: float = 0.0) -> str:
    """What the interval of a difference means, where more is worse. An interval within ``same`` of 0 means nothing."""
    return "worse" if low > same else "better" if high < -same else "not told apart"


def loss_difference(versus: Against | None) -> str:
    """The signed difference with its interval and the meaning of its sign."""
    if versus is None:
        return ""
    low, high = versus.test_bits_low, versus.test_bits_high
    return f"{versus.test_bits:+.3f} [{low:+.3f}, {high:+.3f}] {_meaning(low, high)}"


def cells(row: TrainingRow) -> list[str]:
    rate = f"{row.lr:g}" + (" (edge)" if row.edge else "")
    if row.diverged:
        loss = [f"diverged at step {row.diverged}", "", ""]
    else:
        loss = [f"{row.test_bits:.3f}", loss_difference(row.against), f"{row.train_bits:.3f}"]
    return [
        row.label,
        rate,
        *loss,
        f"{row.tokens_per_s:.0f}",
        text.seconds(row.optimizer_s),
        text.size(row.peak_bytes),
        text.size(row.state_bytes),
        f"{row.state_bytes_per_parameter:.3f}",
    ]


def facts(results: TrainingResults) -> list[str]:
    """Machine, model, text and procedure, and what the figures do not cover."""
    s, source = results.settings, results.text
    machine = results.processor + (f", {text.counted(s.threads, 'thread')}" if s.device == "cpu" else "")
    versions = ", ".join(f"{name} {version}" for name, version in results.software.items())
    trials = ", then ".join(f"{count} rates for {results.steps // part} steps" for part, count in s.rounds)
    lines = [
        f"{machine}, leanops {results.leanops}, {versions}",
        f"Llama, {(results.parameters or 0) / 1e6:.1f}M parameters, fp32: {s.layers} layers of {s.hidden}, "
        f"MLP {s.intermediate}, {s.heads} heads; bytes as tokens, {s.batch} windows of {s.context} a step, "
        f"{results.steps} steps, {s.tokens} tokens",
        f"text: {source.what}, {source.train.bytes / 1e6:.2f} MB to train on, {source.validation.bytes / 1e6:.2f} MB "
        f"for the rates, {source.test.bytes / 1e6:.2f} MB held out; sha256 {source.sha256[:16]}",
        f"same start (seed {s.seed}), same batches, gradient norm clipped at {s.clip:g}, no weight decay; "
        f"warm-up of {100 * s.warmup:g}%, cosine to {s.floor:g} of the rate; rates tuned by {trials}",
        "one seed: the intervals are over the held-out text, not over other starts or orders",
        f"peak: {results.peak_how}; with weights, gradients and activations, over {s.memory_steps} steps",
    ]
    if results.drift is not None:
        lines.append(
            "tokens/s come from a run of its own for each method: forward and backward passes, the same work in all "
            f"methods that train everything, differ by {100 * results.drift:.1f}% between the fastest and the "
            "slowest run"
        )
    if results.sm3_served_by == "reference":
        lines.append("SM3's operator is served by its reference here (see `leanops info`): its times say nothing")
    if results.proves_nothing:
        lines.append("SO SMALL A RUN PROVES NOTHING about the methods: it shows that the command works")
    return lines


def verdict(row: TrainingRow, drift: float | None) -> str:
    """A sentence: what the method is worse in than the baseline, what it is better in, and what the run cannot tell."""
    versus = row.against
    if versus is None:
        return f"{row.label} diverged at step {row.diverged}: it loses to AdamW."
    lists: dict[str, list[str]] = {"worse": [], "better": [], "not told apart": []}
    meaning = _meaning(versus.test_bits_low, versus.test_bits_high)
    lists[meaning].append(f"held-out loss ({versus.test_bits:+.3f} bits/byte)")
    noise = max(CLOSE, drift or 0.0)
    meaning = _meaning(1 - versus.tokens_per_s_high, 1 - versus.tokens_per_s_low, noise)
    lists[meaning].append(f"tokens/s ({100 * (versus.tokens_per_s - 1):+.1f}%)")
    if versus.peak_bytes is not None and row.peak_bytes is not None:
        share = versus.peak_bytes / max(row.peak_bytes - versus.peak_bytes, 1)
        lists[_meaning(share, share, CLOSE)].append(f"peak memory ({versus.peak_bytes / 2**20:+.0f} MiB)")
    meaning = _meaning(versus.state_bytes, versus.state_bytes)
    lists[meaning].append(f"optimizer bytes ({100 * versus.state_ratio:.3g}% of AdamW's)")
    parts = [f"{meaning} in {', '.join(items)}" for meaning, items in lists.items() if items]
    sentence = f"{row.label}, beside AdamW: {'; '.join(parts)}."
    if row.against_adafactor is not None:
        sentence += f" Held-out loss beside Adafactor's: {loss_difference(row.against_adafactor)}."
    return sentence


def verdicts(results: TrainingResults) -> list[str]:
    """A sentence for each method but the baseline."""
    return [verdict(row, results.drift) for row in results.rows if row.against is not None or row.diverged]


def lines(results: TrainingResults, width: int | None) -> list[Line]:
    table = Table(COLUMNS, _IMPORTANCE, [Entry(cells(row)) for row in results.rows])
    found = [
        *terminal.paragraphs(facts(results), width),
        Line(""),
        *table.lines(width),
        Line(""),
        *terminal.paragraphs(verdicts(results), width),
    ]
    return found + terminal.paragraphs(terminal.left_out_note(COLUMNS, table.left_out(width)), width)


def print_table(results: TrainingResults, stream: TextIO) -> None:
    """Machine and procedure, the table, then the sentences."""
    terminal.show(lines(results, terminal.width_of(stream)), stream)


def markdown(results: TrainingResults, picture: str | None = None) -> str:
    lines = [f"`{text.command_line(results)}`, {results.created[:10]}", "", *(f"- {x}" for x in facts(results)), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"| --- | ---: |{' --- |' * (len(COLUMNS) - 2)}"]
    lines += [f"| {' | '.join(cells(row))} |" for row in results.rows]
    lines += ["", *(f"- {x}" for x in verdicts(results)), ""]
    if picture:
        lines += [
            f"![validation loss of each method over its tokens, and final loss over optimizer bytes]({picture})",
            "",
        ]
    return "\n".join(lines)


def write_markdown(results: TrainingResults, target: str, picture: str | None = None) -> None:
    write_text(target, markdown(results, picture))
