"""Every operator on inputs that hypothesis chooses: empty shapes, strides, storage offsets, dtypes, extreme values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opsuite import SPECS, assert_agrees, backends, make, outputs, over_specs, run
from torch import Tensor

ROWS = [pytest.param(s, d, id=f"{s.name}-{str(d).removeprefix('torch.')}") for s in SPECS for d in s.dtypes]


class HypothesisDraw:
    """`leanops._registry.Draw` over hypothesis."""

    def __init__(self, data, device):
        self.data, self.device = data, device

    def integer(self, low, high):
        return self.data.draw(st.integers(low, high))

    def choice(self, options):
        return options[self.data.draw(st.integers(0, len(options) - 1))]

    def tensor(self, shape, dtype) -> Tensor:
        """Random values, laid out as one of: contiguous, transposed, every second element, behind a storage offset."""
        generator = torch.Generator().manual_seed(self.integer(0, 2**31))
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, dtype)
        layout = self.choice(("contiguous", "transposed", "strided", "offset"))
        if layout == "transposed" and values.dim() >= 2:
            order = list(range(values.dim()))[::-1]
            return values.permute(order).contiguous().permute(order)
        if layout == "strided" and values.dim() >= 1:
            wide = torch.zeros(*shape[:-1], 2 * shape[-1], device=self.device, dtype=dtype)
            wide[..., ::2] = values
            return wide[..., ::2]
        if layout == "offset":
            room = torch.zeros(values.numel() + 3, device=self.device, dtype=dtype)
            room[3:] = values.flatten()
            return room[3:].view(shape)
        return values

    def indices(self, n, size=None) -> Tensor:
        """Drawn at random, or a run at the start, at the end or in the middle."""
        size = self.integer(0, n) if size is None else size
        kind = self.choice(("run", "random"))
        if kind == "run":
            first = self.integer(0, n - size)
            return torch.arange(first, first + size, device=self.device)
        generator = torch.Generator().manual_seed(self.integer(0, 2**31))
        return torch.randperm(n, generator=generator)[:size].sort().values.to(self.device)

    def padded_indices(self, shape, n) -> Tensor:
        *lists, width = shape
        out = torch.full((math.prod(lists), width), -1, dtype=torch.int32, device=self.device)
        for row in out:
            chosen = self.indices(n, self.integer(0, min(n, width)))
            row[: len(chosen)] = chosen
        return out.view(shape)


@pytest.mark.parametrize(("spec", "dtype"), ROWS)
@given(data=st.data())
def test_any_input_agrees_with_the_reference(spec, dtype, device, data):
    args = spec.fuzz(HypothesisDraw(data, device), dtype)
    for name, function in backends(spec, device):
        assert_agrees(spec, args, run(spec, args, function), dtype, name, yardstick=False)


@over_specs(where=lambda spec: spec.autograd is not None)
def test_gradients_accept_expanded_and_strided_cotangents(spec, device):
    case = next(c for c in spec.cases if not c.bench)
    args = make(case, device, torch.float64)
    inputs = [a.requires_grad_() for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    results = outputs(spec, args, spec.op(*args))
    dense = [torch.ones_like(y) for y in results]
    want = torch.autograd.grad(results, inputs, dense, retain_graph=True)
    for layout in (
        [torch.ones((), dtype=y.dtype, device=device).expand_as(y) for y in results],  # strides of zero
        [torch.ones(y.shape[::-1], dtype=y.dtype, device=device).permute(tuple(range(y.dim()))[::-1]) for y in results],
    ):
        got = torch.autograd.grad(results, inputs, layout, retain_graph=True)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
