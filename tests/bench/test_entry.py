"""An error in the import of the package is one line, as every other error of the command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMAND = "import leanops_command, sys; sys.exit(leanops_command.main())"


def started(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "LEANOPS_TRACEBACK"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=170)


@pytest.mark.parametrize(
    ("before", "environment", "message"),
    [
        ("import sys; sys.modules['torch'] = None; ", {}, "leanops: torch is not installed (pip install torch)\n"),
        ("import sys; sys.modules['leanops.zo'] = None; ", {}, "leanops: the import fails: ModuleNotFoundError"),
        ("", {"LEANOPS_CPU_ISA": "mmx"}, "leanops: LEANOPS_CPU_ISA must be baseline, avx2 or avx512, got 'mmx'\n"),
        ("", {"LEANOPS_DISABLE": "gpu"}, "leanops: LEANOPS_DISABLE must name backends of cpu, cuda, triton, nvrtc"),
    ],
)
def test_an_import_that_fails_is_one_line_and_status_2(before, environment, message):
    done = started(before + COMMAND, "info", **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_its_traceback_can_be_had():
    done = started(COMMAND, "info", LEANOPS_DISABLE="gpu", LEANOPS_TRACEBACK="1")
    assert "Traceback" in done.stderr


def test_the_installed_command_tells_its_version():
    done = started(COMMAND, "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("leanops 0.")
    assert done.stdout.count("\n") == 1
