"""Runs of MeZO resume, can be copied, and survive steps that fail."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from zo.runs import loss_of, mlp

from leanops.optim import MeZO, ZoLog, replay_
from leanops.optim.zo import strategy


@pytest.mark.parametrize("options", [{}, {"momentum": 0.7}, {"momentum": 0.7, "momentum_mode": "store"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_resumes_to_the_same_bits(options: dict[str, Any], dtype: torch.dtype) -> None:
    def start() -> tuple[nn.Module, MeZO, Any]:
        model = mlp(dtype)
        opt = MeZO(model.parameters(), lr=1e-2, seed=11, rounding="stochastic", **options)
        return model, opt, torch.optim.lr_scheduler.LinearLR(opt, total_iters=6)

    whole, opt, schedule = start()
    for _ in range(6):
        opt.step(loss_of(whole, dtype))
        schedule.step()
    half, opt, schedule = start()
    for _ in range(3):
        opt.step(loss_of(half, dtype))
        schedule.step()
    file = io.BytesIO()
    torch.save([half.state_dict(), opt.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    weights, state, scheduled = torch.load(file, weights_only=True)
    model, opt, schedule = start()
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    schedule.load_state_dict(scheduled)
    for _ in range(3):
        opt.step(loss_of(model, dtype))
        schedule.step()
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    assert opt.steps == 6


@pytest.mark.parametrize("before", [0, 3])
def test_a_run_resumes_right_after_a_group_has_joined(before: int) -> None:
    """Momentum starts anew where the group joins. The saved state says so even before the next step."""

    def start(groups: int) -> tuple[nn.Module, MeZO]:
        model = mlp()
        layers = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.1}]
        return model, MeZO(layers[:groups], lr=1e-2, momentum=0.7)

    whole, opt = start(1)
    for _ in range(before):
        opt.step(loss_of(whole))
    opt.add_param_group({"params": whole[3].parameters(), "lr": 0.1})
    model, again = start(2)
    model.load_state_dict(whole.state_dict())
    again.load_state_dict(opt.state_dict())
    for _ in range(3):
        opt.step(loss_of(whole))
        again.step(loss_of(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    assert again.log.to_bytes() == opt.log.to_bytes()


def test_the_log_before_the_first_step_is_that_of_the_run() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = MeZO([p], lr=1e-2)
    log = opt.log
    p.data = p.data.bfloat16()
    state = opt.state_dict()
    opt.step(lambda: p.sum())
    assert log is opt.log
    assert len(log) == 1
    again = MeZO([nn.Parameter(torch.ones(3).bfloat16())])
    again.load_state_dict(state)
    assert again.steps == 0


def test_an_update_that_fails_is_no_step(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no trace in the momentum, in the log or in a resumed run, and the log's file replays to the weights."""
    p = nn.Parameter(torch.ones(3))
    opt = MeZO([p], lr=0.1, momentum=0.5, log_file=tmp_path / "run.zolog")
    for step in range(6):
        if step in (0, 3):
            opt.param_groups[0]["lr"] = 0.3
            with monkeypatch.context() as patch:
                patch.setattr(strategy, "apply_", failing)
                with pytest.raises(MemoryError):
                    opt.step(lambda: p.square().sum())
            opt.param_groups[0]["lr"] = 0.1
            saved = p.detach().clone(), opt.state_dict()
        opt.step(lambda: p.square().sum())
    opt.log.close()
    saved_weights, saved_state = saved
    start, resumed = torch.ones(3), nn.Parameter(saved_weights)
    replay_([start], tmp_path / "run.zolog")
    assert torch.equal(start, p)
    again = MeZO([resumed])
    again.load_state_dict(saved_state)
    for _ in range(3):
        again.step(lambda: resumed.square().sum())
    assert torch.equal(resumed, p)
    start = torch.ones(3)
    replay_([start], again.log)
    assert torch.equal(start, p)


def failing(*_: Any) -> None:
    raise MemoryError


def test_copies_and_pickles_continue_alike() -> None:
    model = mlp()
    opt = MeZO(model.parameters(), lr=1e-2, momentum=0.5, momentum_mode="store")
    opt.step(loss_of(model))
    runs = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt))), (model, opt)]
    for m, o in runs:
        o.step(loss_of(m))
        o.step(loss_of(m))
    for m, o in runs[:2]:
        assert all(torch.equal(a, b) for a, b in zip(m.parameters(), model.parameters(), strict=True))
        assert o.log.to_bytes() == opt.log.to_bytes()


def test_hooks_run_and_added_groups_move() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    opt = MeZO([a], lr=1e-2)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    opt.step(lambda: a.sum() + b.sum())
    assert calls == ["pre", "post"]
    assert not b.any()
    opt.add_param_group({"params": [b], "lr": 1.0})
    opt.step(lambda: a.sum() + b.sum())
    assert b.all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_change_nothing(bad: float) -> None:
    p = nn.Parameter(torch.randn(5))
    before = p.detach().clone()
    opt = MeZO([p], lr=1.0, weight_decay=0.5)
    with pytest.raises(FloatingPointError, match="step 0: a loss, or the estimate from it in fp32, is not finite"):
        opt.step(lambda: p.sum() * bad)
    assert torch.equal(p, before)
    assert len(opt.log) == 0
    opt = MeZO([p], lr=1.0, weight_decay=0.5, on_nonfinite="skip")
    opt.step(lambda: p.sum() * bad)
    assert torch.equal(p, before)
    assert [s.scalars for s in opt.log.steps()] == [None]
    opt.step(lambda: p.sum())
    assert not torch.equal(p, before)


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({}, 1e308),  # the estimate, or the sum of two, overflows
        ({"variant": "fzoo", "directions": 3}, 1e200),  # their squares overflow
        ({"variant": "hizoo", "eps": 1e-170}, 1.0),  # eps^2 underflows
    ],
)
def test_an_estimate_that_overflows_fp64_is_skipped_like_a_loss_that_is_not_finite(
    options: dict[str, Any], loss: float
) -> None:
    p = nn.Parameter(torch.randn(5))
    before = p.detach().clone()
    opt = MeZO([p], lr=1e-3, on_nonfinite="skip", **options)
    values = iter([loss, 0.5 * loss] * 4)
    opt.step(lambda: next(values) * float(p.abs().sum() > 0))
    assert [s.scalars for s in opt.log.steps()] == [None]
    assert torch.equal(p, before)


def test_a_first_step_that_fails_leaves_no_log_file(tmp_path: Any) -> None:
    p = nn.Parameter(torch.randn(5))
    opt = MeZO([p], log_file=tmp_path / "run.zolog")
    for bad, error in ((lambda: 1 / 0, ZeroDivisionError), (lambda: math.nan, FloatingPointError)):
        with pytest.raises(error):
            opt.step(bad)
        assert not (tmp_path / "run.zolog").exists()
    opt.step(lambda: p.sum())
    opt.log.close()
    assert len(ZoLog.load(tmp_path / "run.zolog")) == 1
