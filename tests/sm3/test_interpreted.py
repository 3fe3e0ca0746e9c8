"""The Triton kernel of SM3 under Triton's interpreter: the same bits as the reference. See
tests/interpreter/remote.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from aot.kernels import NO_TRITON
from sm3 import agreement
from sm3.agreement import DTYPES, MOMENTA, NAMED_OPTIONS, SMALL_SHAPES

pytest.importorskip("triton", reason=NO_TRITON)
triton = importlib.import_module("leanops.sm3.triton")
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]


# each set of options meets each dtype and each momentum, but not every pair: the interpreter takes seconds for one
@pytest.mark.parametrize(("dtype", "d"), list(zip(DTYPES, range(4), strict=True)), ids=str)
@pytest.mark.parametrize(("momentum", "m"), list(zip(MOMENTA, range(4), strict=True)), ids=str)
def test_a_step_has_the_bits_of_the_reference(dtype, momentum, d, m):
    options = list(NAMED_OPTIONS)[(d + m) % len(NAMED_OPTIONS)]
    agreement.step(triton, "cpu", dtype, momentum, options, shapes=SMALL_SHAPES)


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
def test_tensors_at_no_boundary_and_nothing_beyond_them(momentum):
    agreement.unaligned(triton, "cpu", torch.bfloat16, momentum)
    agreement.strided(triton, "cpu", torch.bfloat16, momentum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
def test_special_values(dtype, momentum):
    agreement.special_values(triton, "cpu", dtype, momentum)


def test_codes_of_every_magnitude():
    agreement.codes(triton, "cpu", torch.float32)


def test_gradients_averaged_before_the_division():
    agreement.averaged_gradients(triton, "cpu")


def test_numbers_and_skipped_steps():
    agreement.skips(triton, "cpu")
    agreement.learning_rates(triton, "cpu")
    agreement.mixed(triton, "cpu")
    agreement.empty(triton, "cpu")


def test_scratch_memory_is_left_as_it_was_found():
    """A second call with the same tensors uses the first one's."""
    args = agreement.make([(70, 300), (3, 4, 5)], torch.float32, agreement.Options(), "cpu")
    for _ in range(3):
        agreement.check(triton, args)
    assert all(not maxima.any() for _, maxima, _ in triton._tables.values())
