"""Runs tests/triton/interpreted*.py, each in a process of its own, under TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["interpreted", "interpreted_sm3"])
def test_triton_kernels_under_the_interpreter(name):
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'leanops[triton]'")
    tests = Path(__file__).with_name(f"{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tests.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
