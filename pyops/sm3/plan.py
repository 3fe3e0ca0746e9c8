"""How a call becomes launches on a device: csrc/sm3/call.cuh and plan.h in Python, byte for byte.

Tensors of equal types make one launch. A table on the device tells it of each tensor as a matrix, cut into tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from leanops.sm3 import checks

THREADS, LANE, STEPS, BLOCK = 256, 8, 8, 256
FLAT, ALIGNED = 1, 2
SLOT = np.dtype(
    [(n, "u8") for n in ("param", "grad", "cover", "momentum", "scale", "maxima")]
    + [(n, "i8") for n in ("rows", "cols", "numel", "offset", "first", "tiles", "shape")]
    + [("tensor_id", "u4")]
    + [(n, "u1") for n in ("rank", "split", "threads_log2", "flags")]
)
_SLOT_WORDS = SLOT.itemsize // 8
KINDS = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.int8: 3}  # of momenta


def checked(launcher: Callable[..., None]) -> Callable[..., None]:
    """A launcher that refuses by itself what the operator's check would: an optimizer's kept call passes that by."""

    @wraps(launcher)
    def kernel(*args: Any) -> None:
        checks.step_(*args)
        launcher(*args)

    return kernel


class Item(NamedTuple):
    """One tensor of a launch: contiguous memory, and what is known of it."""

    param: Tensor
    grad: Tensor
    cover: Tensor
    momentum: Tensor | None
    scale: Tensor | None
    offset: int
    tensor_id: int


class Cut(NamedTuple):
    """A shape as a matrix, and its tiles: ``8 * threads`` columns, ``2048 / threads`` rows."""

    rows: int
    cols: int
    split: int  # axes before it are rows
    threads_log2: int  # along a row of a tile
    tiles: int
    flat: bool  # no two elements share an accumulator


def _threads_log2(rows: int, cols: int, int8: bool) -> int:
    needed = min((-(-cols // LANE) - 1).bit_length(), 8)
    log2 = min(needed, 5)
    while 5 <= log2 < needed and (THREADS >> (log2 + 1)) * STEPS >= rows:
        log2 += 1
    if log2 <= 5 and not int8:
        return next((less for less in range(log2, 2, -1) if cols % (LANE << less) == 0), log2)
    return log2


@cache
def cut(shape: tuple[int, ...], int8: bool) -> Cut:
    """How a shape is seen. Blocks of an int8 momentum lie in rows of axis 0, and must lie in those of the matrix."""
    numel = prod(shape)
    if len(shape) < 2:
        rows, cols, split, log2 = -(-numel // BLOCK), BLOCK, 0, 5
    else:
        splits = [(prod(shape[:k]), prod(shape[k:]), k) for k in range(1, len(shape))]
        fit = [s for s in splits if s[2] == 1 or not int8 or s[1] % BLOCK == 0]
        rows, cols, split = min(fit, key=lambda s: s[0] + s[1])
        log2 = _threads_log2(rows, cols, int8)
    tiles = -(-cols // (LANE << log2)) * -(-rows // ((THREADS >> log2) * STEPS))
    return Cut(rows, cols, split, log2, tiles, len(shape) < 2)


class Table(NamedTuple):
    """A launch's tensors: slots, then shapes. ``maxima`` of a slot counts words of scratch from 1, until placed."""

    slots: np.ndarray[Any, Any]
    shapes: np.ndarray[Any, np.dtype[np.int64]]
    tiles: int
    scratch: int  # words of 4 bytes that have to be zero

    def place(self, scratch: int) -> None:
        """Turn counts into addresses, once that of the scratch is known."""
        gathers = self.slots["maxima"] != 0
        self.slots["maxima"][gathers] = scratch + 4 * (self.slots["maxima"][gathers] - 1)

    def words(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        return np.concatenate([self.slots.view(np.uint64), self.shapes.view(np.uint64)])


def table(items: Sequence[Item]) -> Table:
    """The table of non-empty tensors of equal types."""
    first = items[0]
    int8 = first.momentum is not None and first.momentum.dtype == torch.int8
    chunk = 8 if first.param.element_size() == 2 else 4
    access = 16 if first.momentum is None else min(16, chunk * first.momentum.element_size())
    rows: list[tuple[int, ...]] = []
    shapes: list[int] = []
    tiles, scratch, words = 0, 0, len(items) * _SLOT_WORDS
    for i in items:
        shape = tuple(i.param.shape)
        c = cut(shape, int8)
        param, grad, cover = i.param.data_ptr(), i.grad.data_ptr(), i.cover.data_ptr()
        momentum = 0 if i.momentum is None else i.momentum.data_ptr()
        scale = i.scale.data_ptr() if int8 and i.scale is not None else 0
        maxima = 0
        if not c.flat and (c.tiles > 1 or len(shape) > 2):
            maxima = scratch + 1
            scratch += 1 + sum(shape)
        aligned = (param | grad | (cover if c.flat else 0)) % 16 == 0 and momentum % access == 0
        aligned = aligned and (c.flat or c.cols % chunk == 0)
        flags = FLAT * c.flat | ALIGNED * aligned
        memory = (param, grad, cover, momentum, scale, maxima)
        place = (c.rows, c.cols, i.param.numel(), i.offset, tiles, c.tiles, words + len(shapes), i.tensor_id)
        rows.append((*memory, *place, len(shape), c.split, c.threads_log2, flags))
        shapes += shape
        tiles += c.tiles
    return Table(np.array(rows, SLOT), np.array(shapes, np.int64), tiles, scratch)


@contextmanager
def launches(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    covers: Sequence[Tensor],
    momenta: Sequence[Tensor],
    scales: Sequence[Tensor],
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
) -> Iterator[list[list[Item]]]:
    """The non-empty tensors, contiguous, by their types; strided parameters are copied back afterwards."""
    groups: dict[tuple[torch.dtype, torch.dtype | None], list[Item]] = {}
    strided: list[tuple[Tensor, Tensor]] = []
    for k, (p, g) in enumerate(zip(params, grads, strict=True)):
        if p.numel() == 0:
            continue
        m, scale = momenta[k] if momenta else None, scales[k] if scales else None
        dense = p.contiguous()
        if dense is not p:
            strided.append((p, dense))
        item = Item(dense, g.contiguous(), covers[k], m, scale, offsets[k], tensor_ids[k])
        groups.setdefault((p.dtype, None if m is None else m.dtype), []).append(item)
    yield list(groups.values())
    for p, dense in strided:
        p.copy_(dense)
