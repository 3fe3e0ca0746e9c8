"""``leanops compare``: two result files, case by case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from leanops.autotune.measure import Interval, unpaired_ratio
from leanops.bench import terminal
from leanops.bench.results import OperatorResults, load
from leanops.bench.terminal import Entry, Line, Table

VISIBLE = 1.1  # the smallest change that a comparison should show
_COLUMNS = ("case", "verdict", "new over base [95%]")


@dataclass(frozen=True)
class Verdict:
    """``ratio`` is the new time over the base time, its interval widened by ``margin`` on both sides."""

    key: str
    ratio: Interval | None
    margin: float
    verdict: str  # slower, faster, same, wrong, missing, new, or a status of the new file

    @property
    def blind(self) -> bool:
        """Whether the interval is so wide that a change of a tenth would be called the same, too."""
        return self.verdict == "same" and self.ratio is not None and self.ratio.high > VISIBLE**2 * self.ratio.low


def margin(base: OperatorResults, new: OperatorResults) -> float:
    """By how much two runs of the same code may differ beyond the scatter of their samples.

    The largest noise floor or drift of the two runs: a machine whose speed changed by 5% during one run may differ by
    5% in another.
    """
    return max(value or 0.0 for run in (base, new) for value in (run.noise_floor, run.drift))


def compare(base: OperatorResults, new: OperatorResults) -> list[Verdict]:
    """A verdict for every case of either file. Slower and faster mean that 1 is outside of the widened interval."""
    before = {row.key: row for row in base.rows}
    after = {row.key: row for row in new.rows}
    extra = margin(base, new)
    verdicts = []
    for key, row in before.items():
        other = after.get(key)
        if other is None:
            verdicts.append(Verdict(key, None, extra, "missing"))
        elif row.status != "ok" or other.status != "ok":
            verdicts.append(Verdict(key, None, extra, other.status if other.status != "ok" else "new"))
        else:
            raw = unpaired_ratio(other.samples_s, row.samples_s)
            ratio = Interval(raw.value, raw.low / (1 + extra), raw.high * (1 + extra))
            verdict = "slower" if ratio.low > 1 else "faster" if ratio.high < 1 else "same"
            verdicts.append(Verdict(key, ratio, extra, verdict))
    verdicts += [Verdict(key, None, extra, "new") for key in after if key not in before]
    return verdicts


def differences(base: Any, new: Any, path: str = "") -> list[str]:
    """Where two fingerprints differ, as ``path: base -> new``."""
    if isinstance(base, dict) and isinstance(new, dict):
        found = []
        for name in sorted({*base, *new}):
            found += differences(base.get(name), new.get(name), f"{path}.{name}" if path else name)
        return found
    return [] if base == new else [f"{path}: {base} -> {new}"]


def machine_ratio(base: OperatorResults, new: OperatorResults) -> float | None:
    """The geometric mean of new over base bandwidth where both files measured the same thing."""
    rates = {(roof.device, roof.threads, name): rate for roof in base.roofline for name, rate in roof.bandwidth.items()}
    logs = [
        math.log(rate / rates[key])
        for roof in new.roofline
        for name, rate in roof.bandwidth.items()
        if (key := (roof.device, roof.threads, name)) in rates
    ]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _summary(verdicts: Sequence[Verdict]) -> list[str]:
    counts = {name: sum(v.verdict == name for v in verdicts) for name in ("slower", "faster", "same")}
    others = len(verdicts) - sum(counts.values())
    extra = verdicts[0].margin if verdicts else 0.0
    lines = [
        f"{counts['slower']} slower, {counts['faster']} faster, {counts['same']} the same, {others} not comparable; "
        f"ratios are new time over base time, 95% intervals widened by the runs' noise and drift, {100 * extra:.1f}%"
    ]
    if blind := sum(v.blind for v in verdicts):
        lines.append(
            f"{blind} of those called the same have an interval too wide to see a change of a tenth: measure again "
            "on a quieter machine, or without --quick"
        )
    return lines


def lines(base: OperatorResults, new: OperatorResults, verdicts: Sequence[Verdict], width: int | None) -> list[Line]:
    facts = [f"fingerprint differs: {line}" for line in differences(base.fingerprint, new.fingerprint)]
    machine = machine_ratio(base, new)
    if machine is not None:
        facts.append(f"memory bandwidth of the machine, new over base: {machine:.3f}")
    entries = []
    for v in verdicts:
        ratio = "" if v.ratio is None else f"{v.ratio.value:6.3f}x  [{v.ratio.low:.3f}, {v.ratio.high:.3f}]"
        note = " (too wide to see a tenth)" if v.blind else ""
        entries.append(Entry([v.key, v.verdict, ratio + note], style={"slower": "red"}.get(v.verdict, "")))
    table = Table(_COLUMNS, _COLUMNS, entries)
    return [
        *terminal.paragraphs(facts, width),
        *table.lines(width),
        *terminal.paragraphs(_summary(verdicts), width),
    ]


def main(base_path: str, new_path: str, stream: TextIO) -> int:
    """Print the comparison; 1 when a case is slower beyond its confidence interval, else 0."""
    base, new = load(base_path, OperatorResults), load(new_path, OperatorResults)
    verdicts = compare(base, new)
    terminal.show(lines(base, new, verdicts, terminal.width_of(stream)), stream)
    return 1 if any(v.verdict == "slower" for v in verdicts) else 0
