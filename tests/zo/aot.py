"""The kernels of zo for GPUs, as the launchers launch them."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from aot import sass
from aot.kernels import Code, GpuKernels, Source

from leanops.common import nvrtc
from leanops.zo import nvrtc as zo_nvrtc

MANY_TERMS = ("axpy of many", "axpy in order stochastic")
_UNIT = 4096 // 32  # elements that a lane sees of a long unit; see csrc/zo/call.cuh
_NAMES = {"leanops::bf16": "bf16", "leanops::fp16": "fp16"}
_MODES = ("noise", "axpy", "axpy of many", "pair")
_ONE_LOOP = re.compile(r"noise|axpy (?!of many)|pair")  # whose elements pass through one loop, not a loop over terms


def _cuda_name(demangled: str) -> str | None:
    if match := re.search(r"low_rank_kernel<(\S+), (\w+)>", demangled):
        return f"low-rank axpy {_NAMES.get(match[1], match[1])}{' stochastic' * (match[2] == 'true')}"
    match = re.search(r"zo_kernel<(\S+), (\d), (\d), (\w+)>", demangled)
    if match is None:
        return None
    dtype, distribution, mode = _NAMES.get(match[1], match[1]), int(match[2]), int(match[3])
    words = [_MODES[mode], dtype, ("gaussian", "rademacher")[distribution]]
    return " ".join(words + (["stochastic"] if match[4] == "true" else []))


def _instructions(name: str, code: Code) -> float | None:
    """What one element costs in the main loop, with its share of the loop around it."""
    inner = sass.main_loop(code)
    if inner is None or inner.wide_stores == 0:
        return None
    size = {"float": 4, "double": 8}.get(name.split()[1], 2)
    elements = inner.wide_stores * 16 / size / (2 if name.startswith("pair") else 1)
    outer = sass.loop_around(code, inner)
    share = (outer.instructions - inner.instructions) / _UNIT if outer else 0.0
    return round(inner.instructions / elements + share, 2)


def _triton(arch: int) -> Iterable[Source]:
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
                name = f"{mode} {dtype} {distribution}"
                yield Source(name, kernels.update, head, constants, {"num_warps": 4})
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
            yield Source(name, triton_lowrank.low_rank_update, whole, constants, {"num_warps": 4})
    for dtype in ("fp32", "bf16", "fp16"):
        for distribution in ("gaussian", "rademacher"):
            for pair in (False, True):
                pointers = ("x", "x_minus", "weight", "bias", "y_plus", "y_minus")
                signature = dict.fromkeys(pointers, f"*{dtype}") | {"seed_pointer": "*i64", "scale": "fp32"}
                signature |= dict.fromkeys(("tensor_id", "offset", "t", "n", "m"), "i64")
                sizes = triton_linear.config(512, torch_types[dtype], distribution, True, pair, arch // 10)
                options = {k: sizes.pop(k) for k in ("num_warps", "num_stages")}
                constants = {"PAIR": pair, "BIAS": True, "IS_RADEMACHER": distribution == "rademacher", "ALIGNED": True}
                name = f"linear{' pair' if pair else ''} {dtype} {distribution}"
                yield Source(name, triton_linear.linear_kernel, signature, constants | sizes, options)


def _nvrtc() -> list[nvrtc.Kernel]:
    kernels = [zo_nvrtc.COPY_WORDS, zo_nvrtc.combine(torch.float16), zo_nvrtc.add_bias(torch.bfloat16)]
    for distribution in ("gaussian", "rademacher"):
        kernels += [zo_nvrtc.work(torch.bfloat16, distribution, mode, True) for mode in range(4)]
    return kernels + [zo_nvrtc.low_rank(dtype, True) for dtype in (torch.bfloat16, torch.float64)]


KERNELS = GpuKernels(_triton, _nvrtc, _cuda_name, _instructions, lambda name: _ONE_LOOP.match(name) is not None)
