"""Checks that every CUDA backend must pass, on any device. A backend is an object with the operators as functions of
their arguments."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from leanops import _registry
from leanops.zo import reference as _reference

OPERATORS = ("zo_noise_", "zo_axpy_", "zo_axpy_into_", "zo_linear")


def unpacked(backend: Any) -> SimpleNamespace:
    """The operators of a backend, whose launchers take calls, as functions of their arguments."""
    return SimpleNamespace(**{name: _registry.spec(name).unpacked(getattr(backend, name)) for name in OPERATORS})


reference = unpacked(_reference)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DISTRIBUTIONS = ("gaussian", "rademacher")
AXPY_DISTRIBUTIONS = (*DISTRIBUTIONS, "lowrank")
OFFSETS = (0, 8, 5, 127, 4093, 2**40 + 3, 2**62 - 8192)
# (terms, sequential, tensors)
CALLS = ((1, False, 5), (1, True, 20), (6, False, 20), (6, True, 3), (11, False, 3))


def i64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits; any NaN equals any other."""
    actual = actual.cpu()
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(_bits(actual)[~nan], _bits(expected)[~nan])


def noise(backend: Any, device: str, dtype: torch.dtype, distribution: str, offset: int) -> None:
    seed = i64(-0x123456789ABCDEF)
    for n in (1, 31, 8192 + 77):
        actual, expected = torch.full((n,), torch.nan, dtype=dtype, device=device), torch.empty(n, dtype=dtype)
        backend.zo_noise_(actual, seed, 0xFEDCBA98, offset, distribution)
        reference.zo_noise_(expected, seed, 0xFEDCBA98, offset, distribution)
        assert_same(actual, expected)


def model(dtype: torch.dtype, tensors: int, device: str) -> tuple[list[torch.Tensor], list[int], list[int]]:
    """Tensors of many sizes: some are not aligned to 16 bytes, some are shards, and the last one is transposed."""
    generator = torch.Generator().manual_seed(tensors)
    out, ids, offsets = [], [], []
    for i in range(tensors):
        n = (4096, 1, 777, 0, 5000, 33, 8)[i % 7]
        storage = torch.randn(n + 8, generator=generator, dtype=torch.float64).to(device, dtype)
        out.append(storage[i % 3 : i % 3 + n])
        ids.append((i * 2654435761) % 2**32)
        offsets.append((0, 0, 64, 3, 2**33 + 1)[i % 5])
    out.append(torch.randn(60, 70, generator=generator, dtype=torch.float64).to(device, dtype).t())
    return out, [*ids, 5], [*offsets, 11]


def terms_of(count: int, sequential: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    seeds = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(count))
    coeffs = torch.linspace(-1e-2, 2e-2, count, dtype=torch.float64)
    decays = torch.linspace(0.0, 0.1, count, dtype=torch.float64) if sequential else f64(1e-3)
    return seeds, coeffs, decays


def low_rank_arguments(distribution: str, seeds: torch.Tensor, tensors: int, rank: int = 3) -> tuple[Any, ...]:
    """Right seeds, columns and rank for "lowrank", otherwise nothing. Two terms share a V; a tensor may begin and end
    anywhere in a row of its matrix."""
    if distribution != "lowrank":
        return ()
    widths = (0, 24, 1, 33, 256, 700, 16, 600)
    return seeds[torch.arange(len(seeds)) // 2] // 3, [widths[i % 8] for i in range(tensors)], rank


def axpy(
    backend: Any,
    device: str,
    dtype: torch.dtype,
    distribution: str,
    rounding: str,
    call: tuple[int, bool, int],
    terms_device: str = "cpu",
    rank: int = 3,
) -> None:
    count, sequential, tensors = call
    terms = terms_of(count, sequential)
    actual, ids, offsets = model(dtype, tensors, device)
    expected = [t.cpu().clone() for t in actual]
    rest = (ids, offsets, distribution, rounding, sequential)
    low_rank = low_rank_arguments(distribution, terms[0], len(actual), rank)
    moved_low_rank = (low_rank[0].to(terms_device), *low_rank[1:]) if low_rank else ()
    backend.zo_axpy_(actual, *(t.to(terms_device) for t in terms), *rest, *moved_low_rank)
    reference.zo_axpy_(expected, *terms, *rest, *low_rank)
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)


def writes_nothing_else(backend: Any, device: str, dtype: torch.dtype, distribution: str) -> None:
    for start, n in ((0, 4096), (8, 4096), (3, 777), (16, 12288)):
        storage = torch.full((n + 64,), 7.0, dtype=dtype, device=device)
        part = storage[start : start + n]
        low_rank = (i64(2), [48], 2) if distribution == "lowrank" else ()
        backend.zo_axpy_([part], i64(1), f64(0.5), f64(0.0), [0], [0], distribution, "nearest", False, *low_rank)
        assert (storage[:start] == 7).all()
        assert (storage[start + n :] == 7).all()
        assert (part != 7).sum() > 0.9 * n


def axpy_into(backend: Any, device: str, dtype: torch.dtype) -> None:
    sources, ids, offsets = model(dtype, 8, device)
    before = [t.cpu().clone() for t in sources]
    actual = [torch.full(t.shape, torch.nan, dtype=dtype, device=device) for t in sources]
    actual[-1] = torch.full((60, 140), torch.nan, dtype=dtype, device=device)[:, ::2].t()
    expected = [torch.empty(t.shape, dtype=dtype) for t in sources]
    rest = (i64(4, 5), f64(1e-2, -3e-2), f64(0.25), ids, offsets, "rademacher", "nearest", False)
    backend.zo_axpy_into_(actual, sources, *rest)
    reference.zo_axpy_into_(expected, before, *rest)
    for a, e, s, b in zip(actual, expected, sources, before, strict=True):
        assert_same(a, e)
        assert_same(s, b)


def special_values(backend: Any, device: str, dtype: torch.dtype) -> None:
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, -65504.0, 3.3e38]
    special += [6e-8, -6e-8, 6.1e-5, -6.1e-5, 1e-40]
    for rounding in ("nearest", "stochastic"):
        for c in (0.0, -0.0, 1e-8, 40.0):
            expected = torch.tensor(special * 700, dtype=torch.float32).to(dtype)
            actual = expected.to(device, copy=True)
            rest = (i64(9), f64(c), f64(0.0), [1], [0], "gaussian", rounding, False)
            backend.zo_axpy_([actual], *rest)
            reference.zo_axpy_([expected], *rest)
            assert_same(actual, expected)


@cache  # the largest takes seconds; every backend and dtype compares with the same
def _exact_noise(n: int, m: int, offset: int, distribution: str) -> torch.Tensor:
    z = torch.empty(n, m, dtype=torch.float64)
    reference.zo_noise_(z, i64(77), 3, offset, distribution)
    return z


def linear(
    backend: Any,
    device: str,
    dtype: torch.dtype,
    distribution: str,
    pair: bool,
    with_bias: bool,
    sizes: tuple[int, int, int] = (12, 33, 65),
    offset: int = 129,
) -> None:
    """At most twice the error of plain torch with W ± c z in memory, against float64."""
    tokens, n, m = sizes
    generator = torch.Generator().manual_seed(3)
    x, x2 = torch.randn(2, 3, tokens // 3, m, generator=generator, dtype=torch.float64).to(device, dtype).unbind(0)
    w = (torch.randn(n, m, generator=generator, dtype=torch.float64) / 8).to(device, dtype)
    b = torch.randn(n, generator=generator, dtype=torch.float64).to(device, dtype) if with_bias else None
    before = w.clone()
    actual = backend.zo_linear(x, x2 if pair else None, w, b, i64(77), 1e-1, 3, offset, distribution)
    assert torch.equal(w, before)
    z = _exact_noise(n, m, offset, distribution).to(device)
    for y, inputs, sign in zip(actual, (x, x2 if pair else x), (1, -1), strict=True):
        moved = w.double() + sign * 0.1 * z
        exact = torch.nn.functional.linear(inputs.double(), moved, None if b is None else b.double())
        plain = torch.nn.functional.linear(inputs, moved.to(dtype), b).double()
        error, bound = (y.double() - exact).norm(), (plain - exact).norm()
        floor = 4 * m**0.5 * torch.finfo(dtype).eps * exact.norm() if dtype == torch.float64 else 0  # `exact` is fp64
        assert error <= 2 * bound + floor
        assert y.shape == (3, tokens // 3, n)


def empty(backend: Any, device: str) -> None:
    backend.zo_noise_(torch.empty(0, device=device), i64(1), 0, 0, "gaussian")
    rest = (i64(1), f64(1.0), f64(0.0))
    backend.zo_axpy_([torch.empty(0, 3, device=device)], *rest, [0], [0], "gaussian", "nearest", False)
    backend.zo_axpy_([], *rest, [], [], "gaussian", "nearest", False)
    for shape, n, m in (((0, 4), 3, 4), ((2, 0), 3, 0), ((2, 4), 0, 4)):
        x, w = torch.ones(shape, device=device), torch.ones(n, m, device=device)
        y, _ = backend.zo_linear(x, None, w, None, i64(1), 1.0, 0, 0, "rademacher")
        assert y.shape == (shape[0], n)
        assert not y.isnan().any()


# kernels of the CUDA library that no call launches: fp16 products take another path
UNUSED_KERNELS = r"combine_kernel.*fp16"


def every_kernel(backend: Any, device: str) -> None:
    """Small calls that launch every CUDA kernel of the family. ``backend`` holds its launchers, which take calls."""
    backend = unpacked(backend)
    for dtype in DTYPES:
        for distribution in AXPY_DISTRIBUTIONS:
            for rounding in ("nearest", "stochastic"):
                for call in ((1, False, 20), (11, True, 3)):
                    axpy(backend, device, dtype, distribution, rounding, call)
        for distribution in DISTRIBUTIONS:
            noise(backend, device, dtype, distribution, 5)
            for pair in (False, True):
                linear(backend, device, dtype, distribution, pair, True)
        axpy_into(backend, device, dtype)
