"""The binaries on disk: compiled once for all processes, by one that may die, and never read damaged."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from leanops.common import nvrtc

_HOLDER = """
import sys, time
from leanops.common import nvrtc
with nvrtc.exclusive("kernel"):
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
    with nvrtc.exclusive("kernel"):
        pass


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    def no_lock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc.fcntl, "flock", no_lock)
    assert nvrtc.kept("a", lambda: b"binary") == b"binary"
    assert nvrtc.kept("a", lambda: b"other") == b"binary"


def test_an_error_of_who_holds_the_lock_is_raised(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(OSError, match="of the compiler"), nvrtc.exclusive("kernel"):
        raise OSError("of the compiler")


def test_a_user_without_a_home_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, so ignored")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is where nobody knows the user
    assert nvrtc.kept("a", lambda: b"first") == b"first"
    assert nvrtc.kept("a", lambda: b"second") == b"second"
    assert list(tmp_path.iterdir()) == []


def test_a_binary_that_cannot_be_written_leaves_no_part(tmp_path, monkeypatch):
    def fail(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc.Path, "write_bytes", fail)
    assert nvrtc.kept("a", lambda: b"binary") == b"binary"
    assert [file.suffix for file in nvrtc.cache_folder().iterdir()] == [".lock"]


def test_a_binary_is_made_once_and_again_where_its_file_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[bytes] = []

    def make() -> bytes:
        made.append(b"binary %d" % len(made))
        return made[-1]

    assert [nvrtc.kept("a", make), nvrtc.kept("a", make)] == [b"binary 0"] * 2
    assert nvrtc.kept("b", make) == b"binary 1"
    for file in nvrtc.cache_folder().glob("*.bin"):
        file.write_bytes(file.read_bytes()[:-1])
    assert nvrtc.kept("a", make) == b"binary 2"
    assert nvrtc.kept("a", make) == b"binary 2"
    assert {file.suffix for file in nvrtc.cache_folder().iterdir()} == {".bin", ".lock"}


def test_a_binary_is_made_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "leanops").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc.kept("a", lambda: b"binary") == b"binary"
