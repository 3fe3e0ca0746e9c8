"""Closures with compiled functions: MeZO keeps them compiled, or warns where they run eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zo.estimates import EPS, estimates

from leanops.optim import MeZO
from leanops.optim.zo import estimate


class Counting:
    """A backend of torch.compile that counts the runs of its graphs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def small() -> tuple[nn.Module, Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Small(), torch.randn(3, 5)


def compiled_in_place(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    model.compile(backend=backend)
    return model


COMPILED: dict[str, Callable[[nn.Module, Any], Callable[[Tensor], Tensor]]] = {
    "module": lambda m, backend: torch.compile(m, backend=backend),
    "function": lambda m, backend: torch.compile(lambda x: m(x), backend=backend),
    "inner module": lambda m, backend: nn.Sequential(torch.compile(m, backend=backend), nn.Identity()),
    "in place": compiled_in_place,
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", COMPILED)
def test_a_compiled_closure_stays_compiled(
    kind: str, warm: bool, no_warning: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "SMALL", 0)  # let auto be scratch
    model, x = small()
    params = list(model.parameters())
    wanted = estimates(params, lambda: model(x).square().mean(), 3, lr=1e-2, perturb="copy")
    model, x = small()
    params = list(model.parameters())
    backend = Counting()
    opt = MeZO(params, lr=1e-2, eps=EPS, model=None if kind == "in place" else model)
    compiled = COMPILED[kind](model, backend)
    if warm:
        with torch.no_grad():
            compiled(x)
        backend.runs = 0
    for _ in range(3):
        opt.step(lambda: compiled(x).square().mean())
    assert backend.runs == 2 * 3 + 1  # the first step adds a compiled and an eager evaluation
    assert opt.log.scalars().ravel().tolist() == wanted


def test_a_compiled_closure_that_runs_eagerly_gets_one_warning(no_warning: None) -> None:
    model, x = small()
    backend = Counting()
    compiled = torch.compile(model, backend=backend)
    opt = MeZO(model.parameters(), lr=1e-2, perturb="scratch")
    with pytest.warns(UserWarning, match=r"torch\.compile.*perturb='copy'"):
        opt.step(lambda: compiled(x).square().mean())
    opt.step(lambda: compiled(x).square().mean())
    assert backend.runs == 0


def test_a_compiled_function_without_weights_does_not_cost_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "SMALL", 0)
    model, x = small()
    loss = torch.compile(lambda y: y.square().mean(), backend="eager")
    opt = MeZO(model.parameters(), lr=0.0)
    with pytest.warns(UserWarning, match=r"torch\.compile"):
        opt.step(lambda: loss(model(x)))
    assert opt._evaluator._perturber.held is None  # type: ignore[union-attr]


def test_an_eager_closure_in_a_compiled_step_gets_no_warning(no_warning: None) -> None:
    model, x = small()
    opt = MeZO(model.parameters(), lr=0.0, perturb="scratch")
    torch.compile(lambda: opt.step(lambda: model(x).sum()), backend="eager")()
    assert opt.steps == 1
