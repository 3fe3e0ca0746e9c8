"""Launcher of csrc/sm3/sm3.cuh compiled by NVRTC. The mathematics is in that file and in ``reference``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from leanops.common import nvrtc
from leanops.common.dtypes import CXX_NAMES
from leanops.common.upload import to_device
from leanops.sm3 import plan
from leanops.sm3.calls import Step

# csrc/sm3/call.cuh, byte for byte
THREADS, LANE, STEPS = 256, 8, 8
FLAT, ALIGNED = 1, 2
SLOT = np.dtype(
    [(n, "u8") for n in ("param", "grad", "cover", "momentum", "scale", "maxima")]
    + [(n, "i8") for n in ("rows", "cols", "numel", "offset", "first", "tiles", "shape")]
    + [("tensor_id", "u4")]
    + [(n, "u1") for n in ("rank", "split", "threads_log2", "flags")]
    + [("lr_factor", "u8")]
)
_INLINE_WORDS = 480
CALL = np.dtype(
    [(n, "u8") for n in ("table", "lr", "seed", "grad_scale", "found_inf", "lr_factors")]
    + [("lr_value", "f8"), ("seed_value", "i8"), ("weight_decay", "f8"), ("tiles", "i8")]
    + [(n, "f4") for n in ("grad_scale_value", "coupled_decay", "eps", "beta", "one_minus_beta")]
    + [(n, "f4") for n in ("momentum", "one_minus_momentum")]
    + [("tensors", "i4")]
    + [(n, "u1") for n in ("lr_is_float", "averages", "couples", "maximizes", "averages_gradient")]
    + [("unused", "u1", 3), ("words", "u8", _INLINE_WORDS)]
)


@cache
def _threads_log2(rows: int, cols: int, int8: bool) -> int:
    """log2 of the threads along a row of a tile; threads_log2_of in csrc/sm3/plan.h is the same."""
    needed = min((-(-cols // LANE) - 1).bit_length(), 8)
    log2 = min(needed, 5)
    while 5 <= log2 < needed and (THREADS >> (log2 + 1)) * STEPS >= rows:
        log2 += 1
    if log2 <= 5 and not int8:
        return next((less for less in range(log2, 2, -1) if cols % (LANE << less) == 0), log2)
    return log2


def _tile_of(matrix: plan.Matrix, int8: bool) -> tuple[int, int]:
    """(rows, columns) of a tile: with t threads along a row, 2048 / t rows and 8 t columns."""
    log2 = 5 if matrix.split == 0 else _threads_log2(matrix.rows, matrix.cols, int8)
    return (THREADS >> log2) * STEPS, LANE << log2


TILING = plan.Tiling(_tile_of, lambda tiles, rank: tiles > 1 or rank > 2, SLOT.itemsize // 8)


class Table(NamedTuple):
    """A launch's tensors as the kernel reads them. Before ``place``, ``maxima`` is the number of a word of scratch."""

    slots: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, np.dtype[np.int64]]
    tiles: int
    scratch: int  # words of 4 bytes, which must be zero at the launch

    def place(self, scratch: int) -> None:
        """Turn these numbers into addresses. ``scratch``: the address of the scratch."""
        self.slots["maxima"] = plan.addresses(self.slots["maxima"], scratch)

    def words(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        return np.concatenate([self.slots.view(np.uint64), self.sizes.view(np.uint64)])


def table(items: Sequence[plan.Item], lr_factors: np.ndarray[Any, Any]) -> Table:
    """The table of non-empty tensors of equal types. ``lr_factors``: a word of the slot, by the items' ``place``."""
    param, momentum = items[0].param, items[0].momentum
    int8 = momentum is not None and momentum.dtype == torch.int8
    chunk = 8 if param.element_size() == 2 else 4
    access = 16 if momentum is None else min(16, chunk * momentum.element_size())
    planned = plan.table(items, TILING)
    slots = []
    for r, i in zip(planned.rows, items, strict=True):
        flat = r.rank < 2
        aligned = (r.param | r.grad | (r.cover if flat else 0)) % 16 == 0 and r.momentum % access == 0
        aligned = aligned and (flat or r.cols % chunk == 0)
        log2 = 5 if flat else _threads_log2(r.rows, r.cols, int8)
        slots.append((*r, log2, FLAT * flat | ALIGNED * aligned, lr_factors[i.place]))
    return Table(np.array(slots, SLOT), np.array(planned.sizes, np.int64), planned.tiles, planned.scratch)


def step(dtype: torch.dtype, momentum: torch.dtype | None, stochastic: bool) -> nvrtc.Kernel:
    """The kernel for parameters and momenta of these dtypes."""
    random = "true" if stochastic and dtype.itemsize == 2 else "false"
    arguments = f"<{CXX_NAMES[dtype]}, {plan.KINDS[momentum]}, {random}>"
    parameters = ("const __grid_constant__ Call",)
    return nvrtc.Kernel("sm3/sm3.cuh", "leanops::sm3", f"step{arguments}", parameters, THREADS, f"RESIDENT{arguments}")


def _place(call: np.ndarray[Any, Any], name: str, value: Tensor | None) -> None:
    """Put a number into a call: its address if it is on the device, its value if it is on the CPU."""
    if value is None:
        return
    if value.device.type == "cpu":
        call[f"{name}_value"] = value.item()
    else:
        call[name] = value.data_ptr()


def _lr_factors(call: Step) -> tuple[int, np.ndarray[Any, Any]]:
    """The device address of the factors, or 0, and each slot's word: the place there, or the factor's bits."""
    t, count = call.lr_factors, len(call.params)
    if t is not None and t.device.type != "cpu":
        return t.data_ptr(), np.arange(count)
    return 0, (np.ones(count, np.float32) if t is None else t.detach().numpy()).view(np.uint32)


def sm3_step_(call: Step) -> None:
    o, found_inf = call.options, call.found_inf
    if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item() != 0:
        return
    numbers = np.zeros(1, CALL)
    numbers["lr_is_float"] = call.lr.dtype == torch.float32
    numbers["grad_scale_value"] = 1.0
    _place(numbers, "lr", call.lr)
    _place(numbers, "seed", call.seed)
    _place(numbers, "grad_scale", call.grad_scale)
    numbers["found_inf"] = 0 if found_inf is None or found_inf.device.type == "cpu" else found_inf.data_ptr()
    numbers["weight_decay"] = o.weight_decay if o.decoupled else 0.0
    numbers["coupled_decay"], numbers["couples"] = o.weight_decay, not o.decoupled and o.weight_decay != 0
    numbers["maximizes"], numbers["averages"] = o.maximize, o.beta != 1
    numbers["beta"], numbers["one_minus_beta"], numbers["eps"] = o.beta, 1.0 - o.beta, o.eps
    numbers["momentum"], numbers["one_minus_momentum"] = o.momentum, 1.0 - o.momentum
    numbers["averages_gradient"] = o.average_gradient
    numbers["lr_factors"], factors = _lr_factors(call)
    with plan.launches(call) as groups:
        for items in groups:
            like, m = items[0].param, items[0].momentum
            made = table(items, factors)
            scratch = nvrtc.zeros(made.scratch, like)
            made.place(scratch.data_ptr())
            words = made.words()
            numbers["tiles"], numbers["tensors"] = made.tiles, len(items)
            kernel = step(like.dtype, None if m is None else m.dtype, o.stochastic_rounding)
            if words.size <= _INLINE_WORDS:
                numbers["table"] = 0
                numbers["words"][0, : words.size] = words
            else:
                table_words = to_device(torch.from_numpy(words.view(np.int64)), like.device)
                numbers["table"] = table_words.data_ptr()
            nvrtc.launch(kernel, like, min(made.tiles, nvrtc.processors(like) * 32), (numbers,))
