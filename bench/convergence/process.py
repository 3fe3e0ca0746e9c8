"""A worker of the convergence benchmark: a process that prints a line for each unit of work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def run_worker(command: Sequence[str], log: Path, lock: int, on_line: Callable[[str], None]) -> int:
    """Run a worker to its end and return its status. It is terminated if this process is interrupted.

    Args:
        log: the file of its standard error.
        lock: the descriptor of the folder's lock, which the worker holds too.
        on_line: called with each line of its standard output.
    """
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | _ENVIRONMENT,
            pass_fds=(lock,) if sys.platform != "win32" else (),
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                on_line(line.strip())
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()  # a worker may write a checkpoint first
                process.wait()


def last_line(log: Path) -> str:
    """The last line of a worker's log: the reason of an error."""
    return (log.read_text().strip().splitlines() or ["no message"])[-1]
