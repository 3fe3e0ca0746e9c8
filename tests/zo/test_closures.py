"""What a MeZO step says of a closure that changes its own inputs, or calls backward()."""

from __future__ import annotations

import traceback
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from leanops.optim import MeZO, SeedPool


def make() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    return nn.Linear(8, 3), x, x[:, :3].argmax(1)


def told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("perturb", ["copy", "scratch"])
@pytest.mark.parametrize("first_step", [True, False])
def test_an_evaluation_that_fails_after_another_says_that_the_closure_changes_its_inputs(
    perturb: str, first_step: bool
) -> None:
    model, x, y = make()
    opt = MeZO(model.parameters(), lr=1e-2, model=model, perturb=perturb)
    if not first_step:
        opt.step(lambda: cross_entropy(model(x), y))
    batch = {"x": x, "labels": y}
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError, match="labels") as caught:
        opt.step(lambda: cross_entropy(model(batch["x"]), batch.pop("labels")))
    assert "MeZO.step: evaluation 2 of the closure in this step failed" in told(caught.value)
    assert "must not pop() from its batch" in told(caught.value)
    assert all(map(torch.equal, before, model.parameters()))
    opt.step(lambda: cross_entropy(model(x), y))


def test_a_loss_of_another_shape_says_so_too_and_seed_pools_do() -> None:
    model, *_ = make()
    losses = [torch.ones(()), torch.ones(3)]
    with pytest.raises(ValueError, match=r"must return a real scalar, got .*\[3\]") as caught:
        SeedPool(4).step_(model, lambda: losses.pop(0), 0)
    assert "SeedPool.step_: evaluation 2 of the closure" in told(caught.value)


def test_a_closure_that_fails_at_once_gets_no_note() -> None:
    model, x, y = make()
    opt = MeZO(model.parameters(), model=model)
    for error in (ValueError("wrong"), torch.OutOfMemoryError("full"), KeyboardInterrupt()):
        calls = []

        def closure(error: BaseException = error, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            if isinstance(error, ValueError) or len(calls) > 1:
                raise error
            return cross_entropy(model(x), y)

        with pytest.raises(type(error)) as caught:
            opt.step(closure)
        assert caught.value is error
        assert not getattr(caught.value, "__notes__", [])


def test_without_notes_a_warning_says_it() -> None:
    """As in Python 3.10."""

    class Failed(Exception):
        add_note = None  # type: ignore[assignment]

    model, x, y = make()
    inputs = iter([x])

    def closure() -> Tensor:
        for batch in inputs:
            return cross_entropy(model(batch), y)
        raise Failed

    with pytest.raises(Failed), pytest.warns(UserWarning, match="evaluation 2 of the closure .* exhaust an iterator"):
        MeZO(model.parameters(), model=model).step(closure)


@pytest.mark.parametrize("change", ["value", "nan"])
def test_a_closure_that_writes_into_its_inputs_is_noticed_at_the_first_step(change: str) -> None:
    model, x, y = make()

    def closure() -> Tensor:
        loss = cross_entropy(model(x), y)
        x.mul_(3.0) if change == "value" else x.fill_(torch.nan)
        return loss

    opt = MeZO(model.parameters(), model=model, on_nonfinite="skip")
    with pytest.warns(UserWarning, match="two evaluations .* at the same weights .* changes its own inputs"):
        opt.step(closure)


def test_a_closure_that_keeps_its_inputs_is_passed_in_silence() -> None:
    model, x, y = make()
    count, buffer = [0], torch.empty(())

    def closure() -> float | Tensor:
        count[0] += 1
        buffer.copy_(cross_entropy(model(x), y))  # the same memory each time
        return buffer.item() if count[0] % 2 else buffer

    opt = MeZO(model.parameters(), model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            opt.step(closure)


# --- backward() -------------------------------------------------------------------------------------------------------


def descending(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    def closure() -> Tensor:
        with torch.enable_grad():
            loss = cross_entropy(model(x), y)
            loss.backward()
        return loss

    return closure


def test_a_closure_that_calls_backward_is_told_once() -> None:
    model, x, y = make()
    opt = MeZO(model.parameters(), model=model, perturb="copy")
    with pytest.warns(UserWarning, match=r"closure calls backward\(\).*must only return") as caught:
        opt.step(descending(model, x, y))
    assert len(caught) == 1
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(descending(model, x, y))


def test_a_backward_that_fails_names_the_closure() -> None:
    """Perturbed weights that are made where they are used have no gradient."""
    model, x, y = make()
    opt = MeZO(model.parameters(), model=model, perturb="scratch")
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        opt.step(descending(model, x, y))
    assert "MeZO.step: the closure calls backward(), which costs" in told(caught.value)


def test_gradients_that_were_there_before_tell_nothing() -> None:
    model, x, y = make()
    cross_entropy(model(x), y).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MeZO(model.parameters(), model=model).step(lambda: cross_entropy(model(x), y))
