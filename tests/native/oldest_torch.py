"""Compiles what includes torch's headers with those of the oldest torch that the package promises to build with.

They come from the smallest of torch's wheels, whose headers are those of every other.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from native.build import ROOT, toolchain

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
    common = ["-std=c++17", *toolchain.torch_include_flags(include)]
    host = [*toolchain.find_cxx(), "-fsyntax-only", *common]
    commands = [[*host, source] for source in sorted(ROOT.glob("csrc/*/*_cpu.cpp"))]
    try:
        device = [toolchain.find_nvcc(), "-DUSE_CUDA", "-arch=compute_90", "-G", "--ptx", "-o", "/dev/null", *common]
        commands += [[*device, source] for source in sorted(ROOT.glob("csrc/*/*_cuda.cu"))]
    except toolchain.Unavailable as error:
        print(f"the CUDA files are left out: {error}")
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda c: subprocess.run(list(map(str, c)), cwd=ROOT, capture_output=True), commands))
    for command, result in zip(commands, done, strict=True):
        print(f"{command[-1]}: {'ok' if result.returncode == 0 else result.stderr.decode(errors='replace')}")
    return max(result.returncode for result in done)


if __name__ == "__main__":
    sys.exit(main())
