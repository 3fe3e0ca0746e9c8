"""Results as a Markdown section: machine, versions and command first, then a table, each figure with its spread."""

from __future__ import annotations

from pathlib import Path

from leanops.bench.report import Results, Row, gate_text, machine_lines, processor, rate, seconds, spread


def command_line(results: Results) -> str:
    """The command that gave the results, as it can be typed again."""
    words = ["leanops", *results["command"][1:]]
    return " ".join(f"'{w}'" if any(c in w for c in " |*()") else w for w in words)


def _head(results: Results, lines: list[str]) -> list[str]:
    software = ", ".join(f"{name} {version}" for name, version in results["fingerprint"]["software"].items() if version)
    return [
        f"`{command_line(results)}`, {results['created'][:10]}",
        "",
        *(f"- {line}" for line in lines),
        f"- {software}",
        "",
    ]


def _peers(row: Row) -> str:
    shown = [p for p in row["peers"] if p["available"]]
    return "; ".join(f"{p['ratio']:.2f}x {p['name']} [{p['ratio_low']:.2f}, {p['ratio_high']:.2f}]" for p in shown)


def operators(results: Results) -> str:
    """The rows of ``leanops bench``. Ratios are the peer's time over the operator's, with a 95% interval."""
    lines = _head(results, machine_lines(results))
    for op in dict.fromkeys(row["op"] for row in results["rows"]):
        backend = next(row["backend"] for row in results["rows"] if row["op"] == op)
        lines += [
            f"`{op}`, {backend}",
            "",
            "| case | dtype | threads | time | ns/element | rate | of roofline | accuracy | peers |",
        ]
        lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for row in results["rows"]:
            if row["op"] != op:
                continue
            head = f"| {row['case']} | {row['dtype']} | {row['threads']} "
            if row["status"] != "ok":
                lines.append(f"{head}| {row['status']}: {row['reason']} | | | | {gate_text(row)} | |")
                continue
            time = f"{seconds(row['median_s'])} {spread(row)}"
            share = f"{row['percent_of_roofline']:.0f}% ({row['bound']})"
            cells = [time, f"{row['ns_per_element']:.3g}", rate(row), share, gate_text(row), _peers(row)]
            lines.append(f"{head}| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def steps(results: Results) -> str:
    """The cases of ``leanops bench mezo-step``. Ratios are to the two forward passes, with a 95% interval."""
    lines = _head(results, [processor(results)])
    lines += ["| dtype, noise | threads | | time | of two forward passes |", "| --- | --- | --- | --- | --- |"]
    for case in results["cases"]:
        for row in case["rows"]:
            ratio = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
            first = f"| {case['dtype']}, {case['distribution']} | {case['threads']} "
            lines.append(f"{first}| {row['name']} | {seconds(row['median_s'])} | {ratio} |")
    model = results["cases"][0]
    noise = ", ".join(f"{100 * case['noise']:.1f}%" for case in results["cases"])
    lines += ["", f"{model['parameters'] / 1e6:.1f}M parameters, {model['tokens']} tokens; A/A noise {noise}.", ""]
    return "\n".join(lines)


def write(results: Results, target: str) -> None:
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(steps(results) if "cases" in results else operators(results))
