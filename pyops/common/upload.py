"""Copies of small tables for kernels to the device."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_captured: list[Tensor] = []  # a CUDA graph reads this pinned memory again at every replay


@contextmanager
def _relaxed() -> Iterator[None]:
    """Allow calls that a graph's capture forbids to its thread. torch pins memory by such calls, and its older versions
    fail during capture (pytorch/pytorch#167507)."""
    exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED; the call writes the former mode here
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def to_device(words: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for the copy."""
    if device.type != "cuda":
        return words
    if torch.cuda.is_current_stream_capturing():
        with _relaxed():
            pinned = words.pin_memory()
        _captured.append(pinned)
    else:
        pinned = words.pin_memory()
    return pinned.to(device, non_blocking=True)


def float64_bits(value: float) -> int:
    """A number's bits as an int64, for kernels whose float arguments are fp32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
