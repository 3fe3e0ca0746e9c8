"""The claims of torch's suite with each test run by Dynamo, as ``PYTORCH_TEST_WITH_DYNAMO=1`` runs torch's own tests.

torch reads the variable when its test utilities are imported, so the tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(map(str, HERE.glob("test_torch_*.py")))


@pytest.mark.ci
def test_torchs_suite_passes_when_dynamo_compiles_its_tests() -> None:
    pytest.importorskip("expecttest", reason="torch's test utilities need it: pip install 'leanops[dev]'")
    assert len(FILES) == 2
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:logging", *FILES]
    environment = {**os.environ, "PYTORCH_TEST_WITH_DYNAMO": "1"}
    environment.pop("LEANOPS_TEST_TIMES", None)  # the file is that of the run around this one
    run = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
