"""Small tables for kernels, on their way to the device."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

_captured: list[Tensor] = []  # what a CUDA graph reads again at every replay


def to_device(words: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, without waiting for it."""
    if device.type != "cuda":
        return words
    pinned = words.pin_memory()
    there = pinned.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.extend((pinned, there))
    return there


def float64_bits(value: float) -> int:
    """A number's bits as an int64, for kernels whose float arguments are fp32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
