"""Launches every CUDA kernel of the package once or twice, small, for compute-sanitizer to watch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu import agreement, agreement_sm3

from leanops import _native


class Dispatched:
    def __getattr__(self, name: str) -> object:
        return getattr(torch.ops.leanops, name)


def main() -> int:
    state = _native.backends()["cuda"]
    if not state.loaded:
        print(f"the CUDA library is not loaded: {state.detail}", file=sys.stderr)
        return 1
    ops = Dispatched()
    for dtype in agreement.DTYPES:
        for distribution in agreement.DISTRIBUTIONS:
            agreement.noise(ops, "cuda", dtype, distribution, 5)
            for rounding in ("nearest", "stochastic"):
                for call in ((1, False, 20), (11, True, 3)):
                    agreement.axpy(ops, "cuda", dtype, distribution, rounding, call)
            for pair in (False, True):
                agreement.linear(ops, "cuda", dtype, distribution, pair, True)
        agreement.axpy_into(ops, "cuda", dtype)
        for momentum in agreement_sm3.MOMENTA:
            for options in agreement_sm3.NAMED_OPTIONS:
                agreement_sm3.step(ops, "cuda", dtype, momentum, options, shapes=agreement_sm3.SMALL_SHAPES)
            agreement_sm3.unaligned(ops, "cuda", dtype, momentum)
    agreement_sm3.many(ops, "cuda", 40)
    torch.cuda.synchronize()
    print("every kernel ran and agreed with the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
