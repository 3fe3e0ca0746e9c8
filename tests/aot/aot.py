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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script, whose folder would hide the package of the same name
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from aot import sass

from leanops import _native

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = _native.FOLDER / "libleanops_cuda.so"
ARCHS = (80, 90, 100)
_UNIT = 4096 // 32  # elements that a lane sees of a long unit; see csrc/zo/call.cuh
_NAMES = {"leanops::bf16": "bf16", "leanops::fp16": "fp16"}
_MODES = ("noise", "axpy", "axpy of many", "pair")
MANY_TERMS = ("axpy of many", "axpy in order stochastic")
_ONE_LOOP = re.compile(r"noise|axpy (?!of many)|pair")  # whose elements pass through one loop, not a loop over terms
_MOMENTA = ("none", "fp32", "bf16", "int8")  # by their numbers in csrc/sm3
HOST = ", numbers of the host"


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


def _step_name(dtype: str, momentum: str, stochastic: bool) -> str:
    return f"sm3 {dtype} momentum {momentum}{' stochastic' * stochastic}"


def _readable(mangled: str) -> str:
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    if match := re.search(r"low_rank_kernel<(\S+), (\w+)>", text):
        return f"low-rank axpy {_NAMES.get(match[1], match[1])}{' stochastic' * (match[2] == 'true')}"
    if match := re.search(r"sm3_kernel<(\S+), (\d), (\w+)>", text):
        return _step_name(_NAMES.get(match[1], match[1]), _MOMENTA[int(match[2])], match[3] == "true")
    match = re.search(r"zo_kernel<(\S+), (\d), (\d), (\w+)>", text)
    if match is None:
        inner = re.search(r"(\w+)(?:_kernel)?(?:<(?:leanops::)?(\w+)>)?\(", text)
        return " ".join(filter(None, (inner[1], inner[2]))) if inner else text
    dtype, distribution, mode = _NAMES.get(match[1], match[1]), int(match[2]), int(match[3])
    words = [_MODES[mode], dtype, ("gaussian", "rademacher")[distribution]]
    return " ".join(words + (["stochastic"] if match[4] == "true" else []))


def _per_element(name: str, code: list[tuple[int, str]]) -> float | None:
    """Instructions an element."""
    inner = sass.main_loop(code)
    if inner is None or inner.wide_stores == 0:
        return None
    size = {"float": 4, "double": 8}.get(name.split()[1], 2)
    elements = inner.wide_stores * 16 / size / (2 if name.startswith("pair") else 1)
    outer = sass.loop_around(code, inner)
    share = (outer.instructions - inner.instructions) / _UNIT if outer else 0.0
    return round(inner.instructions / elements + share, 2)


def cuda_rows(arch: int, family: str) -> list[Row]:
    """A family's kernels in the CUDA library."""
    usage = sass.cuobjdump(LIBRARY, "-res-usage", "-arch", f"sm_{arch}")
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    own = [(name, int(reg), int(stack)) for name, reg, stack in found if f"{len(family)}{family}" in name]
    readable = {name: _readable(name) for name, _, _ in own}
    counted = [name for name, words in readable.items() if _ONE_LOOP.match(words)]
    listing = sass.listing(LIBRARY, arch, counted) if counted else {}
    return [
        Row("cuda", readable[n], arch, reg, stack, _per_element(readable[n], listing[n]) if n in listing else None)
        for n, reg, stack in own
    ]


Source = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]  # name, kernel, signature, constants, options


def _sm3_sources(arch: int) -> Iterable[Source]:
    """The Triton step of SM3, for numbers (the learning rate and its like) that lie on the device and on the host."""
    import triton.language as tl

    from leanops.sm3 import triton as kernels

    signature = {"table": "*i64", "tensors": "i32", "lr": "*fp32", "seed": "*i64", "grad_scale": "*fp32"}
    signature |= {"found_inf": "*fp32"} | dict.fromkeys(("lr_bits", "decay_bits", "seed_value"), "i64")
    signature |= {"scale_value": "fp32", "sign": "fp32", "averages": "i32", "couples": "i32"}
    signature |= dict.fromkeys(("coupled", "eps", "beta", "one_minus_beta", "kept", "share"), "fp32")
    pointers = dict.fromkeys(("lr", "seed", "grad_scale", "found_inf"), "*i64")  # the table's, where they are not there
    flags = ("LR_THERE", "SEED_THERE", "SCALE_THERE", "FOUND_THERE")
    for dtype, kind in {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}.items():
        for number, momentum in enumerate(_MOMENTA):
            for stochastic in (False, True) if dtype in ("bf16", "fp16") else (False,):
                constants = {"DTYPE": kind, "MOMENTUM": number, "STOCHASTIC": stochastic} | kernels.TILE_SIZES
                name = _step_name(dtype, momentum, stochastic)
                for of_host in (False, True):
                    types = signature | pointers if of_host else signature
                    values = dict.fromkeys(flags, not of_host) | constants
                    yield name + HOST * of_host, kernels.step_kernel, types, values, dict(kernels.LAUNCH)


def _zo_sources(arch: int) -> Iterable[Source]:
    """The Triton kernels of zo as the launchers launch them."""
    import torch
    import triton.language as tl

    from leanops.zo import triton as kernels
    from leanops.zo import triton_linear, triton_lowrank

    torch_types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    types = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}
    head = dict(zip(("table", "tensors", "seeds", "coeffs", "decays", "terms", "decay_count"),
                    ("*i64", "i32", "*i64", "*fp64", "*fp64", "i32", "i32"), strict=True))  # fmt: skip
    head |= {"seed": "i64", "coeff_bits": "i64", "decay_bits": "i64"}
    for dtype, kind in types.items():
        for distribution in ("gaussian", "rademacher"):
            for mode in ("noise", "axpy", "axpy stochastic", "axpy of many", "axpy in order stochastic"):
                if "stochastic" in mode and dtype in ("fp32", "fp64"):
                    continue
                constants = {
                    "IN_ORDER": "in order" in mode,
                    "INLINE": mode not in MANY_TERMS,
                    "NOISE": mode == "noise",
                    "DTYPE": kind,
                    "WORK": tl.float64 if dtype == "fp64" else tl.float32,
                    "IS_RADEMACHER": distribution == "rademacher",
                    "STOCHASTIC": "stochastic" in mode,
                    "TILE": kernels.tile_of(torch_types[dtype], distribution, 2 if mode in MANY_TERMS else 1),
                    "ALIGNED": True,
                }
                yield f"{mode} {dtype} {distribution}", kernels.update, head, constants, {"num_warps": 4}
    whole = dict(zip(("table", "tensors", "seeds", "right_seeds", "coeffs", "decays", "terms", "decay_count", "rank"),
                     ("*i64", "i32", "*i64", "*i64", "*fp64", "*fp64", "i32", "i32", "i32"), strict=True))  # fmt: skip
    for dtype, kind in types.items():
        for aligned in (True, False):
            rows, across = triton_lowrank.tile_of(4096)
            constants = {
                "IN_ORDER": not aligned,
                "DTYPE": kind,
                "WORK": tl.float64 if dtype == "fp64" else tl.float32,
                "STOCHASTIC": dtype in ("bf16", "fp16"),
                "ALIGNED": aligned,
                "ROWS": rows,
                "COLS": across,
            }
            name = f"low-rank axpy{'' if aligned else ' in order'} {dtype}"
            yield name, triton_lowrank.low_rank_update, whole, constants, {"num_warps": 4}
    for dtype in ("fp32", "bf16", "fp16"):
        for distribution in ("gaussian", "rademacher"):
            for pair in (False, True):
                pointers = ("x", "x_minus", "weight", "bias", "y_plus", "y_minus")
                signature = dict.fromkeys(pointers, f"*{dtype}") | {"seed_at": "*i64", "scale": "fp32"}
                signature |= dict.fromkeys(("tensor_id", "offset", "t", "n", "m"), "i64")
                sizes = triton_linear.config(512, torch_types[dtype], distribution, True, pair, arch // 10)
                options = {k: sizes.pop(k) for k in ("num_warps", "num_stages")}
                constants = {"PAIR": pair, "BIAS": True, "IS_RADEMACHER": distribution == "rademacher", "ALIGNED": True}
                name = f"linear{' pair' if pair else ''} {dtype} {distribution}"
                yield name, triton_linear.linear_kernel, signature, constants | sizes, options


# a family's Triton kernels as its launchers launch them on an architecture; a family without any is not named
TRITON: dict[str, Callable[[int], Iterable[Source]]] = {"zo": _zo_sources, "sm3": _sm3_sources}
FAMILIES = sorted(path.parent.name for path in ROOT.glob("pyops/*/specs.py"))


def triton_rows(arch: int, folder: Path, family: str, names: Sequence[str] | None = None) -> list[Row]:
    """A family's Triton kernels, or those of these names, through Triton's own compiler and its ptxas."""
    if family not in TRITON:
        return []
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = next(t for t in (tools / "ptxas-blackwell", tools / "ptxas") if t.exists())  # the newer one reads all PTX
    rows = []
    for name, kernel, signature, constants, options in TRITON[family](arch):
        if names is not None and name not in names:
            continue
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
