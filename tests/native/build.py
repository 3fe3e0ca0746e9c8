"""Builds C++ that tests need, with the flags of ``setup.py``: the cores as a Python module, a driver, an emulator.

Ninja compiles in ``build/tests`` what has changed, under a lock: once for all processes and runs of a checkout. The
module is linked from the objects of the installed library, ``build/objects/cpu``, where ``setup.py`` made them here.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "tests"
INSTALLED = Path("build", "objects", "cpu")  # below the root
EMULATED = "avx512_emulated"  # the AVX-512 kernels over csrc/testing/avx512/immintrin.h, for any processor
_EMULATION = f"-O1 -Wno-psabi -Icsrc/testing/avx512 -DLEANOPS_LEVEL_{EMULATED}=2 -DLEANOPS_ALWAYS_INLINE="


@dataclass(frozen=True)
class Object:
    """One compilation: a source below the root, what tells its object from others of that source, and the flags."""

    source: Path
    flags: tuple[str, ...]
    variant: str = ""

    @property
    def name(self) -> str:
        parts = self.source.relative_to(ROOT).with_suffix("").parts
        return ".".join((*parts, self.variant) if self.variant else parts) + ".o"

    @property
    def installed_name(self) -> str:
        """The name in ``build/objects/cpu``."""
        return f"{self.source.stem}.{self.variant}.o" if self.variant else f"{self.source.stem}.o"


def setup_constants() -> dict[str, object]:
    """The literal constants of setup.py, read without running it."""
    constants: dict[str, object] = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                constants[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return constants


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def isa_flags() -> dict[str, str]:
    flags = setup_constants()["ISA_FLAGS"]
    assert isinstance(flags, dict)
    return flags if platform.machine() in ("x86_64", "AMD64") else {"baseline": ""}


def kernel_sets() -> dict[str, tuple[str, ...]]:
    """The flags of each compilation of a kernel file: one for every instruction set, one for AVX-512 emulated."""
    sets = {**isa_flags(), EMULATED: _EMULATION}
    return {name: (*shlex.split(flags), f"-DLEANOPS_ISA={name}") for name, flags in sets.items()}


def base_flags(extra: Sequence[str] = ()) -> tuple[str, ...]:
    return (*shlex.split(str(setup_constants()["CXX_FLAGS"])), "-Icsrc", *extra)


def core_objects(extra: Sequence[str] = ()) -> list[Object]:
    """Objects of ``csrc/common``, and of every family's core once for each set of kernels."""
    base = base_flags(extra)
    objects = [Object(source, base) for source in sorted(ROOT.glob("csrc/common/*.cpp"))]
    for source in sorted(ROOT.glob("csrc/*/*_kernels.cpp")):
        objects += [Object(source, (*base, *flags), name) for name, flags in kernel_sets().items()]
    return objects


def part_objects(part: str, extra: Sequence[str] = ()) -> list[Object]:
    """Objects of ``csrc/testing/PART.cpp`` and of ``tests/FAMILY/PART.cpp`` in every family that has it."""
    sources = [ROOT / "csrc" / "testing" / f"{part}.cpp", *sorted(ROOT.glob(f"tests/*/{part}.cpp"))]
    return [Object(source, base_flags(extra)) for source in sources]


def intrinsics_objects() -> list[Object]:
    """Each intrinsic of AVX-512 as a function: the processor's, and the emulation's."""
    source = ROOT / "csrc" / "testing" / "intrinsics.cpp"
    sets = {name: flags for name, flags in kernel_sets().items() if name.startswith("avx512")}
    return [Object(source, (*base_flags(), *flags), name) for name, flags in sets.items()]


def _quote(words: Iterable[str]) -> str:
    """Words of a command in build.ninja."""
    return shlex.join(words).replace("$", "$$")


def _ninja(folder: Path, *arguments: str) -> str:
    """What ninja prints; ``folder`` holds its build.ninja."""
    paths = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    ninja = shutil.which("ninja", path=paths)
    assert ninja is not None, "ninja is not installed: pip install ninja"
    command = [ninja, "-f", str(folder / "build.ninja"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{folder} cannot be built:\n{done.stdout}{done.stderr}")
    return done.stdout


def _split_installed(objects: Sequence[Object]) -> tuple[list[Path], list[Object]]:
    """Objects that the installed library is linked from, compiled again where a source has changed; and the others."""
    if not (ROOT / INSTALLED / "build.ninja").exists():
        return [], list(objects)
    known = {line.split(":")[0] for line in _ninja(INSTALLED, "-t", "targets", "all").splitlines()}
    shared = {
        item: INSTALLED / item.installed_name for item in objects if str(INSTALLED / item.installed_name) in known
    }
    with FileLock(ROOT / INSTALLED / "lock"):
        _ninja(INSTALLED, *map(str, shared.values()))
    return list(shared.values()), [item for item in objects if item not in shared]


def build(
    name: str, objects: Sequence[Object], link_flags: Sequence[str], suffix: str = "", shared: Sequence[Path] = ()
) -> Path:
    """``build/tests/NAME/NAME`` with a suffix, linked from objects of its own and from those that are ``shared``."""
    folder = FOLDER.relative_to(ROOT) / name
    target = folder / f"{name}{suffix}"
    lines = [
        f"builddir = {folder}",
        f"cxx = {_quote(compiler())}",
        "rule compile\n command = $cxx -MD -MF $out.d $flags -c $in -o $out\n depfile = $out.d\n deps = gcc",
        f"rule link\n command = $cxx $in -o $out {_quote(link_flags)}",
    ]
    for item in objects:
        lines.append(f"build {folder / item.name}: compile {item.source.relative_to(ROOT)}")
        lines.append(f" flags = {_quote(item.flags)}")
    parts = [*(folder / item.name for item in objects), *shared]
    lines.append(f"build {target}: link {' '.join(map(str, parts))}")
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    with FileLock(ROOT / folder / "lock"):
        (ROOT / folder / "build.ninja").write_text("\n".join(lines) + "\n")
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
