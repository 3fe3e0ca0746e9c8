"""What the SM3 operator refuses. The function takes the operator's arguments; see ``_registry``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leanops._checks import in_range, same_layout
from leanops.sm3.reference import scale_shape

_OP = "sm3_step_"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOMENTA = (torch.float32, torch.bfloat16, torch.int8)
_ID = 2**32
_INDEX = 2**63


def _dense(name: str, t: Tensor, dtypes: Sequence[torch.dtype], device: torch.device, like: str) -> None:
    if t.layout != torch.strided:
        raise ValueError(f"{_OP}: {name} must be a dense tensor, got layout {t.layout}")
    if t.dtype not in dtypes:
        names = [str(d).removeprefix("torch.") for d in dtypes]
        wanted = f"{', '.join(names[:-1])} or {names[-1]}" if names[1:] else names[0]
        raise ValueError(f"{_OP}: {name} must be {wanted}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{_OP}: {name} must be on {device} as {like}, got {t.device}")


def _kept(t: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> bool:
    """Whether a tensor of the optimizer's state fits: dense, contiguous, of that dtype, shape and device."""
    fits = t.dtype == dtype and t.shape == shape and t.device == device
    return fits and t.layout == torch.strided and t.is_contiguous()


def _refuse(name: str, t: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int], param: Tensor, why: str) -> None:
    """Say what is wrong with a tensor of the optimizer's state."""
    _dense(name, t, dtypes, param.device, "params[0]")
    if t.shape != torch.Size(shape):
        raise ValueError(f"{_OP}: {name} must have shape {list(shape)} for {why}, got {list(t.shape)}")
    raise ValueError(f"{_OP}: {name} must be contiguous, got shape {list(t.shape)} with strides {list(t.stride())}")


def _number(name: str, t: Tensor | None, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    if t is None:
        return
    _dense(name, t, dtypes, t.device if t.device.type == "cpu" else device, "params[0], or on the CPU")
    if t.numel() != 1:
        raise ValueError(f"{_OP}: {name} must be one number, got shape {list(t.shape)}")


def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    covers: Sequence[Tensor],
    momenta: Sequence[Tensor],
    scales: Sequence[Tensor],
    lr: Tensor,
    seed: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    momentum: float,
    beta: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    stochastic_rounding: bool,
) -> None:
    # comparisons that a NaN fails; an infinity is not below infinity
    if not 0 <= momentum < 1:
        raise ValueError(f"{_OP}: momentum must be in [0, 1), got {momentum}")
    if not 0 < beta <= 1:
        raise ValueError(f"{_OP}: beta must be in (0, 1], got {beta}")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{_OP}: {name} must be finite and at least 0, got {value}")
    n = len(params)
    for name, values in (("grads", grads), ("covers", covers), ("tensor_ids", tensor_ids), ("offsets", offsets)):
        if len(values) != n:
            raise ValueError(f"{_OP}: {name} must have one entry a parameter ({n}), got {len(values)}")
    if len(momenta) != (n if momentum else 0):
        entries = f"one entry a parameter ({n})" if momentum else "no entry"
        raise ValueError(f"{_OP}: momenta must have {entries} with momentum {momentum}, got {len(momenta)}")
    if len(scales) != len(momenta):
        raise ValueError(f"{_OP}: scales must have one entry a momentum ({len(momenta)}), got {len(scales)}")
    device = params[0].device if params else torch.device("cpu")
    # thousands of tensors pass here at every step: names are made only for those that do not fit
    for i, (p, g, cover) in enumerate(zip(params, grads, covers, strict=True)):
        if p.dtype not in _FLOATS or p.layout != torch.strided or p.device != device:
            _dense(f"params[{i}]", p, _FLOATS, device, "params[0]")
        if g.layout != torch.strided:
            raise ValueError(f"{_OP}: grads[{i}] must be a dense tensor, got layout {g.layout}")
        shape = p.shape
        if g.shape != shape or g.dtype != p.dtype or g.device != device:
            same_layout(_OP, f"grads[{i}]", g, f"params[{i}]", p)
        length = (sum(shape) if shape else 1,)
        if not _kept(cover, torch.float32, length, device):
            _refuse(f"covers[{i}]", cover, (torch.float32,), length, p, f"params[{i}] of shape {list(shape)}")
    for i, (p, m, scale) in enumerate(zip(params, momenta, scales, strict=False)):
        shape, dtype = p.shape, m.dtype
        if dtype not in _MOMENTA or not _kept(m, dtype, shape, device):
            _refuse(f"momenta[{i}]", m, _MOMENTA, shape, p, f"params[{i}]")
        wanted = scale_shape(shape) if dtype == torch.int8 else (0,)
        if not _kept(scale, torch.float32, wanted, device):
            why = f"momenta[{i}] of shape {list(shape)} and dtype {dtype}"
            _refuse(f"scales[{i}]", scale, (torch.float32,), wanted, p, why)
    _number("lr", lr, (torch.float32, torch.float64), device)
    _number("seed", seed, (torch.int64,), device)
    _number("grad_scale", grad_scale, (torch.float32,), device)
    _number("found_inf", found_inf, (torch.float32,), device)
    for i, (p, tensor_id, offset) in enumerate(zip(params, tensor_ids, offsets, strict=True)):
        if not 0 <= tensor_id < _ID:
            in_range(_OP, f"tensor_ids[{i}]", tensor_id, 0, _ID)
        if offset:
            in_range(_OP, f"offsets[{i}]", offset, 0, _INDEX - p.numel())
