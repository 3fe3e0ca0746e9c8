"""Compiles what includes torch's headers with those of the oldest torch that the package promises to build with.

They come from PyPI: the smallest of its wheels has the headers of all.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = ("--platform", "macosx_11_0_arm64", "--python-version", "3.12", "--implementation", "cp")


def headers() -> Path:
    """The folder that holds ``torch/include``."""
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest
    version = f"{oldest[1]}.0"
    folder = ROOT / "build" / f"torch-{version}"
    if not folder.exists():
        download = folder.with_suffix(".download")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *SMALLEST]
        subprocess.run([*pip, "--dest", str(download), f"torch=={version}"], check=True)
        (wheel,) = download.glob("*.whl")
        with zipfile.ZipFile(wheel) as file:
            file.extractall(download, [n for n in file.namelist() if n.startswith("torch/include/")])
        wheel.unlink()
        download.rename(folder)
    return folder


def main() -> int:
    include = headers() / "torch" / "include"
    target = re.search(r'STABLE_ABI = "(.*)"', (ROOT / "setup.py").read_text())
    assert target
    common = ["-std=c++17", target[1], "-Icsrc", "-isystem", include, "-isystem", include / "torch/csrc/api/include"]
    commands = [["c++", "-fsyntax-only", *common, source] for source in sorted(ROOT.glob("csrc/*/*_cpu.cpp"))]
    if nvcc := shutil.which("nvcc"):
        device = [nvcc, "-DUSE_CUDA", "-arch=compute_90", "-G", "--ptx", "-o", "/dev/null", *common]
        commands += [[*device, source] for source in sorted(ROOT.glob("csrc/*/*_cuda.cu"))]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda c: subprocess.run(list(map(str, c)), cwd=ROOT, capture_output=True), commands))
    for command, result in zip(commands, done, strict=True):
        print(f"{command[-1]}: {'ok' if result.returncode == 0 else result.stderr.decode(errors='replace')}")
    return max(result.returncode for result in done)


if __name__ == "__main__":
    sys.exit(main())
