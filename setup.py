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
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, "csrc")
import toolchain
from toolchain import CXX_FLAGS, NVCC_FLAGS, Object, Unavailable, find_cxx, find_nvcc, find_torch

FOLDERS = [p.parent for top in ("pyops", "optim", "autotune", "bench") for p in sorted(Path(top).rglob("__init__.py"))]
PACKAGES = {".".join(("leanops", *f.parts[f.parts[0] == "pyops" :])): f.as_posix() for f in FOLDERS}
PACKAGES["leanops_command"] = PACKAGES.pop("leanops.bench.entry")  # outside of leanops, whose import needs torch
PACKAGES["leanops.integrations"] = PACKAGES.pop("leanops.optim.integrations")
Library = tuple[list[Object], list[str], dict[str, object]]  # objects, flags of the link, facts for the report


def sources(*patterns: str) -> list[Path]:
    return [Path(file) for file in sorted(file for pattern in patterns for file in glob.glob(pattern))]


def torch_flags() -> tuple[list[str], list[str]]:
    """The flags of a compilation against torch's headers, and those of the link."""
    torch = find_torch()
    # libtorch depends on whatever backends this torch has; --no-as-needed keeps them in the symbol search
    link = [f"-L{torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    return toolchain.torch_include_flags(torch / "include"), link


def cpu_library() -> Library:
    cxx, (include, link) = find_cxx(), torch_flags()
    objects = [
        Object(source, cxx, [*CXX_FLAGS, "-Icsrc", *flags], isa)
        for source in sources("csrc/*/*_kernels.cpp")
        for isa, flags in toolchain.kernel_flags().items()
    ]
    for source in sources("csrc/common/*.cpp", "csrc/*/*_cpu.cpp"):
        objects.append(Object(source, cxx, [*CXX_FLAGS, *include]))
    return objects, link, {}


def cuda_library() -> Library:
    archs, nvcc, (include, link) = toolchain.cuda_archs(), find_nvcc(), torch_flags()
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    code += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]  # PTX, for later architectures
    flags = [*toolchain.nvcc_host_flags(find_cxx()), *NVCC_FLAGS, *include, *code]
    link = ["-lcudart_static", "-ldl", "-lrt", "-lpthread", *link]
    folders = [f"-L{nvcc.parent.parent / name}" for name in ("lib64", "lib")]
    return [Object(source, [nvcc], flags) for source in sources("csrc/*/*_cuda.cu")], folders + link, {"archs": archs}


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
                link = ["-shared", "-s", f"-Wl,-soname,{output.name}", *link]
                (folder := objects_folder / library).mkdir(parents=True, exist_ok=True)
                (folder / "build.ninja").write_bytes(toolchain.ninja_file(folder, objects, output, link))
                toolchain.run_ninja(folder / "build.ninja", library, len(objects))
                report[library] = {"built": True, **facts}
            except Exception as error:  # the package works without the library
                reason = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
                report[library] = {"built": False, "reason": reason}
                toolchain.say(f"leanops: without the {library} library: {reason}")
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
