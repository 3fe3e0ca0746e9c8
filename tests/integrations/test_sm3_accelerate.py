"""SM3 that accelerate prepared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sm3.parameters import equal
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from leanops.optim import SM3

accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'leanops[dev]'")


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))


def make_data() -> DataLoader[tuple[torch.Tensor, ...]]:
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_loop_learns_with_clipping_and_accumulation(precision: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = make_model()
    opt = SM3(model.parameters(), lr=0.05, momentum_dtype=torch.int8)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=30, gamma=0.5)
    model, opt, data, schedule = accelerator.prepare(model, opt, make_data(), schedule)
    losses = []
    for _ in range(20):
        for x, y in data:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                schedule.step()
                opt.zero_grad()
                losses.append(loss.item())
    assert sum(losses[-4:]) < 0.35 * sum(losses[:4])
    assert {float(s["step"]) for s in opt.optimizer.state.values()} == {40.0}
    assert opt.param_groups[0]["lr"] == 0.025


def test_saved_states_come_back_to_the_bit(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, opt, data = accelerator.prepare(make_model(), SM3(make_model().parameters()), make_data())
    opt.optimizer.param_groups[0]["params"] = list(model.parameters())

    def epoch() -> None:
        for x, y in data:
            accelerator.backward(cross_entropy(model(x), y))
            opt.step()
            opt.zero_grad()

    epoch()
    accelerator.save_state(str(tmp_path))
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    epoch()
    first = {k: v.clone() for k, v in model.state_dict().items()}, opt.state_dict()
    accelerator.load_state(str(tmp_path))
    assert equal(dict(model.state_dict()), saved)
    epoch()
    assert equal(dict(model.state_dict()), first[0])
    assert equal(opt.state_dict()["state"], first[1]["state"])
