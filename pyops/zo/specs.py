"""The OpSpecs of the zeroth-order family."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from leanops._registry import Autograd, Cost, Loader, OpSpec, bytes_of, late, register
from leanops.common.dtypes import FLOATS
from leanops.zo import checks, reference
from leanops.zo.autograd import linear_backward, linear_setup_context
from leanops.zo.calls import Axpy, AxpyInto, Linear, Noise, NoiseInPlace


def _backends(name: str) -> dict[str, Loader]:
    """The Python launchers of an operator. Their modules are imported at the first call."""
    return {backend: late(f"leanops.zo.{backend}", name) for backend in ("triton", "nvrtc")}


register(
    OpSpec(
        name="zo_noise_",
        schema="(Tensor(a!) out, Tensor seed, int tensor_id, int offset, str distribution) -> ()",
        call=NoiseInPlace,
        reference=reference.zo_noise_,
        fake=lambda call: None,
        check=checks.noise_in_place,
        inputs=late("leanops.zo.cases", "NOISE_IN_PLACE"),
        cost=lambda call: Cost(read=0, written=bytes_of([call.out])),
        dtypes=FLOATS,
        exact=True,
        backends=_backends("zo_noise_"),
    )
)


def _zo_noise(call: Noise) -> Tensor:
    out = torch.empty(call.shape, dtype=call.dtype, device=call.device)
    seed = torch.tensor([call.seed], dtype=torch.int64, device="cpu")
    torch.ops.leanops.zo_noise_(*NoiseInPlace(out, seed, call.tensor_id, call.offset, call.distribution))
    return out


def _noise_cost(call: Noise) -> Cost:
    dtype = torch.get_default_dtype() if call.dtype is None else call.dtype
    return Cost(read=0, written=dtype.itemsize * torch.Size(call.shape).numel())


register(
    OpSpec(
        name="zo_noise",
        schema="(SymInt[] shape, SymInt seed, SymInt tensor_id=0, SymInt offset=0, str distribution='gaussian', "
        "ScalarType? dtype=None, Device? device=None) -> Tensor",
        call=Noise,
        reference=reference.zo_noise,
        composite=_zo_noise,
        fake=lambda call: torch.empty(call.shape, dtype=call.dtype, device=call.device),
        check=checks.noise,
        inputs=late("leanops.zo.cases", "NOISE"),
        cost=_noise_cost,
        dtypes=FLOATS,
        exact=True,
    )
)


_NOISE_SUM = (
    "Tensor seeds, Tensor coeffs, Tensor decays, int[] tensor_ids, int[] offsets, str distribution, str rounding, "
    "bool sequential, Tensor? right_seeds=None, int[]? columns=None, int rank=2"
)


register(
    OpSpec(
        name="zo_axpy_",
        schema=f"(Tensor(a!)[] tensors, {_NOISE_SUM}) -> ()",
        call=Axpy,
        reference=reference.zo_axpy_,
        fake=lambda call: None,
        check=checks.axpy,
        inputs=late("leanops.zo.cases", "AXPY"),
        cost=lambda call: Cost(read=bytes_of(call.tensors), written=bytes_of(call.tensors)),
        dtypes=FLOATS,
        exact=True,
        backends=_backends("zo_axpy_"),
    )
)


register(
    OpSpec(
        name="zo_axpy_into_",
        schema=f"(Tensor(a!)[] out, Tensor[] tensors, {_NOISE_SUM}) -> ()",
        call=AxpyInto,
        reference=reference.zo_axpy_into_,
        fake=lambda call: None,
        check=checks.axpy_into,
        inputs=late("leanops.zo.cases", "AXPY_INTO"),
        cost=lambda call: Cost(read=bytes_of(call.out), written=bytes_of(call.out)),
        dtypes=FLOATS,
        exact=True,
        backends=_backends("zo_axpy_into_"),
    )
)


def _linear_fake(call: Linear) -> tuple[Tensor, Tensor]:
    shape = (*call.x.shape[:-1], call.weight.shape[0])
    return call.x.new_empty(shape), call.x.new_empty(shape)


def _linear_plain(call: Linear) -> tuple[Tensor, Tensor]:
    weight, bias = call.weight, call.bias
    place = (call.tensor_id, call.offset, call.distribution, weight.dtype, weight.device)
    z = torch.ops.leanops.zo_noise(weight.shape, int(call.seed), *place)
    minus = call.x if call.x_minus is None else call.x_minus
    return linear(call.x, weight + call.scale * z, bias), linear(minus, weight - call.scale * z, bias)


def _linear_cost(call: Linear) -> Cost:
    x, weight = call.x, call.weight
    tokens = x.numel() // max(x.shape[-1], 1)
    tensors = [t for t in (x, call.x_minus, weight, call.bias) if t is not None]
    written = 2 * tokens * weight.shape[0] * x.element_size()
    return Cost(bytes_of(tensors), written, flops=4 * tokens * weight.numel(), flops_dtype=x.dtype)


register(
    OpSpec(
        name="zo_linear",
        schema="(Tensor x, Tensor? x_minus, Tensor weight, Tensor? bias, Tensor seed, float scale, int tensor_id, "
        "int offset, str distribution) -> (Tensor, Tensor)",
        call=Linear,
        reference=reference.zo_linear,
        fake=_linear_fake,
        check=checks.linear,
        inputs=late("leanops.zo.cases", "LINEAR"),
        cost=_linear_cost,
        dtypes=FLOATS,
        exact=False,
        depth=lambda call: max(call.x.shape[-1], 1),
        plain=_linear_plain,
        autograd=Autograd(linear_setup_context, linear_backward),
        backends=_backends("zo_linear"),
    )
)
