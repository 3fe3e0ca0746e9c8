"""The Triton kernels under Triton's interpreter: the same bits as the reference. See tests/interpreter/remote.py."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from aot.kernels import NO_TRITON
from zo import agreement
from zo.agreement import AXPY_DISTRIBUTIONS, DISTRIBUTIONS, DTYPES, OFFSETS

from leanops.zo.plan import Pair

pytest.importorskip("triton", reason=NO_TRITON)
triton = importlib.import_module("leanops.zo.triton")
OPERATORS = agreement.unpacked(triton)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", OFFSETS[::2])
def test_noise_has_the_bits_of_the_reference(dtype, distribution, offset):
    agreement.noise(OPERATORS, "cpu", dtype, distribution, offset)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("call", [(1, False, 3), (1, True, 20), (3, False, 5), (3, True, 3)], ids=str)
def test_axpy_has_the_bits_of_the_reference(dtype, distribution, rounding, call):
    agreement.axpy(OPERATORS, "cpu", dtype, distribution, rounding, call)


# ten times as slow as the other distributions under the interpreter
@pytest.mark.parametrize("call", [(1, False, 3), (1, True, 3), (3, False, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_noise_has_the_bits_of_the_reference(dtype, call):
    rounding = "stochastic" if dtype.itemsize == 2 else "nearest"
    agreement.axpy(OPERATORS, "cpu", dtype, "lowrank", rounding, call)


@pytest.mark.parametrize("rank", [1, 5])
def test_low_rank_noise_of_any_rank(rank):
    agreement.axpy(OPERATORS, "cpu", torch.bfloat16, "lowrank", "stochastic", (2, True, 3), rank=rank)


@pytest.mark.parametrize("distribution", AXPY_DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_axpy_writes_nothing_beyond_its_tensor(dtype, distribution):
    agreement.writes_nothing_else(OPERATORS, "cpu", dtype, distribution)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_axpy_into_leaves_its_source_alone_and_serves_strided_results(dtype):
    agreement.axpy_into(OPERATORS, "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_of_special_values(dtype):
    agreement.special_values(OPERATORS, "cpu", dtype)


# m and offset are multiples of a Philox block or not: the kernel makes z in two ways
@pytest.mark.parametrize(("sizes", "offset"), [((12, 33, 65), 129), ((69, 70, 256), 128), ((12, 33, 68), 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("pair", "with_bias"), [(False, True), (True, False), (True, True)], ids=str)
def test_linear_is_as_close_as_plain_torch(dtype, distribution, pair, with_bias, sizes, offset):
    agreement.linear(OPERATORS, "cpu", dtype, distribution, pair, with_bias, sizes, offset)


def test_empty_input():
    agreement.empty(OPERATORS, "cpu")


def test_a_graph_gets_a_table_of_its_own(monkeypatch):
    """Calls between the capture and a replay must not change the table that the graph reads."""
    state = SimpleNamespace(cuda_stream=7, capturing=False)
    monkeypatch.setattr(triton, "_tables", OrderedDict())
    monkeypatch.setattr(triton, "to_device", lambda words, device: words)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    t = torch.zeros(8)

    def table() -> torch.Tensor:
        return triton._table([Pair(t, t, 0, 0)], 4096, torch.device("cuda", 0))[0]

    before = table()
    assert table() is before
    state.capturing = True
    captured = table()
    assert captured is not before
    assert torch.equal(captured, before)
    state.capturing = False
    assert table() is before
