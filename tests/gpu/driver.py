"""Launches every CUDA kernel of a family (zo or sm3) once or twice, small, for compute-sanitizer to watch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu import agreement, agreement_sm3

from leanops import _native


class Dispatched:
    def __getattr__(self, name: str) -> object:
        return getattr(torch.ops.leanops, name)


def zo(ops: Any, device: str) -> None:
    for dtype in agreement.DTYPES:
        for distribution in agreement.AXPY_DISTRIBUTIONS:
            for rounding in ("nearest", "stochastic"):
                for call in ((1, False, 20), (11, True, 3)):
                    agreement.axpy(ops, device, dtype, distribution, rounding, call)
        for distribution in agreement.DISTRIBUTIONS:
            agreement.noise(ops, device, dtype, distribution, 5)
            for pair in (False, True):
                agreement.linear(ops, device, dtype, distribution, pair, True)
        agreement.axpy_into(ops, device, dtype)


def sm3(ops: Any, device: str) -> None:
    for dtype in agreement.DTYPES:
        for momentum in agreement_sm3.MOMENTA:
            for options in agreement_sm3.NAMED_OPTIONS:
                agreement_sm3.step(ops, device, dtype, momentum, options, shapes=agreement_sm3.SMALL_SHAPES)
            agreement_sm3.unaligned(ops, device, dtype, momentum)
    agreement_sm3.many(ops, device, 40)


FAMILIES: dict[str, Callable[[Any, str], None]] = {"zo": zo, "sm3": sm3}


def main() -> int:
    state = _native.backends()["cuda"]
    if not state.loaded:
        print(f"the CUDA library is not loaded: {state.detail}", file=sys.stderr)
        return 1
    FAMILIES[sys.argv[1]](Dispatched(), "cuda")
    torch.cuda.synchronize()
    print("every kernel ran and agreed with the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
