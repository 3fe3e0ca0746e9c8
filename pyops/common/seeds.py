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
from leanops.common.philox import MASK, rounds
from leanops.common.streams import STEP_SEEDS

RULE = "philox4x32-10(step,direction,3)"


def _seed(base: int, step: Any, direction: Any, stream: Any) -> Any:
    low, high, *_ = rounds((step & MASK, step >> 32, direction, stream), (base & MASK, (base >> 32) & MASK))
    return low | (high << 32)


def derive(base: int, step: int, direction: int = 0, *, stream: int = STEP_SEEDS) -> int:
    """The 64-bit seed of one direction of one step."""
    return int(_seed(base, step, direction, stream))


def derive_many(
    base: int, steps: Sequence[int] | NDArray[np.uint64], direction: int = 0, *, stream: int = STEP_SEEDS
) -> NDArray[np.int64]:
    """:func:`derive` for many steps at once, as int64 with the same bits: what ``zo_axpy_`` takes as a seed tensor."""
    counter = np.asarray(steps, dtype=np.uint64)
    zero = np.zeros_like(counter)
    derived: NDArray[np.int64] = _seed(base, counter, zero + direction, zero + stream).view(np.int64)
    return derived


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
