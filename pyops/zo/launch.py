"""What the launchers of every CUDA backend in Python have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """One tensor's contiguous memory to read and to write; the same memory where it is updated in place."""

    target: Tensor
    source: Tensor
    tensor_id: int
    offset: int
    columns: int = 0  # of low-rank noise


@contextmanager
def dense(out: Tensor) -> Iterator[Tensor]:
    """A contiguous tensor to write; copied to ``out`` afterwards where that is another."""
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    yield target
    if target is not out:
        out.copy_(target)


@contextmanager
def dense_pairs(
    out: Sequence[Tensor],
    tensors: Sequence[Tensor],
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    columns: Sequence[int] | None = None,
) -> Iterator[dict[torch.dtype, list[Pair]]]:
    """The non-empty tensors as contiguous pairs, by dtype; strided results are copied back afterwards."""
    pairs: dict[torch.dtype, list[Pair]] = {}
    strided: list[tuple[Tensor, Tensor]] = []
    widths = [0] * len(out) if columns is None else columns
    for o, t, tensor_id, offset, width in zip(out, tensors, tensor_ids, offsets, widths, strict=True):
        if o.numel() == 0:
            continue
        source, target = t.contiguous(), o
        if not o.is_contiguous():
            target = torch.empty_like(source) if source is t else source
            strided.append((o, target))
        pairs.setdefault(o.dtype, []).append(Pair(target, source, tensor_id, offset, width))
    yield pairs
    for o, target in strided:
        o.copy_(target)
