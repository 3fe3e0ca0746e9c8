"""Builds leanops: the package map, the wheel tag, and the native libraries, which are optional.

Each native library is a plain shared object over torch's stable ABI with no Python symbol in it, so one wheel serves
every Python and every torch from 2.10 on. A library that cannot be built is left out, with the reason in
leanops/lib/build.json (see `leanops info`). docs/install.md lists the environment variables that the build reads.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, "csrc")
from toolchain import Unavailable, cuda_archs, find_cxx, find_nvcc, find_torch, nvcc_host_flags, run_ninja, say

FOLDERS = [p.parent for top in ("pyops", "optim", "autotune", "bench") for p in sorted(Path(top).rglob("__init__.py"))]
PACKAGES = {".".join(("leanops", *f.parts[f.parts[0] == "pyops" :])): f.as_posix() for f in FOLDERS}
PACKAGES["leanops_command"] = PACKAGES.pop("leanops.bench.entry")  # outside of leanops, whose import needs torch
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
# they stand after the words of CXX, so that -Ofast among those changes no result; CXXFLAGS is not read for that reason
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-fast-math -ffp-contract=off -Wall -Wextra"
ISA_FLAGS = {"baseline": "", "avx2": "-mavx2 -mfma -mf16c", "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq"}
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -DUSE_CUDA"
Objects = list[tuple[str, str, str]]  # of each: source, name, command


def quote(*words: str | Path) -> str:
    """Words of a command in build.ninja, quoted for the shell and for ninja."""
    return shlex.join(map(str, words)).replace("$", "$$")


def escape(path: Path) -> str:
    """A path in build.ninja outside of a command."""
    return re.sub("[$ :]", r"$\g<0>", str(path))


def torch_flags() -> tuple[str, str]:
    torch = find_torch()
    folders = ("-isystem", torch / "include", "-isystem", torch / "include/torch/csrc/api/include")  # -I would warn
    # libtorch depends on whatever backends this torch has; --no-as-needed keeps them in the symbol search
    link = f"{quote(f'-L{torch}/lib')} -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10"
    return f"-Icsrc {quote(*folders)} {STABLE_ABI}", link


def cpu_library() -> tuple[Objects, str, dict[str, object]]:
    """The objects, the flags of the link, and what the report adds."""
    include, link = torch_flags()
    command = f"{quote(*find_cxx())} -MD -MF $out.d {CXX_FLAGS} -c $in -o $out"
    objects = [  # a kernel file is compiled once for each instruction set
        (source, f"{Path(source).stem}.{isa}", f"{command} -Icsrc {flags} -DLEANOPS_ISA={isa}")
        for source in sorted(glob.glob("csrc/*/*_kernels.cpp"))
        for isa, flags in ISA_FLAGS.items()
        if not flags or platform.machine() == "x86_64"
    ]
    for source in sorted(glob.glob("csrc/common/*.cpp") + glob.glob("csrc/*/*_cpu.cpp")):
        objects.append((source, Path(source).stem, f"{command} {include}"))
    return objects, link, {}


def cuda_library() -> tuple[Objects, str, dict[str, object]]:
    archs, nvcc, (include, link) = cuda_archs(), find_nvcc(), torch_flags()
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    code += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]  # PTX, for what comes later
    host = quote(*nvcc_host_flags(find_cxx()))
    command = f"{quote(nvcc)} -MD -MF $out.d {host} {NVCC_FLAGS} {include} {quote(*code)} -c $in -o $out"
    sources = sorted(glob.glob("csrc/*/*_cuda.cu"))
    folders = quote(*(f"-L{nvcc.parent.parent / name}" for name in ("lib64", "lib")))
    link = f"{folders} -lcudart_static -ldl -lrt -lpthread {link}"
    return [(source, Path(source).stem, command) for source in sources], link, {"archs": archs}


def build(library: str, objects: Objects, link: str, folder: Path, output: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"builddir = {escape(folder)}"]
    for source, name, command in objects:
        lines.append(
            f"rule {name}\n command = {command}\n depfile = $out.d\n deps = gcc\n description = {source}, {name}"
        )
        lines.append(f"build {escape(folder / name)}.o: {name} {source}")
    outputs = " ".join(f"{escape(folder / name)}.o" for _, name, _ in objects)
    command = f"{quote(*find_cxx())} {CXX_FLAGS} -shared -s -Wl,-soname,{output.name} -o $out $in {link}"
    lines.append(
        f"rule link\n command = {command}\n description = {output.name}\nbuild {escape(output)}: link {outputs}\n"
    )
    (folder / "build.ninja").write_bytes(os.fsencode("\n".join(lines)))
    run_ninja(folder / "build.ninja", library, len(objects))


class BuildNative(build_ext):
    """Builds each library with ninja, and reports what could not be built."""

    def run(self) -> None:
        target = Path(self.build_lib, "leanops", "lib").resolve()
        target.mkdir(parents=True, exist_ok=True)
        objects_folder, report = Path(self.get_finalized_command("build").build_base, "objects"), {}  # kept objects
        for library, describe in (("cpu", cpu_library), ("cuda", cuda_library)):
            output = target / f"libleanops_{library}.so"
            output.unlink(missing_ok=True)
            try:
                if platform.system() != "Linux":
                    raise Unavailable(f"the native libraries are built on Linux only, this is {platform.system()}")
                objects, link, facts = describe()
                build(library, objects, link, objects_folder / library, output)
                report[library] = {"built": True, **facts}
            except Exception as error:  # whatever it is, the package works without the library
                reason = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
                report[library] = {"built": False, "reason": reason}
                say(f"leanops: without the {library} library: {reason}")
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


OPTIONS: dict[str, dict[str, str]] = {"editable_wheel": {"mode": "strict"}}
if not os.access(".", os.W_OK):  # a read-only checkout
    scratch = tempfile.TemporaryDirectory(prefix="leanops-build-")  # lasts as long as this module
    OPTIONS |= {"build": {"build_base": scratch.name}, "egg_info": {"egg_base": scratch.name}}

setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"leanops": ["py.typed"]},
    ext_modules=[Extension("leanops.lib", sources=[])],  # makes the wheel a platform's; BuildNative does the work
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options=OPTIONS,
)
