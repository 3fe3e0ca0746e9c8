"""``leanops compare``: two result files, case by case."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from leanops.autotune.measure import Interval, unpaired_ratio
from leanops.bench.runner import SCHEMA

Results = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """``ratio`` is the new time over the base time, its interval widened by ``margin`` on both sides."""

    key: str
    ratio: Interval | None
    margin: float
    verdict: str  # slower, faster, same, wrong, missing, new, or a status of the new file


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value <= sys.float_info.max


def load(path: str) -> Results:
    """The results in a file, which hold all that a comparison reads.

    Raises:
        ValueError: the file is not JSON, has another schema, or an entry is not what it must be.
    """
    try:
        results: Results = json.loads(Path(path).read_bytes())
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"leanops compare: {path} is not JSON: {error}") from error
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        found = results.get("schema") if isinstance(results, dict) else type(results).__name__
        raise ValueError(f"leanops compare: {path} must have schema {SCHEMA}, got {found}")

    def require(good: bool, place: str, wanted: str, value: Any) -> None:
        if not good:
            raise ValueError(f"leanops compare: {path}: {place} must be {wanted}, got {json.dumps(value):.60}")

    for name, kind, wanted in (
        ("fingerprint", dict, "an object"),
        ("roofline", list, "a list"),
        ("rows", list, "a list"),
    ):
        require(isinstance(results.get(name), kind), name, wanted, results.get(name))
    for name in ("noise_floor", "drift"):
        value = results.get(name)
        require(value in (None, 0) or _positive(value), name, "a number, 0 or more, or null", value)
    for i, roof in enumerate(results["roofline"]):
        rates: Any = roof.get("bandwidth") if isinstance(roof, dict) else None
        good = isinstance(rates, dict) and isinstance(roof.get("device"), str) and isinstance(roof.get("threads"), int)
        require(good, f"roofline[{i}]", "an object with device, threads and bandwidth", roof)
        for name, rate in rates.items():
            require(_positive(rate), f"roofline[{i}].bandwidth.{name}", "a positive number", rate)
    for i, row in enumerate(results["rows"]):
        good = isinstance(row, dict) and isinstance(row.get("key"), str) and isinstance(row.get("status"), str)
        require(good, f"rows[{i}]", "an object with key and status", row)
        if row["status"] == "ok":
            times = row.get("samples_s")
            good = isinstance(times, list) and bool(times) and all(map(_positive, times))
            require(good, f"rows[{i}].samples_s", "a list of positive times", times)
    return results


def margin(base: Mapping[str, Any], new: Mapping[str, Any]) -> float:
    """What two runs of the same code may differ by beyond their samples' scatter.

    The larger noise floor and the larger drift of the two runs: a machine that changed speed by 5% during a run will
    not be the same to better than 5% in another.
    """
    return max(float(run.get(name) or 0.0) for run in (base, new) for name in ("noise_floor", "drift"))


def compare(base: Results, new: Results) -> list[Verdict]:
    """A verdict for every case of either file. Slower or faster: the widened interval does not hold 1."""
    before = {row["key"]: row for row in base["rows"]}
    after = {row["key"]: row for row in new["rows"]}
    extra = margin(base, new)
    verdicts = []
    for key, row in before.items():
        if key not in after:
            verdicts.append(Verdict(key, None, extra, "missing"))
            continue
        other = after[key]
        if row["status"] != "ok" or other["status"] != "ok":
            verdicts.append(Verdict(key, None, extra, other["status"] if other["status"] != "ok" else "new"))
            continue
        raw = unpaired_ratio(other["samples_s"], row["samples_s"])
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


def machine_ratio(base: Results, new: Results) -> float | None:
    """The geometric mean of new over base bandwidth where both files measured the same thing."""
    rates = {
        (roof["device"], roof["threads"], name): rate
        for roof in base["roofline"]
        for name, rate in roof["bandwidth"].items()
    }
    logs = [
        math.log(rate / rates[key])
        for roof in new["roofline"]
        for name, rate in roof["bandwidth"].items()
        if (key := (roof["device"], roof["threads"], name)) in rates
    ]
    return math.exp(sum(logs) / len(logs)) if logs else None


def main(base_path: str, new_path: str, stream: TextIO) -> int:
    """Print the comparison; 1 when a case is slower beyond its confidence interval, else 0."""
    base, new = load(base_path), load(new_path)
    machine, verdicts = machine_ratio(base, new), compare(base, new)
    for line in differences(base["fingerprint"], new["fingerprint"]):
        print(f"fingerprint differs: {line}", file=stream)
    if machine is not None:
        print(f"memory bandwidth of the machine, new over base: {machine:.3f}", file=stream)
    width = max((len(v.key) for v in verdicts), default=0)
    for v in verdicts:
        text = "" if v.ratio is None else f"{v.ratio.value:6.3f}x  [{v.ratio.low:.3f}, {v.ratio.high:.3f}]"
        print(f"{v.key:<{width}}  {v.verdict:<8} {text}".rstrip(), file=stream)
    counts = {name: sum(v.verdict == name for v in verdicts) for name in ("slower", "faster", "same")}
    others = len(verdicts) - sum(counts.values())
    extra = verdicts[0].margin if verdicts else 0.0
    print(
        f"{counts['slower']} slower, {counts['faster']} faster, {counts['same']} the same, {others} not comparable; "
        f"ratios are new time over base time, 95% intervals widened by the runs' noise and drift, {100 * extra:.1f}%",
        file=stream,
    )
    return 1 if counts["slower"] else 0
