"""The checks of the zeroth-order operators' arguments. Each function takes the operator's call; see ``_registry``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from leanops.common.checks import IDS, INDICES, in_range, one_of, require, same_layout
from leanops.common.dtypes import FLOATS, dtype_names
from leanops.zo.calls import Axpy, AxpyInto, Linear, Noise, NoiseInPlace, NoiseSum

MAX_RANK = 64  # of low-rank noise; U and V of a tile then fit the buffers of every backend


def _float_tensor(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} must be {dtype_names(FLOATS)}, got {t.dtype}")
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


def noise_in_place(call: NoiseInPlace) -> None:
    op = "zo_noise_"
    _float_tensor(op, "out", call.out)
    _one_seed(op, call.seed, call.out.device)
    _place(op, call.tensor_id, call.offset, call.out.numel())
    one_of(op, "distribution", call.distribution, ("gaussian", "rademacher"))


def noise(call: Noise) -> None:
    op, shape = "zo_noise", call.shape
    for size in shape:
        if isinstance(size, int) and size < 0:
            raise ValueError(f"{op}: shape must have no negative size, got {list(shape)}")
    if call.dtype is not None:
        require(call.dtype in FLOATS, f"{op}: dtype must be {dtype_names(FLOATS)}, got {call.dtype}")
    numel = math.prod(shape) if all(isinstance(size, int) for size in shape) else 0
    require(numel < INDICES, f"{op}: shape must have fewer than 2^63 elements, got {list(shape)}")
    _place(op, call.tensor_id, call.offset, numel)
    one_of(op, "distribution", call.distribution, ("gaussian", "rademacher"))


def axpy(call: Axpy) -> None:
    _written("zo_axpy_", "tensors", call.tensors, call.noise)


def axpy_into(call: AxpyInto) -> None:
    op, out, tensors = "zo_axpy_into_", call.out, call.tensors
    require(
        len(out) == len(tensors), f"{op}: out and tensors must have the same length, got {len(out)} and {len(tensors)}"
    )
    _written(op, "out", out, call.noise)
    for i, (o, t) in enumerate(zip(out, tensors, strict=True)):
        same_layout(op, f"out[{i}]", o, f"tensors[{i}]", t)
        if t.layout != torch.strided:
            _float_tensor(op, f"tensors[{i}]", t)


def _written(op: str, name: str, written: Sequence[Tensor], noise: NoiseSum) -> None:
    """Check the tensors that an axpy writes, which are the argument ``name``, and the noise for them."""
    device = written[0].device if written else None
    for i, t in enumerate(written):
        if t.dtype not in FLOATS or t.layout != torch.strided:
            _float_tensor(op, f"{name}[{i}]", t)
        if t.device != device:
            raise ValueError(f"{op}: {name}[{i}] must be on {device} as {name}[0], got {t.device}")
    _terms(op, noise, device)
    for argument, values in (("tensor_ids", noise.tensor_ids), ("offsets", noise.offsets)):
        if len(values) != len(written):
            raise ValueError(f"{op}: {argument} must have one entry a tensor ({len(written)}), got {len(values)}")
    for i, (t, tensor_id, offset) in enumerate(zip(written, noise.tensor_ids, noise.offsets, strict=True)):
        if not 0 <= tensor_id < IDS:
            in_range(op, f"tensor_ids[{i}]", tensor_id, 0, IDS)
        if offset:
            in_range(op, f"offsets[{i}]", offset, 0, INDICES - t.numel())
    one_of(op, "distribution", noise.distribution, ("gaussian", "rademacher", "lowrank"))
    one_of(op, "rounding", noise.rounding, ("nearest", "stochastic"))
    if noise.distribution == "lowrank":
        _low_rank(op, written, noise, device)
    elif noise.right_seeds is not None or noise.columns is not None:
        raise ValueError(f"{op}: right_seeds and columns are for distribution lowrank, got {noise.distribution}")


def _terms(op: str, noise: NoiseSum, device: torch.device | None) -> None:
    _vector(op, "seeds", noise.seeds, torch.int64, device)
    _vector(op, "coeffs", noise.coeffs, torch.float64, device)
    _vector(op, "decay", noise.decays, torch.float64, device)
    k, c, d = noise.seeds.numel(), noise.coeffs.numel(), noise.decays.numel()
    if k != c:
        raise ValueError(f"{op}: seeds and coeffs must have the same length, got {k} and {c}")
    if k == 0:
        raise ValueError(f"{op}: seeds must not be empty")
    if noise.sequential:
        require(d in (1, k), f"{op}: decay must be one number or as many as seeds ({k}), got {d}")
    elif d != 1:
        raise ValueError(f"{op}: decay must be one number where sequential is not set, got {d}")


def _low_rank(op: str, written: Sequence[Tensor], noise: NoiseSum, device: torch.device | None) -> None:
    right_seeds, columns, rank = noise.right_seeds, noise.columns, noise.rank
    if right_seeds is None or columns is None:
        absent = "right_seeds" if right_seeds is None else "columns"
        raise ValueError(f"{op}: {absent} must be given for distribution lowrank, got None")
    _vector(op, "right_seeds", right_seeds, torch.int64, device)
    k, n = noise.seeds.numel(), right_seeds.numel()
    require(n == k, f"{op}: seeds and right_seeds must have the same length, got {k} and {n}")
    in_range(op, "rank", rank, 1, MAX_RANK + 1)
    if len(columns) != len(written):
        raise ValueError(f"{op}: columns must have one entry a tensor ({len(written)}), got {len(columns)}")
    for i, (t, width, offset) in enumerate(zip(written, columns, noise.offsets, strict=True)):
        in_range(op, f"columns[{i}]", width, 0, INDICES // rank)
        if width:  # an index of U or V must have 63 bits, too
            in_range(op, f"offsets[{i}]", offset, 0, INDICES // rank - t.numel())


def linear(call: Linear) -> None:
    op, x, weight = "zo_linear", call.x, call.weight
    for name, value in (("x", x), ("weight", weight)):
        require(value is not None, f"{op}: {name} must be a tensor, got None")  # the dispatcher accepts None
    _float_tensor(op, "x", x)
    require(weight.dim() == 2, f"{op}: weight must be [n, m], got shape {list(weight.shape)}")
    n, m = weight.shape
    require(x.dim() >= 1 and x.shape[-1] == m, f"{op}: x must be [..., {m}] to fit weight, got shape {list(x.shape)}")
    for name, t in (("weight", weight), ("bias", call.bias), ("x_minus", call.x_minus)):
        if t is None:
            continue
        require(t.dtype == x.dtype, f"{op}: {name} must have the dtype of x, {x.dtype}, got {t.dtype}")
        require(t.device == x.device, f"{op}: {name} must be on the device of x, {x.device}, got {t.device}")
        _float_tensor(op, name, t)
    if call.bias is not None:
        require(call.bias.shape == (n,), f"{op}: bias must have shape [{n}], got {list(call.bias.shape)}")
    if call.x_minus is not None:
        same_layout(op, "x_minus", call.x_minus, "x", x)
    _one_seed(op, call.seed, x.device)
    _place(op, call.tensor_id, call.offset, n * m)
    one_of(op, "distribution", call.distribution, ("gaussian", "rademacher"))
