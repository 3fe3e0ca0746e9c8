"""Philox4x32-10 in Python, the generator of all random bits. csrc/common/philox.h and common/triton.py have it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox(counter: Sequence[Tensor | int], key: tuple[int, int]) -> list[Tensor]:
    """:func:`rounds` of int64 tensors; numbers in the counter become tensors."""
    return list(rounds([c if isinstance(c, Tensor) else torch.tensor(c, device="cpu") for c in counter], key))


def rounds(counter: Sequence[Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 (Salmon et al., SC'11). The words, in [0, 2^32), are integers of Python, uint64 arrays or int64
    tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # products in int64 wrap modulo 2^64, and the masks keep the right 32 bits of them
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK) ^ c1 ^ k0,
            p1 & MASK,
            ((p0 >> 32) & MASK) ^ c3 ^ k1,
            p0 & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def words_at(index: Tensor, per_block: int, stream: int, seed: int, tensor_id: int) -> Tensor:
    """The four Philox words of every element's block, [n, 4], for a contiguous run of indices."""
    first, last = int(index[0]) // per_block, int(index[-1]) // per_block
    block = torch.arange(first, last + 1, device=index.device)
    words = torch.stack(
        torch.broadcast_tensors(
            *philox((block & MASK, block >> 32, tensor_id, stream), (seed & MASK, (seed >> 32) & MASK))
        ),
        dim=1,
    )
    return words[index // per_block - first]
