"""A closure may keep a view of a perturbed weight beyond the evaluation: the view then follows its weight."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zo.estimates import EPS, estimates, spsa

import leanops as lo
from leanops.common import seeds as seed_rule
from leanops.optim import MeZO
from leanops.optim.zo import estimate


class Caching(nn.Module):
    """Makes something of its weight at the first call, and keeps it."""

    def __init__(self, make: Callable[[Tensor], Any], use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(3))
        self.make, self.use = make, use
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.make(self.weight)
        return self.use(x, self.kept) + self.bias


CACHES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor, Any], Tensor]]] = {
    "a view": (lambda w: w.detach().view(-1), lambda x, kept: x @ kept.view(3, 4).T),
    "a slice": (lambda w: w.detach()[1:], lambda x, kept: nn.functional.pad(x @ kept.T, (1, 0))),
    "a transpose": (lambda w: w.t(), lambda x, kept: x @ kept),
    "rows": (lambda w: list(w.unbind()), lambda x, kept: x @ torch.stack(kept).T),
    "another dtype": (
        lambda w: w.detach().view(torch.int32),
        lambda x, kept: x @ kept.view(torch.float32).T,
    ),
    "a function's cache": (lambda w: functools.partial(torch.mm, mat2=w.t()), lambda x, kept: kept(x)),
}


@pytest.mark.parametrize("mode", ["scratch", "auto"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_kept_view_follows_its_weight(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "SMALL", 0)  # let auto be scratch
    torch.manual_seed(0)
    model, x = Caching(*CACHES[kind]), torch.randn(5, 4)
    twin = Caching(*CACHES[kind])
    twin.load_state_dict(model.state_dict())
    opt = MeZO(model.parameters(), lr=1e-2, eps=EPS, perturb=mode)
    other = MeZO(twin.parameters(), lr=1e-2, eps=EPS, perturb="copy")
    with pytest.warns(UserWarning, match=r"still referred to.*: 0\."):
        opt.step(lambda: model(x).square().mean())
    for _ in range(3):
        opt.step(lambda: model(x).square().mean())
    for _ in range(4):
        other.step(lambda: twin(x).square().mean())
    assert opt.log.scalars().tolist() == other.log.scalars().tolist()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))  # between steps, too
        model.weight.zero_()
        assert torch.equal(model(x), model.bias.expand(5, 3))


def test_a_view_that_is_kept_at_a_later_step_follows_its_weight() -> None:
    torch.manual_seed(0)
    model, x = Caching(*CACHES["a view"]), torch.randn(5, 4)

    def closure(keep: bool) -> Tensor:
        if keep:
            return model(x).square().mean()
        return (x @ model.weight.T + model.bias).square().mean()

    opt = MeZO(model.parameters(), lr=0.0, eps=EPS, perturb="scratch")
    for _ in range(3):
        opt.step(lambda: closure(False))
    with pytest.warns(UserWarning, match="still referred to"):
        opt.step(lambda: closure(True))
    wanted = spsa(list(model.parameters()), lambda: closure(False), step=3)
    assert opt.log.scalars()[3, 0] == pytest.approx(wanted, rel=1e-5)


def test_memory_that_a_numpy_array_keeps_stays_valid() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(64))
    kept: list[Any] = []

    def closure() -> Tensor:
        if not kept:
            kept.append(p.detach().numpy())
        return p.sum()

    with pytest.warns(UserWarning, match="NumPy"):
        estimates([p], closure, perturb="scratch")
    gc.collect()
    filler = [torch.zeros(64) for _ in range(1000)]
    seen = torch.empty(64)
    lo.zo_axpy_into_(seen, p.detach(), seed_rule.derive(0, 0, 0), EPS)
    assert np.array_equal(kept[0], seen.numpy())
    assert filler


def test_a_view_in_a_cycle_of_references_is_not_taken_for_kept(no_warning: None) -> None:
    p = nn.Parameter(torch.randn(4))

    def closure() -> Tensor:
        cycle: list[Any] = [p.detach()]
        cycle.append(cycle)
        return cycle[0].sum()

    opt = MeZO([p], lr=0.0, perturb="scratch")
    opt.step(closure)
    assert opt._evaluator._perturber.held is None  # type: ignore[union-attr]


def test_a_view_that_an_aborted_evaluation_kept_is_found_by_the_next() -> None:
    torch.manual_seed(0)
    model, x = Caching(*CACHES["a view"]), torch.randn(5, 4)
    fails = True

    def closure() -> Tensor:
        loss = model(x).square().mean()
        if fails:
            raise MemoryError("stop")
        return loss

    opt = MeZO(model.parameters(), lr=0.0, eps=EPS, perturb="scratch")
    with pytest.raises(MemoryError):
        opt.step(closure)
    fails = False
    with pytest.warns(UserWarning, match="still referred to"):
        opt.step(closure)
    assert [float(g) for g in opt.log.scalars()[:, 0]] == [spsa(list(model.parameters()), closure)]
