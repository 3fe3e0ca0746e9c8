"""The OpSpecs of the zeroth-order family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from leanops._registry import Autograd, Cost, Loader, OpSpec, late, register
from leanops.common.dtypes import FLOATS
from leanops.zo import checks, reference
from leanops.zo.autograd import linear_backward, linear_setup_context


def _backends(name: str) -> dict[str, Loader]:
    """Python launchers of an operator; their modules are imported at the first call."""
    return {backend: late(f"leanops.zo.{backend}", name) for backend in ("triton", "nvrtc")}


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


register(
    OpSpec(
        name="zo_noise_",
        schema="(Tensor(a!) out, Tensor seed, int tensor_id, int offset, str distribution) -> ()",
        reference=reference.zo_noise_,
        fake=lambda *args: None,
        check=checks.noise_,
        inputs=late("leanops.zo.cases", "NOISE_IN_PLACE"),
        cost=lambda out, *_: Cost(read=0, written=_bytes([out])),
        dtypes=FLOATS,
        exact=True,
        backends=_backends("zo_noise_"),
    )
)


def _zo_noise(
    shape: Sequence[int],
    seed: int,
    tensor_id: int = 0,
    offset: int = 0,
    distribution: str = "gaussian",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=device)
    seeds = torch.tensor([seed], dtype=torch.int64, device="cpu")
    torch.ops.leanops.zo_noise_(out, seeds, tensor_id, offset, distribution)
    return out


register(
    OpSpec(
        name="zo_noise",
        schema="(SymInt[] shape, SymInt seed, SymInt tensor_id=0, SymInt offset=0, str distribution='gaussian', "
        "ScalarType? dtype=None, Device? device=None) -> Tensor",
        reference=reference.zo_noise,
        composite=_zo_noise,
        fake=lambda shape, *args, dtype=None, device=None: torch.empty(
            shape, dtype=args[4] if len(args) > 4 else dtype, device=args[5] if len(args) > 5 else device
        ),
        check=checks.noise,
        inputs=late("leanops.zo.cases", "NOISE"),
        cost=lambda shape, *_: Cost(read=0, written=4 * torch.Size(shape).numel()),
        dtypes=FLOATS,
        exact=True,
    )
)


_AXPY_REST = (
    "Tensor seeds, Tensor coeffs, Tensor decays, int[] tensor_ids, int[] offsets, str distribution, str rounding, "
    "bool sequential, Tensor? right_seeds=None, int[]? columns=None, int rank=2) -> ()"
)


register(
    OpSpec(
        name="zo_axpy_",
        schema=f"(Tensor(a!)[] tensors, {_AXPY_REST}",
        reference=reference.zo_axpy_,
        fake=lambda *args: None,
        check=checks.axpy_,
        inputs=late("leanops.zo.cases", "AXPY"),
        cost=lambda tensors, *_: Cost(read=_bytes(tensors), written=_bytes(tensors)),
        dtypes=FLOATS,
        exact=True,
        backends=_backends("zo_axpy_"),
    )
)


register(
    OpSpec(
        name="zo_axpy_into_",
        schema=f"(Tensor(a!)[] out, Tensor[] tensors, {_AXPY_REST}",
        reference=reference.zo_axpy_into_,
        fake=lambda *args: None,
        check=checks.axpy_into_,
        inputs=late("leanops.zo.cases", "AXPY_INTO"),
        cost=lambda out, *_: Cost(read=_bytes(out), written=_bytes(out)),
        dtypes=FLOATS,
        exact=True,
        backends=_backends("zo_axpy_into_"),
    )
)


def _linear_fake(x: Tensor, x_minus: Any, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


def _linear_plain(
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
    z = _zo_noise(weight.shape, int(seed), tensor_id, offset, distribution, weight.dtype, weight.device)
    minus = x if x_minus is None else x_minus
    return linear(x, weight + scale * z, bias), linear(minus, weight - scale * z, bias)


def _linear_cost(x: Tensor, x_minus: Tensor | None, weight: Tensor, bias: Tensor | None, *_: Any) -> Cost:
    tokens = x.numel() // max(x.shape[-1], 1)
    tensors = [t for t in (x, x_minus, weight, bias) if t is not None]
    written = 2 * tokens * weight.shape[0] * x.element_size()
    return Cost(_bytes(tensors), written, flops=4 * tokens * weight.numel(), flops_dtype=x.dtype)


register(
    OpSpec(
        name="zo_linear",
        schema="(Tensor x, Tensor? x_minus, Tensor weight, Tensor? bias, Tensor seed, float scale, int tensor_id, "
        "int offset, str distribution) -> (Tensor, Tensor)",
        reference=reference.zo_linear,
        fake=_linear_fake,
        check=checks.linear,
        inputs=late("leanops.zo.cases", "LINEAR"),
        cost=_linear_cost,
        dtypes=FLOATS,
        exact=False,
        depth=lambda x, *_: max(x.shape[-1], 1),
        plain=_linear_plain,
        autograd=Autograd(linear_setup_context, linear_backward),
        backends=_backends("zo_linear"),
    )
)
