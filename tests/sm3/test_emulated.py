"""The CUDA C++ core of SM3, emulated on the CPU with blocks and threads in several orders: the bits of the reference.
tests/sm3/test_device.py adds the device's own compiler and memory system."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from gpu.emulated import Emulator
from opsuite import assert_same_bits, clone
from sm3 import agreement
from sm3.agreement import ALL_SHAPES, DTYPES, MOMENTA, NAMED_OPTIONS, SPEC

from leanops.sm3 import nvrtc, plan
from leanops.sm3.calls import Step
from leanops.sm3.cases import Options

pytestmark = pytest.mark.usefixtures("one_thread")


class EveryOrder:
    """Launches on copies, once for each order of blocks and threads (as numbered, backwards, mixed), and compares."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator

    def sm3_step_(self, args: Step) -> None:
        copies = [clone(args) for _ in range(3)]
        nvrtc.sm3_step_(args)
        for order, copy in zip((1, 2, 3), copies, strict=True):
            self.emulator.order = order
            nvrtc.sm3_step_(copy)
            assert_same_bits(SPEC.mutated(copy), SPEC.mutated(args), f"order {order}")
        self.emulator.order = 0


@pytest.fixture
def backend(emulator: Emulator) -> EveryOrder:
    return EveryOrder(emulator)


@pytest.mark.parametrize("options", NAMED_OPTIONS)
@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_has_the_bits_of_the_reference(backend, dtype, momentum, options):
    agreement.step(backend, "cpu", dtype, momentum, options)


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_at_no_boundary_and_nothing_beyond_them(backend, dtype, momentum):
    agreement.unaligned(backend, "cpu", dtype, momentum)
    agreement.strided(backend, "cpu", dtype, momentum)


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(emulator, dtype, momentum):
    agreement.special_values(nvrtc, "cpu", dtype, momentum)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_every_magnitude(emulator, dtype):
    agreement.codes(nvrtc, "cpu", dtype)


def test_gradients_averaged_before_the_division(backend):
    agreement.averaged_gradients(backend, "cpu")


def test_numbers_and_skipped_steps(emulator):
    agreement.skips(nvrtc, "cpu")
    agreement.learning_rates(nvrtc, "cpu")
    agreement.mixed(nvrtc, "cpu")


@pytest.mark.parametrize("count", [5, 30, 31, 200])
def test_one_launch_serves_any_number_of_tensors(backend, emulator, count):
    agreement.many(backend, "cpu", count)
    assert len(emulator.launches) == 4  # one for each order


def test_empty_input_launches_nothing(emulator):
    agreement.empty(nvrtc, "cpu")
    assert emulator.launches == []


ITEM = np.dtype(
    [(n, "u8") for n in ("param", "grad", "cover", "momentum", "scale", "sizes")]
    + [("rank", "i4"), ("unused", "i4"), ("offset", "i8"), ("tensor_id", "u4"), ("unused2", "u4")]
    + [("lr_factor", "u8")]
)


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_launchers_make_the_same_table(emulator_library, dtype, momentum):
    """The launcher in Python, and the one in C++ by csrc/sm3/plan.h."""
    large = [(4096, 11008), (32000, 4096), (128, 3, 224, 224), (8, 1024, 2816), (1 << 20, 3), (96, 192), (5, 8192)]
    shapes = [s for s in (*ALL_SHAPES, *large) if 0 not in s]
    items, sizes, table = [], [], np.zeros(len(shapes), ITEM)
    for i, shape in enumerate(shapes):

        def tensor(dtype: torch.dtype, shape=shape) -> torch.Tensor:
            return torch.empty((), dtype=dtype).expand(shape)  # large shapes, no memory

        p, g, cover = tensor(dtype), tensor(dtype), torch.zeros(8)[i % 3 :]
        m = None if momentum is None else tensor(momentum)
        scale = torch.zeros(1)
        items.append(plan.Item(p, g, cover, m, scale, 3 * i, 5 * i, i))
        addresses = [t.data_ptr() if t is not None else 0 for t in (p, g, cover, m)]
        sizes.append(np.array(shape, dtype=np.int64))  # in a list, so that the addresses stay valid
        table[i] = (
            *addresses,
            scale.data_ptr() if momentum == torch.int8 else 0,
            sizes[i].ctypes.data,
            len(shape),
            0,
            3 * i,
            5 * i,
            0,
            7 * i,
        )
    expected = nvrtc.table(items, 7 * np.arange(len(items)))
    expected.place(1 << 40)
    words, counts = np.zeros(expected.words().size + 9, np.uint64), np.zeros(3, np.int64)
    function = emulator_library.leanops_sm3_table
    function.restype = ctypes.c_int64
    used = function(
        table.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(shapes)), plan.KINDS[momentum], dtype.itemsize,
        ctypes.c_uint64(1 << 40), words.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(words.size),
        counts.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    assert used == expected.words().size
    assert counts.tolist() == [expected.tiles, expected.scratch, len(shapes)]
    assert np.array_equal(words[:used], expected.words())


def test_a_table_in_device_memory_gives_the_bits_of_one_in_the_parameters(emulator, monkeypatch):
    args = agreement.make([(70, 300), (3, 4, 5)], torch.float32, Options(), "cpu")
    copy = clone(args)
    nvrtc.sm3_step_(args)
    monkeypatch.setattr(nvrtc, "_INLINE_WORDS", 0)
    nvrtc.sm3_step_(copy)
    assert_same_bits(SPEC.mutated(copy), SPEC.mutated(args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_compiles_one_step_for_types_that_ignore_stochastic_rounding(monkeypatch, dtype):
    pytest.importorskip("triton.language", reason="Triton is not installed: pip install 'leanops[triton]'")
    from leanops.sm3 import triton

    compiled = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *numbers, **constants: compiled.append(constants["STOCHASTIC"])

    monkeypatch.setattr(triton, "step_kernel", Kernel())
    for stochastic in (False, True):
        triton.sm3_step_(agreement.make([(9, 7)], dtype, Options(stochastic_rounding=stochastic), "cpu"))
    assert compiled == [False, dtype.itemsize == 2]
