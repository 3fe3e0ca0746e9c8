"""Launchers of csrc/zo/zo.cuh compiled by NVRTC. The mathematics is in that file and in ``reference``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanops.common import nvrtc
from leanops.common.dtypes import CXX_NAMES
from leanops.zo import plan
from leanops.zo.calls import Axpy, AxpyInto, Linear, NoiseInPlace
from leanops.zo.plan import Pair

# csrc/zo/call.cuh, byte for byte
_WARPS, _UNIT_LONG, _UNIT_SHORT, _INLINE_SLOTS, _INLINE_TERMS, _UPLOAD_WORDS = 4, 4096, 1024, 16, 8, 448
_UNIT_ROWS, _PANEL_FLOATS = 32, 1024
_NOISE, _SINGLE, _MANY, _PAIR = range(4)
SLOT = np.dtype(
    [(n, "u8") for n in ("out", "in", "out2")]
    + [(n, "i8") for n in ("offset", "numel", "first")]
    + [("tensor_id", "u8"), ("columns", "i8")]
)
_SLOT_NAMES = {"source": "in"}  # fields of plan.Row that have another name in C++
CALL = np.dtype(
    [(n, "u8") for n in ("slots", "seeds", "right_seeds", "coeffs", "decays")]
    + [(n, "i8") for n in ("units", "rank", "wide")]
    + [(n, "i4") for n in ("tensors", "terms", "decay_count", "sequential")]
    + [(f"inline_{n}", "i8", _INLINE_TERMS) for n in ("seeds", "right_seeds")]
    + [(f"inline_{n}", "f8", _INLINE_TERMS) for n in ("coeffs", "decays")]
    + [("inline_slots", SLOT, _INLINE_SLOTS)]
)
_UPLOAD = np.dtype([("target", "u8"), ("count", "i8"), ("words", "u8", _UPLOAD_WORDS)])

_PANEL = 8 << 20  # elements of z (or of W ± c z) at a time; they stay in the L2 cache until the product reads them


def _core(body: str, parameters: Sequence[str], threads: int = 256, resident: str = "1") -> nvrtc.Kernel:
    return nvrtc.Kernel("zo/zo.cuh", "leanops::zo", body, tuple(parameters), threads, resident)


def work(dtype: torch.dtype, distribution: str, mode: int, stochastic: bool) -> nvrtc.Kernel:
    """The kernel of noise and axpy."""
    random = "true" if stochastic and dtype.itemsize == 2 else "false"
    body = f"work<{CXX_NAMES[dtype]}, {int(distribution == 'rademacher')}, {mode}, {random}>"
    resident = f"RESIDENT<{CXX_NAMES[dtype]}, {mode}, {random}>"
    return _core(body, ["const __grid_constant__ Call"], 32 * _WARPS, resident)


def low_rank(dtype: torch.dtype, stochastic: bool) -> nvrtc.Kernel:
    """The kernel of axpy with low-rank noise, for matrices."""
    random = "true" if stochastic and dtype.itemsize == 2 else "false"
    body, resident = f"low_rank<{CXX_NAMES[dtype]}, {random}>", f"LOW_RANK_RESIDENT<{random}>"
    parameters = ("const __grid_constant__ Call",)
    return nvrtc.Kernel("zo/lowrank.cuh", "leanops::zo", body, parameters, 32 * _WARPS, resident)


COPY_WORDS = _core("copy_words", ["const __grid_constant__ Upload"], 128)


def combine(dtype: torch.dtype) -> nvrtc.Kernel:
    return _core(f"combine<{CXX_NAMES[dtype]}>", ["leanops::u64"] * 5 + ["double"] + ["leanops::i64"] * 4)


def add_bias(dtype: torch.dtype) -> nvrtc.Kernel:
    return _core(f"add_bias<{CXX_NAMES[dtype]}>", ["leanops::u64"] * 2 + ["leanops::i64"] * 2)


def _upload(words: np.ndarray[Any, Any], like: Tensor) -> Tensor:
    """Copy words to the device as kernel parameters. No host buffer has to stay alive, so a graph can capture it."""
    target = torch.empty(words.size, dtype=torch.int64, device=like.device)
    for done in range(0, words.size, _UPLOAD_WORDS):
        part = np.zeros(1, _UPLOAD)
        count = min(_UPLOAD_WORDS, words.size - done)
        part["target"], part["count"] = target.data_ptr() + 8 * done, count
        part["words"][0, :count] = words[done : done + count]
        nvrtc.launch(COPY_WORDS, like, 1, (part,))
    return target


def _place(call: np.ndarray[Any, Any], name: str, values: Tensor, like: Tensor) -> Tensor:
    """Put numbers into a call: by their address if they are on the device, inline if they fit, otherwise uploaded.

    The caller keeps the result alive until the launch."""
    values = values.contiguous()
    if values.device == like.device and values.device.type != "cpu":
        call[name] = values.data_ptr()
        return values
    numbers = values.numpy()
    if numbers.size <= _INLINE_TERMS:
        call[f"inline_{name}"][0, : numbers.size] = numbers
        return values
    target = _upload(numbers.view(np.uint64), like)
    call[name] = target.data_ptr()
    return target


def _run(call: np.ndarray[Any, Any], pairs: Sequence[Pair], distribution: str, mode: int, stochastic: bool) -> None:
    like = pairs[0].target
    unit = _UNIT_SHORT if mode == _MANY else _UNIT_LONG
    _start(call, pairs, unit, work(like.dtype, distribution, mode, stochastic))


def _run_low_rank(call: np.ndarray[Any, Any], pairs: Sequence[Pair], stochastic: bool) -> None:
    like = pairs[0].target
    chunk = 8 if like.dtype.itemsize == 2 else 4
    wide = min(32 * chunk, _PANEL_FLOATS // int(call["rank"][0]) // chunk * chunk)
    call["wide"] = wide
    _start(call, pairs, (_UNIT_ROWS, wide), low_rank(like.dtype, stochastic))


def _start(call: np.ndarray[Any, Any], pairs: Sequence[Pair], unit: plan.Tile, kernel: nvrtc.Kernel) -> None:
    """Launch over the tensors, cut into units of work."""
    like = pairs[0].target
    rows, units = plan.table(pairs, unit)
    slots = np.zeros(len(rows), SLOT)
    for name, column in zip(plan.Row._fields, zip(*rows, strict=True), strict=True):
        slots[_SLOT_NAMES.get(name, name)] = column
    slots["out2"] = [(p.target if p.second is None else p.second).data_ptr() for p in pairs]
    call["units"], call["tensors"] = units, slots.size
    keep = None
    if slots.size <= _INLINE_SLOTS:
        call["inline_slots"][0, : slots.size] = slots
    else:
        keep = _upload(slots.view(np.uint64), like)
        call["slots"] = keep.data_ptr()
    nvrtc.launch(kernel, like, _grid(units, _WARPS, like), (call,))


def _grid(work_items: int, per_block: int, like: Tensor) -> int:
    return min(-(-work_items // per_block), nvrtc.processors(like) * 32)


def zo_noise_(call: NoiseInPlace) -> None:
    if call.out.numel() == 0:
        return
    with plan.dense(call.out) as target:
        numbers = np.zeros(1, CALL)
        numbers["terms"] = 1
        _keep = _place(numbers, "seeds", call.seed, target)
        _run(numbers, [Pair(target, target, call.tensor_id, call.offset)], call.distribution, _NOISE, False)


def zo_axpy_into_(call: AxpyInto) -> None:
    noise = call.noise
    stochastic, mode = noise.rounding == "stochastic", _SINGLE if noise.seeds.numel() == 1 else _MANY
    placed = {"seeds": noise.seeds, "coeffs": noise.coeffs, "decays": noise.decays}
    if noise.right_seeds is not None:
        placed["right_seeds"] = noise.right_seeds
    with plan.launches(call) as launches:
        if not launches:
            return
        terms = np.zeros(1, CALL)
        terms["terms"], terms["decay_count"] = noise.seeds.numel(), noise.decays.numel()
        terms["sequential"], terms["rank"] = noise.sequential, noise.rank
        _keep = [_place(terms, name, values, call.out[0]) for name, values in placed.items()]
        for pairs in launches:
            numbers = terms.copy()
            if pairs[0].columns:
                _run_low_rank(numbers, pairs, stochastic)
            else:
                _run(numbers, pairs, noise.distribution, mode, stochastic)


def zo_axpy_(call: Axpy) -> None:
    zo_axpy_into_(call.into())


def zo_linear(call: Linear) -> tuple[Tensor, Tensor]:
    """With one x: A = x W^T, B = x z^T, y = A + bias ± c B. With two x, each product has its own panel of W ± c z. fp16
    does that, too: B itself may overflow, although c B is small."""
    x, x_minus, scale = call.x, call.x_minus, call.scale
    n, m = call.weight.shape
    flat, w = x.reshape(-1, m) if m else x.new_empty(x.shape[:-1].numel(), 0), call.weight.contiguous()
    rows = flat.shape[0]
    pair = x_minus is not None or x.dtype == torch.float16
    flat_minus = flat if x_minus is None else x_minus.reshape(rows, m)
    b = None if call.bias is None else call.bias.contiguous()
    bias_address = np.uint64(0 if b is None else b.data_ptr())
    step = max(1, min(n, _PANEL // max(m, 1)))
    numbers = np.zeros(1, CALL)
    numbers["terms"] = 1
    numbers["inline_coeffs"][0, 0] = scale
    _keep = _place(numbers, "seeds", call.seed, x)

    y_minus = x.new_empty(rows, n)
    y_plus = x.new_empty(rows, n) if pair else flat @ w.t()
    for first in range(0, n, step):
        width = min(step, n - first)
        plus = x.new_empty(width, m)
        minus = x.new_empty(width, m) if pair else plus
        source = w[first : first + width] if pair else plus
        if m and rows:
            panel = Pair(plus, source, call.tensor_id, call.offset + first * m, second=minus)
            _run(numbers, [panel], call.distribution, _PAIR if pair else _NOISE, False)
        if pair:
            y_plus[:, first : first + width] = flat @ plus.t()
            y_minus[:, first : first + width] = flat_minus @ minus.t()
        elif rows:
            x_z = flat @ plus.t()
            arguments = [np.uint64(t.data_ptr()) for t in (y_plus, y_minus, y_plus, x_z)]
            arguments += [bias_address, np.float64(scale), *map(np.int64, (rows, n, first, width))]
            nvrtc.launch(combine(x.dtype), x, _grid(rows * width, 256, x), arguments)
    if pair and b is not None and rows * n:
        for y in (y_plus, y_minus):
            arguments = [np.uint64(y.data_ptr()), bias_address, np.int64(rows), np.int64(n)]
            nvrtc.launch(add_bias(x.dtype), x, _grid(rows * n, 256, x), arguments)
    shape = (*x.shape[:-1], n)
    return y_plus.reshape(shape), y_minus.reshape(shape)
