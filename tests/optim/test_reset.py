"""reset_momentum_: later steps equal those of a new optimizer, and state without a known start value is made anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from selection.runs import assert_same, loss_of, net
from torch import Tensor, nn
from torch.optim import Optimizer

from leanops.optim import SM3, MeZO, fuse_into_backward, reset_momentum_

F64 = torch.float64
Make = Callable[[Iterable[Any]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD-plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    "Adam-foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "AdamW-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, t0=2),
    "AdamW-in-backward": lambda p: fuse_into_backward(torch.optim.AdamW, p, lr=0.1),
    "SM3": lambda p: SM3(p, lr=0.1),
    "SM3-int8": lambda p: SM3(p, lr=0.1, momentum_dtype=torch.int8),
}


def steps(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_steps_after_it_are_those_of_a_new_optimizer(name: str) -> None:
    """To the bit, for every optimizer of torch that has state by parameter, and for SM3 with its covers."""
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, 0, 5)
    before = weights(model)
    if name.startswith("SM3"):
        reset_momentum_(optimizer, covers=True)
    else:
        reset_momentum_(optimizer)
    assert_same(weights(model), before)  # weights stay
    fresh = copy.deepcopy(model)
    new = OPTIMIZERS[name](fresh.parameters())
    steps(model, optimizer, 5, 8)
    steps(fresh, new, 5, 8)
    assert_same(weights(model), weights(fresh))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_entries_stay_where_they_are_in_memory(name: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, 0, 3)
    before = {
        (i, k): v.data_ptr()
        for i, state in enumerate(optimizer.state.values())
        for k, v in state.items()
        if isinstance(v, Tensor)
    }
    reset_momentum_(optimizer)
    after = {
        (i, k): v.data_ptr()
        for i, state in enumerate(optimizer.state.values())
        for k, v in state.items()
        if isinstance(v, Tensor)
    }
    assert after == before


def test_moments_and_the_step_count_are_zero() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer, 0, 3)
    reset_momentum_(optimizer)
    for state in optimizer.state.values():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(float(v.abs().sum()) == 0 for v in state.values())


def test_without_the_step_count_the_next_update_would_be_3_16_times_too_large() -> None:
    """Moments of 0 with an old count t make the update (1 - .9) / sqrt(1 - .999) times as large, if t is large."""
    updates = {}
    for reset in ("moments", "both"):
        p = nn.Parameter(torch.ones(4, dtype=F64))
        optimizer = torch.optim.Adam([p], lr=1e-3, eps=0.0, betas=(0.9, 0.999))
        for _ in range(20000):
            p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        if reset == "both":
            reset_momentum_(optimizer)
        else:
            optimizer.state[p]["exp_avg"].zero_()
            optimizer.state[p]["exp_avg_sq"].zero_()
        before = p.detach().clone()
        p.grad = torch.full_like(p, 0.5)
        optimizer.step()
        updates[reset] = float((before - p.detach())[0])
    assert updates["both"] == pytest.approx(1e-3, rel=1e-9)
    assert updates["moments"] / updates["both"] == pytest.approx(0.1 / 0.001**0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_sm3_keeps_its_covers_unless_covers_is_true(dtype: torch.dtype | None) -> None:
    for covers in (False, True):
        model = net()
        optimizer = SM3(model.parameters(), lr=0.1, momentum_dtype=dtype)
        steps(model, optimizer, 0, 4)
        before = [state["cover"].clone() for state in optimizer.state.values()]
        assert any(float(c.sum()) > 0 for c in before)
        reset_momentum_(optimizer, covers=covers)
        for state, cover in zip(optimizer.state.values(), before, strict=True):
            assert torch.equal(state["cover"], torch.zeros_like(cover) if covers else cover)
            assert not state["momentum_buffer"].any()
            assert not state.get("momentum_scale", torch.zeros(1)).any()
            assert int(state["step"]) == 4  # it numbers the bits of stochastic rounding and stays
        steps(model, optimizer, 4, 5)


@pytest.mark.parametrize("name", ["AdamP", "AdaBelief", "StableAdamW", "Adan"])
def test_a_step_count_of_the_group_starts_anew_too(name: str) -> None:
    kind = getattr(pytest.importorskip("pytorch_optimizer", reason="pip install 'leanops[dev]'"), name)
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = kind([p], lr=1e-3)

    def update(optimizer: Optimizer) -> Tensor:
        before = p.detach().clone()
        p.grad = torch.full_like(p, 0.5)
        optimizer.step()
        return p.detach() - before

    for _ in range(300):
        update(optimizer)
    reset_momentum_(optimizer)
    with torch.no_grad():
        start = p.clone()
        after = update(optimizer)
        p.copy_(start)
    assert torch.equal(after, update(kind([p], lr=1e-3)))


@pytest.mark.parametrize("count", [7, 7.0, torch.tensor(7.0)])
def test_a_step_count_of_the_group_may_be_any_number(count: Any) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.param_groups[0]["step"] = count
    reset_momentum_(optimizer)
    assert optimizer.param_groups[0]["step"] == 0
    assert type(optimizer.param_groups[0]["step"]) is type(count)


@pytest.mark.parametrize("name", ["Adam", "AdamW-amsgrad", "Adagrad", "Rprop", "NAdam", "ASGD", "RMSprop"])
def test_complex_parameters_start_as_in_a_new_optimizer(name: str) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, dtype=torch.complex64))
    grads = torch.randn(7, 6, dtype=torch.complex64)

    def moved(optimizer: Optimizer, grads: Tensor) -> Tensor:
        for g in grads:
            p.grad = g.clone()
            optimizer.step()
        return p.detach().clone()

    optimizer = OPTIMIZERS[name]([p])
    start = moved(optimizer, grads[:4])
    reset_momentum_(optimizer)
    after = moved(optimizer, grads[4:])
    with torch.no_grad():
        p.copy_(start)
    assert torch.equal(after, moved(OPTIMIZERS[name]([p]), grads[4:]))


class Quantized(Tensor):
    """A tensor subclass that cannot be filled, like torchao's moments of 8 bits."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.fill_:
            raise NotImplementedError(f"{func}")
        return super().__torch_function__(func, types, args, kwargs)


def test_a_parameter_whose_state_cannot_be_filled_loses_its_whole_state() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p, q], lr=0.1)
    p.grad = q.grad = torch.ones(2)
    optimizer.step()
    optimizer.state[q]["exp_avg_sq"] = optimizer.state[q]["exp_avg_sq"].as_subclass(Quantized)
    reset_momentum_(optimizer)
    assert q not in optimizer.state
    assert not any(v.any() for v in optimizer.state[p].values())
    optimizer.step()
    assert_same(optimizer.state[q], optimizer.state[p])


class Strange(Optimizer):
    """An optimizer with an entry whose start value only the optimizer knows."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("exp_avg", torch.zeros_like(p)).add_(p.grad)
                if p.dim() > 1:
                    state["trust"] = state.get("trust", 2.5) * 2


def test_a_parameter_with_an_unknown_entry_loses_its_whole_state() -> None:
    model = nn.Linear(2, 2)
    optimizer = Strange(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    reset_momentum_(optimizer)
    assert model.weight not in optimizer.state
    assert float(optimizer.state[model.bias]["exp_avg"].sum()) == 0
    optimizer.step()
    assert optimizer.state[model.weight]["trust"] == 5.0


def test_numbers_and_missing_entries_are_handled() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p, q], lr=0.1)
    optimizer.state[p] = {"step": 7, "momentum_buffer": None, "exp_avg": torch.ones(2)}
    reset_momentum_(optimizer)
    assert optimizer.state[p]["step"] == 0
    assert isinstance(optimizer.state[p]["step"], int)
    assert optimizer.state[p]["momentum_buffer"] is None
    assert q not in optimizer.state  # no state is made


def test_state_under_a_name_instead_of_a_parameter_stays() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p] = {"step": 7}
    optimizer.state["total_step"] = 7  # as SPAM of pytorch_optimizer does
    reset_momentum_(optimizer)
    assert optimizer.state == {p: {"step": 0}, "total_step": 7}


def test_an_entry_that_starts_from_an_option_of_another_name_is_unknown() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p] = {"exp_avg": torch.ones(2), "sum": torch.ones(2)}  # no initial_accumulator_value
    reset_momentum_(optimizer)
    assert p not in optimizer.state


def test_before_the_first_step_there_is_nothing_to_do() -> None:
    optimizer = torch.optim.AdamW(net().parameters())
    reset_momentum_(optimizer)
    reset_momentum_(optimizer, covers=True)
    assert not optimizer.state


def test_bad_input_is_refused_and_changes_nothing() -> None:
    with pytest.raises(TypeError, match=r"reset_momentum_: optimizer must be a torch.optim.Optimizer, got list"):
        reset_momentum_([])
    model = net()
    with pytest.raises(ValueError, match="reset_momentum_: optimizer must not be MeZO: its log would no longer replay"):
        reset_momentum_(MeZO(model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer, 0, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="covers must be False for an optimizer without covers, got True for AdamW"):
        reset_momentum_(optimizer, covers=True)
    assert_same(optimizer.state_dict(), before)
