"""Tests in files test_interpreted.py run under Triton's interpreter, and their outcomes are those of ordinary items."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import families
import pytest
from interpreter.remote import FILE

TESTS = """
import os
import pytest

@pytest.mark.parametrize("x", [1, 2])
def test_passes(x):
    assert os.environ["TRITON_INTERPRET"] == "1"

def test_fails(tmp_path):
    print("seen before")
    assert tmp_path is None

def test_skips():
    pytest.skip("no reason at all")

def test_ends():
    os._exit(3)

def test_goes_on():
    pass
"""


def outcomes(folder: Path, *options: str) -> dict[str, tuple[str, str]]:
    """The outcome of each test, and the text that comes with it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(families.TESTS), os.environ.get("PYTHONPATH", "")])
    plugins = ["-p", "interpreter.remote", "-p", "no:cacheprovider", f"--junitxml={folder / 'results.xml'}"]
    command = [sys.executable, "-m", "pytest", *plugins, f"--rootdir={folder}", *options, str(folder / FILE)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    found = {}
    for case in ElementTree.parse(folder / "results.xml").iter("testcase"):
        children = [child for child in case if child.tag in ("failure", "skipped", "error")]
        text = "".join(f"{child.get('message')} {child.text}" for child in children)
        text += "".join(child.text or "" for child in case if child.tag == "system-out")
        found[case.get("name", "")] = (children[0].tag if children else "passed", text)
    assert found, done.stdout + done.stderr
    return found


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_the_outcome_of_a_test_comes_back(tmp_path, workers):
    (tmp_path / FILE).write_text(TESTS)
    found = outcomes(tmp_path, *workers, "-o", "junit_logging=all")
    ended = found.pop("test_ends")
    assert {name: outcome for name, (outcome, _) in found.items()} == {
        "test_passes[1]": "passed",
        "test_passes[2]": "passed",
        "test_fails": "failure",
        "test_skips": "skipped",
        "test_goes_on": "passed",
    }
    assert "assert tmp_path is None" in found["test_fails"][1]
    assert "seen before" in found["test_fails"][1]
    assert "no reason at all" in found["test_skips"][1]
    assert ended[0] == "failure"
    assert "the interpreting process has ended" in ended[1]


def test_a_file_that_the_interpreting_process_cannot_import_fails_with_its_error(tmp_path):
    broken = "import os\nassert os.environ.get('TRITON_INTERPRET') != '1', 'broken here'\n\ndef test_any(): pass\n"
    (tmp_path / FILE).write_text(broken)
    outcome, text = outcomes(tmp_path)["test_any"]
    assert outcome == "failure"
    assert "broken here" in text


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if (families.ROOT / f"pyops/{f}/triton.py").exists()])
def test_every_family_with_triton_kernels_is_interpreted(family):
    assert f"leanops.{family}.triton" in (families.TESTS / family / FILE).read_text()
