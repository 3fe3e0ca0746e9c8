"""Runs tests/interpreter/interpreted*.py, each in a process of its own, under TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("interpreted*.py"))
KERNELS = sorted(Path(__file__).parents[2].glob("pyops/*/triton.py"))


@pytest.mark.parametrize("tests", FILES, ids=[path.stem for path in FILES])
def test_triton_kernels_under_the_interpreter(tests):
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'leanops[triton]'")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tests.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("kernels", KERNELS, ids=[path.parent.name for path in KERNELS])
def test_every_family_with_triton_kernels_is_interpreted(kernels):
    module = f"leanops.{kernels.parent.name}"
    assert any(f"from {module} import triton\n" in path.read_text() for path in FILES)
