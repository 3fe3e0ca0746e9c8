"""TensorSelector measures each tensor's importance, and changes nothing by it."""

from __future__ import annotations

import copy

import pytest
import torch
from selection.runs import MEASURABLE, OPTIMIZERS, assert_same, loss_of, net, snapshot
from torch import Tensor, nn

from leanops.optim import TensorSelector


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


def test_importance_is_the_fall_of_the_loss_when_the_tensor_alone_moves() -> None:
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


def test_buffers_that_the_forward_pass_replaces_or_registers_are_restored() -> None:
    class ChangesBuffers(nn.Module):
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

    model = ChangesBuffers()
    seen = model.seen
    selector = TensorSelector(model, torch.optim.SGD(model.parameters()), rho=0.9)
    selector.select(lambda: model(torch.ones(2, 4)).square().mean())
    assert model.seen is seen
    assert seen == 0
    assert model.last is None
    assert set(model._buffers) == {"seen", "last"}
