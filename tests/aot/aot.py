"""What every kernel costs on GPUs that are not here: registers, local memory, instructions.

    python tests/aot/aot.py [--json FILE] [--markdown FILE] [--arch 90]

The CUDA kernels are read from the library that the build made for these architectures, Triton's are compiled.
"local memory" is the stack of a thread: registers that were spilled, and arrays with computed indices. "instructions"
is what one element costs in a kernel's main loop with its share of the loop around it, counted in the machine code; see
sass.py.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script, whose folder would hide the package of the same name
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from aot import kernels, sass
from aot.kernels import GpuKernels
from families import FAMILIES

from leanops import _native

LIBRARY = _native.FOLDER / "libleanops_cuda.so"
ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture."""

    backend: str
    kernel: str
    arch: int
    registers: int
    local_bytes: int  # a thread's stack
    instructions: float | None = None  # an element


def no_library() -> str | None:
    """Why the kernels of the build cannot be read, or None."""
    if not LIBRARY.exists():
        return f"no CUDA library: {_native.build_report().get('cuda', {}).get('reason')}"
    if sass.find_cuobjdump() is None:
        return "no cuobjdump (CUDA toolkit or Triton's wheel) to read the CUDA library with"
    return None


def find_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _ptxas_rows(log: str) -> Iterable[tuple[int, int]]:
    """(registers, bytes of stack) from ptxas -v."""
    stack = 0
    for line in log.splitlines():
        if match := re.search(r"(\d+) bytes stack frame", line):
            stack = int(match[1])
        elif match := re.search(r"Used (\d+) registers", line):
            yield int(match[1]), stack


def _readable(family: GpuKernels, mangled: str) -> str:
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    if name := family.cuda_name(text):
        return name
    inner = re.search(r"(\w+)(?:_kernel)?(?:<(?:leanops::)?(\w+)>)?\(", text)
    return " ".join(filter(None, (inner[1], inner[2]))) if inner else text


def cuda_rows(arch: int, family: str) -> list[Row]:
    """A family's kernels in the CUDA library."""
    usage = sass.cuobjdump(LIBRARY, "-res-usage", "-arch", f"sm_{arch}")
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    own = [(name, int(reg), int(stack)) for name, reg, stack in found if f"{len(family)}{family}" in name]
    family_kernels = kernels.of(family)
    readable = {name: _readable(family_kernels, name) for name, _, _ in own}
    counted = [name for name, words in readable.items() if family_kernels.counted(words)]
    listing = sass.listing(LIBRARY, arch, counted) if counted else {}
    counts = {name: family_kernels.instructions(readable[name], code) for name, code in listing.items()}
    return [Row("cuda", readable[n], arch, reg, stack, counts.get(n)) for n, reg, stack in own]


def triton_rows(arch: int, folder: Path, family: str, names: Sequence[str] | None = None) -> list[Row]:
    """A family's Triton kernels, or those of these names, through Triton's own compiler and its ptxas."""
    sources = [s for s in kernels.of(family).triton(arch) if names is None or s.name in names]
    if not sources:
        return []
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = next(t for t in (tools / "ptxas-blackwell", tools / "ptxas") if t.exists())  # the newer one reads all PTX
    rows = []
    for name, kernel, signature, constants, options in sources:
        full = signature | dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(full.values()) if t.startswith("*")}
        source = ASTSource(kernel, full, constexprs=constants, attrs=aligned)
        built = triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options=options | {"enable_fp_fusion": False}
        )
        ptx = folder / "kernel.ptx"
        ptx.write_text(built.asm["ptx"])
        target = re.search(r"\.target (sm_\w+)", built.asm["ptx"])
        assert target is not None
        command = [str(ptxas), "-v", f"--gpu-name={target[1]}", "-o", str(folder / "kernel.cubin"), str(ptx)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        rows += [Row("triton", name, arch, registers, stack) for registers, stack in _ptxas_rows(log)]
    return rows


def find_nvrtc() -> Nvrtc | None:
    """NVRTC of the system or of the wheel nvidia-cuda-nvrtc."""
    places: list[str] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    for package in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        spec = importlib.util.find_spec(package) if importlib.util.find_spec("nvidia") else None
        for folder in spec.submodule_search_locations or [] if spec else []:
            places += [str(p) for p in Path(folder).glob("lib/libnvrtc.so.[0-9]*")]
    for place in places:
        for builtins in Path(place).parent.glob("libnvrtc-builtins.so.*.*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # NVRTC looks for it by its name alone
        try:
            return Nvrtc(ctypes.CDLL(place))
        except OSError:
            continue
    return None


class Nvrtc:
    """The functions of ``cupy.cuda.nvrtc`` that leanops uses, without CuPy."""

    class NVRTCError(RuntimeError): ...

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def _call(self, function: str, *arguments: Any) -> None:
        if status := getattr(self._library, function)(*arguments):
            raise self.NVRTCError(f"{function}: error {status}")

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        return text.raw

    def getVersion(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def getSupportedArchs(self) -> tuple[int, ...]:
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", archs)
        return tuple(archs)

    def createProgram(self, text: str, name: str, headers: tuple[()], names: tuple[()]) -> ctypes.c_void_p:
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        return program

    def compileProgram(self, program: ctypes.c_void_p, options: tuple[str, ...]) -> None:
        words = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        self._call("nvrtcCompileProgram", program, len(options), words)

    def getCUBIN(self, program: ctypes.c_void_p) -> bytes:
        return self._bytes("CUBIN", program)

    def getPTX(self, program: ctypes.c_void_p) -> bytes:
        return self._bytes("PTX", program).rstrip(b"\0")

    def getProgramLog(self, program: ctypes.c_void_p) -> str:
        return self._bytes("ProgramLog", program).rstrip(b"\0").decode()

    def destroyProgram(self, program: ctypes.c_void_p) -> None:
        self._call("nvrtcDestroyProgram", ctypes.byref(program))


def markdown(rows: list[Row]) -> str:
    """A table: one line a kernel, one column an architecture: registers, local memory, instructions an element."""
    archs = sorted({r.arch for r in rows})
    lines = [
        "| backend | kernel | " + " | ".join(f"sm_{a}" for a in archs) + " |",
        "| --- | --- |" + " --- |" * len(archs),
    ]
    kernels = dict.fromkeys((r.backend, r.kernel) for r in rows)
    by_key = {(r.backend, r.kernel, r.arch): r for r in rows}
    for backend, kernel in kernels:
        cells = []
        for arch in archs:
            r = by_key[backend, kernel, arch]
            count = "" if r.instructions is None else f", {r.instructions:g} instr."
            cells.append(f"{r.registers} reg., {r.local_bytes} B local{count}")
        lines.append(f"| {backend} | {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS)
    options = parser.parse_args()
    rows: list[Row] = []
    if reason := no_library():
        print(reason, file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        for arch in options.arch or ARCHS:
            for family in FAMILIES:
                rows += [] if reason else cuda_rows(arch, family)
                rows += triton_rows(arch, Path(name), family) if find_triton() else []
    print(markdown(rows), end="")
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
