"""Small tables for kernels, on their way to the device."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_captured: list[Tensor] = []  # what a CUDA graph reads again at every replay


@contextmanager
def _relaxed() -> Iterator[None]:
    """Lifts what a graph's capture forbids its thread: torch pins memory by such calls, and older versions of it fail
    there (pytorch/pytorch#167507)."""
    exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED; the call leaves here what was before
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


def to_device(words: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, without waiting for it."""
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
