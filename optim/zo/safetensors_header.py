"""The safetensors format, without loading a tensor: size of the header (8 bytes), header (JSON), the tensors' bytes."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leanops.optim.zo.log import LogError

Table = dict[str, dict[str, Any]]  # a tensor's name -> its dtype, shape and data_offsets

_PIECE = 1 << 20  # bytes that are compared at a time


def read_header(path: str | os.PathLike[str]) -> tuple[bytes, Table]:
    """The bytes before the data, and the tensors, which must fill the file, each with the bytes of its shape."""
    held = Path(path).stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        size = int.from_bytes(head, "little")
        if len(head) < 8 or size > min(held, 100_000_000):
            raise LogError(f"{path}: not a safetensors file")
        text = file.read(size)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LogError(f"{path}: not a safetensors file: its header does not read ({error})") from error
    if not isinstance(table, dict):
        raise LogError(f"{path}: not a safetensors file: its header must be an object, got {type(table).__name__}")
    table.pop("__metadata__", None)
    end = 0
    for first, last in sorted(_offsets(path, name, entry) for name, entry in table.items()):
        if first != end:
            raise LogError(f"{path}: damaged: a tensor begins at byte {first} of the data, expected {end}")
        end = last
    if 8 + size + end != held:
        raise LogError(f"{path}: truncated or damaged: {held} bytes, its header announces {8 + size + end}")
    return head + text, table


def _offsets(path: str | os.PathLike[str], name: str, entry: Any) -> tuple[int, int]:
    """First byte and one past the last byte of a tensor."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise LogError(f"{path}: damaged: tensor {name} must have a dtype, a shape and two data_offsets, got {entry}")
    bits = re.search(r"\d+", dtype)  # F8_E4M3 has 8, BF16 has 16; BOOL alone has no number
    needed = math.prod(shape) * int(bits[0] if bits else 8) // 8
    if last - first != needed:
        raise LogError(
            f"{path}: damaged: tensor {name} must have the {needed} bytes of {dtype} {shape}, got {last - first}"
        )
    return first, last


class Stored(NamedTuple):
    """A tensor in its file: where its bytes are and what they mean."""

    path: Path
    start: int  # in the file
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def copies(tensors: Mapping[str, Stored], names: Collection[str], others: Collection[str]) -> Iterator[tuple[str, str]]:
    """(name, other) where two tensors of one dtype and shape hold the same bytes, and not one value all over."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        alike.setdefault(_kind(tensors[name]), []).append(name)
    for other in others:
        for name in alike.get(_kind(tensors[other]), ()):
            first, second = (_mapped(tensors[n]) for n in (name, other))
            width = len(first) // max(math.prod(tensors[name].shape), 1)
            if _equal(first, second) and not _equal(first[width:], first[:-width]):
                yield name, other


def _kind(tensor: Stored) -> tuple[Any, ...]:
    return (tensor.dtype, *tensor.shape)


def _mapped(tensor: Stored) -> NDArray[np.uint8]:
    if not tensor.nbytes:
        return np.empty(0, np.uint8)
    return np.memmap(tensor.path, np.uint8, "r", tensor.start, (tensor.nbytes,))


def _equal(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    return all(np.array_equal(a[i : i + _PIECE], b[i : i + _PIECE]) for i in range(0, len(a), _PIECE))
