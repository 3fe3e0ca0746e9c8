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


def tied(params: Iterable[Tensor]) -> dict[int, int]:
    """Position -> the first position of a parameter with the same memory, seen with the same shape and strides. Such
    parameters, tied by ``p.data = q.data``, are one weight under several names."""
    first: dict[tuple[Any, ...], int] = {}
    ties: dict[int, int] = {}
    for i, p in enumerate(params):
        plain = type(p) in (Tensor, nn.Parameter, nn.Buffer) and p.layout == torch.strided and not p.is_meta
        if plain and p.numel():
            key = (p.data_ptr(), p.device, p.dtype, p.shape, p.stride())
            if (other := first.setdefault(key, i)) != i:
                ties[i] = other
    return ties


def check_apart(op: str, pairs: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tensors, given with their names, that overlap themselves or one another."""
    found: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, t in pairs:
        found.setdefault(t.device, []).append((f"parameter {name}", t))
    for names, tensors in (zip(*part, strict=True) for part in found.values()):
        with torch.no_grad():  # leaves that require grad are what is moved
            WrittenMemory(op, names, range(len(names))).check(tensors)


# A wrapper's attribute for the module inside of it, and the classes of wrappers that call it simply `module`.
_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPERS = frozenset({"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"})


def canonical_names(model: nn.Module) -> list[str]:
    """The names of ``model.named_parameters()`` as the plain model has them: without the prefixes of torch.compile,
    DataParallel, DistributedDataParallel, FSDP and checkpoint wrappers, however they are nested."""
    return [canonical_name(model, name) for name, _ in model.named_parameters()]


def canonical_name(model: nn.Module, name: str) -> str:
    """The name of a parameter or buffer as the plain model has it."""
    module: Any = model
    kept = []
    for part in name.split("."):
        inner = part == "module" and any(c.__name__ in _WRAPPERS for c in type(module).__mro__)
        if not inner and part not in _WRAPPED:
            kept.append(part)
        module = getattr(module, part, None)
    return ".".join(kept)


def names_by_identity(model: nn.Module) -> dict[int, tuple[str, str]]:
    """id(p) -> the model's name of a parameter, and the canonical one."""
    pairs = zip(model.named_parameters(), canonical_names(model), strict=True)
    return {id(p): (name, canonical) for (name, p), canonical in pairs}


def without_wrappers(name: str) -> str:
    """A name from which the wrappers' own attributes are removed, where the model itself is not at hand. ``module``
    stays: a model may have a submodule of this name."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


Params = nn.Module | Mapping[str, Tensor] | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


def named(op: str, params: Any) -> tuple[list[tuple[str, Tensor]], bool]:
    """(name, tensor) pairs, and whether the names are the caller's own."""
    if isinstance(params, nn.Module):
        return list(zip(canonical_names(params), params.parameters(), strict=True)), True
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
