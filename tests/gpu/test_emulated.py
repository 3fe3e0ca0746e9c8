"""The CUDA C++ core, thread by thread on the CPU, and the launcher that calls NVRTC's kernels: the same bits as the
reference. What this cannot see is the device's own compiler and memory system; tests/gpu/test_device.py does."""

from __future__ import annotations

import shutil

import pytest
import torch
from emulated import Emulator, build
from leanops import _nvrtc
from leanops.zo import nvrtc, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DISTRIBUTIONS = ("gaussian", "rademacher")
pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler to build the emulator with"
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory):
    return build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulator(library, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    emulator = Emulator(library)
    monkeypatch.setattr(_nvrtc, "launch", emulator.launch)
    monkeypatch.setattr(_nvrtc, "processors", emulator.processors)
    return emulator


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(bits(actual)[~nan], bits(expected)[~nan])


def i64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 8, 5, 127, 4093, 2**40 + 3, 2**62 - 8192])
def test_noise_has_the_bits_of_the_reference(emulator, dtype, distribution, offset):
    seed = i64(-0x123456789ABCDEF)
    for n in (1, 31, 8192 + 77):
        actual, expected = torch.full((n,), torch.nan, dtype=dtype), torch.empty(n, dtype=dtype)
        nvrtc.zo_noise_(actual, seed, 0xFEDCBA98, offset, distribution)
        reference.zo_noise_(expected, seed, 0xFEDCBA98, offset, distribution)
        assert_same(actual, expected)


def model(dtype: torch.dtype, tensors: int) -> tuple[list[torch.Tensor], list[int], list[int]]:
    """Tensors of many sizes, some at addresses that no 16-byte access fits, some shards, some transposed."""
    generator = torch.Generator().manual_seed(tensors)
    out, ids, offsets = [], [], []
    for i in range(tensors):
        n = (4096, 1, 777, 0, 5000, 33, 8)[i % 7]
        storage = torch.randn(n + 8, generator=generator, dtype=torch.float64).to(dtype)
        out.append(storage[i % 3 : i % 3 + n])
        ids.append((i * 2654435761) % 2**32)
        offsets.append((0, 0, 64, 3, 2**33 + 1)[i % 5])
    out.append(torch.randn(60, 70, generator=generator, dtype=torch.float64).to(dtype).t())
    return out, [*ids, 5], [*offsets, 11]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    ("terms", "sequential", "tensors"), [(1, False, 5), (1, True, 20), (6, False, 20), (6, True, 3), (11, False, 3)]
)
def test_axpy_has_the_bits_of_the_reference(emulator, dtype, distribution, rounding, terms, sequential, tensors):
    seeds = torch.randint(-(2**62), 2**62, (terms,), generator=torch.Generator().manual_seed(terms))
    coeffs = torch.linspace(-1e-2, 2e-2, terms, dtype=torch.float64)
    decays = torch.linspace(0.0, 0.1, terms, dtype=torch.float64) if sequential else f64(1e-3)
    actual, ids, offsets = model(dtype, tensors)
    expected = [t.clone() for t in actual]
    nvrtc.zo_axpy_(actual, seeds, coeffs, decays, ids, offsets, distribution, rounding, sequential)
    reference.zo_axpy_(expected, seeds, coeffs, decays, ids, offsets, distribution, rounding, sequential)
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)
    assert sum("work" in name for name in emulator.launches) == 1  # one launch for the whole model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_axpy_writes_nothing_beyond_its_tensor(emulator, dtype):
    for start, n in ((0, 4096), (8, 4096), (3, 777), (16, 12288)):
        storage = torch.full((n + 64,), 7.0, dtype=dtype)
        nvrtc.zo_axpy_([storage[start : start + n]], i64(1), f64(0.5), f64(0.0), [0], [0], "gaussian", "nearest", False)
        assert (storage[:start] == 7).all()
        assert (storage[start + n :] == 7).all()
        assert (storage[start : start + n] != 7).sum() > 0.9 * n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_axpy_into_leaves_its_source_alone_and_serves_strided_results(emulator, dtype):
    sources, ids, offsets = model(dtype, 8)
    before = [t.clone() for t in sources]
    actual = [torch.full(t.shape, torch.nan, dtype=dtype) for t in sources]
    actual[-1] = torch.full((60, 140), torch.nan, dtype=dtype)[:, ::2].t()
    expected = [torch.empty_like(t) for t in sources]
    rest = (i64(4, 5), f64(1e-2, -3e-2), f64(0.25), ids, offsets, "rademacher", "nearest", False)
    nvrtc.zo_axpy_into_(actual, sources, *rest)
    reference.zo_axpy_into_(expected, sources, *rest)
    for a, e, s, b in zip(actual, expected, sources, before, strict=True):
        assert_same(a, e)
        assert torch.equal(s, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_of_special_values(emulator, dtype):
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, -65504.0, 3.3e38]
    special += [6e-8, -6e-8, 6.1e-5, -6.1e-5, 1e-40]
    for rounding in ("nearest", "stochastic"):
        for c in (0.0, 1e-8, 40.0):
            actual = torch.tensor(special * 700, dtype=torch.float32).to(dtype)
            expected = actual.clone()
            rest = (i64(9), f64(c), f64(0.0), [1], [0], "gaussian", rounding, False)
            nvrtc.zo_axpy_([actual], *rest)
            reference.zo_axpy_([expected], *rest)
            assert_same(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_as_close_as_plain_torch(emulator, monkeypatch, dtype, distribution, pair, with_bias):
    monkeypatch.setattr(nvrtc, "_PANEL", 65 * 7)  # several panels, the last one narrower
    generator = torch.Generator().manual_seed(3)
    x, x2 = torch.randn(2, 3, 4, 65, generator=generator, dtype=torch.float64).to(dtype).unbind(0)
    w = (torch.randn(33, 65, generator=generator, dtype=torch.float64) / 8).to(dtype)
    b = torch.randn(33, generator=generator, dtype=torch.float64).to(dtype) if with_bias else None
    args = (w, b, i64(77), 1e-1, 3, 129, distribution)
    actual = nvrtc.zo_linear(x, x2 if pair else None, *args)
    z = torch.empty(33, 65, dtype=torch.float64)
    reference.zo_noise_(z, i64(77), 3, 129, distribution)
    for y, inputs, sign in zip(actual, (x, x2 if pair else x), (1, -1), strict=True):
        moved = w.double() + sign * 0.1 * z
        exact = torch.nn.functional.linear(inputs.double(), moved, None if b is None else b.double())
        plain = torch.nn.functional.linear(inputs, moved.to(dtype), b).double()
        error, bound = (y.double() - exact).norm(), (plain - exact).norm()
        floor = 4 * 65**0.5 * torch.finfo(dtype).eps * exact.norm() if dtype == torch.float64 else 0  # `exact` is fp64
        assert error <= 2 * bound + floor
        assert y.shape == (3, 4, 33)


def test_empty_input_launches_nothing(emulator):
    nvrtc.zo_noise_(torch.empty(0), i64(1), 0, 0, "gaussian")
    nvrtc.zo_axpy_([torch.empty(0, 3)], i64(1), f64(1.0), f64(0.0), [0], [0], "gaussian", "nearest", False)
    nvrtc.zo_axpy_([], i64(1), f64(1.0), f64(0.0), [], [], "gaussian", "nearest", False)
    assert emulator.launches == []
    for shape, n, m in (((0, 4), 3, 4), ((2, 0), 3, 0), ((2, 4), 0, 4)):
        y, _ = nvrtc.zo_linear(torch.ones(shape), None, torch.ones(n, m), None, i64(1), 1.0, 0, 0, "rademacher")
        assert y.shape == (shape[0], n)
        assert not y.isnan().any()
