"""Every operator under pytest-benchmark: ``pytest tests/ops/test_speed.py --benchmark-enable``.

For figures that count (interleaved with peers, against the roofline) there is ``leanops bench``.
"""

from __future__ import annotations

import torch
from opsuite import make, over_specs


@over_specs(where=lambda spec: any(c.bench for c in spec.cases))
def test_speed(spec, device, benchmark):
    case = next(c for c in spec.cases if c.bench)
    args = make(case, device, torch.float32)
    benchmark(spec.op, *args)
