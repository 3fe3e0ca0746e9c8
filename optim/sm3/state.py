"""SM3's state of a parameter: how it is kept, how it is saved, and how saved state is taken in.

Kept: ``step``, ``cover`` (flat, as the operator takes it), ``momentum_buffer`` and, for int8, ``momentum_scale``; of a
DTensor parameter this rank's part, as plain tensors. Saved: the same names, but ``cover`` is a dict of its axes,
``{"0": [n_0], "1": [n_1], ...}``, views of what is kept, and of a DTensor parameter every tensor is a DTensor of the
whole: axis 0, momentum and scales lie as the parameter does, the other axes are replicated. A saved state therefore
does not depend on the mesh that it comes from, nor on the one that it is loaded into.
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
    """A group's options in a state_dict: torch's checkpoints take names, not dtypes."""
    dtype = group["momentum_dtype"]
    return {**group, "momentum_dtype": None if dtype is None else dtype_name(dtype)}


def loaded_group(group: Group) -> Group:
    names = {dtype_name(d): d for d in MOMENTUM_DTYPES}
    dtype = group.get("momentum_dtype")
    return {**group, "momentum_dtype": names[dtype]} if dtype in names else group


@dataclass(frozen=True)
class Kept:
    """State that torch's ``load_state_dict`` shall take as it is: it would cast tensors to the parameter's dtype."""

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


def complete(state: State, local: Tensor, momentum: bool, dtype: torch.dtype | None) -> None:
    """Make what a parameter's state lacks: at its first step all of it, later what was taken out to start anew."""
    state.setdefault("step", torch.zeros((), dtype=torch.float32, device="cpu"))
    cover = state.get("cover")
    if isinstance(cover, Mapping):  # as it is saved: ZeroRedundancyOptimizer loads without asking the optimizer
        state["cover"] = torch.cat([cover[str(k)] for k in range(len(cover))])
    elif cover is None:
        state["cover"] = sm3_cover(local)
    if not momentum:
        return
    m = state.get("momentum_buffer")
    coded = m is not None and m.dtype == torch.int8
    if not coded:
        state.pop("momentum_scale", None)  # of codes that are gone
    if m is None or (coded and "momentum_scale" not in state):
        # int8 needs rows: cut into blocks, a vector would depend on where its shards begin; in rows of one element
        # codes and scales would take more than fp32
        short = math.prod(local.shape[1:]) == 1
        kind = torch.float32 if dtype is None or (dtype == torch.int8 and short) else dtype
        state["momentum_buffer"], scale = sm3_momentum(local, kind)
        if kind == torch.int8:
            state["momentum_scale"] = scale


# --- saving -----------------------------------------------------------------------------------------------------------


def _whole(local: Tensor, p: Any, shape: Sequence[int], by_rows: bool) -> Any:
    """A DTensor of this shape, of which ``local`` is this rank's part."""
    from torch.distributed.tensor import DTensor, Replicate

    placements = p.placements if by_rows else [Replicate()] * p.device_mesh.ndim
    stride = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
    if local.storage_offset():  # which the DTensor would inherit, and with it could not be saved or copied
        local = from_dlpack(local)
    return DTensor.from_local(local, p.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def saved(op: str, name: str, p: Tensor, state: State) -> State:
    """What stands for a parameter's state in a state_dict; its tensors share memory with those that are kept."""
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


def _here(op: str, name: str, what: str, value: Any, shape: Sequence[int], part: Part, by_rows: bool) -> Tensor:
    """This rank's part of a saved tensor, on the parameter's device: a copy, of the dtype it has."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {what} of parameter {name} must be a tensor, got {type(value).__name__}")
    if list(value.shape) != list(shape):
        raise ValueError(
            f"{op}: {what} of parameter {name} must have shape {list(shape)} for a parameter of shape "
            f"{list(part.param.shape)}, got {list(value.shape)}"
        )
    if value.is_meta:
        raise ValueError(f"{op}: {what} of parameter {name} must have data, got a meta tensor")
    if parameters.is_sharded(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    if by_rows and part.group is not None:
        value = value[part.first : part.first + part.local.shape[0]]
    return value.detach().to(part.local.device, copy=True).contiguous()


def number(value: Any) -> Tensor:
    """A tensor where it lies, and what is none on the CPU, whatever the default device; float32."""
    if isinstance(value, Tensor):
        return value.to(torch.float32)
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _steps(op: str, name: str, step: Any) -> Tensor:
    if not isinstance(step, (int, float)) and not (isinstance(step, Tensor) and step.numel() == 1 and not step.is_meta):
        seen = f"shape {list(step.shape)} on {step.device}" if isinstance(step, Tensor) else repr(step)
        raise ValueError(f"{op}: the step of parameter {name} must be one number, got {seen}")
    return number(step)


def loaded(op: str, name: str, p: Tensor, state: State, step_on_device: bool) -> State:
    """The state that is kept, from what :func:`saved` wrote; entries of other names stay as they are.

    Raises ValueError for a state that is not SM3's, or is that of a parameter of another shape.
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
            f"{op}: the cover of parameter {name} must have one entry an axis of {list(p.shape)}, got {sorted(cover)}"
        )
    axes = [
        _here(op, name, f"axis {k} of the cover", cover[str(k)], [n], part, k == 0).float()
        for k, n in enumerate(part.shape)
    ]
    out["cover"] = torch.cat(axes)
    home = part.local.device if step_on_device else torch.device("cpu")
    out["step"] = _steps(op, name, state["step"]).detach().to(home, copy=True).reshape(())
    if "momentum_buffer" in state:
        m = _here(op, name, "momentum_buffer", state["momentum_buffer"], p.shape, part, True)
        if m.dtype not in MOMENTUM_DTYPES:
            raise ValueError(
                f"{op}: momentum_buffer of parameter {name} must be float32, bfloat16 or int8, got {m.dtype}"
            )
        out["momentum_buffer"] = m
        if m.dtype == torch.int8:
            scale = _here(op, name, "momentum_scale", state.get("momentum_scale"), scale_shape(p.shape), part, True)
            out["momentum_scale"] = scale.float()
    return out
