"""Launcher of csrc/sm3/sm3.cuh compiled by NVRTC. The mathematics is in that file and in ``reference``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanops.common import nvrtc
from leanops.common.dtypes import CXX_NAMES
from leanops.common.upload import to_device
from leanops.sm3 import plan

# csrc/sm3/call.cuh, byte for byte
_INLINE_WORDS = 480
CALL = np.dtype(
    [(n, "u8") for n in ("table", "lr", "seed", "grad_scale", "found_inf")]
    + [("lr_value", "f8"), ("seed_value", "i8"), ("weight_decay", "f8"), ("tiles", "i8")]
    + [(n, "f4") for n in ("grad_scale_value", "coupled_decay", "eps", "beta", "one_minus_beta")]
    + [(n, "f4") for n in ("momentum", "one_minus_momentum")]
    + [("tensors", "i4")]
    + [(n, "u1") for n in ("lr_is_float", "averages", "couples", "maximizes")]
    + [("unused", "u1", 4), ("words", "u8", _INLINE_WORDS)]
)


def step(dtype: torch.dtype, momentum: torch.dtype | None, stochastic: bool) -> nvrtc.Kernel:
    """The kernel that serves parameters and momenta of these types."""
    random = "true" if stochastic and dtype.itemsize == 2 else "false"
    arguments = f"<{CXX_NAMES[dtype]}, {plan.KINDS[momentum]}, {random}>"
    parameters = ("const __grid_constant__ Call",)
    return nvrtc.Kernel(
        "sm3/sm3.cuh", "leanops::sm3", f"step{arguments}", parameters, plan.THREADS, f"RESIDENT{arguments}"
    )


def _place(call: np.ndarray[Any, Any], name: str, value: Tensor | None) -> None:
    """A number for the kernel: read in place on the device, or at once from the CPU."""
    if value is None:
        return
    if value.device.type == "cpu":
        call[f"{name}_value"] = value.item()
    else:
        call[name] = value.data_ptr()


@plan.checked
def sm3_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    covers: Sequence[Tensor],
    momenta: Sequence[Tensor],
    scales: Sequence[Tensor],
    lr: Tensor,
    seed: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    momentum: float,
    beta: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    stochastic_rounding: bool,
) -> None:
    if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item() != 0:
        return
    call = np.zeros(1, CALL)
    call["lr_is_float"] = lr.dtype == torch.float32
    call["grad_scale_value"] = 1.0
    _place(call, "lr", lr)
    _place(call, "seed", seed)
    _place(call, "grad_scale", grad_scale)
    call["found_inf"] = 0 if found_inf is None or found_inf.device.type == "cpu" else found_inf.data_ptr()
    call["weight_decay"] = weight_decay if decoupled else 0.0
    call["coupled_decay"], call["couples"] = weight_decay, not decoupled and weight_decay != 0
    call["maximizes"], call["averages"] = maximize, beta != 1
    call["beta"], call["one_minus_beta"], call["eps"] = beta, 1.0 - beta, eps
    call["momentum"], call["one_minus_momentum"] = momentum, 1.0 - momentum
    with plan.launches(params, grads, covers, momenta, scales, tensor_ids, offsets) as groups:
        for items in groups:
            like, m = items[0].param, items[0].momentum
            table = plan.table(items)
            scratch = nvrtc.zeros(table.scratch, like)
            table.place(scratch.data_ptr())
            words = table.words()
            call["tiles"], call["tensors"] = table.tiles, len(items)
            kernel = step(like.dtype, None if m is None else m.dtype, stochastic_rounding)
            if words.size <= _INLINE_WORDS:
                call["table"] = 0
                call["words"][0, : words.size] = words
            else:
                there = to_device(torch.from_numpy(words.view(np.int64)), like.device)
                call["table"] = there.data_ptr()
            nvrtc.launch(kernel, like, min(table.tiles, nvrtc.processors(like) * 32), (call,))
