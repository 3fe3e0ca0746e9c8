"""Optimizers that a compiled function makes and uses: they give the bits of the same function, uncompiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leanops.optim import (
    LISA,
    SM3,
    HalfFineTuning,
    MeZO,
    SeedPool,
    TensorSelector,
    decay_groups,
    fuse_into_backward,
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(model: nn.Module, loss: Callable[[], Tensor], opt: Any, steps: int = 2) -> None:
    for _ in range(steps):
        loss().backward()
        opt.step()
        opt.zero_grad()


def sm3(model: nn.Module, loss: Callable[[], Tensor]) -> object:
    trained(model, loss, SM3(model.parameters(), lr=0.1, momentum_dtype=torch.int8))


def mezo(model: nn.Module, loss: Callable[[], Tensor]) -> object:
    opt = MeZO(decay_groups(model, 0.1), lr=0.1, momentum=0.9, model=model)
    for _ in range(3):
        opt.step(loss)
    return opt.log.scalars().tolist()


def fused_backward(model: nn.Module, loss: Callable[[], Tensor]) -> object:
    opt = fuse_into_backward(torch.optim.AdamW, model, lr=0.1)
    trained(model, loss, opt)
    opt.remove()


def fused_sm3(model: nn.Module, loss: Callable[[], Tensor]) -> object:
    opt = fuse_into_backward(SM3, model, lr=0.1)
    trained(model, loss, opt)
    opt.remove()


def seed_pool(model: nn.Module, loss: Callable[[], Tensor]) -> object:
    pool = SeedPool(64, seed=3)
    pool.add(2, 1.5)
    pool.step_(model, loss, 5, lr=0.1)
    server = SeedPool.from_bytes(pool.to_bytes())
    server.merge(pool, 0.5)
    server.apply_(model, 0.1)
    return server.sums.tolist(), server.probabilities().tolist(), server.sample(4, generator=0)


def lisa(model: nn.Module, loss: Callable[[], Tensor]) -> object:
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler = LISA(model, opt, active=1, period=1, blocks=["0", "2"])
    trained(model, loss, opt, 1)
    sampler.step()
    trained(model, loss, opt, 1)
    sampler.release()
    return sampler.active_blocks


def half_fine_tuning(model: nn.Module, loss: Callable[[], Tensor]) -> object:
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler = HalfFineTuning(model, opt, period=1)
    sampler.step()
    trained(model, loss, opt, 1)
    sampler.release()
    return sampler.trainable


def tensor_selector(model: nn.Module, loss: Callable[[], Tensor]) -> object:
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    return TensorSelector(model, opt, rho=0.8).select(loss).names


MADE = [sm3, mezo, fused_backward, fused_sm3, seed_pool]
MADE += [pytest.param(f, marks=pytest.mark.ci) for f in (lisa, half_fine_tuning, tensor_selector)]


def run(use: Callable[[nn.Module, Callable[[], Tensor]], object], compiled: bool) -> tuple[list[Tensor], object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(6, 4)
    function = lambda: use(model, lambda: model(x).square().mean())  # noqa: E731
    told = torch.compile(function, backend="eager")() if compiled else function()
    return [p.detach() for p in model.parameters()], told


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("use", MADE, ids=lambda use: use.__name__)
def test_an_optimizer_made_in_a_compiled_function_gives_the_bits_of_the_uncompiled_one(use: Any) -> None:
    weights, told = run(use, compiled=True)
    wanted, wanted_told = run(use, compiled=False)
    assert told == wanted_told
    assert all(map(torch.equal, weights, wanted))


def test_a_compiled_training_step_runs_the_hooks_of_a_fused_backward_as_they_are() -> None:
    """Compiled, the step of one parameter served the next one, whose gradient had been freed."""
    results = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), torch.randn(6, 4)
        opt = fuse_into_backward(torch.optim.SGD, model, lr=0.1, momentum=0.9)

        def step(model: nn.Module = model, x: Tensor = x, opt: Any = opt) -> None:
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()

        run_step = torch.compile(step, backend="eager") if compiled else step
        for _ in range(3):
            run_step()
        results.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", [SM3, MeZO])
def test_a_copy_made_in_a_compiled_function_is_whole(kind: Any) -> None:
    opt = kind([nn.Parameter(torch.ones(3))], lr=0.1)
    made = torch.compile(lambda: copy.deepcopy(opt), backend="eager")()
    assert vars(made).keys() == vars(copy.deepcopy(opt)).keys()
