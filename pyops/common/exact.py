"""fp32 arithmetic that is rounded once on every build and device of torch, for the exact references."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def fp32(value: float) -> float:
    """The number rounded to fp32."""
    return float(torch.tensor(value, dtype=torch.float32, device="cpu"))


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """round(a * b + c) for fp32, rounded once.

    The product of two fp32 numbers is exact in fp64. The fp64 sum is rounded to odd (an inexact sum gets a last bit
    of 1), after which rounding to fp32 gives the correctly rounded result (Boldo and Melquiond, 2008).
    """
    product = a.double() * b
    addend = torch.as_tensor(c, dtype=torch.float64, device=a.device).expand_as(product)
    total = product + addend
    tail = total - product
    error = (product - (total - tail)) + (addend - tail)  # TwoSum: total + error is exact
    bits = total.view(torch.int64)
    inexact = (error != 0) & (bits & 1 == 0) & torch.isfinite(total)
    toward = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + toward, bits).view(torch.float64).float()


def sqrt(x: Tensor) -> Tensor:
    """round(sqrt(x)) for fp32 and fp64. torch.sqrt on a CPU is not correctly rounded (MKL, last bit); NumPy's is."""
    if x.device.type != "cpu":
        return x.sqrt()
    root = torch.empty_like(x)
    np.sqrt(x.detach().numpy(), out=root.numpy())
    return root


def divide(a: Tensor | float, b: Tensor | float, like: Tensor) -> Tensor:
    """round(a / b) for fp32, on the device of ``like``. Both operands become tensors, because torch turns a division
    by a number into a product with its reciprocal."""
    x, y = (torch.as_tensor(v, dtype=torch.float32, device=like.device) for v in (a, b))
    return torch.div(*torch.broadcast_tensors(x, y))
