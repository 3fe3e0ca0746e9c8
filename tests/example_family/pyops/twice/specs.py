"""The operator."""

from __future__ import annotations

import torch
from torch import Tensor

from leanops._registry import Cost, OpSpec, late, register
from leanops.common.checks import require
from leanops.twice import reference


def _check(x: Tensor) -> None:
    require(x.dtype == torch.float32, f"twice: x must be float32, got {x.dtype}")


def _cost(x: Tensor) -> Cost:
    size = x.numel() * x.element_size()
    return Cost(read=size, written=size)


register(
    OpSpec(
        name="twice",
        schema="(Tensor x) -> Tensor",
        reference=reference.twice,
        fake=lambda x: torch.empty_like(x),
        check=_check,
        inputs=late("leanops.twice.cases", "INPUTS"),
        cost=_cost,
        dtypes=(torch.float32,),
        exact=True,
        backends={backend: late(f"leanops.twice.{backend}", "twice") for backend in ("triton", "nvrtc")},
    )
)
