"""Launchers of csrc/zo/zo.cuh compiled by NVRTC. The mathematics is in that file and in ``reference``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanops.common import nvrtc
from leanops.common.dtypes import CXX_NAMES
from leanops.zo.launch import dense, dense_pairs

# csrc/zo/call.cuh, byte for byte
_WARPS, _UNIT_LONG, _UNIT_SHORT, _INLINE_SLOTS, _INLINE_TERMS, _UPLOAD_WORDS = 4, 4096, 1024, 16, 8, 448
_UNIT_ROWS, _PANEL_FLOATS = 32, 1024
_NOISE, _SINGLE, _MANY, _PAIR = range(4)
SLOT = np.dtype(
    [(n, "u8") for n in ("out", "in", "out2")]
    + [(n, "i8") for n in ("offset", "numel", "first")]
    + [("tensor_id", "u8"), ("columns", "i8")]
)
CALL = np.dtype(
    [(n, "u8") for n in ("slots", "seeds", "right_seeds", "coeffs", "decays")]
    + [(n, "i8") for n in ("units", "rank", "wide")]
    + [(n, "i4") for n in ("tensors", "terms", "decay_count", "sequential")]
    + [(f"inline_{n}", "i8", _INLINE_TERMS) for n in ("seeds", "right_seeds")]
    + [(f"inline_{n}", "f8", _INLINE_TERMS) for n in ("coeffs", "decays")]
    + [("inline_slots", SLOT, _INLINE_SLOTS)]
)
_UPLOAD = np.dtype([("target", "u8"), ("count", "i8"), ("words", "u8", _UPLOAD_WORDS)])

_PANEL = 8 << 20  # elements of z (or of W ± c z) at a time: they stay in the L2 cache until the product reads them


def _core(body: str, parameters: Sequence[str], threads: int = 256, resident: str = "1") -> nvrtc.Kernel:
    return nvrtc.Kernel("zo/zo.cuh", "leanops::zo", body, tuple(parameters), threads, resident)


def work(dtype: torch.dtype, distribution: str, mode: int, stochastic: bool) -> nvrtc.Kernel:
    """The kernel that serves a call."""
    random = "true" if stochastic and dtype.itemsize == 2 else "false"
    body = f"work<{CXX_NAMES[dtype]}, {int(distribution == 'rademacher')}, {mode}, {random}>"
    resident = f"RESIDENT<{CXX_NAMES[dtype]}, {mode}, {random}>"
    return _core(body, ["const __grid_constant__ Call"], 32 * _WARPS, resident)


def low_rank(dtype: torch.dtype, stochastic: bool) -> nvrtc.Kernel:
    """The kernel that serves matrices of low-rank noise."""
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
    """Words to the device as kernel parameters: no host buffer to keep alive, so a graph can capture it."""
    target = torch.empty(words.size, dtype=torch.int64, device=like.device)
    for done in range(0, words.size, _UPLOAD_WORDS):
        part = np.zeros(1, _UPLOAD)
        count = min(_UPLOAD_WORDS, words.size - done)
        part["target"], part["count"] = target.data_ptr() + 8 * done, count
        part["words"][0, :count] = words[done : done + count]
        nvrtc.launch(COPY_WORDS, like, 1, (part,))
    return target


def _place(call: np.ndarray[Any, Any], name: str, values: Tensor, like: Tensor) -> Tensor:
    """Numbers for a kernel: read in place on the device, inline if they fit, else uploaded."""
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


def _table(slots: Sequence[tuple[int, ...]]) -> np.ndarray[Any, Any]:
    """``slots``: (out, in, out2, offset, numel, tensor_id[, columns]), addresses and integers."""
    table = np.zeros(len(slots), SLOT)
    names = ("out", "in", "out2", "offset", "numel", "tensor_id", "columns")
    for name, column in zip(names, zip(*slots, strict=True), strict=False):
        table[name] = column
    return table


def _run(
    call: np.ndarray[Any, Any],
    slots: Sequence[tuple[int, ...]],
    like: Tensor,
    distribution: str,
    mode: int,
    stochastic: bool,
) -> None:
    table = _table(slots)
    unit = _UNIT_SHORT if mode == _MANY else _UNIT_LONG
    units = (table["offset"] + table["numel"] - 1) // unit - table["offset"] // unit + 1
    _start(call, table, units, like, work(like.dtype, distribution, mode, stochastic))


def _run_low_rank(call: np.ndarray[Any, Any], slots: Sequence[tuple[int, ...]], like: Tensor, stochastic: bool) -> None:
    table = _table(slots)
    chunk = 8 if like.dtype.itemsize == 2 else 4
    wide = min(32 * chunk, _PANEL_FLOATS // int(call["rank"][0]) // chunk * chunk)
    first, last = table["offset"] // table["columns"], (table["offset"] + table["numel"] - 1) // table["columns"]
    units = (last // _UNIT_ROWS - first // _UNIT_ROWS + 1) * -(-table["columns"] // wide)
    call["wide"] = wide
    _start(call, table, units, like, low_rank(like.dtype, stochastic))


def _start(
    call: np.ndarray[Any, Any], table: np.ndarray[Any, Any], units: Any, like: Tensor, kernel: nvrtc.Kernel
) -> None:
    """Launch over the tensors of ``table``, which have so many units each."""
    table["first"] = np.cumsum(units) - units
    call["units"], call["tensors"] = units.sum(), table.size
    keep = None
    if table.size <= _INLINE_SLOTS:
        call["inline_slots"][0, : table.size] = table
    else:
        keep = _upload(table.view(np.uint64), like)
        call["slots"] = keep.data_ptr()
    nvrtc.launch(kernel, like, _grid(int(units.sum()), _WARPS, like), (call,))


def _grid(work_items: int, per_block: int, like: Tensor) -> int:
    return min(-(-work_items // per_block), nvrtc.processors(like) * 32)


def zo_noise_(out: Tensor, seed: Tensor, tensor_id: int, offset: int, distribution: str) -> None:
    if out.numel() == 0:
        return
    with dense(out) as target:
        call = np.zeros(1, CALL)
        call["terms"] = 1
        _keep = _place(call, "seeds", seed, out)
        at = target.data_ptr()
        _run(call, [(at, at, at, offset, out.numel(), tensor_id)], target, distribution, _NOISE, False)


def zo_axpy_into_(
    out: Sequence[Tensor],
    tensors: Sequence[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    decays: Tensor,
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    distribution: str,
    rounding: str,
    sequential: bool,
    right_seeds: Tensor | None = None,
    columns: Sequence[int] | None = None,
    rank: int = 2,
) -> None:
    stochastic, mode = rounding == "stochastic", _SINGLE if seeds.numel() == 1 else _MANY
    numbers = {"seeds": seeds, "coeffs": coeffs, "decays": decays}
    if right_seeds is not None:
        numbers["right_seeds"] = right_seeds
    with dense_pairs(out, tensors, tensor_ids, offsets, columns) as groups:
        for pairs in groups.values():
            like = pairs[0].target
            call = np.zeros(1, CALL)
            call["terms"], call["decay_count"], call["sequential"] = seeds.numel(), decays.numel(), sequential
            call["rank"] = rank
            _keep = [_place(call, n, v, like) for n, v in numbers.items()]
            vectors: list[tuple[int, ...]] = []
            matrices: list[tuple[int, ...]] = []  # of low-rank noise, whose vectors have the Gaussian
            for p in pairs:
                at = p.target.data_ptr()
                slot = (at, p.source.data_ptr(), at, p.offset, p.target.numel(), p.tensor_id, p.columns)
                (matrices if p.columns else vectors).append(slot)
            if vectors:
                _run(call, vectors, like, distribution, mode, stochastic)
            if matrices:
                _run_low_rank(call, matrices, like, stochastic)


def zo_axpy_(
    tensors: Sequence[Tensor],
    seeds: Tensor,
    coeffs: Tensor,
    decays: Tensor,
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    distribution: str,
    rounding: str,
    sequential: bool,
    right_seeds: Tensor | None = None,
    columns: Sequence[int] | None = None,
    rank: int = 2,
) -> None:
    rest = (distribution, rounding, sequential, right_seeds, columns, rank)
    zo_axpy_into_(tensors, tensors, seeds, coeffs, decays, tensor_ids, offsets, *rest)


def zo_linear(
    x: Tensor,
    x_minus: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    scale: float,
    tensor_id: int,
    offset: int,
    distribution: str,
) -> tuple[Tensor, Tensor]:
    """With one x: A = x W^T, B = x z^T, y = A + bias ± c B. With two: each has its own panel of W ± c z; so with
    fp16, which B, not small as c B is, may overflow."""
    n, m = weight.shape
    flat, w = x.reshape(-1, m) if m else x.new_empty(x.shape[:-1].numel(), 0), weight.contiguous()
    rows = flat.shape[0]
    pair = x_minus is not None or x.dtype == torch.float16
    flat_minus = flat if x_minus is None else x_minus.reshape(rows, m)
    b = None if bias is None else bias.contiguous()
    bias_at = np.uint64(0 if b is None else b.data_ptr())
    step = max(1, min(n, _PANEL // max(m, 1)))
    call = np.zeros(1, CALL)
    call["terms"] = 1
    call["inline_coeffs"][0, 0] = scale
    _keep = _place(call, "seeds", seed, x)

    y_minus = x.new_empty(rows, n)
    y_plus = x.new_empty(rows, n) if pair else flat @ w.t()
    for first in range(0, n, step):
        width = min(step, n - first)
        plus = x.new_empty(width, m)
        minus = x.new_empty(width, m) if pair else plus
        source = w[first : first + width] if pair else plus
        if m and rows:
            slot = (plus.data_ptr(), source.data_ptr(), minus.data_ptr(), offset + first * m, width * m, tensor_id)
            _run(call, [slot], plus, distribution, _PAIR if pair else _NOISE, False)
        if pair:
            y_plus[:, first : first + width] = flat @ plus.t()
            y_minus[:, first : first + width] = flat_minus @ minus.t()
        elif rows:
            turn = flat @ plus.t()
            arguments = [np.uint64(t.data_ptr()) for t in (y_plus, y_minus, y_plus, turn)]
            arguments += [bias_at, np.float64(scale), *map(np.int64, (rows, n, first, width))]
            nvrtc.launch(combine(x.dtype), x, _grid(rows * width, 256, x), arguments)
    if pair and b is not None and rows * n:
        for y in (y_plus, y_minus):
            arguments = [np.uint64(y.data_ptr()), bias_at, np.int64(rows), np.int64(n)]
            nvrtc.launch(add_bias(x.dtype), x, _grid(rows * n, 256, x), arguments)
    shape = (*x.shape[:-1], n)
    return y_plus.reshape(shape), y_minus.reshape(shape)
