"""Seeds are 64-bit integers. This module checks them, derives them from a base seed, and packs them for operators.

    seed(base, step, direction) = x0 + 2^32 x1,   x = Philox4x32-10(key = base, counter = (step, direction, stream))

``step`` fills the two low counter words and ``direction`` the third; :mod:`leanops.common.streams` lists the streams.
A log needs to hold only scalars, because its seeds follow from the base seed by this rule. Every log names the rule
(:data:`RULE`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanops.common.checks import as_list, is_integer
from leanops.common.streams import STEP_SEEDS

RULE = "philox4x32-10(step,direction,3)"

_MASK = 0xFFFFFFFF


def _philox(c0: Any, c1: Any, c2: Any, c3: Any, key: int) -> tuple[Any, Any]:
    """The first two words, for Python integers or uint64 arrays (a product of two words fits 64 bits)."""
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1


def derive(base: int, step: int, direction: int = 0, *, stream: int = STEP_SEEDS) -> int:
    """The 64-bit seed of one direction of one step."""
    low, high = _philox(step & _MASK, step >> 32, direction, stream, base)
    return int(low | (high << 32))


def derive_many(
    base: int, steps: Sequence[int] | NDArray[np.uint64], direction: int = 0, *, stream: int = STEP_SEEDS
) -> NDArray[np.int64]:
    """:func:`derive` for many steps at once, as int64 with the same bits: what ``zo_axpy_`` takes as a seed tensor."""
    counter = np.asarray(steps, dtype=np.uint64)
    zero = np.zeros_like(counter)
    low, high = _philox(counter & _MASK, counter >> 32, zero + direction, zero + stream, base)
    return (low | (high << 32)).view(np.int64)


def check(op: str, seed: int) -> int:
    """A seed as a number in [0, 2^64); negative numbers stand for their two's complement."""
    return int(wrapped(op, "seed", seed)) % 2**64


def seed_tensor(seeds: int | Iterable[int] | Tensor, op: str, name: str) -> Tensor:
    """Seeds in the operators' format: int64 [K] with the bits of numbers in [-2^63, 2^64). ``op`` and ``name`` are for
    error messages."""
    if isinstance(seeds, Tensor):
        return as_vector(seeds)
    return torch.tensor([wrapped(op, name, s) for s in as_list(seeds)], dtype=torch.int64, device="cpu")


def wrapped(op: str, name: str, seed: int) -> int:
    """The int64 with the bits of a seed."""
    if (type(seed) is not int and not is_integer(seed)) or not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"{op}: {name} must be an integer in [-2^63, 2^64), got {seed!r}")
    seed = int(seed) if isinstance(seed, np.integer) else seed
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def as_vector(values: Tensor) -> Tensor:
    return values.reshape(1) if values.dim() == 0 else values
