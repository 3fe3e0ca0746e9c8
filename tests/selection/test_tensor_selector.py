"""GreenTrainer's selection: the budget, the best set of tensors, and resumed runs."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from selection.models import MODELS, Adapter
from selection.runs import (
    BLOCK_DW,
    MEASURABLE,
    OPTIMIZERS,
    Net,
    assert_same,
    backward_flops,
    brute_force,
    loss_of,
    net,
    snapshot,
    state_bytes,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from leanops.optim import SM3, TensorSelection, TensorSelector


@pytest.mark.parametrize("rho", [0.4, 0.5, 0.67, 0.8, 1.0])
@pytest.mark.parametrize("name", ["blocks", "tied head", "gpt2"])
def test_the_budget_is_kept_and_reported(name: str, rho: float) -> None:
    """A whole step, both passes counted by torch, costs at most the share rho of a step that trains everything."""
    model = MODELS[name]().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = TensorSelector(model, optimizer, rho=rho)
    report = selector.select(lambda: loss_of(model))
    assert selector.trainable == [n for n, p in model.named_parameters() if p.requires_grad]
    assert set(selector.trainable) == set(report.names)
    with FlopCounterMode(display=False) as forward:
        loss = loss_of(model)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    spent = forward.get_total_flops() + backward.get_total_flops()
    assert (report.forward, report.backward) == (forward.get_total_flops(), backward.get_total_flops())
    assert report.backward <= report.cost <= report.budget
    assert spent <= rho * (report.forward + report.full_backward)
    assert report.rho == pytest.approx(spent / (report.forward + report.full_backward))
    assert report.exact
    assert selector.measure(lambda: loss_of(model)) == (report.forward, report.backward)
    assert f"{report.rho:.1%} of full training" in str(report)
    if rho == 1.0:
        assert set(report.names) == {n for n, i in selector.importance(lambda: loss_of(model)).items() if i > 0}


def test_a_selection_that_would_cost_more_than_the_budget_is_refused() -> None:
    """The hook makes the frozen embedding's output a leaf, so all gradients of activations are computed."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model).backward()
    optimizer.step()
    model.embed.register_forward_hook(lambda m, x, out: out.requires_grad_(True))  # enable_input_require_grads()
    selector = TensorSelector(model, optimizer, rho=0.5)
    before = snapshot(model, optimizer)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"closure must have a backward pass of at most [\d,]+ FLOPs .*, got [\d,]"
        ):
            selector.select(lambda: loss_of(model))
        assert_same(snapshot(model, optimizer), before)
        assert selector.selection is None


@pytest.mark.parametrize("rho", [0.5, 0.7])
def test_flops_of_recomputed_activations_count(rho: float) -> None:
    model = net()

    def closure() -> Tensor:
        x = model.embed(torch.arange(11))
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return model.head(x).square().mean()

    selector = TensorSelector(model, torch.optim.AdamW(model.parameters()), rho=rho)
    report = selector.select(closure)
    assert (report.forward, report.backward) == selector.measure(closure)
    assert report.backward <= report.budget


def test_flops_are_measured_again_where_another_batch_would_miss_the_budget() -> None:
    """Two experts share ten tokens: the forward FLOPs stay the same, and an expert's cost follows its tokens."""
    experts = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    x, unit = torch.randn(10, 4), 2 * 4 * 4

    def batch(first: int) -> Tensor:
        return experts["a"](x[:first]).square().mean() + experts["b"](x[first:]).square().mean()

    selector = TensorSelector(experts, torch.optim.SGD(experts.parameters()), rho=0.75)
    importance = {"a.weight": 1.0, "b.weight": 1.0}
    report = selector.select(lambda: batch(9), importance=importance)
    assert (report.names, report.backward, report.budget) == (("b.weight",), unit, 5 * unit)
    report = selector.select(lambda: batch(1), importance=importance)
    assert (report.names, report.backward) == (("a.weight",), unit)
    assert selector.trainable == ["a.weight"]


def test_the_backward_budget_is_the_published_one() -> None:
    """ρ_bp T_bp with ρ_bp = ρ (1 + T_fp / T_bp) - T_fp / T_bp."""
    model = net()
    selector = TensorSelector(model, torch.optim.SGD(model.parameters()), rho=0.6)
    r = selector.select(lambda: loss_of(model))
    t_fp, t_bp = r.forward, r.full_backward
    assert r.budget == int((0.6 * (1 + t_fp / t_bp) - t_fp / t_bp) * t_bp)


def test_the_selection_is_the_best_of_all_sets_of_tensors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(7, 4)
    selector = TensorSelector(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.65)
    report = selector.select(lambda: model(x).square().mean())
    importance = selector.importance(lambda: model(x).square().mean())
    flops = selector.flops
    assert flops is not None
    best = brute_force(
        np.array([importance[n] for n in flops.names]), np.array(flops.dw), np.array(flops.dy), report.budget
    )
    assert report.importance == pytest.approx(best, rel=1e-9)


def test_tensors_that_are_not_selected_cost_nothing() -> None:
    """They have no gradient and no state, and nothing is computed below the deepest selected tensor."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    full = backward_flops(lambda: loss_of(model))
    model.zero_grad()
    importance = {n: 1.0 if n == "layers.4.up_proj.weight" else 0.0 for n, _ in model.named_parameters()}
    selector = TensorSelector(model, optimizer, rho=0.9)
    selector.profile(lambda: loss_of(model))
    report = selector.select(importance=importance)
    assert report.names == ("layers.4.up_proj.weight",)
    p = model.layers[4].up_proj.weight
    assert state_bytes(optimizer) == 8 * p.numel() + 4
    head, down_proj = 2 * 12 * 8 * 11, BLOCK_DW // 2  # gradients of activations on the way to up_proj
    assert backward_flops(lambda: loss_of(model)) == head + down_proj + BLOCK_DW // 2 < full
    assert [q.grad is not None for q in model.parameters()] == [q is p for q in model.parameters()]
    selector.release()
    assert all(q.requires_grad for q in model.parameters())


@pytest.mark.parametrize("name", MEASURABLE)
def test_a_run_resumes_to_the_same_bits_between_selections(name: str) -> None:
    def train(model: Net, optimizer: torch.optim.Optimizer, selector: TensorSelector, first: int, last: int) -> None:
        for step in range(first, last):
            if step % 4 == 0:
                selector.select(lambda step=step: loss_of(model, step))
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()

    def make(seed: int) -> tuple[Net, torch.optim.Optimizer, TensorSelector]:
        model = net(seed=seed)
        optimizer = OPTIMIZERS[name][0](model.parameters())
        return model, optimizer, TensorSelector(model, optimizer, rho=0.7)

    model, optimizer, selector = make(0)
    train(model, optimizer, selector, 0, 6)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), selector.state_dict()], file)
    train(model, optimizer, selector, 6, 13)
    for optimizer_first in (True, False):
        file.seek(0)
        weights, state, chosen = torch.load(file, weights_only=True)
        again, resumed, other = make(1)
        again.load_state_dict(weights)
        if optimizer_first:
            resumed.load_state_dict(state)
        other.load_state_dict(chosen)
        if not optimizer_first:
            resumed.load_state_dict(state)
        assert isinstance(other.selection, TensorSelection)
        train(again, resumed, other, 6, 13)
        assert_same(snapshot(again, resumed), snapshot(model, optimizer))
        assert other.state_dict() == selector.state_dict()


def test_a_state_of_thousands_of_tensors_is_read_as_weights_and_as_json() -> None:
    model = nn.ParameterList(torch.ones(1, 1) for _ in range(2100))

    def make() -> TensorSelector:
        for p in model:
            p.requires_grad_(True)
        return TensorSelector(model, torch.optim.SGD(model, lr=0.1), rho=0.8)

    selector = make()
    selector.select(lambda: sum(torch.ones(1, 1) @ p for p in model).sum())
    file = io.BytesIO()
    torch.save(selector.state_dict(), file)
    file.seek(0)
    for state in (torch.load(file, weights_only=True), json.loads(json.dumps(selector.state_dict()))):
        again = make()
        again.load_state_dict(state)
        assert again.flops == selector.flops
        assert again.selection == selector.selection
        assert set(again.trainable) == set(selector.selection.names)


def test_loading_frees_the_state_of_a_running_optimizer() -> None:
    model = net()
    selector = TensorSelector(model, torch.optim.AdamW(model.parameters()))
    selector.select(lambda: loss_of(model))
    other = net()
    optimizer = torch.optim.AdamW(other.parameters())
    loss_of(other).backward()
    optimizer.step()
    TensorSelector(other, optimizer).load_state_dict(selector.state_dict())
    assert state_bytes(optimizer) == sum(8 * p.numel() + 4 for p in other.parameters() if p.requires_grad)


def test_tensors_without_a_gradient_are_not_selected() -> None:
    model = net()
    selector = TensorSelector(model, torch.optim.AdamW(model.parameters()), rho=1.0)

    def closure() -> Tensor:
        return model.head(model.final(model.layers[0](torch.ones(2, 8)))).square().mean()

    report = selector.select(closure)
    assert not any(n.startswith(("embed", "layers.1", "layers.2")) for n in report.names)
    assert not model.embed.weight.requires_grad


def test_adapters_on_a_frozen_model_are_selected_among() -> None:
    model = Adapter()
    trainable = [p for p in model.parameters() if p.requires_grad]
    selector = TensorSelector(model, SM3(trainable, lr=0.1), rho=0.75)
    report = selector.select(lambda: loss_of(model))
    assert set(report.names) < {"a", "b", "before.weight", "before.bias"}
    assert not model.base.weight.requires_grad
