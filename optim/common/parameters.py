"""The parameters of an optimizer: their names, which tensors are refused, and the part of a DTensor on this rank."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leanops.common.dtypes import FLOATS
from leanops.common.written_memory import WrittenMemory

PLAIN = frozenset({Tensor, nn.Parameter, nn.Buffer})  # classes of tensors that hold their values themselves


def is_sharded(p: Tensor) -> bool:
    """Whether the parameter is a DTensor. No DTensor exists where its module was never imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(p, module.DTensor)


def check(op: str, name: str, p: Tensor) -> None:
    """ValueError for a parameter that the operators cannot move."""
    if p.is_meta:
        raise ValueError(f"{op}: parameter {name} must have data, got a meta tensor")
    if p.layout != torch.strided:
        raise ValueError(f"{op}: parameter {name} must be dense, got layout {p.layout}")
    if p.dtype not in FLOATS:
        raise ValueError(f"{op}: parameter {name} must be float32, bfloat16, float16 or float64, got {p.dtype}")
    if is_sharded(p):
        rows_of(op, name, p)
    elif type(p) not in PLAIN:
        raise ValueError(f"{op}: parameter {name} must be a plain tensor or a DTensor, got {type(p).__name__}")


class Rows(NamedTuple):
    """The rows of a DTensor that lie on this rank."""

    first: int
    offset: int  # index of their first element in the whole tensor
    mesh_dim: int | None  # the mesh dimension whose processes share the rows; None: every process has all rows


def rows_of(op: str, name: str, p: Any) -> Rows:
    """This rank's rows of a DTensor. ValueError unless it is Shard(0) on at most one mesh dimension, and replicated on
    the others."""
    shards = [d for d, placement in enumerate(p.placements) if not placement.is_replicate()]
    if not shards:
        return Rows(0, 0, None)
    placement = p.placements[shards[0]]
    if len(shards) > 1 or not placement.is_shard(0) or "Strided" in type(placement).__name__:
        raise ValueError(
            f"{op}: parameter {name} must be sharded by rows, Shard(0), on one mesh axis, got {tuple(p.placements)}"
        )
    mesh, dim = p.device_mesh, shards[0]
    count, rows = p.to_local().shape[0], p.shape[0]
    share = -(-rows // mesh.size(dim))
    first = min(share * mesh.get_local_rank(dim), rows)
    if count != min(share, rows - first):
        raise ValueError(f"{op}: parameter {name}: its {count} local rows are not an even share of {rows}")
    return Rows(first, first * (p.numel() // max(rows, 1)), dim)


def local(p: Any) -> Tensor:
    """The part of a parameter that lies on this rank."""
    shard: Tensor = p.to_local() if is_sharded(p) else p
    return shard


def tied(params: Iterable[Tensor]) -> dict[int, int]:
    """Position of a parameter -> position of the first one with the same memory, shape and strides.

    Such parameters are one weight under several names: ``p.data = q.data`` ties them.
    """
    first: dict[tuple[Any, ...], int] = {}
    ties: dict[int, int] = {}
    for i, p in enumerate(params):
        if type(p) in PLAIN and p.layout == torch.strided and not p.is_meta and p.numel():
            key = (p.data_ptr(), p.device, p.dtype, p.shape, p.stride())
            if (other := first.setdefault(key, i)) != i:
                ties[i] = other
    return ties


def check_apart(op: str, pairs: Iterable[tuple[str, Tensor]]) -> None:
    """ValueError where a tensor of the (name, tensor) pairs overlaps itself or another one."""
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, t in pairs:
        by_device.setdefault(t.device, []).append((f"parameter {name}", t))
    for names, tensors in (zip(*part, strict=True) for part in by_device.values()):
        with torch.no_grad():  # the check refuses leaves that require grad while grad is enabled
            WrittenMemory(op, names, range(len(names))).check(tensors)


# Attributes that hold the module inside a wrapper, and the classes of wrappers that name this attribute `module`.
_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPERS = frozenset({"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"})


def _holds_wrapped(module: Any, attribute: str) -> bool:
    """Whether the module is a wrapper, and this attribute holds the module inside."""
    if attribute == "module":
        return any(c.__name__ in _WRAPPERS for c in type(module).__mro__)
    return attribute in _WRAPPED


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile, DataParallel, DistributedDataParallel, FSDP, DeepSpeed and
    checkpointing, however they are nested."""
    while True:
        inner = next((m for name, m in model.named_children() if _holds_wrapped(model, name)), None)
        if inner is None:
            return model
        model = inner


def canonical_names(model: nn.Module) -> list[str]:
    """The names of ``model.named_parameters()`` in the plain model: without the prefixes of wrappers, see
    :func:`unwrapped`, which may be anywhere in the model."""
    return [canonical_name(model, name) for name, _ in model.named_parameters()]


def canonical_name(model: nn.Module, name: str) -> str:
    """The name of a parameter or buffer in the plain model."""
    module: Any = model
    kept = []
    for part in name.split("."):
        if not _holds_wrapped(module, part):
            kept.append(part)
        module = getattr(module, part, None)
    return ".".join(kept)


def names_by_identity(model: nn.Module) -> dict[int, tuple[str, str]]:
    """id(p) -> the name that the model has for a parameter, and the canonical name."""
    pairs = zip(model.named_parameters(), canonical_names(model), strict=True)
    return {id(p): (name, canonical) for (name, p), canonical in pairs}


def without_wrappers(name: str) -> str:
    """A name without the wrappers' attributes, for a caller that does not have the model. ``module`` stays, because a
    model may have a submodule of this name."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


Params = nn.Module | Mapping[str, Tensor] | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


def named(op: str, params: Any) -> tuple[list[tuple[str, Tensor]], bool]:
    """(name, tensor) pairs, and whether ``params`` has names; without names, a tensor's name is its position."""
    if isinstance(params, nn.Module):
        return list(zip(canonical_names(params), params.parameters(), strict=True)), True
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        kinds = "a module, a mapping or an iterable of tensors"
        raise TypeError(f"{op}: params must be {kinds}, got {type(params).__name__}")
    items = list(params.items() if isinstance(params, Mapping) else params)
    has_names = not any(isinstance(item, Tensor) for item in items)
    pairs = [(str(i), item) if isinstance(item, Tensor) else item for i, item in enumerate(items)]
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[1], Tensor):
            raise TypeError(f"{op}: params must hold tensors, or names with tensors, got {pair!r}")
    return pairs, has_names
