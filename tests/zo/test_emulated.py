"""The CUDA C++ core, emulated thread by thread on the CPU, and the launcher of NVRTC's kernels: the same bits as the
reference. tests/zo/test_device.py adds the device's own compiler and memory system."""

from __future__ import annotations

import pytest
import torch
from zo import agreement
from zo.agreement import AXPY_DISTRIBUTIONS, CALLS, DISTRIBUTIONS, DTYPES, OFFSETS, f64, i64

from leanops.zo import nvrtc

OPERATORS = agreement.unpacked(nvrtc)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
def test_noise_has_the_bits_of_the_reference(emulator, dtype, distribution, offset):
    agreement.noise(OPERATORS, "cpu", dtype, distribution, offset)


@pytest.mark.parametrize("distribution", AXPY_DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_axpy_has_the_bits_of_the_reference(emulator, dtype, distribution, rounding, call):
    agreement.axpy(OPERATORS, "cpu", dtype, distribution, rounding, call)
    assert sum("work" in name for name in emulator.launches) == 1  # one for all tensors
    assert sum("low_rank" in name for name in emulator.launches) == (distribution == "lowrank")  # one for all matrices


@pytest.mark.parametrize(("vectors", "matrices"), [(20, 1), (1, 20)])
def test_vectors_and_matrices_have_tables_of_their_own(emulator, vectors, matrices):
    """The shorter table fits into the kernel's parameters, the longer one lies in device memory."""
    actual = [torch.ones(8 + i) for i in range(vectors + matrices)]
    expected = [t.clone() for t in actual]
    ids, offsets = list(range(len(actual))), [0] * len(actual)
    columns = [0] * vectors + [4] * matrices
    rest = (i64(3), f64(0.5), f64(0.0), ids, offsets, "lowrank", "nearest", False, i64(4), columns, 2)
    OPERATORS.zo_axpy_(actual, *rest)
    agreement.reference.zo_axpy_(expected, *rest)
    for a, e in zip(actual, expected, strict=True):
        agreement.assert_same(a, e)


@pytest.mark.parametrize("rank", [1, 2, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_noise_of_any_rank(emulator, dtype, rank):
    agreement.axpy(OPERATORS, "cpu", dtype, "lowrank", "stochastic", (3, True, 8), rank=rank)


@pytest.mark.parametrize("distribution", AXPY_DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_axpy_writes_nothing_beyond_its_tensor(emulator, dtype, distribution):
    agreement.writes_nothing_else(OPERATORS, "cpu", dtype, distribution)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_axpy_into_leaves_its_source_alone_and_serves_strided_results(emulator, dtype):
    agreement.axpy_into(OPERATORS, "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_of_special_values(emulator, dtype):
    agreement.special_values(OPERATORS, "cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("pair", [False, True], ids=["one-x", "pair"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_linear_is_as_close_as_plain_torch(emulator, monkeypatch, dtype, distribution, pair, with_bias):
    monkeypatch.setattr(nvrtc, "_PANEL", 65 * 7)  # several panels, the last one narrower
    agreement.linear(OPERATORS, "cpu", dtype, distribution, pair, with_bias)


def test_empty_input(emulator):
    agreement.empty(OPERATORS, "cpu")
    assert not any("work" in name for name in emulator.launches)
