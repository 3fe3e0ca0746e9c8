"""The OpSpecs of the zeroth-order family."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from leanops._registry import Autograd, BadInput, Cost, Loader, OpSpec, register
from leanops.common.dtypes import FLOATS
from leanops.zo import checks, reference
from leanops.zo.autograd import linear_backward, linear_setup_context
from leanops.zo.cases import (
    DISTRIBUTIONS,
    axpy_bad,
    axpy_cases,
    axpy_fuzz,
    axpy_large,
    i64,
    linear_bad,
    linear_case,
    linear_fuzz,
    noise_bad,
    noise_case,
    noise_fuzz,
    noise_large,
    noise_like,
)


def _backends(name: str) -> dict[str, Loader]:
    """Python launchers of an operator; their modules are imported at the first call."""

    def loader(module: str) -> Loader:
        return lambda: getattr(importlib.import_module(f"leanops.zo.{module}"), name)

    return {"triton": loader("triton"), "nvrtc": loader("nvrtc")}


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


register(
    OpSpec(
        name="zo_noise_",
        schema="(Tensor(a!) out, Tensor seed, int tensor_id, int offset, str distribution) -> ()",
        reference=reference.zo_noise_,
        fake=lambda *args: None,
        check=checks.noise_,
        cases=(
            *(noise_case(f"{d}-257x3", (257, 3), d, 5) for d in DISTRIBUTIONS),
            *(noise_case(f"{d}-16M", (1 << 24,), d, bench=True) for d in DISTRIBUTIONS),
        ),
        fuzz=noise_fuzz,
        bad_inputs=noise_bad(),
        cost=lambda out, *_: Cost(read=0, written=_bytes([out])),
        dtypes=FLOATS,
        exact=True,
        large=noise_large,
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
    torch.ops.leanops.zo_noise_(out, i64(seed), tensor_id, offset, distribution)
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
        cases=tuple(noise_like(f"{d}-33x5", (33, 5), d) for d in DISTRIBUTIONS),
        fuzz=lambda draw, dtype: (
            [draw.integer(0, 40) for _ in range(draw.integer(0, 3))],
            draw.integer(-(2**63), 2**63 - 1),
            draw.integer(0, 2**32 - 1),
            draw.integer(0, 2**62),
            draw.choice(DISTRIBUTIONS),
            dtype,
            draw.device,
        ),
        bad_inputs=(
            BadInput("dtype", lambda d: ([4], 1, 0, 0, "gaussian", torch.int32, d), "zo_noise: dtype .*int32"),
            BadInput("negative size", lambda d: ([-4], 1, 0, 0, "gaussian", torch.float32, d), "zo_noise: shape .*-4"),
            BadInput("id", lambda d: ([4], 1, -1, 0, "gaussian", torch.float32, d), "zo_noise: tensor_id .*-1"),
            BadInput("offset", lambda d: ([4], 1, 0, -2, "gaussian", torch.float32, d), "zo_noise: offset .*-2"),
            BadInput("end", lambda d: ([4], 1, 0, 2**63 - 4, "gaussian", torch.float32, d), "zo_noise: offset .*5804"),
            BadInput(
                "size", lambda d: ([2**40] * 2, 1, 0, 0, "gaussian", torch.float32, d), "zo_noise: shape .*2\\^63"
            ),
            BadInput("distribution", lambda d: ([4], 1, 0, 0, "cauchy", torch.float32, d), "zo_noise: .*cauchy"),
        ),
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
        cases=axpy_cases(into=False),
        fuzz=lambda draw, dtype: axpy_fuzz(draw, dtype, into=False),
        bad_inputs=axpy_bad("zo_axpy_"),
        cost=lambda tensors, *_: Cost(read=_bytes(tensors), written=_bytes(tensors)),
        dtypes=FLOATS,
        exact=True,
        large=axpy_large(into=False),
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
        cases=axpy_cases(into=True),
        fuzz=lambda draw, dtype: axpy_fuzz(draw, dtype, into=True),
        bad_inputs=axpy_bad("zo_axpy_into_"),
        cost=lambda out, *_: Cost(read=_bytes(out), written=_bytes(out)),
        dtypes=FLOATS,
        exact=True,
        large=axpy_large(into=True),
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
        cases=(
            *(linear_case(f"{d}-9x33x65", 9, 33, 65, d) for d in DISTRIBUTIONS),
            *(linear_case(f"{d}-9x33x65-pair", 9, 33, 65, d, pair=True) for d in DISTRIBUTIONS),
            linear_case("rademacher-70000x8x8", 70000, 8, 8, "rademacher"),
            linear_case("rademacher-3x9x256-large", 3, 9, 256, "rademacher", std=4000.0),  # x z^T is infinite in fp16
            *(
                linear_case(f"rademacher-{t}x2048x2048", t, 2048, 2048, "rademacher", bench=True)
                for t in (1, 32, 128, 512, 2048)
            ),
            linear_case("gaussian-512x2048x2048", 512, 2048, 2048, "gaussian", bench=True),
            linear_case("rademacher-512x2048x2048-pair", 512, 2048, 2048, "rademacher", pair=True, bench=True),
        ),
        fuzz=linear_fuzz,
        bad_inputs=linear_bad(),
        cost=_linear_cost,
        dtypes=FLOATS,
        exact=False,
        depth=lambda x, *_: max(x.shape[-1], 1),
        plain=_linear_plain,
        autograd=Autograd(linear_setup_context, linear_backward),
        backends=_backends("zo_linear"),
    )
)
