"""A pytest plugin: tests of Triton kernels run under Triton's interpreter, as ordinary items in files of one name.

Triton reads TRITON_INTERPRET when it is imported, so a process either interprets kernels or compiles them. A process of
pytest, which is each worker of xdist, starts a second process with TRITON_INTERPRET=1 at the first test of a file
``test_interpreted.py``, and sends it the ids of such tests, one after the other. Fixtures and the test itself run
there; its outcome comes back. Where TRITON_INTERPRET=1 is set for pytest itself, the tests run in place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import execnet
import pytest
import tiers
from interpreter import served

FILE = "test_interpreted.py"
_INTERPRETER = pytest.StashKey["Interpreter"]()


class Outcome(NamedTuple):
    """The outcome of a test ("passed", "failed" or "skipped"), the text of the failure or the reason of the skip, the
    printed text, and the CPU time of the interpreting process."""

    outcome: str
    text: str
    printed: str
    seconds: float


class Interpreter:
    """The second process, which has collected ``files``."""

    def __init__(self, config: pytest.Config, files: list[Path]) -> None:
        self.ended = False
        self._group = execnet.Group()
        # as xdist starts its workers: signals and some C libraries want the main thread
        spec = "execmodel=main_thread_only//popen//env:TRITON_INTERPRET=1"
        self._channel = self._group.makegateway(spec).remote_exec(served)
        options = ["-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={config.rootpath}"]
        options += ["-c", str(config.inipath)] if config.inipath else []
        self._channel.send([*options, *map(str, files)])

    def run(self, nodeid: str) -> Outcome:
        try:
            self._channel.send(nodeid)
            return Outcome(*self._channel.receive())
        except (EOFError, OSError, execnet.RemoteError) as error:
            self.ended = True
            self.stop()
            return Outcome("failed", f"the interpreting process has ended: {error!r}", "", 0.0)

    def stop(self) -> None:
        self._group.terminate(timeout=5)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.path.name != FILE or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    stash = pyfuncitem.config.stash
    if _INTERPRETER not in stash or stash[_INTERPRETER].ended:
        files = {item.path for item in pyfuncitem.session.items if item.path.name == FILE}
        stash[_INTERPRETER] = Interpreter(pyfuncitem.config, sorted(files))
    outcome, text, printed, seconds = stash[_INTERPRETER].run(pyfuncitem.nodeid)
    tiers.also_spent(pyfuncitem, seconds)
    if printed:
        pyfuncitem.add_report_section("call", "interpreter", printed)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    if _INTERPRETER in config.stash and not config.stash[_INTERPRETER].ended:
        config.stash[_INTERPRETER].stop()
