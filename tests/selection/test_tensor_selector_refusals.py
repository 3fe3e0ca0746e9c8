"""TensorSelector refuses bad options, closures, selections and states before anything changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo import distributed, spawn
from selection.runs import OPTIMIZERS, assert_same, loss_of, net, snapshot
from torch import Tensor

from leanops.optim import MeZO, TensorSelector


@pytest.mark.parametrize("rho", [0, -0.1, 1.5, True, "half", float("nan")])
def test_a_bad_rho_is_refused(rho: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"TensorSelector: rho must be in \(0, 1\], got"):
        TensorSelector(model, torch.optim.SGD(model.parameters()), rho=rho)


def test_an_optimizer_that_steps_inside_the_backward_pass_is_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match="TensorSelector: optimizer must not step inside the backward pass"):
        TensorSelector(model, OPTIMIZERS["AdamW-in-backward"][0](model.parameters()))


def test_an_optimizer_without_a_backward_pass_is_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match="TensorSelector: optimizer must step by gradients, got MeZO"):
        TensorSelector(model, MeZO(model.parameters()))


@distributed
def test_sharded_models_are_refused() -> None:
    def job(rank: int) -> None:
        from torch.distributed.fsdp import fully_shard

        model = net()
        fully_shard(model.layers[0])
        with pytest.raises(ValueError, match="TensorSelector: model must not be sharded by FSDP"):
            TensorSelector(model, torch.optim.SGD(model.parameters()))

    spawn(job, world=1)


def test_a_closure_that_calls_backward_is_refused_and_leaves_no_gradient() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model).backward()
    before = snapshot(model, optimizer)
    selector = TensorSelector(model, optimizer)

    def closure() -> Tensor:
        loss = loss_of(model)
        loss.backward()
        return loss

    for measuring in (selector.profile, selector.importance, selector.measure, selector.select):
        with pytest.raises(ValueError, match=r"closure must return the loss and not call backward, got a gradient of"):
            measuring(closure)
        assert_same(snapshot(model, optimizer), before)


def test_bad_selections_are_refused_and_change_nothing() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model).backward()
    optimizer.step()
    selector = TensorSelector(model, optimizer, rho=0.2)
    before = snapshot(model, optimizer)

    def closure() -> Tensor:
        return loss_of(model)

    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"closure must be given to measure FLOPs or importance, got None"):
        selector.select()
    with pytest.raises(ValueError, match=r"closure must return a scalar loss that has a graph.*, got float"):
        selector.select(lambda: 1.0)
    with pytest.raises(ValueError, match=r"closure must return a scalar loss.*, got \[12\], grad_fn None"):
        selector.select(lambda: torch.ones(12))
    with pytest.raises(
        ValueError, match=r"rho must be at least 0\.3\d+ for any tensor to fit \(the forward pass is 0\.3"
    ):
        selector.select(closure)
    with pytest.raises(ValueError, match=r"importance must be above 0 for a tensor, got at most -1.0"):
        selector.select(importance=dict.fromkeys(names, -1.0))
    with pytest.raises(ValueError, match=r"importance must have one entry for each tensor, got .*'other'"):
        selector.select(importance={**dict.fromkeys(names, 1.0), "other": 1.0})
    with pytest.raises(ValueError, match=r"importance must be finite, got nan for "):
        selector.select(importance=dict.fromkeys(names, float("nan")))
    with pytest.raises(ZeroDivisionError):
        selector.importance(lambda: 1 / 0)
    nothing = TensorSelector(model, optimizer)
    with pytest.raises(ValueError, match=r"closure must do work that torch's FLOP counter counts, got a loss with 0"):
        nothing.select(lambda: sum(p.sum() for p in model.parameters()))
    assert_same(snapshot(model, optimizer), before)
    assert selector.selection is None


@pytest.mark.parametrize("other", ["rho", "tensors"])
def test_a_state_of_another_run_is_refused_and_changes_nothing(other: str) -> None:
    model = net()
    saved = TensorSelector(model, torch.optim.SGD(model.parameters())).state_dict()
    different = net(layers=5 if other == "rho" else 3)
    optimizer = torch.optim.SGD(different.parameters())
    selector = TensorSelector(different, optimizer, rho=0.9 if other == "rho" else 0.5)
    selector.select(lambda: loss_of(different))
    before = snapshot(different, optimizer)
    with pytest.raises(ValueError, match=f"TensorSelector.load_state_dict: {other} must be the saved run's"):
        selector.load_state_dict(saved)
    with pytest.raises(ValueError, match="state_dict must be one of TensorSelector, got one without 'rho'"):
        selector.load_state_dict({})
    mine = selector.state_dict()
    for flops in ({"forward": 1}, 3, {**mine["flops"], "dy": []}, {**mine["flops"], "groups": [[1, 2]]}):
        with pytest.raises(ValueError, match=r"load_state_dict: state_dict must be one of TensorSelector, got "):
            selector.load_state_dict({**mine, "flops": flops})
    for selection in ({"names": ["a"]}, {**mine["selection"], "more": 1}):
        with pytest.raises(ValueError, match=r"load_state_dict: state_dict must be one of TensorSelector, got "):
            selector.load_state_dict({**mine, "selection": selection})
    with pytest.raises(ValueError, match=r"load_state_dict: state_dict must be one of TensorSelector, got KeyError"):
        selector.load_state_dict({k: mine[k] for k in ("rho", "tensors")})
    with pytest.raises(ValueError, match=r"load_state_dict: selection must name the model's tensors, got \['a'\]"):
        selector.load_state_dict({**mine, "selection": {**mine["selection"], "names": ["a"]}})
    assert selector.state_dict() == mine
    assert_same(snapshot(different, optimizer), before)
