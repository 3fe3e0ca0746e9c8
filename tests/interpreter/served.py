"""The second process of remote.py, in which execnet runs this file: tests whose ids arrive through ``channel``."""

from __future__ import annotations

import os
from typing import Any

import pytest


class Served:
    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._errors: list[str] = []  # of files that cannot be collected
        self._reports: list[pytest.TestReport] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._errors.append(str(report.longreprtext))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for nodeid in self._channel:
            began = sum(os.times()[:4])
            self._reports.clear()
            if nodeid in items:
                session.config.hook.pytest_runtest_protocol(item=items[nodeid], nextitem=None)
            self._channel.send((*self._outcome(nodeid), sum(os.times()[:4]) - began))
        return True

    def _outcome(self, nodeid: str) -> tuple[str, str, str]:
        if not self._reports:
            return "failed", "\n".join(self._errors) or f"{nodeid} is not among the collected tests", ""
        printed = "\n".join(report.capstdout + report.capstderr for report in self._reports).strip()
        for outcome in ("failed", "skipped"):
            for report in self._reports:
                if report.outcome == outcome:
                    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
                    return outcome, reason.removeprefix("Skipped: "), printed
        return "passed", "", printed


if __name__ == "__channelexec__":
    channel = globals()["channel"]  # execnet's
    pytest.main([*channel.receive(), "--continue-on-collection-errors"], plugins=[Served(channel)])
