"""Tensors compared by their bits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def octets(t: Tensor) -> Tensor:
    """The tensor's bytes in row-major order, every NaN as the same one."""
    flat = t.detach().cpu().contiguous().reshape(-1)
    if flat.is_floating_point():
        flat = torch.where(flat.isnan(), torch.full_like(flat, math.nan), flat)
    return flat.view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(octets(a), octets(b))


def differing(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """The names under which the two do not have the same bits."""
    alike = {n for n in found.keys() & wanted.keys() if same_bits(found[n], wanted[n])}
    return sorted((found.keys() | wanted.keys()) - alike)


def digest(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of the tensors' bytes, one after another."""
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(octets(t).numpy().tobytes())
    return sha.hexdigest()


def leaves(tree: Any) -> list[Tensor]:
    """The tensors and numbers of nested dicts, in the order of their keys."""
    if isinstance(tree, Mapping):
        return [t for key in sorted(tree, key=str) for t in leaves(tree[key])]
    return [tree] if isinstance(tree, Tensor) else [torch.tensor(tree, device="cpu")]


def state_digests(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """Of an optimizer's state_dict: the digest of each parameter's state, by the parameter's number."""
    return {str(i): digest(leaves(entry)) for i, entry in sorted(state_dict["state"].items())}
