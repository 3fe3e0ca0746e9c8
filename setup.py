"""Builds leanops: the package map, the wheel tag, and the native libraries, which are optional.

Each native library is a plain shared object over torch's stable ABI with no Python symbol in it, so one wheel serves
every Python and every torch from 2.10 on. A library that cannot be built is left out and the reason is written to
leanops/lib/build.json, where `leanops info` finds it. Environment:

    LEANOPS_CUDA_ARCHS  architectures of the CUDA library (default "80;90;100"; empty: do not build it)
    CXX, CUDA_HOME      which compilers
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGES = {
    "leanops": "pyops",
    "leanops.zo": "pyops/zo",
    "leanops.optim": "optim",
    "leanops.autotune": "autotune",
    "leanops.bench": "bench",
}
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra"
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq",
}


class Unavailable(Exception):
    """A library cannot be built here; the text says why."""


def find_nvcc() -> str:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (nvcc := Path(home, "bin", "nvcc")).exists():
            return str(nvcc)
    if nvcc_on_path := shutil.which("nvcc"):
        return nvcc_on_path
    raise Unavailable("no nvcc found (looked at CUDA_HOME, CUDA_PATH, /usr/local/cuda and PATH)")


def torch_flags() -> tuple[str, str]:
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise Unavailable(f"torch is not installed where the build runs ({error}); "
                          "install it, then build with: pip install --no-build-isolation") from error  # fmt: skip
    # as system headers, so that warnings are about this project's code
    include = " ".join(f"-isystem {p}" for p in cpp_extension.include_paths())
    # libtorch depends on whatever backends this torch has; --no-as-needed keeps them in the symbol search
    link = " ".join(f"-L{p}" for p in cpp_extension.library_paths())
    return include, f"{link} -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10"


def cpu_objects(cxx: str) -> list[tuple[str, str, str]]:
    """(source, object name, command) of everything in the CPU library."""
    include, _ = torch_flags()
    common = f"{cxx} -MD -MF $out.d {CXX_FLAGS} -Icsrc"
    objects = []
    for source in sorted(glob.glob("csrc/*/*_kernels.cpp")):
        for isa, flags in ISA_FLAGS.items():
            objects.append((source, f"{Path(source).stem}.{isa}", f"{common} {flags} -DLEANOPS_ISA={isa}"))
    for source in sorted(glob.glob("csrc/common/*.cpp") + glob.glob("csrc/*/*_cpu.cpp")):
        objects.append((source, Path(source).stem, f"{common} {include} {STABLE_ABI}"))
    return [(source, name, f"{command} -c $in -o $out") for source, name, command in objects]


def cuda_objects(cxx: str) -> list[tuple[str, str, str]]:
    archs = os.environ.get("LEANOPS_CUDA_ARCHS", "80;90;100").replace(",", ";").strip(";")
    if not archs:
        raise Unavailable("LEANOPS_CUDA_ARCHS is empty")
    include, _ = torch_flags()
    code = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs.split(";")]
    code.append("-gencode arch=compute_{0},code=compute_{0}".format(archs.split(";")[-1]))  # PTX for what comes later
    command = f"{find_nvcc()} -MD -MF $out.d -ccbin {cxx} -std=c++17 -O3 --threads 0 -Xcompiler -fPIC,-fvisibility=hidden"
    command += f" -DUSE_CUDA {STABLE_ABI} -Icsrc {include} {' '.join(code)} -c $in -o $out"
    return [(source, Path(source).stem, command) for source in sorted(glob.glob("csrc/*/*_cuda.cu"))]


class BuildNative(build_ext):
    """Writes a ninja file for each library and runs it; reports what could not be built."""

    def run(self) -> None:
        target = Path(self.build_lib, "leanops", "lib").resolve()
        target.mkdir(parents=True, exist_ok=True)
        report = {}
        for extension in self.extensions:
            library = extension.name.rpartition(".")[2]
            (target / f"libleanops_{library}.so").unlink(missing_ok=True)
            try:
                self.build_library(library, target)
                report[library] = {"built": True}
            except (Unavailable, OSError) as error:
                report[library] = {"built": False, "reason": str(error)}
                print(f"leanops: without the {library} library: {error}", file=sys.stderr)
        for source in glob.glob("csrc/*/*.cuh"):  # compiled at first use where there is a GPU and no CUDA library
            destination = target / source
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, destination)
        (target / "build.json").write_text(json.dumps(report, indent=1) + "\n")

    def build_library(self, library: str, target: Path) -> None:
        cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not cxx or not shutil.which(cxx):
            raise Unavailable(f"no C++ compiler found (looked at CXX{f'={cxx}' if cxx else ''}, g++ and clang++)")
        try:
            import ninja
        except ImportError as error:
            raise Unavailable(f"ninja is not installed ({error})") from error
        objects = {"cpu": cpu_objects, "cuda": cuda_objects}[library](cxx)
        folder = Path(self.build_temp, library)
        folder.mkdir(parents=True, exist_ok=True)
        output = target / f"libleanops_{library}.so"
        cudart = f"{Path(find_nvcc()).parent.parent}/lib64/libcudart_static.a -ldl -lrt -lpthread" if library == "cuda" else ""
        lines = [f"builddir = {folder}"]
        for source, name, command in objects:
            lines.append(f"rule {name}\n command = {command}\n depfile = $out.d\n deps = gcc")
            lines.append(f"build {folder}/{name}.o: {name} {source}")
        outputs = " ".join(f"{folder}/{name}.o" for _, name, _ in objects)
        link = f"{cxx} -shared -s -Wl,-soname,{output.name} -o $out $in {cudart} {torch_flags()[1]}"
        lines += [f"rule link\n command = {link}", f"build {output}: link {outputs}"]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        done = subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-f", folder / "build.ninja"], capture_output=True, text=True)
        print(done.stdout, done.stderr, sep="")
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if "error" in line] or done.stdout.splitlines()[-1:]
            raise Unavailable(f"the build failed: {' | '.join(errors[:3])}")

    def get_outputs(self) -> list[str]:
        return sorted(str(f) for f in Path(self.build_lib, "leanops", "lib").rglob("*") if f.is_file())

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"leanops": ["py.typed"]},
    ext_modules=[Extension(f"leanops.lib.{library}", sources=[]) for library in ("cpu", "cuda")],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options={"editable_wheel": {"mode": "strict"}},
)
