"""Every operator under pytest-benchmark; ``make exhaustive`` runs it with ``--benchmark-enable``.

For figures that count (interleaved with peers, against the roofline) there is ``leanops bench``.
"""

from __future__ import annotations

import time

import pytest
import torch
from opsuite import clone, make, over_specs


@pytest.mark.exhaustive
@over_specs(where=lambda spec: spec.composite is None and any(c.bench for c in spec.cases))
def test_a_kernel_is_faster_than_the_reference(spec, device, benchmark):
    case = next(c for c in spec.cases if c.bench)
    args = make(case, device, torch.float32)
    start = time.perf_counter()
    spec.kernel("reference")(*clone(args))
    reference = time.perf_counter() - start
    benchmark.pedantic(spec.op, args, rounds=5, warmup_rounds=1)
    if benchmark.enabled:
        assert benchmark.stats.stats.median < reference
