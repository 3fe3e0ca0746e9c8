"""What the zeroth-order operators refuse. Each function takes the operator's arguments; see ``_registry``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from leanops.common.checks import IDS, INDICES, in_range, one_of, require, same_layout
from leanops.common.dtypes import FLOATS

MAX_RANK = 64  # of low-rank noise: the factors of a tile fit the buffers of every backend


def _float_tensor(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {t.dtype}")
    if t.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be a dense tensor, got layout {t.layout}")


def _vector(op: str, name: str, t: Tensor, dtype: torch.dtype, device: torch.device | None) -> None:
    if t.dtype != dtype:
        raise ValueError(f"{op}: {name} must be {dtype}, got {t.dtype}")
    if t.dim() != 1:
        raise ValueError(f"{op}: {name} must be one-dimensional, got shape {list(t.shape)}")
    if t.device.type != "cpu" and device is not None and t.device != device:
        raise ValueError(f"{op}: {name} must be on the CPU or on {device}, got {t.device}")


def _one_seed(op: str, seed: Tensor, device: torch.device) -> None:
    _vector(op, "seed", seed, torch.int64, device)
    require(seed.numel() == 1, f"{op}: seed must be one number, got {seed.numel()}")


def _place(op: str, tensor_id: int, offset: int, numel: int) -> None:
    in_range(op, "tensor_id", tensor_id, 0, IDS)
    in_range(op, "offset", offset, 0, INDICES - numel)


def noise_(out: Tensor, seed: Tensor, tensor_id: int, offset: int, distribution: str) -> None:
    _float_tensor("zo_noise_", "out", out)
    _one_seed("zo_noise_", seed, out.device)
    _place("zo_noise_", tensor_id, offset, out.numel())
    one_of("zo_noise_", "distribution", distribution, ("gaussian", "rademacher"))


def noise(
    shape: Sequence[int],
    seed: int,
    tensor_id: int = 0,
    offset: int = 0,
    distribution: str = "gaussian",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    for size in shape:
        if isinstance(size, int) and size < 0:
            raise ValueError(f"zo_noise: shape must have no negative size, got {list(shape)}")
    if dtype is not None:
        require(dtype in FLOATS, f"zo_noise: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    numel = math.prod(shape) if all(isinstance(size, int) for size in shape) else 0
    require(numel < INDICES, f"zo_noise: shape must have fewer than 2^63 elements, got {list(shape)}")
    _place("zo_noise", tensor_id, offset, numel)
    one_of("zo_noise", "distribution", distribution, ("gaussian", "rademacher"))


def _axpy(
    op: str,
    written: Sequence[Tensor],
    written_name: str,
    seeds: Tensor,
    coeffs: Tensor,
    decays: Tensor,
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    distribution: str,
    rounding: str,
    sequential: bool,
    right_seeds: Tensor | None = None,
    columns: Sequence[int] | None = None,
    rank: int = 2,
) -> None:
    device = written[0].device if written else None
    for i, t in enumerate(written):
        if t.dtype not in FLOATS or t.layout != torch.strided:
            _float_tensor(op, f"{written_name}[{i}]", t)
        if t.device != device:
            raise ValueError(f"{op}: {written_name}[{i}] must be on {device} as {written_name}[0], got {t.device}")
    _vector(op, "seeds", seeds, torch.int64, device)
    _vector(op, "coeffs", coeffs, torch.float64, device)
    _vector(op, "decay", decays, torch.float64, device)
    k = seeds.numel()
    require(k == coeffs.numel(), f"{op}: seeds and coeffs must have the same length, got {k} and {coeffs.numel()}")
    require(k > 0, f"{op}: seeds must not be empty")
    d = decays.numel()
    if sequential:
        require(d in (1, k), f"{op}: decay must be one number or as many as seeds ({k}), got {d}")
    else:
        require(d == 1, f"{op}: decay must be one number where sequential is not set, got {d}")
    for name, values in (("tensor_ids", tensor_ids), ("offsets", offsets)):
        if len(values) != len(written):
            raise ValueError(f"{op}: {name} must have one entry a tensor ({len(written)}), got {len(values)}")
    for i, (t, tensor_id, offset) in enumerate(zip(written, tensor_ids, offsets, strict=True)):
        if not 0 <= tensor_id < IDS:
            in_range(op, f"tensor_ids[{i}]", tensor_id, 0, IDS)
        if offset:
            in_range(op, f"offsets[{i}]", offset, 0, INDICES - t.numel())
    one_of(op, "distribution", distribution, ("gaussian", "rademacher", "lowrank"))
    one_of(op, "rounding", rounding, ("nearest", "stochastic"))
    if distribution == "lowrank":
        _low_rank(op, written, k, offsets, right_seeds, columns, rank)
    elif right_seeds is not None or columns is not None:
        raise ValueError(f"{op}: right_seeds and columns are for distribution lowrank, got {distribution}")


def _low_rank(
    op: str,
    written: Sequence[Tensor],
    k: int,
    offsets: Sequence[int],
    right_seeds: Tensor | None,
    columns: Sequence[int] | None,
    rank: int,
) -> None:
    if right_seeds is None or columns is None:
        absent = "right_seeds" if right_seeds is None else "columns"
        raise ValueError(f"{op}: {absent} must be given for distribution lowrank, got None")
    _vector(op, "right_seeds", right_seeds, torch.int64, written[0].device if written else None)
    n = right_seeds.numel()
    require(n == k, f"{op}: seeds and right_seeds must have the same length, got {k} and {n}")
    in_range(op, "rank", rank, 1, MAX_RANK + 1)
    if len(columns) != len(written):
        raise ValueError(f"{op}: columns must have one entry a tensor ({len(written)}), got {len(columns)}")
    for i, (t, width, offset) in enumerate(zip(written, columns, offsets, strict=True)):
        in_range(op, f"columns[{i}]", width, 0, INDICES // rank)
        if width:  # the factors' own indices have 63 bits too
            in_range(op, f"offsets[{i}]", offset, 0, INDICES // rank - t.numel())


def axpy_(
    tensors: Sequence[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    decays: Tensor,
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    distribution: str,
    rounding: str,
    sequential: bool,
    right_seeds: Tensor | None = None,
    columns: Sequence[int] | None = None,
    rank: int = 2,
) -> None:
    z = (distribution, rounding, sequential, right_seeds, columns, rank)
    rest = (seeds, coeffs, decays, tensor_ids, offsets, *z)
    _axpy("zo_axpy_", tensors, "tensors", *rest)


def axpy_into_(
    out: Sequence[Tensor],
    tensors: Sequence[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    decays: Tensor,
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    distribution: str,
    rounding: str,
    sequential: bool,
    right_seeds: Tensor | None = None,
    columns: Sequence[int] | None = None,
    rank: int = 2,
) -> None:
    op = "zo_axpy_into_"
    require(
        len(out) == len(tensors), f"{op}: out and tensors must have the same length, got {len(out)} and {len(tensors)}"
    )
    z = (distribution, rounding, sequential, right_seeds, columns, rank)
    rest = (seeds, coeffs, decays, tensor_ids, offsets, *z)
    _axpy(op, out, "out", *rest)
    for i, (o, t) in enumerate(zip(out, tensors, strict=True)):
        same_layout(op, f"out[{i}]", o, f"tensors[{i}]", t)
        if t.layout != torch.strided:
            _float_tensor(op, f"tensors[{i}]", t)


def linear(
    x: Tensor,
    x_minus: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    scale: float,
    tensor_id: int,
    offset: int,
    distribution: str,
) -> None:
    op = "zo_linear"
    for name, given in (("x", x), ("weight", weight)):
        require(given is not None, f"{op}: {name} must be a tensor, got None")  # the dispatcher lets it pass
    _float_tensor(op, "x", x)
    require(weight.dim() == 2, f"{op}: weight must be [n, m], got shape {list(weight.shape)}")
    n, m = weight.shape
    require(x.dim() >= 1 and x.shape[-1] == m, f"{op}: x must be [..., {m}] to fit weight, got shape {list(x.shape)}")
    for name, t in (("weight", weight), ("bias", bias), ("x_minus", x_minus)):
        if t is None:
            continue
        require(t.dtype == x.dtype, f"{op}: {name} must have the dtype of x, {x.dtype}, got {t.dtype}")
        require(t.device == x.device, f"{op}: {name} must be on the device of x, {x.device}, got {t.device}")
        _float_tensor(op, name, t)
    if bias is not None:
        require(bias.shape == (n,), f"{op}: bias must have shape [{n}], got {list(bias.shape)}")
    if x_minus is not None:
        same_layout(op, "x_minus", x_minus, "x", x)
    _one_seed(op, seed, x.device)
    _place(op, tensor_id, offset, n * m)
    one_of(op, "distribution", distribution, ("gaussian", "rademacher"))
