"""zo_linear in Triton. A program makes the z of its tile, and reads the tile of W once for both results.

With one x: A = x W^T and B = x z^T in fp32, y± = A ± c B + b.
With two: y± = x± (W ± c z)^T + b. Each tile of W ± c z is rounded to the weight's dtype, as perturbed weights are.
"""

# Triton reads annotations of kernels as its own types
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanops.common.triton import INTERPRETED, in_order, narrow, philox, select_word, widen
from leanops.zo.calls import Linear
from leanops.zo.triton_noise import GAUSSIAN, RADEMACHER, box_muller, noise_at, signs


@triton.jit
def _z(seed, rows, column, m, offset, tensor_id, IS_RADEMACHER: tl.constexpr, ALIGNED: tl.constexpr, N: tl.constexpr,
       K: tl.constexpr):  # fmt: skip
    """z [N, K] of the weight's rows ``rows`` [N] and its K columns from ``column`` on.

    ALIGNED: the start of every row is the first element of a Philox block.
    """
    start = offset + rows * m + column  # [N]
    if not ALIGNED:
        index = start[:, None] + tl.arange(0, K)[None, :]  # [N, K]
        z = noise_at(seed, index, tensor_id, IS_RADEMACHER)  # [N, K]
    elif IS_RADEMACHER and K == 32:  # 32 signs are one word of a row's block
        w0, w1, w2, w3 = philox(seed, start >> 7, tensor_id, RADEMACHER)  # [N] each
        z = signs(select_word((start >> 5) & 3, w0, w1, w2, w3))  # [N, K]
    elif IS_RADEMACHER:
        block = (start[:, None] >> 7) + tl.arange(0, K // 128)[None, :]  # [N, K/128]
        w0, w1, w2, w3 = philox(seed, block, tensor_id, RADEMACHER)  # [N, K/128] each
        z = tl.reshape(signs(in_order(w0, w1, w2, w3)), [N, K])  # [N, K/128, 4, 32] -> [N, K]
    else:
        block = (start[:, None] >> 2) + tl.arange(0, K // 4)[None, :]  # [N, K/4]
        w0, w1, w2, w3 = philox(seed, block, tensor_id, GAUSSIAN)  # [N, K/4] each
        z0, z1 = box_muller(w0, w1)  # [N, K/4] each
        z2, z3 = box_muller(w2, w3)  # [N, K/4] each
        z = tl.reshape(in_order(z0, z1, z2, z3), [N, K])  # [N, K/4, 4] -> [N, K]
    return z


@triton.jit
def _product(x, w, acc):
    """acc + x w^T, where x is [BLOCK_T, BLOCK_K], w is [BLOCK_N, BLOCK_K] and acc is [BLOCK_T, BLOCK_N]."""
    if INTERPRETED:  # the interpreter's product of bf16 is wrong
        wide_w = tl.trans(widen(w, tl.float32))  # [BLOCK_K, BLOCK_N]
        out = acc + tl.dot(widen(x, tl.float32), wide_w, input_precision="ieee")  # [BLOCK_T, BLOCK_N]
    else:
        out = tl.dot(x, tl.trans(w), acc, input_precision="ieee")  # [BLOCK_T, BLOCK_N]
    return out


@triton.jit(do_not_specialize=["scale", "tensor_id"])
def linear_kernel(
    x, x_minus, weight, bias, y_plus, y_minus, seed_pointer, scale, tensor_id: tl.int64, offset: tl.int64,
    t: tl.int64, n: tl.int64, m: tl.int64,
    PAIR: tl.constexpr, BIAS: tl.constexpr, IS_RADEMACHER: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_T tokens of BLOCK_N out-features of both results."""
    tiles = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    rows = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    tokens = program // tiles * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    seed = tl.load(seed_pointer)
    id = tensor_id.to(tl.int64)
    DTYPE = weight.dtype.element_ty
    a = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)  # [BLOCK_T, BLOCK_N]
    b = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)  # [BLOCK_T, BLOCK_N]
    for column in range(0, m, BLOCK_K):
        columns = column + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        x_inside = (tokens[:, None] < t) & (columns[None, :] < m)  # [BLOCK_T, BLOCK_K]
        w_inside = (rows[:, None] < n) & (columns[None, :] < m)  # [BLOCK_N, BLOCK_K]
        x_index = tokens[:, None] * m + columns[None, :]  # [BLOCK_T, BLOCK_K]
        x_tile = tl.load(x + x_index, mask=x_inside, other=0.0)  # [BLOCK_T, BLOCK_K]
        w = tl.load(weight + rows[:, None] * m + columns[None, :], mask=w_inside, other=0.0)  # [BLOCK_N, BLOCK_K]
        z = _z(seed, rows, column, m, offset, id, IS_RADEMACHER, ALIGNED, BLOCK_N, BLOCK_K)  # [BLOCK_N, BLOCK_K]
        if PAIR:
            perturbation = scale * z  # [BLOCK_N, BLOCK_K]
            x_minus_tile = tl.load(x_minus + x_index, mask=x_inside, other=0.0)  # [BLOCK_T, BLOCK_K]
            a = _product(x_tile, narrow(widen(w, tl.float32) + perturbation, DTYPE), a)  # [BLOCK_T, BLOCK_N]
            b = _product(x_minus_tile, narrow(widen(w, tl.float32) - perturbation, DTYPE), b)  # [BLOCK_T, BLOCK_N]
        else:
            a = _product(x_tile, w, a)  # [BLOCK_T, BLOCK_N]
            b = _product(x_tile, narrow(z, DTYPE), b)  # [BLOCK_T, BLOCK_N]
    if BIAS:
        shift = widen(tl.load(bias + rows, mask=rows < n, other=0.0), tl.float32)[None, :]  # [1, BLOCK_N]
        a += shift
        if PAIR:
            b += shift
    if PAIR:
        plus = a
        minus = b
    else:
        plus = a + scale * b  # [BLOCK_T, BLOCK_N]
        minus = a - scale * b  # [BLOCK_T, BLOCK_N]
    y_index = tokens[:, None] * n + rows[None, :]  # [BLOCK_T, BLOCK_N]
    y_inside = (tokens[:, None] < t) & (rows[None, :] < n)  # [BLOCK_T, BLOCK_N]
    tl.store(y_plus + y_index, narrow(plus, DTYPE), mask=y_inside)  # [BLOCK_T, BLOCK_N]
    tl.store(y_minus + y_index, narrow(minus, DTYPE), mask=y_inside)  # [BLOCK_T, BLOCK_N]


def config(tokens: int, dtype: torch.dtype, distribution: str, aligned: bool, pair: bool, major: int) -> dict[str, int]:
    """Tile shape and warps with which no kernel spills. BLOCK_K 128 is one Philox block of Rademacher noise.

    ``major``: first digit of the device's compute capability.
    """
    if dtype == torch.float32:  # no tensor cores: the accumulators and both operands compete for registers
        return {
            "BLOCK_T": 16 if tokens <= 16 or pair else 32,
            "BLOCK_N": 32,
            "BLOCK_K": 32,
            "num_warps": 8,
            "num_stages": 2,
        }
    return {
        "BLOCK_T": 16 if tokens <= 16 else 64,
        "BLOCK_N": 64,
        "BLOCK_K": 128 if distribution == "rademacher" and aligned and not pair and major >= 9 else 32,
        "num_warps": 8,
        "num_stages": 2,
    }


def linear(call: Linear) -> tuple[Tensor, Tensor]:
    """``zo_linear`` in fp32, bf16 or fp16. ``call.seed`` is on the device of x."""
    x, weight, bias = call.x, call.weight, call.bias
    n, m = weight.shape
    shape = (*x.shape[:-1], n)
    y_plus, y_minus = x.new_empty(shape), x.new_empty(shape)
    tokens = x.shape[:-1].numel()
    if y_plus.numel() == 0:
        return y_plus, y_minus
    pair, is_rademacher = call.x_minus is not None, call.distribution == "rademacher"
    x, weight = x.contiguous(), weight.contiguous()
    minus = x if call.x_minus is None else call.x_minus.contiguous()
    block = 128 if is_rademacher else 4
    aligned = m % block == 0 and call.offset % block == 0
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9
    sizes = config(tokens, x.dtype, call.distribution, aligned, pair, major)
    grid = (triton.cdiv(tokens, sizes["BLOCK_T"]) * triton.cdiv(n, sizes["BLOCK_N"]),)
    linear_kernel[grid](
        x, minus, weight, weight if bias is None else bias.contiguous(), y_plus, y_minus, call.seed, call.scale,
        call.tensor_id, call.offset, tokens, n, m,
        PAIR=pair, BIAS=bias is not None, IS_RADEMACHER=is_rademacher, ALIGNED=aligned,
        **sizes, enable_fp_fusion=False,
    )  # fmt: skip
    return y_plus, y_minus
