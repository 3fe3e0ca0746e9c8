"""Builds leanops: the package map, the wheel tag, and the native libraries, which are optional.

Each native library is a plain shared object over torch's stable ABI with no Python symbol in it, so one wheel serves
every Python and every torch from 2.10 on. What cannot be built is left out, with the reason in leanops/lib/build.json
(see `leanops info`). CXX and CUDA_HOME say which compilers, LEANOPS_CUDA_ARCHS which architectures (empty: no CUDA).
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDERS = [
    p.parent for top in ("pyops", "optim", "autotune", "bench") for p in sorted(Path(top).glob("**/__init__.py"))
]
PACKAGES = {".".join(("leanops", *f.parts[f.parts[0] == "pyops" :])): str(f) for f in FOLDERS}
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra"
ISA_FLAGS = {"baseline": "", "avx2": "-mavx2 -mfma -mf16c", "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq"}
Objects = list[tuple[str, str, str]]  # of each: source, name, command


class Unavailable(Exception): ...  # a library cannot be built here; the text says why


def find_nvcc() -> Path:
    home = os.environ.get("CUDA_HOME")
    folders = f"{home}/bin" if home else f"/usr/local/cuda/bin{os.pathsep}{os.environ.get('PATH', '')}"
    if nvcc := shutil.which("nvcc", path=folders):
        return Path(nvcc).resolve()
    raise Unavailable(f"no nvcc found (looked at {f'CUDA_HOME={home}' if home else '/usr/local/cuda and PATH'})")


def find_cxx() -> str:
    wish = os.environ.get("CXX")
    if found := shutil.which(wish) if wish else shutil.which("g++") or shutil.which("clang++"):
        return found
    raise Unavailable(f"no C++ compiler found (looked at {f'CXX={wish}' if wish else 'CXX, g++ and clang++'})")


def torch_flags() -> tuple[str, str]:
    # an isolated build does not import the environment's packages, but torch's headers are all it needs of them
    found = importlib.util.find_spec("torch")
    torch = Path(found.origin).parent if found and found.origin else Path(sysconfig.get_path("purelib"), "torch")
    if not (torch / "include").exists():
        raise Unavailable("torch is not installed; install torch, then leanops again")
    include = f"-isystem {torch}/include -isystem {torch}/include/torch/csrc/api/include"  # not this project's warnings
    # libtorch depends on whatever backends this torch has; --no-as-needed keeps them in the symbol search
    return f"-Icsrc {include} {STABLE_ABI}", f"-L{torch}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10"


def cpu_library() -> tuple[Objects, str]:
    include, link = torch_flags()  # a kernel file is compiled once for each instruction set
    command = f"{find_cxx()} -MD -MF $out.d {CXX_FLAGS} -c $in -o $out"
    objects = [
        (source, f"{Path(source).stem}.{isa}", f"{command} -Icsrc {flags} -DLEANOPS_ISA={isa}")
        for source in sorted(glob.glob("csrc/*/*_kernels.cpp"))
        for isa, flags in ISA_FLAGS.items()
        if not flags or os.uname().machine == "x86_64"
    ]
    for source in sorted(glob.glob("csrc/common/*.cpp") + glob.glob("csrc/*/*_cpu.cpp")):
        objects.append((source, Path(source).stem, f"{command} {include}"))
    return objects, link


def cuda_library() -> tuple[Objects, str]:
    archs = os.environ.get("LEANOPS_CUDA_ARCHS", "80;90;100").replace(";", " ").split()
    if not archs:
        raise Unavailable("LEANOPS_CUDA_ARCHS is empty")
    include, link = torch_flags()
    code = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
    code += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"  # PTX, for what comes later
    options = "-std=c++17 -O3 --threads 0 -Xcompiler -fPIC,-fvisibility=hidden -DUSE_CUDA"
    command = f"{find_nvcc()} -MD -MF $out.d -ccbin {find_cxx()} {options} {include} {code} -c $in -o $out"
    cudart = find_nvcc().parent.parent / "lib64" / "libcudart_static.a"
    return [
        (source, Path(source).stem, command) for source in sorted(glob.glob("csrc/*/*_cuda.cu"))
    ], f"{cudart} -ldl -lrt -lpthread {link}"


def build(objects: Objects, link: str, folder: Path, output: Path) -> None:
    ninja = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    if not ninja:
        raise Unavailable("ninja is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"builddir = {folder}"]
    for source, name, command in objects:
        lines.append(f"rule {name}\n command = {command}\n depfile = $out.d\n deps = gcc")
        lines.append(f"build {folder}/{name}.o: {name} {source}")
    lines.append(f"rule link\n command = {find_cxx()} -shared -s -Wl,-soname,{output.name} -o $out $in {link}")
    outputs = " ".join(f"{folder}/{name}.o" for _, name, _ in objects)
    (folder / "build.ninja").write_text("\n".join([*lines, f"build {output}: link {outputs}\n"]))
    done = subprocess.run([ninja, "-f", folder / "build.ninja"], capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="")
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if "error" in line] or done.stdout.splitlines()[-1:]
        raise Unavailable(f"the build failed: {' | '.join(errors[:3])}")


class BuildNative(build_ext):
    """Builds each library with ninja, and reports what could not be built."""

    def run(self) -> None:
        target = Path(self.build_lib, "leanops", "lib").resolve()
        target.mkdir(parents=True, exist_ok=True)
        report = {}
        for library, describe in (("cpu", cpu_library), ("cuda", cuda_library)):
            output = target / f"libleanops_{library}.so"
            output.unlink(missing_ok=True)
            try:
                build(*describe(), Path(self.build_temp, library), output)
                report[library] = {"built": True}
            except (Unavailable, OSError) as error:
                report[library] = {"built": False, "reason": str(error)}
                print(f"leanops: without the {library} library: {error}")
        for source in glob.glob("csrc/*/*.cuh"):  # compiled at first use where there is a GPU and no CUDA library
            (target / source).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / source)
        (target / "build.json").write_text(json.dumps(report, indent=1) + "\n")

    get_output_mapping = dict  # an editable install finds nothing in the source tree to link to

    def get_outputs(self) -> list[str]:
        return sorted(str(f) for f in Path(self.build_lib, "leanops", "lib").rglob("*") if f.is_file())


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # no Python symbol, one wheel a platform


setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"leanops": ["py.typed"]},
    ext_modules=[Extension("leanops.lib", sources=[])],  # makes the wheel a platform's; BuildNative does the work
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options={"editable_wheel": {"mode": "strict"}},
)
