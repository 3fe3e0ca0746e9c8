"""The operator."""

from __future__ import annotations

import torch

from leanops._registry import Cost, OpSpec, late, register
from leanops.common.checks import require
from leanops.twice import reference
from leanops.twice.calls import Twice


def _check(call: Twice) -> None:
    require(call.x.dtype == torch.float32, f"twice: x must be float32, got {call.x.dtype}")


register(
    OpSpec(
        name="twice",
        schema="(Tensor x) -> Tensor",
        call=Twice,
        reference=reference.twice,
        fake=lambda call: torch.empty_like(call.x),
        check=_check,
        inputs=late("leanops.twice.cases", "INPUTS"),
        cost=lambda call: Cost(read=call.x.nbytes, written=call.x.nbytes),
        dtypes=(torch.float32,),
        exact=True,
        backends={backend: late(f"leanops.twice.{backend}", "twice") for backend in ("triton", "nvrtc")},
    )
)
