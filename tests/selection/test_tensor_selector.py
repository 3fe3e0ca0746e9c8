"""GreenTrainer's selection: importance, the budget, and resumed runs."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from gloo import distributed, spawn
from selection.models import MODELS, Adapter
from selection.runs import (
    BLOCK_DW,
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

from leanops.optim import SM3, MeZO, TensorSelection, TensorSelector

MEASURABLE = [name for name in OPTIMIZERS if not name.endswith("in-backward")]  # see test_steps_inside_of_the_backward

# --- importance -----------------------------------------------------------------------------------------------------


def test_importance_of_plain_descent_is_the_squared_gradient() -> None:
    r"""Δw = -η g, so I = η Σ g²."""
    model = net()
    selector = TensorSelector(model, torch.optim.SGD(model.parameters(), lr=0.3))
    found = selector.importance(lambda: loss_of(model))
    loss_of(model).backward()
    for name, p in model.named_parameters():
        assert found[name] == pytest.approx(0.3 * float((p.grad**2).sum()), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("name", MEASURABLE)
def test_importance_is_the_gradient_times_the_next_step(name: str) -> None:
    """I = -Σ g Δw, where Δw is the optimizer's next step with its state, learning rate and decay."""
    model = net().double()
    optimizer = OPTIMIZERS[name][0](model.parameters())
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = TensorSelector(model, optimizer).importance(lambda: loss_of(model, 3))
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 3).backward()
    optimizer.step()
    for (n, p), w in zip(model.named_parameters(), before, strict=True):
        assert found[n] == pytest.approx(-float((p.grad * (p.detach() - w)).sum()), rel=1e-6, abs=1e-15)


def test_importance_follows_options_that_are_loaded_or_scheduled() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    selector = TensorSelector(model, optimizer)
    first = selector.importance(lambda: loss_of(model))
    other = torch.optim.SGD(model.parameters(), lr=0.3)
    optimizer.load_state_dict(other.state_dict())  # loading replaces the groups
    assert all(
        i == pytest.approx(3 * first[n], rel=1e-3) for n, i in selector.importance(lambda: loss_of(model)).items()
    )


def test_importance_is_how_far_the_loss_falls_by_the_tensor_alone() -> None:
    """To first order: for a small step, the measured fall agrees within a percent."""
    model = net().double()
    selector = TensorSelector(model, torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0))
    found = selector.importance(lambda: loss_of(model))
    before = loss_of(model).item()
    for name, p in model.named_parameters():
        loss_of(model).backward()
        assert p.grad is not None
        with torch.no_grad():
            old = p.clone()
            p -= 1e-6 * torch.sign(p.grad) * (p.grad.abs() > 1e-6)  # Adam's first step without its eps
            fall = before - loss_of(model).item()
            p.copy_(old)
        model.zero_grad()
        assert fall == pytest.approx(found[name], rel=1e-2, abs=1e-11)


@pytest.mark.parametrize("name", MEASURABLE)
def test_measuring_changes_nothing(name: str) -> None:
    """Weights, gradients, state, buffers, random generators, hooks and scheduler are unchanged after it."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    optimizer = OPTIMIZERS[name][0](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    x = torch.randn(8, 4)
    model(x).square().mean().backward()
    optimizer.step()
    scheduler.step()
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    before, buffers = snapshot(model, optimizer), copy.deepcopy(dict(model.named_buffers()))
    rng, options = torch.get_rng_state(), copy.deepcopy(optimizer.state_dict()["param_groups"])
    grads = [p.grad for p in model.parameters()]
    selector = TensorSelector(model, optimizer)
    selector.profile(lambda: model(x).square().mean())
    selector.importance(lambda: model(x).square().mean())
    selector.measure(lambda: model(x).square().mean())
    assert_same(snapshot(model, optimizer), before)
    assert_same(dict(model.named_buffers()), buffers)
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same(optimizer.state_dict()["param_groups"], options)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert not called
    optimizer.step()
    assert called == [1]


def test_buffers_that_the_forward_pass_binds_anew_are_restored() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("last", None)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            self.last = x.mean().detach()
            if "late" not in self._buffers:
                self.register_buffer("late", x.detach())
            return self.lin(x)

    model = Counts()
    seen = model.seen
    selector = TensorSelector(model, torch.optim.SGD(model.parameters()), rho=0.9)
    selector.select(lambda: model(torch.ones(2, 4)).square().mean())
    assert model.seen is seen
    assert seen == 0
    assert model.last is None
    assert set(model._buffers) == {"seen", "last"}


# --- the selection --------------------------------------------------------------------------------------------------


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
def test_what_is_recomputed_is_counted(rho: float) -> None:
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


def test_flops_are_measured_anew_where_another_batch_would_miss_the_budget() -> None:
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


def test_what_is_not_selected_costs_nothing() -> None:
    """Frozen tensors have no gradient, no gradient computation (none at all below the deepest) and no state."""
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
    head, way = 2 * 12 * 8 * 11, BLOCK_DW // 2
    assert backward_flops(lambda: loss_of(model)) == head + way + BLOCK_DW // 2 < full
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
    for first in ("optimizer", "selector"):
        file.seek(0)
        weights, state, chosen = torch.load(file, weights_only=True)
        again, resumed, other = make(1)
        again.load_state_dict(weights)
        for what in (first, "selector" if first == "optimizer" else "optimizer"):
            if what == "optimizer":
                resumed.load_state_dict(state)
            else:
                other.load_state_dict(chosen)
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


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0, -0.1, 1.5, True, "half", float("nan")])
def test_a_bad_rho_is_refused(rho: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"TensorSelector: rho must be in \(0, 1\], got"):
        TensorSelector(model, torch.optim.SGD(model.parameters()), rho=rho)


def test_steps_inside_of_the_backward_pass_are_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match="TensorSelector: optimizer must not step inside the backward pass"):
        TensorSelector(model, OPTIMIZERS["AdamW-in-backward"][0](model.parameters()))


def test_steps_without_a_backward_pass_are_refused() -> None:
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
