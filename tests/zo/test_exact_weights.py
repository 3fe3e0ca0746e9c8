"""A step's evaluations leave every bit of the weights, also where the closure raises or is interrupted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zo.runs import DTYPES, bits

from leanops.optim import MeZO


@pytest.mark.parametrize("mode", ["scratch", "copy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_after_10000_steps_of_evaluations_no_bit_has_changed(dtype: torch.dtype, mode: str) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(70).to(dtype))
    p.data[:4] = torch.tensor([0.0, -0.0, 2.0**-140, 1e4]).to(dtype)
    before = bits(p)
    opt = MeZO([p], lr=0.0, perturb=mode)
    for _ in range(10_000):
        opt.step(lambda: (p.double() ** 2).sum())
    assert opt.steps == 10_000
    assert torch.equal(bits(p), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", ["scratch", "copy"])
def test_an_exception_in_the_closure_leaves_the_weights(mode: str, error: type[BaseException]) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(9).bfloat16())
    before = bits(p)
    opt = MeZO([p], lr=1.0, perturb=mode)
    for fail_at in (1, 2):
        calls = 0

        def closure(fail_at: int = fail_at) -> Tensor:
            nonlocal calls
            calls += 1
            value = p.double().sum()
            if calls == fail_at:
                raise error("stop")
            return value

        with pytest.raises(error, match="stop"):
            opt.step(closure)
        assert torch.equal(bits(p), before)
        assert opt.steps == 0
    opt.step(lambda: p.double().sum())
    assert not torch.equal(bits(p), before)


@pytest.mark.parametrize("mode", ["scratch", "copy"])
def test_a_closure_may_leave_grad_enabled(mode: str) -> None:
    p = nn.Parameter(torch.randn(9).bfloat16())
    before = bits(p)
    opt = MeZO([p], lr=1.0, perturb=mode)

    def closure(fails: bool) -> Tensor:
        torch.set_grad_enabled(True)
        if fails:
            raise RuntimeError("stop")
        return p.double().sum()

    with pytest.raises(RuntimeError, match="stop"):
        opt.step(lambda: closure(True))
    assert torch.equal(bits(p), before)
    opt.step(lambda: closure(False))
    assert not torch.equal(bits(p), before)


def test_an_interrupt_while_the_weights_are_restored_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.randn(9)) for _ in range(3)]
    before = [bits(p) for p in params]
    opt = MeZO(params, lr=1.0, perturb="copy")
    copy, calls = Tensor.copy_, 0

    def interrupted(self: Tensor, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return copy(self, *args)

    monkeypatch.setattr(Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step(lambda: sum(p.sum() for p in params))
    monkeypatch.undo()
    assert calls > 2
    assert all(torch.equal(a, bits(p)) for a, p in zip(before, params, strict=True))


def test_perturb_inplace_restores_the_weights_up_to_rounding_after_an_exception() -> None:
    p = nn.Parameter(torch.randn(50))
    before = p.detach().clone()

    def closure() -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        MeZO([p], perturb="inplace").step(closure)
    torch.testing.assert_close(p.detach(), before, rtol=1e-6, atol=1e-7)


def test_perturb_inplace_loses_bits_in_bf16() -> None:
    torch.manual_seed(0)
    p = nn.Parameter((0.02 * torch.randn(5000)).bfloat16())
    before = p.detach().clone()
    MeZO([p], lr=0.0, perturb="inplace").step(lambda: p.sum())
    assert float((p != before).float().mean()) > 0.2


def test_autograd_notices_the_update() -> None:
    p = nn.Parameter(torch.randn(4))
    loss = (p**2).sum()
    MeZO([p], lr=1.0).step(lambda: p.sum())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
