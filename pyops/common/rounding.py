"""Rounding to a weight's dtype, to nearest or stochastically, in PyTorch: the specification for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from leanops.common.philox import MASK, words_at
from leanops.common.streams import ROUNDING


def rounding_bits(index: Tensor, seed: int, tensor_id: int) -> Tensor:
    """The 16 random bits that stochastic rounding adds, int64 in [0, 2^16)."""
    words = words_at(index, 8, ROUNDING, seed, tensor_id)
    word = words.gather(1, (index % 8 // 2)[:, None])[:, 0]
    return (word >> (16 * (index % 2))) & 0xFFFF


def round_to(acc: Tensor, dtype: torch.dtype, rounding: str, index: Tensor, seed: int, tensor_id: int) -> Tensor:
    """Round fp32 (fp64 for fp64) once to ``dtype``: ties to even, or stochastically for bf16 and fp16."""
    if rounding == "nearest" or dtype not in (torch.bfloat16, torch.float16):
        return acc.to(dtype)
    r = rounding_bits(index, seed, tensor_id)
    bits = acc.view(torch.int32).long() & MASK
    if dtype == torch.bfloat16:
        up = ((bits + r) & 0xFFFF0000).to(torch.uint32).view(torch.float32).to(dtype)
        return torch.where(acc.isfinite(), up, acc.to(dtype))
    normal = ((bits + (r >> 3)) & 0xFFFFE000).to(torch.uint32).view(torch.float32)
    magnitude = torch.where(normal.abs() < 65536.0, normal, normal.sign() * torch.inf).to(dtype)
    # below 2^-14 the spacing of fp16 is constant, 2^-24: round |acc| / 2^-24, whose bits are the fp16 code
    small = acc.abs() < 2.0**-14
    code = (torch.where(small, acc.abs(), 0.0) * 2.0**40).long() + r >> 16
    subnormal = torch.where(bits & 0x80000000 != 0, code | 0x8000, code).to(torch.uint16).view(dtype)
    return torch.where(acc.isfinite(), torch.where(small, subnormal, magnitude), acc.to(dtype))
