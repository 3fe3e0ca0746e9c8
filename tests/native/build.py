"""Builds C++ that tests need, with the tools and flags of ``setup.py``: the cores as a Python module, a driver.

Ninja compiles in ``build/tests`` what has changed, under a lock: once for all processes and runs of a checkout. The
module is linked from the objects of the installed library, ``build/objects/cpu``, where ``setup.py`` made them here.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from filelock import FileLock

sys.path.append(str(Path(__file__).resolve().parents[2] / "csrc"))  # after tests/, which has folders of the same names
import toolchain
from toolchain import CXX_FLAGS, Object

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("build", "tests")  # relative to the root, where ninja runs
INSTALLED = Path("build", "objects", "cpu")
EMULATED = "avx512_emulated"  # the AVX-512 kernels over csrc/testing/avx512/immintrin.h, for any processor
_EMULATION = ("-O1", "-Wno-psabi", "-Icsrc/testing/avx512", f"-DLEANOPS_LEVEL_{EMULATED}=2", "-DLEANOPS_ALWAYS_INLINE=")


def kernel_sets() -> dict[str, tuple[str, ...]]:
    """The flags of each compilation of a kernel file: one for every instruction set, one for AVX-512 emulated."""
    return {**toolchain.kernel_flags(), EMULATED: (*_EMULATION, f"-DLEANOPS_ISA={EMULATED}")}


def object_of(source: Path, flags: Sequence[str], variant: str = "") -> Object:
    """The compilation of a source with the C++ compiler."""
    return Object(source.relative_to(ROOT), toolchain.find_cxx(), flags, variant)


def core_objects(extra: Sequence[str] = ()) -> list[Object]:
    """Objects of ``csrc/common``, and of every family's core once for each set of kernels."""
    base = (*CXX_FLAGS, "-Icsrc", *extra)
    objects = [object_of(source, base) for source in sorted(ROOT.glob("csrc/common/*.cpp"))]
    for source in sorted(ROOT.glob("csrc/*/*_kernels.cpp")):
        objects += [object_of(source, (*base, *flags), name) for name, flags in kernel_sets().items()]
    return objects


def part_objects(part: str, extra: Sequence[str] = ()) -> list[Object]:
    """Objects of ``csrc/testing/PART.cpp`` and of ``tests/FAMILY/PART.cpp`` in every family that has it."""
    sources = [ROOT / "csrc" / "testing" / f"{part}.cpp", *sorted(ROOT.glob(f"tests/*/{part}.cpp"))]
    return [object_of(source, (*CXX_FLAGS, "-Icsrc", *extra)) for source in sources]


def intrinsics_objects() -> list[Object]:
    """Each intrinsic of AVX-512 as a function: the processor's, and the emulation's."""
    source = ROOT / "csrc" / "testing" / "intrinsics.cpp"
    sets = {name: flags for name, flags in kernel_sets().items() if name.startswith("avx512")}
    return [object_of(source, (*CXX_FLAGS, "-Icsrc", *flags), name) for name, flags in sets.items()]


def _ninja(folder: Path, *arguments: str) -> str:
    """What ninja prints; ``folder`` holds its build.ninja."""
    command = [toolchain.find_ninja(), "-f", str(folder / "build.ninja"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{folder} cannot be built:\n{done.stdout}{done.stderr}")
    return done.stdout


def _split_installed(objects: Sequence[Object]) -> tuple[list[Path], list[Object]]:
    """Object files of the installed library, compiled again where a source has changed; and the other objects."""
    if not (ROOT / INSTALLED / "build.ninja").exists():
        return [], list(objects)
    targets = {line.split(":")[0] for line in _ninja(INSTALLED, "-t", "targets", "all").splitlines()}
    shared = [INSTALLED / item.name for item in objects if str(INSTALLED / item.name) in targets]
    if shared:
        with FileLock(ROOT / INSTALLED / "lock"):
            _ninja(INSTALLED, *map(str, shared))
    return shared, [item for item in objects if INSTALLED / item.name not in shared]


def build(
    name: str, objects: Sequence[Object], link_flags: Sequence[str], suffix: str = "", shared: Sequence[Path] = ()
) -> Path:
    """``build/tests/NAME/NAME`` with a suffix, linked from objects of its own and from those that are ``shared``."""
    folder = FOLDER / name
    target = folder / f"{name}{suffix}"
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    with FileLock(ROOT / folder / "lock"):
        content = toolchain.ninja_file(folder, objects, target, link_flags, shared)
        (ROOT / folder / "build.ninja").write_bytes(content)
        _ninja(folder)
    return ROOT / target


def build_module() -> ModuleType:
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    shared, own = _split_installed(core_objects())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    own += [*intrinsics_objects(), *part_objects("bindings", includes)]
    target = build("leanops_native", own, ["-shared", "-pthread"], suffix, shared)
    spec = importlib.util.spec_from_file_location("leanops_native", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_driver(sanitizers: str) -> Path:
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    name = f"driver-{sanitizers.replace(',', '-')}"
    return build(name, [*core_objects(flags), *part_objects("driver", flags)], [*flags, "-pthread"])
