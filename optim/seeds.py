"""Seeds that follow from a base seed: what lets a log hold scalars alone.

    seed(base, step, direction) = x0 + 2^32 x1,   x = Philox4x32-10(key = base, counter = (step, direction, stream))

with ``step`` in the two low counter words, ``direction`` in the third, and stream 3 for the steps of an optimizer,
stream 4 for the candidates of a pool, stream 5 for draws of what trains, or stream 6 for the right seeds of low-rank
noise. The noise itself (``zo/1``) has streams 0 to 4, but its keys are seeds made here, not a base, so no seed is made
of words that are used as noise. The rule is named in every log (:data:`RULE`).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

RULE = "philox4x32-10(step,direction,3)"
STEPS, POOL, DRAWS, RIGHT = 3, 4, 5, 6  # the last counter word

_MASK = 0xFFFFFFFF


def _philox(c0: Any, c1: Any, c2: Any, c3: Any, key: int) -> tuple[Any, Any]:
    """The first two words, for Python integers and for uint64 arrays alike (a product of two words fits 64 bits)."""
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1


def derive(base: int, step: int, direction: int = 0, *, stream: int = STEPS) -> int:
    """The 64-bit seed of one direction of one step."""
    low, high = _philox(step & _MASK, step >> 32, direction, stream, base)
    return int(low | (high << 32))


def derive_many(
    base: int, steps: Sequence[int] | NDArray[np.uint64], direction: int = 0, *, stream: int = STEPS
) -> NDArray[np.int64]:
    """:func:`derive` for many steps at once, as int64 with the same bits: what ``zo_axpy_`` takes as a seed tensor."""
    counter = np.asarray(steps, dtype=np.uint64)
    zero = np.zeros_like(counter)
    low, high = _philox(counter & _MASK, counter >> 32, zero + direction, zero + stream, base)
    return (low | (high << 32)).view(np.int64)


def check(name: str, seed: int) -> int:
    """A 64-bit seed, negative numbers in two's complement."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"{name}: seed must be an integer in [-2^63, 2^64), got {seed!r}")
    return int(seed) % 2**64
