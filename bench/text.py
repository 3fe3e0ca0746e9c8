"""Results in words: each number with its unit, each comparison with its interval."""

from __future__ import annotations

from collections.abc import Sequence

from leanops.bench.results import OperatorResults, PeerResult, Results, Row, StepCase, StepRow

NO_TIME = "left out for want of time"  # the reason of a peer
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


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
    if row.gflop_per_s is not None:
        return f"{row.gflop_per_s:.4g} GFLOP/s"
    return "" if row.gb_per_s is None else f"{row.gb_per_s:.3g} GB/s"


def per_element(row: Row) -> str:
    return "" if row.ns_per_element is None else f"{row.ns_per_element:.3g}"


def percent(row: Row) -> str:
    return "" if row.percent_of_roofline is None else f"{row.percent_of_roofline:.0f}%"


def spread(row: Row) -> str:
    if row.median_s is None or row.low_s is None or row.high_s is None:
        return ""
    return f"±{50 * (row.high_s - row.low_s) / row.median_s:.1f}%"


def ratio(peer: PeerResult) -> str:
    return f"{peer.ratio:.2f}x {peer.name} [{peer.ratio_low:.2f}, {peer.ratio_high:.2f}]"


def peer(result: PeerResult) -> str:
    if not result.available:
        return f"{result.name}: {result.reason}"
    text = ratio(result)
    if result.error is not None:
        text += f", error {result.error:.1g}"
    return text + (f" ({result.reason})" if result.reason else "")


def notes(row: Row) -> list[str]:
    """The lines below a row: its reason, then its peers, without those that :func:`skipped` counts."""
    peers = [peer(result) for result in row.peers if result.available or result.reason != NO_TIME]
    return ([row.reason] if row.reason else []) + peers


def skipped(rows: Sequence[Row]) -> str:
    """A line that counts the rows and peers without a result, by reason; empty where there are none."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.status == "skipped":
            reasons.setdefault(row.reason, []).append(f"{row.op}/{row.case}")
    parts = [_skipped_rows(reason, names) for reason, names in reasons.items()]
    peers = sum(result.reason == NO_TIME for row in rows for result in row.peers)
    if peers:
        parts.append(f"{counted(peers, 'peer')} {NO_TIME}")
    return f"skipped: {'; '.join(parts)}" if parts else ""


def _skipped_rows(reason: str, names: Sequence[str]) -> str:
    different = list(dict.fromkeys(names))
    shown = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
    return f"{counted(len(names), 'row')} of {shown}: {reason}"


def counted(number: int, noun: str) -> str:
    """The number with its noun: 1 thread, 2 threads."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def gate(row: Row) -> str:
    found = row.gate
    if found is None:
        return ""
    if not found.passed:
        return "WRONG"
    return "exact" if found.bound == 0 else f"{found.error:.1g} of {found.bound:.1g}"


def step_ratio(row: StepRow) -> str:
    return f"{row.ratio:.3f} [{row.ratio_low:.3f}, {row.ratio_high:.3f}]"


def parameters(case: StepCase) -> str:
    n = case.parameters
    return f"{n / 1e6:.1f}M" if n >= 1_000_000 else f"{n / 1e3:.0f}K"


def step_case(case: StepCase) -> str:
    return (
        f"{parameters(case)} parameters, {case.tokens} tokens, {case.dtype}, "
        f"{case.distribution}, {counted(case.threads, 'thread')}, A/A noise {100 * case.noise:.1f}%"
    )


def machine(results: Results) -> str:
    return f"{results.processor}, torch {results.software['torch']}, leanops {results.leanops}"


def rooflines(results: OperatorResults) -> list[str]:
    """What the machine can do, and how steady it was."""
    lines = []
    for roof in results.roofline:
        bandwidth = ", ".join(f"{name} {value * 1e-9:.3g}" for name, value in roof.bandwidth.items())
        gemm = ", ".join(f"{name} {value * 1e-9:.4g}" for name, value in roof.gemm.items())
        lines.append(
            f"roofline, {counted(roof.threads, 'thread')}: GB/s {bandwidth}; GEMM GFLOP/s {gemm}; "
            f"one torch call {seconds(roof.dispatch_s)}"
        )
    noise = "n/a" if results.noise_floor is None else f"{100 * results.noise_floor:.1f}%"
    drift = "was measured once"
    if results.drift is not None:
        drift = f"drifted {100 * results.drift:.1f}% during the run"
    lines.append(f"noise floor (an operator against itself) {noise}; the machine {drift}")
    return lines


def command_line(results: Results) -> str:
    """The command that gave the results, as it can be typed again."""
    words = ["leanops", *results.command[1:]]
    return " ".join(f"'{word}'" if any(c in word for c in " |*()") else word for word in words)
