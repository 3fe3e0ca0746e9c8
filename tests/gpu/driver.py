"""Launches every CUDA kernel of a family once or twice, small, for compute-sanitizer to watch.

The calls are those of ``every_kernel`` in the family's ``tests/FAMILY/agreement.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import families
import torch

from leanops import _native
from leanops.common.call import flat


class Dispatched:
    """The operators through the dispatcher, which calls the CUDA library. They take calls, as Python's launchers do."""

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        return lambda call: getattr(torch.ops.leanops, name)(*flat(call))


def main() -> int:
    state = _native.backends()["cuda"]
    if not state.loaded:
        print(f"the CUDA library is not loaded: {state.detail}", file=sys.stderr)
        return 1
    families.module(sys.argv[1], "agreement").every_kernel(Dispatched(), "cuda")
    torch.cuda.synchronize()
    print("every kernel ran and agreed with the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
