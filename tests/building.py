"""Builds a copy of the sources with a stand-in for the compilers that records its arguments and writes empty files."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

STAND_IN = """#!/bin/sh
{ printf '%s\\n' "$0"; for word; do printf '%s\\n' "$word"; done; } > "$RECORDS/$$"
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && : > "$2"
  [ "$1" = -MF ] && echo "object: " > "$2"
  shift
done
"""


def program(path: Path, text: str = STAND_IN) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@dataclass
class Built:
    """What a build left behind."""

    output: str
    report: dict[str, dict[str, object]]
    commands: list[list[str]]  # of the stand-ins

    def command(self, output: str) -> list[str]:
        """The one that wrote a file."""
        (found,) = [c for c in self.commands if c[c.index("-o") + 1].endswith(output)]
        return found


@dataclass
class Checkout:
    """A copy of the sources, which the stand-ins build."""

    folder: Path

    def environment(self, **changes: str) -> dict[str, str]:
        records = self.folder.parent / "records"
        shutil.rmtree(records, ignore_errors=True)
        records.mkdir()
        cxx = shlex.quote(str(program(self.folder.parent / "tools" / "g++")))
        unset = {"CUDA_HOME", "MAX_JOBS", "NVCC_APPEND_FLAGS", *(k for k, v in changes.items() if v == "unset")}
        env = os.environ | {"RECORDS": str(records), "CXX": cxx, "LEANOPS_CUDA_ARCHS": ""} | changes
        return {k: v for k, v in env.items() if k in changes or k not in unset}

    def command(self, python: str | Path = sys.executable, build_lib: str = "lib") -> list[str | Path]:
        return [python, "setup.py", "build_ext", "--build-lib", build_lib]

    def build(
        self,
        command: list[str | Path] | None = None,
        build_lib: str = "lib",
        environment: dict[str, str] | None = None,
        clean: bool = True,
    ) -> Built:
        if clean:
            shutil.rmtree(self.folder / "build", ignore_errors=True)
        done = subprocess.run(
            command or self.command(build_lib=build_lib),
            cwd=self.folder,
            env=environment or self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output = done.stdout.decode(errors="replace")
        assert done.returncode == 0, output
        report = json.loads((self.folder / build_lib / "leanops/lib/build.json").read_text())
        records = [path.read_text().splitlines() for path in (self.folder.parent / "records").iterdir()]
        return Built(output, report, records)


def checkout(folder: Path) -> Checkout:
    folder.mkdir(parents=True)
    for name in ("csrc", "pyops", "optim", "autotune", "bench"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return Checkout(folder)
