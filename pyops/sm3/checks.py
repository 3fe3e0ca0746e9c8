"""The checks of the SM3 operator's arguments. ``step`` takes the operator's call; see ``_registry``."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from leanops.common.checks import IDS, INDICES, in_range, same_layout
from leanops.common.dtypes import FLOATS, dtype_names
from leanops.sm3.calls import Step
from leanops.sm3.reference import axes_of, scale_shape

_OP = "sm3_step_"
_MOMENTA = (torch.float32, torch.bfloat16, torch.int8)
_SHAPE, _DTYPE, _DEVICE, _LAYOUT = map(attrgetter, ("shape", "dtype", "device", "layout"))


def _dense(name: str, t: Tensor, dtypes: Sequence[torch.dtype], device: torch.device, like: str) -> None:
    if t.layout != torch.strided:
        raise ValueError(f"{_OP}: {name} must be a dense tensor, got layout {t.layout}")
    if t.dtype not in dtypes:
        raise ValueError(f"{_OP}: {name} must be {dtype_names(dtypes)}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{_OP}: {name} must be on {device} as {like}, got {t.device}")


def _fit(call: Step) -> bool:
    """Whether all tensors fit, as :func:`_explain` defines it, in an eighth of its time for a thousand parameters."""
    params, grads, covers, momenta, scales = call[:5]
    kept = [*covers, *momenta, *scales]
    tensors = [*params, *grads, *kept]
    shapes, dtypes, stored = list(map(_SHAPE, params)), list(map(_DTYPE, params)), list(map(_DTYPE, momenta))
    wanted = [scale_shape(s) if d == torch.int8 else (0,) for s, d in zip(shapes, stored, strict=False)]
    return (
        {torch.strided}.issuperset(map(_LAYOUT, tensors))
        and len(set(map(_DEVICE, tensors))) <= 1
        and all(map(Tensor.is_contiguous, kept))
        and set(FLOATS).issuperset(dtypes)
        and dtypes == list(map(_DTYPE, grads))
        and {torch.float32}.issuperset(map(_DTYPE, [*covers, *scales]))
        and set(_MOMENTA).issuperset(stored)
        and shapes == list(map(_SHAPE, grads))
        and [(sum(s) if s else 1,) for s in shapes] == list(map(_SHAPE, covers))
        and (not momenta or shapes == list(map(_SHAPE, momenta)))
        and (not scales or wanted == list(map(_SHAPE, scales)))
    )


def _explain(call: Step) -> None:
    """Raise for the first tensor that does not fit."""
    params = call.params
    for i, (p, g, cover) in enumerate(zip(params, call.grads, call.covers, strict=True)):
        _dense(f"params[{i}]", p, FLOATS, params[0].device, "params[0]")
        if g.layout != torch.strided:
            raise ValueError(f"{_OP}: grads[{i}] must be a dense tensor, got layout {g.layout}")
        same_layout(_OP, f"grads[{i}]", g, f"params[{i}]", p)
        length = sum(axes_of(p.shape))
        _state(f"covers[{i}]", cover, (torch.float32,), (length,), p, f"params[{i}] of shape {list(p.shape)}")
    for i, (p, m) in enumerate(zip(params, call.momenta, strict=False)):
        _state(f"momenta[{i}]", m, _MOMENTA, p.shape, p, f"params[{i}]")
    for i, (p, m, scale) in enumerate(zip(params, call.momenta, call.scales, strict=False)):
        shape = scale_shape(p.shape) if m.dtype == torch.int8 else (0,)
        why = f"momenta[{i}] of shape {list(m.shape)} and dtype {m.dtype}"
        _state(f"scales[{i}]", scale, (torch.float32,), shape, p, why)


def _state(name: str, t: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int], param: Tensor, why: str) -> None:
    """Check a tensor of the optimizer's state: it must be contiguous and have the shape that follows from ``why``."""
    _dense(name, t, dtypes, param.device, "params[0]")
    if t.shape != torch.Size(shape):
        raise ValueError(f"{_OP}: {name} must have shape {list(shape)} for {why}, got {list(t.shape)}")
    if not t.is_contiguous():
        raise ValueError(f"{_OP}: {name} must be contiguous, got shape {list(t.shape)} with strides {list(t.stride())}")


def _number(name: str, t: Tensor | None, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    if t is None:
        return
    _dense(name, t, dtypes, t.device if t.device.type == "cpu" else device, "params[0], or on the CPU")
    if t.numel() != 1:
        raise ValueError(f"{_OP}: {name} must be one number, got shape {list(t.shape)}")


def _lr_factors(t: Tensor | None, n: int, device: torch.device) -> None:
    if t is None:
        return
    name = "lr_factors"
    _dense(name, t, (torch.float32,), t.device if t.device.type == "cpu" else device, "params[0], or on the CPU")
    if t.shape != (n,):
        raise ValueError(f"{_OP}: {name} must have shape [{n}], one number a parameter, got {list(t.shape)}")
    if not t.is_contiguous():
        raise ValueError(f"{_OP}: {name} must be contiguous, got shape {list(t.shape)} with strides {list(t.stride())}")


def _one_each(call: Step) -> None:
    n, momenta, scales = len(call.params), call.momenta, call.scales
    for name in ("grads", "covers", "tensor_ids", "offsets"):
        length = len(getattr(call, name))
        if length != n:
            raise ValueError(f"{_OP}: {name} must have one entry a parameter ({n}), got {length}")
    momentum = call.options.momentum
    if len(momenta) != (n if momentum else 0):
        entries = f"one entry a parameter ({n})" if momentum else "no entry"
        raise ValueError(f"{_OP}: momenta must have {entries} with momentum {momentum}, got {len(momenta)}")
    if len(scales) != len(momenta) and (scales or torch.int8 in map(_DTYPE, momenta)):
        least = f"one entry a momentum ({len(momenta)}), or none where no momentum is int8"
        raise ValueError(f"{_OP}: scales must have {least}, got {len(scales)}")


def step(call: Step) -> None:
    call.options.check(_OP)
    _one_each(call)
    if not _fit(call):
        _explain(call)
    params = call.params
    device = params[0].device if params else torch.device("cpu")
    _number("lr", call.lr, (torch.float32, torch.float64), device)
    _number("seed", call.seed, (torch.int64,), device)
    _number("grad_scale", call.grad_scale, (torch.float32,), device)
    _number("found_inf", call.found_inf, (torch.float32,), device)
    _lr_factors(call.lr_factors, len(params), device)
    if not all(0 <= i < IDS for i in call.tensor_ids) or any(call.offsets):
        for i, (p, tensor_id, offset) in enumerate(zip(params, call.tensor_ids, call.offsets, strict=True)):
            in_range(_OP, f"tensor_ids[{i}]", tensor_id, 0, IDS)
            in_range(_OP, f"offsets[{i}]", offset, 0, INDICES - p.numel())
