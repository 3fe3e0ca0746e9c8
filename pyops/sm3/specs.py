"""The OpSpec of SM3."""

from __future__ import annotations

from leanops._registry import Cost, OpSpec, bytes_of, late, register
from leanops.common.dtypes import FLOATS
from leanops.sm3 import checks, reference
from leanops.sm3.calls import Step


def _cost(call: Step) -> Cost:
    """Weights, covers and momenta are read and written once, gradients read."""
    kept = sum(map(bytes_of, (call.params, call.covers, call.momenta, call.scales)))
    return Cost(read=kept + bytes_of(call.grads), written=kept)


register(
    OpSpec(
        name="sm3_step_",
        schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] covers, Tensor(c!)[] momenta, Tensor(d!)[] scales, "
        "Tensor lr, Tensor seed, Tensor? grad_scale, Tensor? found_inf, int[] tensor_ids, int[] offsets, "
        "float momentum, float beta, float eps, float weight_decay, bool decoupled, bool maximize, "
        "bool stochastic_rounding, bool average_gradient=False, Tensor? lr_factors=None) -> ()",
        call=Step,
        reference=reference.sm3_step_,
        fake=lambda call: None,
        check=checks.step,
        inputs=late("leanops.sm3.cases", "STEP"),
        cost=_cost,
        dtypes=FLOATS,
        exact=True,
        backends={b: late(f"leanops.sm3.{b}", "sm3_step_") for b in ("triton", "nvrtc")},
    )
)
