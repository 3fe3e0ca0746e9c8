"""FLOPs of the backward pass, split by tensor: sums are what torch counts."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from selection.models import MODELS
from selection.runs import backward_flops, loss_of, net
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leanops.optim import TensorSelector
from leanops.optim.selection.backward_flops import measure


@pytest.mark.parametrize("name", MODELS)
def test_the_cost_of_any_set_of_tensors_is_what_torch_counts(name: str) -> None:
    """Measured once with all tensors, then for random sets: equal to the FLOP, and the knapsack's cost is a bound."""
    model = MODELS[name]().eval()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    flops = measure("test", lambda: loss_of(model), params)
    assert set(flops.names) == set(params)
    assert flops.backward == flops.cost(params) == sum(flops.dw) + sum(flops.dy)
    assert flops.backward == backward_flops(lambda: loss_of(model))
    with FlopCounterMode(display=False) as counter:
        loss_of(model)
    assert flops.forward == counter.get_total_flops()
    rng = random.Random(0)
    for i in range(16):
        few = i % 2 or len(params) < 4
        chosen = rng.sample(sorted(params), rng.randint(1, min(3, len(params)) if few else len(params)))
        for n, p in params.items():
            p.requires_grad_(n in chosen)
        assert flops.cost(chosen) == backward_flops(lambda: loss_of(model))
        deepest = max(flops.names.index(n) for n in chosen)
        dw = sum(w for n, w in zip(flops.names, flops.dw, strict=True) if n in chosen)
        assert flops.cost(chosen) <= dw + sum(flops.dy[: deepest + 1])


def test_flops_of_a_chain_of_products_are_the_textbook_ones() -> None:
    """A product costs 2 T n m for its weight and as much for its input; nothing below the deepest tensor costs any."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7))
    flops = measure("test", lambda: model(torch.randn(3, 4)).square().mean(), dict(model.named_parameters()))
    dw = dict(zip(flops.names, flops.dw, strict=True))
    assert dw == {
        "4.weight": 2 * 3 * 6 * 7,
        "2.weight": 2 * 3 * 5 * 6,
        "0.weight": 2 * 3 * 4 * 5,
        "4.bias": 0,
        "2.bias": 0,
        "0.bias": 0,
    }
    assert [int(n[0]) for n in flops.names] == [4, 4, 2, 2, 0, 0]  # from the output to the input
    assert [sum(flops.dy[i : i + 2]) for i in (0, 2, 4)] == [0, 2 * 3 * 6 * 7, 2 * 3 * 5 * 6]
    assert (flops.forward, flops.fixed) == (2 * 3 * (4 * 5 + 5 * 6 + 6 * 7), 0)


def test_a_function_that_computes_all_its_gradients_counts_in_full() -> None:
    """Whichever gradients are needed, so that the cost is never too small."""

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            x, w = ctx.saved_tensors
            return g @ w.T, x.T @ g

    first, w = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 5))
    params = {"w": w, "first.weight": first.weight, "first.bias": first.bias}
    flops = measure("test", lambda: Both.apply(first(torch.randn(2, 3)), w).sum(), params)
    assert flops.cost(["w"]) == 2 * (2 * 2 * 4 * 5)
    assert flops.cost(params) == flops.backward == 2 * (2 * 2 * 4 * 5) + 2 * 2 * 3 * 4


def test_gradients_of_an_input_that_requires_grad_are_in_every_cost() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6))
    x = torch.randn(3, 4, requires_grad=True)
    flops = measure("test", lambda: model(x).square().mean(), dict(model.named_parameters()))
    assert flops.fixed == 2 * 3 * (4 * 5 + 5 * 6)
    assert flops.cost([]) == flops.fixed
    assert flops.cost(["0.weight"]) == flops.fixed + 2 * 3 * 4 * 5


def test_reentrant_checkpointing_hides_the_graph_and_is_refused() -> None:
    model = net()

    def closure() -> Tensor:
        x = torch.ones(2, 8, requires_grad=True)
        return torch.utils.checkpoint.checkpoint(model.layers[0], x, use_reentrant=True).sum()

    selector = TensorSelector(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(
        RuntimeError, match=r"TensorSelector.profile: the gradient of layers\.0.* without activation checkpointing"
    ):
        selector.profile(closure)
