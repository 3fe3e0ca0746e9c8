"""SM3 as an entry of torch's own database of optimizers, ``torch.testing._internal.common_optimizers``.

The wheel ships the database and its tools, not ``test/test_optim.py``; so the tests of ``TestOptimRenewed`` there are
written anew, under their names, in ``tests/sm3/test_torch_*.py``. ``docs/torch-suite.md`` lists those that are
left out and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import tiers
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TEST_WITH_TORCHDYNAMO

from leanops.optim import SM3

hypothesis.settings.load_profile("default")  # torch's test utilities load one of their own for the whole process


# compiling takes a second or two for each set of options; the tier exhaustive has them all
UNDER_DYNAMO = ("Tensor lr", "no momentum", "int8 momentum", "stochastic rounding")


def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    """All options but foreach, fused and differentiable, which each test sets itself."""
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "Tensor lr": {"lr": torch.tensor(0.01)},
        "nonzero weight_decay": {"weight_decay": 0.1},
        "coupled weight_decay": {"weight_decay": 0.1, "decoupled": False},
        "maximize": {"maximize": True},
        "maximize, weight_decay": {"weight_decay": 0.1, "maximize": True},
        "no momentum": {"momentum": 0.0},
        "average": {"beta": 0.9, "eps": 1e-8},
        "int8 momentum": {"momentum_dtype": torch.int8},
        "bf16 momentum": {"momentum_dtype": torch.bfloat16},
        "stochastic rounding": {"stochastic_rounding": True, "seed": 3},
        "capturable": {"capturable": True},
        "capturable with weight decay": {"capturable": True, "weight_decay": 0.1},
        "Tensor lr with capturable": {"capturable": True, "lr": torch.tensor(0.01)},
    }
    if TEST_WITH_TORCHDYNAMO and not tiers.at_least("exhaustive"):
        options = {desc: options[desc] for desc in UNDER_DYNAMO}
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in options.items()]


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    own: list[tuple[dict[str, Any], str]] = [
        ({"lr": -0.1}, "lr must be a finite number >= 0, got -0.1"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"beta": 0.0}, r"beta must be in \(0, 1\], got 0.0"),
        ({"eps": -1.0}, "eps must be a finite float32 number >= 0, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite float32 number >= 0, got -1.0"),
        ({"momentum_dtype": torch.float16}, "momentum_dtype must be one of"),
        ({"differentiable": True}, "differentiable=True is not supported"),
    ]
    return get_error_inputs_for_all_optims(device, dtype) + [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=regex), error_type=ValueError, error_regex=regex
        )
        for kwargs, regex in own
    ]


SM3_INFO = OptimizerInfo(
    SM3,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=(
        [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
        [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: ReduceLROnPlateau(opt)],
        [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4), lambda opt: ExponentialLR(opt, gamma=0.99)],
        [lambda opt: OneCycleLR(opt, 0.1, total_steps=30)],
    ),
    supported_impls=("foreach", "fused"),
    not_og_supported_flags=("foreach", "fused", "differentiable", "maximize", "capturable", "seed", "momentum_dtype"),
    supports_sparse=False,
    supports_complex=False,
    has_capturable_arg=True,
    supports_fused_on=("cpu", "cuda"),
)
sm3 = optims([SM3_INFO], dtypes=[torch.float32])


def all_options(device: Any, info: OptimizerInfo, **more: Any) -> Iterator[dict[str, Any]]:
    """The options of every entry of the database, with foreach and fused off and with each of them on."""
    for entry in _get_optim_inputs_including_global_cliquey_kwargs(device, torch.float32, info, **more):
        yield entry.kwargs


class Problem:
    """A weight, a bias and a loss that a step in the right direction lowers."""

    def __init__(self, device: Any, dtype: torch.dtype = torch.float32, contiguous: bool = True) -> None:
        if contiguous:
            self.weight = Parameter(torch.randn((10, 5), device=device, dtype=dtype))
            self.bias = Parameter(torch.randn(10, device=device, dtype=dtype))
        else:
            self.weight = Parameter(torch.randn((10, 5, 2), device=device, dtype=dtype)[..., 0])
            self.bias = Parameter(torch.randn((10, 2), device=device, dtype=dtype)[..., 0])
        self.input = torch.randn(5, device=device, dtype=dtype)

    @property
    def params(self) -> list[Parameter]:
        return [self.weight, self.bias]

    def copy(self) -> Problem:
        other = object.__new__(Problem)
        other.weight, other.bias = (Parameter(p.detach().clone()) for p in self.params)
        other.input = self.input
        return other

    def closure(self, opt: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            opt.zero_grad()
            loss = (self.weight.mv(self.input) + self.bias.to(self.weight.device)).pow(2).sum()
            loss.backward()
            return loss

        return run


def advance(schedules: list[Any], loss: Tensor) -> None:
    for s in schedules:
        s.step(loss) if isinstance(s, ReduceLROnPlateau) else s.step()
