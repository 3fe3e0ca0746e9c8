"""SM3's state of a parameter, in the optimizer and in a state_dict.

The optimizer keeps ``step``, ``cover`` (flat, as the operator takes it), ``momentum_buffer``, for int8
``momentum_scale`` and, where the momentum averages gradients, ``momentum_weight``. For a DTensor parameter they are
this rank's part, as plain tensors.

A state_dict has the same names, but ``cover`` is a dict of its axes, ``{"0": [n_0], "1": [n_1], ...}``, which are views
of the flat cover. For a DTensor parameter every tensor but the two numbers is a DTensor of the whole: axis 0, momentum
and scales are sharded as the parameter, the other axes are replicated. So a saved state does not depend on a mesh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from leanops.common.dtypes import dtype_name
from leanops.optim.common import parameters
from leanops.sm3 import scale_shape, sm3_cover, sm3_cover_axes, sm3_momentum

MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.int8)

State = dict[str, Any]
Group = dict[str, Any]


def saved_group(group: Group) -> Group:
    """A group's options as a state_dict has them: with the name of a dtype, which torch's checkpoints can store."""
    dtype = group["momentum_dtype"]
    return {**group, "momentum_dtype": None if dtype is None else dtype_name(dtype)}


def loaded_group(group: Group) -> Group:
    """A group's options from those of a state_dict."""
    names = {dtype_name(d): d for d in MOMENTUM_DTYPES}
    dtype = group.get("momentum_dtype")
    return {**group, "momentum_dtype": names[dtype]} if dtype in names else group


@dataclass(frozen=True)
class Kept:
    """Wraps state that torch's ``load_state_dict`` must not change: it would cast tensors to the parameter's dtype."""

    value: State


class Part(NamedTuple):
    """The part of a parameter that lies on this rank."""

    param: Any
    local: Tensor
    offset: int  # index of the first element in the whole tensor
    first: int  # index of the first row
    group: Any  # the processes that share the rows; None: every process has all rows

    @property
    def shape(self) -> list[int]:
        """The whole tensor's shape; a 0-d parameter counts as shape (1,)."""
        return list(self.param.shape) or [1]


def part_of(op: str, name: str, p: Any) -> Part:
    """Raises ValueError for a DTensor that is not sharded by rows or replicated."""
    if not parameters.is_sharded(p):
        return Part(p, p, 0, 0, None)
    rows = parameters.rows_of(op, name, p)
    group = None if rows.mesh_dim is None else p.device_mesh.get_group(rows.mesh_dim)
    return Part(p, parameters.local(p), rows.offset, rows.first, group)


def complete(state: State, local: Tensor, momentum: bool, dtype: torch.dtype | None, of_gradient: bool) -> None:
    """Make the missing entries of a parameter's state: all of them at its first step, later those that were deleted."""
    state.setdefault("step", torch.zeros((), dtype=torch.float32, device="cpu"))
    cover = state.get("cover")
    if isinstance(cover, Mapping):  # as saved: ZeroRedundancyOptimizer does not load through the optimizer
        state["cover"] = torch.cat([cover[str(k)] for k in range(len(cover))])
    elif cover is None:
        state["cover"] = sm3_cover(local)
    if not momentum:
        return
    if of_gradient != ("momentum_weight" in state):  # an average of the other quantity
        for name in ("momentum_buffer", "momentum_weight"):
            state.pop(name, None)
    m = state.get("momentum_buffer")
    coded = m is not None and m.dtype == torch.int8
    if not coded:
        state.pop("momentum_scale", None)  # the scales of deleted codes
    if m is None or (coded and "momentum_scale" not in state):
        # int8 needs rows of several elements: a vector's blocks would depend on where its shards begin, and in rows of
        # one element codes and scales would take more memory than fp32
        one_element_rows = math.prod(local.shape[1:]) == 1
        new_dtype = torch.float32 if dtype is None or (dtype == torch.int8 and one_element_rows) else dtype
        state["momentum_buffer"], scale = sm3_momentum(local, new_dtype)
        if new_dtype == torch.int8:
            state["momentum_scale"] = scale
        if of_gradient:
            state["momentum_weight"] = torch.zeros((), dtype=torch.float32, device="cpu")


def new_momentum_weights(weights: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """Every ``momentum_weight`` after one more step, and the factors of the rate that correct the bias.

    A momentum of gradients is a weighted sum of them, and its ``momentum_weight`` is the sum of the weights: 1 -
    momentum^t after t steps of one momentum. It follows the recursion of the momentum, with ones for the gradients.
    Without momentum it stays.
    """
    if not momentum:
        return weights.clone(), torch.ones_like(weights)
    new = weights.mul(momentum).add_(1.0 - momentum)
    return new, new.reciprocal()


# --- saving -----------------------------------------------------------------------------------------------------------


def _whole(local: Tensor, p: Any, shape: Sequence[int], by_rows: bool) -> Any:
    """A DTensor of this shape with ``local`` as this rank's part, sharded as ``p`` (``by_rows``) or replicated."""
    from torch.distributed.tensor import DTensor, Replicate

    placements = p.placements if by_rows else [Replicate()] * p.device_mesh.ndim
    stride = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
    if local.storage_offset():  # a DTensor that inherits the offset cannot be saved or copied
        local = from_dlpack(local)
    return DTensor.from_local(local, p.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def saved(op: str, name: str, p: Tensor, state: State) -> State:
    """A parameter's state as a state_dict has it. Its tensors share memory with the optimizer's."""
    part = part_of(op, name, p)
    out = dict(state)
    if isinstance(out.get("cover"), Tensor):
        axes = sm3_cover_axes(out["cover"], part.local.shape)
        out["cover"] = {str(k): axis for k, axis in enumerate(axes)}
    if not parameters.is_sharded(p):
        return out
    if "cover" in out:
        sizes = part.shape
        out["cover"] = {k: _whole(a, p, [sizes[int(k)]], k == "0") for k, a in out["cover"].items()}
    for key in ("momentum_buffer", "momentum_scale"):
        if key in out:
            local = out[key]
            shape = list(p.shape) if key == "momentum_buffer" else [p.shape[0], *local.shape[1:]]
            out[key] = _whole(local, p, shape, True)
    return out


# --- loading ----------------------------------------------------------------------------------------------------------


def _local_part(subject: str, value: Any, shape: Sequence[int], part: Part, by_rows: bool) -> Tensor:
    """A copy of this rank's part of a saved tensor, in the tensor's dtype, on the parameter's device. ``subject`` names
    the tensor in errors."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{subject} must be a tensor, got {type(value).__name__}")
    if list(value.shape) != list(shape):
        raise ValueError(
            f"{subject} must have shape {list(shape)} for a parameter of shape {list(part.param.shape)}, got "
            f"{list(value.shape)}"
        )
    if value.is_meta:
        raise ValueError(f"{subject} must have data, got a meta tensor")
    if parameters.is_sharded(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    if by_rows and part.group is not None:
        value = value[part.first : part.first + part.local.shape[0]]
    return value.detach().to(part.local.device, copy=True).contiguous()


def number(value: Any) -> Tensor:
    """The value as float32: a tensor on its device, a Python number on the CPU, whatever the default device."""
    if isinstance(value, Tensor):
        return value.to(torch.float32)
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _one_number(op: str, name: str, what: str, value: Any, home: torch.device) -> Tensor:
    """A copy of a saved number, on its device."""
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta
    if not one and not isinstance(value, (int, float)):
        seen = f"shape {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{op}: the {what} of parameter {name} must be one number, got {seen}")
    return number(value).detach().to(home, copy=True).reshape(())


def loaded(op: str, name: str, p: Tensor, state: State, step_on_device: bool) -> State:
    """The optimizer's state, from what :func:`saved` returned; entries of other names stay as they are.

    Raises ValueError for a state that is not SM3's, or that belongs to a parameter of another shape.
    """
    part = part_of(op, name, p)
    if not isinstance(state, Mapping):
        raise ValueError(f"{op}: the state of parameter {name} must be a dict, got {type(state).__name__}")
    out = dict(state)
    cover = state.get("cover")
    if not isinstance(cover, dict) or "step" not in state:
        seen = ", ".join(sorted(f"{key}: {type(value).__name__}" for key, value in state.items()))
        raise ValueError(
            f"{op}: the state of parameter {name} must have 'step' and in 'cover' a dict of axes, got {seen}"
        )
    if set(cover) != {str(k) for k in range(len(part.shape))}:
        raise ValueError(
            f"{op}: the cover of parameter {name} must have an entry for each axis of {list(p.shape)}, got "
            f"{sorted(cover)}"
        )
    axes = [
        _local_part(f"{op}: axis {k} of the cover of parameter {name}", cover[str(k)], [n], part, k == 0).float()
        for k, n in enumerate(part.shape)
    ]
    out["cover"] = torch.cat(axes)
    step_device = part.local.device if step_on_device else torch.device("cpu")
    for what in {"step", "momentum_weight"} & state.keys():
        out[what] = _one_number(op, name, what, state[what], step_device)
    if "momentum_buffer" in state:
        subject = f"{op}: momentum_buffer of parameter {name}"
        m = _local_part(subject, state["momentum_buffer"], p.shape, part, True)
        if m.dtype not in MOMENTUM_DTYPES:
            raise ValueError(f"{subject} must be float32, bfloat16 or int8, got {m.dtype}")
        out["momentum_buffer"] = m
        if m.dtype == torch.int8:
            subject = f"{op}: momentum_scale of parameter {name}"
            scale = _local_part(subject, state.get("momentum_scale"), scale_shape(p.shape), part, True)
            out["momentum_scale"] = scale.float()
    return out
