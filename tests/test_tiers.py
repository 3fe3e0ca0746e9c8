"""The report of the time that families take."""

from __future__ import annotations

import tiers


class Report:
    """Collects what a plugin writes at the end of a run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def section(self, title: str) -> None:
        self.lines.append(title)

    def write_line(self, line: str) -> None:
        self.lines.append(line)


def test_a_family_without_a_budget_fails_a_whole_run_and_the_report_names_the_file():
    plugin = tiers.Plugin()
    plugin.whole = True
    plugin.spent["twice"] = 1.0
    report = Report()
    plugin.pytest_terminal_summary(report)
    assert plugin.over() == ["twice"]
    assert any("add tests/twice/budget.json" in line for line in report.lines)
