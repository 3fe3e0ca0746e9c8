"""The kernels of SM3 for GPUs, as the launchers launch them."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from aot.kernels import GpuKernels, Source

from leanops.common import nvrtc
from leanops.sm3 import nvrtc as sm3_nvrtc
from leanops.sm3 import plan

HOST = ", numbers of the host"
_NAMES = {"leanops::bf16": "bf16", "leanops::fp16": "fp16"}
_MOMENTA = ("none", "fp32", "bf16", "int8")  # by their numbers in csrc/sm3


def _step_name(dtype: str, momentum: str, stochastic: bool) -> str:
    return f"sm3 {dtype} momentum {momentum}{' stochastic' * stochastic}"


def _cuda_name(demangled: str) -> str | None:
    match = re.search(r"sm3_kernel<(\S+), (\d), (\w+)>", demangled)
    return _step_name(_NAMES.get(match[1], match[1]), _MOMENTA[int(match[2])], match[3] == "true") if match else None


def _triton(arch: int) -> Iterable[Source]:
    """The Triton step of SM3, with its numbers (the learning rate and the like) on the device and on the host."""
    import triton.language as tl

    from leanops.sm3 import triton as kernels

    signature = {"table": "*i64", "tensors": "i32", "lr": "*fp32", "seed": "*i64", "grad_scale": "*fp32"}
    signature |= {"found_inf": "*fp32", "lr_factors": "*fp32"}
    signature |= dict.fromkeys(("lr_bits", "decay_bits", "seed_value"), "i64")
    signature |= {"scale_value": "fp32", "sign": "fp32", "averages": "i32", "couples": "i32"}
    signature |= dict.fromkeys(("coupled_decay", "eps", "beta", "one_minus_beta", "beta_m", "one_minus_beta_m"), "fp32")
    # for a number on the host, the launcher passes the table as its pointer
    pointers = dict.fromkeys(("lr", "seed", "grad_scale", "found_inf", "lr_factors"), "*i64")
    flags = ("LOAD_LR", "LOAD_SEED", "LOAD_SCALE", "LOAD_FOUND_INF", "LOAD_LR_FACTORS")
    for dtype, kind in {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}.items():
        for number, momentum in enumerate(_MOMENTA):
            for stochastic in (False, True) if dtype in ("bf16", "fp16") else (False,):
                constants = {"DTYPE": kind, "MOMENTUM": number, "STOCHASTIC": stochastic} | kernels.TILE_SIZES
                name = _step_name(dtype, momentum, stochastic)
                for of_host in (False, True):
                    types = signature | pointers if of_host else signature
                    values = dict.fromkeys(flags, not of_host) | constants | {"OF_GRADIENT": False}
                    yield Source(name + HOST * of_host, kernels.step_kernel, types, values, dict(kernels.LAUNCH))


def _nvrtc() -> list[nvrtc.Kernel]:
    return [sm3_nvrtc.step(torch.bfloat16, momentum, True) for momentum in plan.KINDS]


KERNELS = GpuKernels(_triton, _nvrtc, _cuda_name)
