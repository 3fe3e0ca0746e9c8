"""MeZO with a model and data that accelerate prepared."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from leanops.optim import MeZO, replay_

accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'leanops[dev]'")


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))


def test_a_loop_over_prepared_objects_learns_and_replays() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32)
    model = make_model()
    opt = MeZO(model.parameters(), lr=2e-2, distribution="rademacher", model=model)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=50, gamma=0.5)
    prepared, data, schedule = accelerator.prepare(model, data, schedule)
    with torch.no_grad():
        before = cross_entropy(model(x), x[:, :4].argmax(1)).item()
    for _ in range(40):
        for inputs, labels in data:
            opt.step(lambda inputs=inputs, labels=labels: cross_entropy(prepared(inputs), labels))
            schedule.step()
    with torch.no_grad():
        assert cross_entropy(model(x), x[:, :4].argmax(1)).item() < before - 0.05
    start = make_model()
    replay_(start, opt.log)
    assert all(torch.equal(p, q) for p, q in zip(start.parameters(), model.parameters(), strict=True))


def test_the_prepared_optimizer_passes_the_closure_on() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    opt = accelerator.prepare(MeZO(model.parameters(), lr=1e-3, model=model))
    x, y = torch.randn(8, 16), torch.randint(4, (8,))
    opt.step(lambda: cross_entropy(model(x), y))
    assert opt.optimizer.steps == 1
