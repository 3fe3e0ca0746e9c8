"""The parameters of an optimizer: their names, what is refused, and the part of a DTensor on this rank."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leanops.common.dtypes import FLOATS
from leanops.common.written_memory import WrittenMemory


def is_sharded(p: Tensor) -> bool:
    """Whether the parameter is a DTensor. No DTensor exists where its module was never imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(p, module.DTensor)


def check(op: str, name: str, p: Tensor) -> None:
    """Refuse what the operators cannot move."""
    if p.is_meta:
        raise ValueError(f"{op}: parameter {name} must have data, got a meta tensor")
    if p.layout != torch.strided:
        raise ValueError(f"{op}: parameter {name} must be dense, got layout {p.layout}")
    if p.dtype not in FLOATS:
        raise ValueError(f"{op}: parameter {name} must be float32, bfloat16, float16 or float64, got {p.dtype}")
    if is_sharded(p):
        place(op, name, p)
    elif type(p) not in (Tensor, nn.Parameter, nn.Buffer):
        raise ValueError(f"{op}: parameter {name} must be a plain tensor or a DTensor, got {type(p).__name__}")


def place(op: str, name: str, p: Any) -> int:
    """Index of this rank's first element of a DTensor: Shard(0) over one mesh dimension, replicated over the others."""
    shards = [d for d, placement in enumerate(p.placements) if not placement.is_replicate()]
    if not shards:
        return 0
    if (
        len(shards) > 1
        or not p.placements[shards[0]].is_shard(0)
        or "Strided" in type(p.placements[shards[0]]).__name__
    ):
        raise ValueError(
            f"{op}: parameter {name} must be sharded by rows, Shard(0), on one mesh axis, got {tuple(p.placements)}"
        )
    mesh, dim = p.device_mesh, shards[0]
    rows = p.shape[0]
    step = -(-rows // mesh.size(dim))
    first = min(step * mesh.get_local_rank(dim), rows)
    if p.to_local().shape[0] != min(step, rows - first):
        raise ValueError(
            f"{op}: parameter {name}: its {p.to_local().shape[0]} local rows are not an even share of {rows}"
        )
    return first * (p.numel() // max(rows, 1))


def local(p: Any) -> Tensor:
    """The part of a parameter that lies on this rank."""
    shard: Tensor = p.to_local() if is_sharded(p) else p
    return shard


def check_apart(op: str, pairs: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tensors, given with their names, that overlap themselves or one another."""
    found: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, t in pairs:
        found.setdefault(t.device, []).append((f"parameter {name}", t))
    for names, tensors in (zip(*part, strict=True) for part in found.values()):
        with torch.no_grad():  # leaves that require grad are what is moved
            WrittenMemory(op, names, range(len(names))).check(tensors)


Params = nn.Module | Mapping[str, Tensor] | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


def named(op: str, params: Any) -> tuple[list[tuple[str, Tensor]], bool]:
    """(name, tensor) pairs, and whether the names are the caller's own."""
    if isinstance(params, nn.Module):
        return list(params.named_parameters()), True
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        kinds = "a module, a mapping or an iterable of tensors"
        raise TypeError(f"{op}: params must be {kinds}, got {type(params).__name__}")
    items = list(params.items() if isinstance(params, Mapping) else params)
    own = not any(isinstance(item, Tensor) for item in items)
    pairs = [(str(i), item) if isinstance(item, Tensor) else item for i, item in enumerate(items)]
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[1], Tensor):
            raise TypeError(f"{op}: params must hold tensors, or names with tensors, got {pair!r}")
    return pairs, own
