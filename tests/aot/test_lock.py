"""A process that dies while it compiles must not keep the next one waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from leanops import _nvrtc

_HOLDER = """
import sys, time
from leanops import _nvrtc
with _nvrtc.exclusive("kernel"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_kill_9_of_a_builder_frees_the_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        waiter = subprocess.Popen([sys.executable, "-c", _HOLDER.replace("600", "0")], env=dict(os.environ))
        time.sleep(5)
        assert waiter.poll() is None, "two builders at once"
        os.kill(holder.pid, signal.SIGKILL)
        assert waiter.wait(timeout=60) == 0
    finally:
        holder.kill()
        holder.wait()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "leanops").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with _nvrtc.exclusive("kernel"):
        pass
