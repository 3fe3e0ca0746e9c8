"""What the SM3 operator refuses. The function takes the operator's arguments; see ``_registry``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leanops._checks import in_range, same_layout
from leanops.sm3.reference import axes_of, scale_shape

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


def _state(name: str, t: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int], param: Tensor, like: str) -> None:
    """A tensor that the optimizer keeps: contiguous, of the shape that the parameter asks for."""
    _dense(name, t, dtypes, param.device, like)
    if t.shape != torch.Size(shape):
        seen = f"{list(param.shape)} {param.dtype}"
        raise ValueError(f"{_OP}: {name} must have shape {list(shape)} for {like} ({seen}), got {list(t.shape)}")
    if not t.is_contiguous():
        raise ValueError(f"{_OP}: {name} must be contiguous, got shape {list(t.shape)} with strides {list(t.stride())}")


def _number(name: str, t: Tensor | None, dtypes: Sequence[torch.dtype], device: torch.device | None) -> None:
    if t is None:
        return
    on_cpu = t.device.type == "cpu" or device is None
    _dense(name, t, dtypes, t.device if on_cpu else device, "params[0] or on the CPU")  # type: ignore[arg-type]
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
        wanted = f"one entry a parameter ({n})" if momentum else "no entry"
        raise ValueError(f"{_OP}: momenta must have {wanted} with momentum {momentum}, got {len(momenta)}")
    if len(scales) != len(momenta):
        raise ValueError(f"{_OP}: scales must have one entry a momentum ({len(momenta)}), got {len(scales)}")
    device = params[0].device if params else None
    for i, (p, g, cover) in enumerate(zip(params, grads, covers, strict=True)):
        _dense(f"params[{i}]", p, _FLOATS, params[0].device, "params[0]")
        if g.layout != torch.strided:
            raise ValueError(f"{_OP}: grads[{i}] must be a dense tensor, got layout {g.layout}")
        same_layout(_OP, f"grads[{i}]", g, f"params[{i}]", p)
        length = sum(axes_of(p.shape))
        _state(f"covers[{i}]", cover, (torch.float32,), (length,), p, f"params[{i}]")
    for i, (p, m, scale) in enumerate(zip(params, momenta, scales, strict=False)):
        _state(f"momenta[{i}]", m, _MOMENTA, p.shape, p, f"params[{i}]")
        shape = scale_shape(p.shape) if m.dtype == torch.int8 else (0,)
        _state(f"scales[{i}]", scale, (torch.float32,), shape, p, f"params[{i}] and a momentum in {m.dtype}")
    _number("lr", lr, (torch.float32, torch.float64), device)
    _number("seed", seed, (torch.int64,), device)
    _number("grad_scale", grad_scale, (torch.float32,), device)
    _number("found_inf", found_inf, (torch.float32,), device)
    for i, (p, tensor_id, offset) in enumerate(zip(params, tensor_ids, offsets, strict=True)):
        in_range(_OP, f"tensor_ids[{i}]", tensor_id, 0, _ID)
        if offset:
            in_range(_OP, f"offsets[{i}]", offset, 0, _INDEX - p.numel())
