"""Parameters and gradients that SM3 refuses."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from leanops.common.dtypes import FLOATS
from leanops.optim.common import parameters


def check_parameter(name: str, p: Tensor) -> None:
    """ValueError for a parameter that no step can move. Called when the parameter joins the optimizer."""
    if p.is_complex():
        raise ValueError(f"SM3: parameter {name} must be real, got {p.dtype}; use torch.view_as_real")
    if p.layout != torch.strided:
        raise ValueError(f"SM3: parameter {name} must be dense, got layout {p.layout}")


def is_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether none of the tensors is a wrapper: a subclass with a dispatch of its own, whose values are elsewhere."""
    types: set[type[Tensor]] = set(map(type, tensors))
    return all(t.__torch_dispatch__ is Tensor.__torch_dispatch__ for t in types)


def check_step(name: str, p: Tensor, g: Tensor) -> None:
    """Raise for a parameter or a gradient that this step cannot use. Called before any parameter moves."""
    check_parameter(name, p)
    if p.dtype not in FLOATS:
        raise ValueError(f"SM3: parameter {name} must be float32, bfloat16, float16 or float64, got {p.dtype}")
    if not is_plain((p,)) and not parameters.is_sharded(p) and not isinstance(p, FakeTensor):
        raise ValueError(f"SM3: parameter {name} must be a plain tensor or a DTensor, got {type(p).__name__}")
    if p.is_neg():
        raise ValueError(f"SM3: parameter {name} must not be a negated view; use its resolve_neg()")
    if p.device.type == "meta":
        raise RuntimeError(f"SM3: parameter {name} must have data, got a meta tensor")
    if g.layout != torch.strided:
        kind = "sparse gradients" if g.layout == torch.sparse_coo else f"gradients of layout {g.layout}"
        raise RuntimeError(f"SM3 does not support {kind}; parameter {name} has one (nn.Embedding: pass sparse=False)")
    if parameters.is_sharded(g) != parameters.is_sharded(p):
        raise ValueError(
            f"SM3: the gradient of parameter {name} must be a {type(p).__name__} as the parameter, got a "
            f"{type(g).__name__}"
        )
    if g.dtype != p.dtype or g.shape != p.shape or g.device != p.device:
        raise ValueError(
            f"SM3: the gradient of parameter {name} must be {p.dtype} {list(p.shape)} on {p.device} as the parameter, "
            f"got {g.dtype} {list(g.shape)} on {g.device}"
        )
