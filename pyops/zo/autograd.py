"""The backward of ``zo_linear``. It consists of torch operators, so torch can differentiate it again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanops.zo.calls import Linear

_PANEL = 1 << 22  # elements of z in memory at a time


def linear_setup_context(ctx: Any, call: Linear, output: Any) -> None:
    ctx.save_for_backward(call.x, call.x_minus, call.weight, call.seed)
    ctx.scale, ctx.tensor_id, ctx.offset, ctx.distribution = call.scale, call.tensor_id, call.offset, call.distribution
    ctx.has_bias = call.bias is not None


def _times_z(ctx: Any, seed: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    """g z [T, m] for g [T, n] and z [n, m]. z is made in panels of rows."""
    n, m = weight.shape
    out = g.new_zeros(g.shape[0], m)
    rows = max(1, _PANEL // max(m, 1))
    for start in range(0, n, rows):
        z = weight.new_empty(min(rows, n - start), m)
        offset = ctx.offset + start * m
        torch.ops.leanops.zo_noise_(z, seed, ctx.tensor_id, offset, ctx.distribution)
        out = out + g[:, start : start + rows] @ z
    return out


def linear_backward(ctx: Any, grad_plus: Tensor, grad_minus: Tensor) -> tuple[Tensor | None, ...]:
    """dx = g (W ± c z), dW = g_plus^T x_plus + g_minus^T x_minus, db = the sum of g over tokens."""
    x, x_minus, weight, seed = ctx.saved_tensors
    n, m = weight.shape
    plus, minus = grad_plus.reshape(-1, n), grad_minus.reshape(-1, n)
    grad_x = grad_x_minus = grad_weight = grad_bias = None
    if x_minus is None:
        if ctx.needs_input_grad[0]:
            z_part = _times_z(ctx, seed, plus - minus, weight)
            grad_x = ((plus + minus) @ weight + ctx.scale * z_part).reshape(x.shape)
    else:
        if ctx.needs_input_grad[0]:
            grad_x = (plus @ weight + ctx.scale * _times_z(ctx, seed, plus, weight)).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            grad_x_minus = (minus @ weight - ctx.scale * _times_z(ctx, seed, minus, weight)).reshape(x.shape)
    if ctx.needs_input_grad[2]:
        x_other = x if x_minus is None else x_minus
        grad_weight = plus.mT @ x.reshape(-1, m) + minus.mT @ x_other.reshape(-1, m)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grad_bias = (plus + minus).sum(0)
    return grad_x, grad_x_minus, grad_weight, grad_bias, None, None, None, None, None
