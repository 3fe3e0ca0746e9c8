"""Shapes that a kernel cuts into many pieces: the bits of the reference."""

from __future__ import annotations

import pytest
import torch
from opsuite import assert_same_bits, backends, run, run_reference

from leanops import _registry
from leanops.sm3.cases import MOMENTA, Options, step_inputs

SPEC = _registry.spec("sm3_step_")
SHAPES = [
    [(70_000, 8)],  # more rows than a grid's second axis
    [(5, 70_001)],
    [(600_011,)],
    [(1, 300_000)],
    [(65, 33, 129)],
    [(3, 4099, 17)],
    [(40, 30, 7, 9, 2)],
    [(64, 64)] * 200,
    [(700, 513), (), (40_000,), (0, 7), (3,)],
]


@pytest.mark.parametrize("momentum_dtype", MOMENTA, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=lambda s: f"{len(s)}x{s[0]}")
def test_any_size_gives_the_bits_of_the_reference(shapes, momentum_dtype, device, threads):
    dtype = torch.bfloat16 if momentum_dtype == torch.int8 else torch.float32
    options = Options(momentum_dtype, weight_decay=0.1, stochastic_rounding=True, strided=len(shapes) == 5)
    args = step_inputs(shapes, options, device, dtype, torch.Generator().manual_seed(0))
    want = run_reference(SPEC, args)
    for name, function in backends(SPEC, device):
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert_same_bits(run(SPEC, args, function), want, f"{name}, {count} threads")


@pytest.mark.parametrize("where", ["first", "last", "middle"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_bad_gradient_among_many_is_found(bad, where, device):
    shape = (515, 4100)
    args = step_inputs([shape], Options(torch.int8), device, torch.float32, torch.Generator().manual_seed(0))
    i, j = {"first": (0, 0), "last": (514, 4099), "middle": (300, 2500)}[where]
    args[1][0][i, j] = bad
    (w, cover, _, scales) = run(SPEC, args)
    assert w.isnan().nonzero().tolist() == [[i, j]]
    assert (~cover.isfinite()).nonzero().flatten().tolist() == [i, shape[0] + j]
    assert scales.isnan().nonzero().tolist() == [[i, j // 256]]
