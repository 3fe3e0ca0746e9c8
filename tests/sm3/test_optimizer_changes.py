"""What SM3 notices between steps, and what it refuses, before a byte changes."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from sm3.parameters import equal, parameters, set_grads, snapshot
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from leanops.optim import SM3

BF16, F16, I8 = torch.bfloat16, torch.float16, torch.int8


# --- state that changes under the optimizer ---------------------------------------------------------------------------


def test_what_is_replaced_between_steps_is_used_from_then_on() -> None:
    """The lists of a step are used again while nothing changes; here something changes before every one."""
    params, others = parameters(), parameters()
    opt = SM3(params, momentum_dtype=I8)

    def fresh() -> SM3:
        """An optimizer that has never seen a step, in the same state."""
        new = SM3(others, momentum_dtype=I8)
        new.load_state_dict(opt.state_dict())
        with torch.no_grad():
            for p, q in zip(params, others, strict=True):
                q.data = p.data.clone()
                q.grad = None if p.grad is None else p.grad.clone()
        return new

    def replace_cover() -> None:
        opt.state[params[0]]["cover"] = opt.state[params[0]]["cover"] * 2

    def replace_momentum() -> None:
        opt.state[params[3]]["momentum_buffer"] = opt.state[params[3]]["momentum_buffer"].clone().fill_(5)

    def replace_step() -> None:
        opt.state[params[1]]["step"] = torch.tensor(40.0)

    def replace_entries() -> None:
        opt.state[params[5]] = {k: v.clone() for k, v in opt.state[params[5]].items()}

    def exchange() -> None:
        params[0].data, params[3].data = params[0].data.clone(), params[3].data * 0.5

    def forget() -> None:
        del opt.state[params[0]]

    def forget_momentum() -> None:
        del opt.state[params[3]]["momentum_buffer"]
        del opt.state[params[3]]["momentum_scale"]

    def no_momentum() -> None:
        opt.param_groups[0]["momentum"] = 0.0

    def momentum() -> None:
        opt.param_groups[0]["momentum"] = 0.5

    def no_gradient() -> None:
        params[2].grad = None

    def device_step() -> None:
        opt.param_groups[0]["capturable"] = True

    changes = [replace_cover, replace_momentum, replace_step, replace_entries, exchange, forget, forget_momentum]
    changes += [no_momentum, momentum, no_gradient, device_step]
    set_grads(params, 0)
    opt.step()
    for i, change in enumerate(changes):
        set_grads(params, i)
        change()
        ref = fresh()
        opt.step()
        ref.step()
        assert all(map(torch.equal, params, others)), change.__name__
        for p, q in zip(params, others, strict=True):
            assert equal(dict(opt.state[p]), dict(ref.state[q])), change.__name__


@pytest.mark.parametrize("options", [{}, {"momentum_dtype": I8, "stochastic_rounding": True}], ids=["fp32", "int8"])
def test_a_default_device_is_not_that_of_the_parameters(options: dict[str, Any]) -> None:
    def train() -> dict[str, Any]:
        params = parameters(BF16)
        opt, scaled = SM3(params, **options), SM3(params, **options)
        for seed in range(3):
            set_grads(params, seed)
            with place():
                opt.step()
                scaled.load_state_dict(opt.state_dict())
                scaled.grad_scale, scaled.found_inf = (torch.tensor(v, device="cpu") for v in (2.0, 0.0))  # type: ignore[attr-defined]
                scaled.step()
        with place():
            return {**dict(enumerate(params)), "state": scaled.state_dict()["state"]}

    place: Callable[[], AbstractContextManager[Any]] = nullcontext
    wanted = train()
    place = partial(torch.device, "meta")
    assert equal(train(), wanted)


def test_parameters_that_are_exchanged_in_a_group_are_seen() -> None:
    """accelerate and FSDP put other parameters into the groups."""
    params, others = parameters(), parameters(seed=1)
    opt = SM3(params)
    set_grads(params, 0)
    opt.step()
    opt.param_groups[0]["params"] = others
    set_grads(others, 0)
    before = [p.detach().clone() for p in params]
    opt.step()
    assert all(map(torch.equal, before, params))
    assert all(float(opt.state[q]["step"]) == 1 for q in others)


@pytest.mark.parametrize("size", [8, 300])
def test_a_parameter_that_leads_to_its_optimizer_goes_with_it(size: int) -> None:
    """What C++ holds, Python's collector does not see."""

    def train() -> weakref.ref[nn.Parameter]:
        w = nn.Parameter(torch.ones(size, size))
        w.optimizer = optimizer = SM3([w])  # type: ignore[attr-defined]
        for _ in range(3):
            w.grad = torch.ones_like(w)
            optimizer.step()
        return weakref.ref(w)

    gone = train()
    gc.collect()
    assert gone() is None


def test_the_memory_of_a_large_weight_that_is_moved_away_is_free_at_once() -> None:
    w = nn.Parameter(torch.ones(300, 300))
    optimizer = SM3([w])
    for _ in range(3):
        w.grad = torch.ones_like(w)
        optimizer.step()
    memory = StorageWeakRef(w.untyped_storage())
    w.data = w.detach().clone()
    assert memory.expired()


def test_a_parameter_that_comes_twice_moves_once() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = SM3([p, p])
    ref = SM3([q])
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    opt.step()
    ref.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("size", [6, 300])
@pytest.mark.parametrize("turn", [torch.t, lambda t: t.view(t.shape[1], t.shape[0])], ids=["strides", "shape"])
def test_a_weight_that_is_seen_in_another_way_moves_as_it_is_seen(size: int, turn: Any) -> None:
    """The same memory under other strides; of a matrix that is not square, under another shape."""
    square = turn is torch.t
    w = torch.randn(size, size if square else 2 * size)
    p, q = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    opt, ref = SM3([p]), SM3([q])
    for step in range(4):
        if step == 2:
            p.grad = q.grad = None
            p.data, q.data = turn(p.data), turn(q.data).clone()
            if not square:
                opt.state.clear()
                ref.state.clear()
        set_grads([p, q], step)
        q.grad = p.grad.clone()
        opt.step()
        ref.step()
        assert torch.equal(p, q), step


def test_state_whose_momentum_or_scales_were_taken_out_starts_anew() -> None:
    for entry in ("momentum_buffer", "momentum_scale"):
        params, others = parameters(), parameters()
        opt, ref = SM3(params, momentum_dtype=I8), SM3(others, momentum_dtype=I8)
        for step in range(3):
            if step == 2:
                del opt.state[params[0]][entry]
                for key in ("momentum_buffer", "momentum_scale"):
                    ref.state[others[0]][key].zero_()
            for o, ps in ((opt, params), (ref, others)):
                set_grads(ps, step)
                o.step()
        assert all(map(torch.equal, params, others))
        assert equal(snapshot(opt), snapshot(ref))
        del opt.state[params[0]]["momentum_buffer"]
        opt.param_groups[0]["momentum_dtype"] = BF16
        opt.step()
        assert opt.state[params[0]]["momentum_buffer"].dtype == BF16
        assert "momentum_scale" not in opt.state[params[0]]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be a finite number >= 0, got -0.1"),
        ({"lr": math.nan}, "lr"),
        ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element, got shape .2."),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, "momentum"),
        ({"beta": 0.0}, r"beta must be in \(0, 1\], got 0.0"),
        ({"beta": 1.1}, "beta"),
        ({"eps": -1e-9}, "eps must be a finite float32 number >= 0, got -1e-09"),
        ({"eps": math.inf}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"momentum_dtype": F16}, "momentum_dtype must be one of None, torch.float32.*got torch.float16"),
        ({"weight_decay": 1e300}, "weight_decay must be a finite float32 number >= 0, got 1e.300"),
        ({"seed": 2**64}, "seed must be an integer"),
        ({"differentiable": True}, "differentiable=True is not supported"),
    ],
    ids=str,
)
def test_bad_options_are_refused_in_the_constructor_and_in_groups(options: dict[str, Any], message: str) -> None:
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=f"SM3: {message}"):
        SM3([p], **options)
    opt = SM3([p])
    with pytest.raises(ValueError, match=f"SM3: {message}"):
        opt.add_param_group({"params": [q], **options})
    assert len(opt.param_groups) == 1


def test_unknown_keywords_are_refused() -> None:
    """A defect of ports: ``**kwargs`` swallows what is misspelt."""
    with pytest.raises(TypeError, match="wieght_decay"):
        SM3([nn.Parameter(torch.zeros(2))], wieght_decay=0.1)  # type: ignore[call-arg]
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        SM3([nn.Parameter(torch.zeros(2))], foreach=True, fused=True)


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        SM3([])
    with pytest.raises(ValueError, match=r"parameter w must be real, got torch\.complex64"):
        SM3([("w", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))])
    with pytest.raises(ValueError, match="parameter 1 must be dense"):
        SM3([nn.Parameter(torch.zeros(2)), torch.eye(3).to_sparse().requires_grad_()])
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        SM3(torch.zeros(3))
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        SM3([{"params": [p]}, {"params": [p]}])


@contextmanager
def nothing_changes(opt: SM3, params: list[nn.Parameter]) -> Iterator[None]:
    before = [p.detach().clone() for p in params], snapshot(opt)
    yield
    assert all(map(torch.equal, before[0], params))
    assert equal(snapshot(opt), before[1])


def test_steps_that_are_refused_change_nothing() -> None:
    params = parameters()
    opt = SM3([{"params": params[:3]}, {"params": params[3:]}])
    set_grads(params, 0)
    opt.step()

    def expect(error: type[Exception] | tuple[type[Exception], ...], message: str) -> None:
        with nothing_changes(opt, params), pytest.raises(error, match=message):
            opt.step()

    group = opt.param_groups[1]
    for name, value in (("momentum", 1.0), ("beta", 0.0), ("eps", -1.0), ("weight_decay", math.inf)):
        kept, group[name] = group[name], value
        expect(ValueError, f"SM3: {name} must be")
        group[name] = kept
    group["lr"] = torch.zeros(2)
    expect(ValueError, "Tensor lr must be 1-element")
    group["lr"] = 0.1

    cover = opt.state[params[3]]["cover"]
    opt.state[params[3]]["cover"] = torch.zeros(3)
    expect(ValueError, r"covers\[0\]")
    opt.state[params[3]]["cover"] = cover.double()
    expect(ValueError, r"covers\[0\] .*float32.*float64")
    opt.state[params[3]]["cover"] = cover

    group["momentum_dtype"] = F16
    expect(ValueError, "momentum_dtype must be one of None, torch.float32.*got torch.float16")
    group["momentum_dtype"] = None

    opt.found_inf = torch.zeros(2)
    expect((ValueError, RuntimeError), "found_inf must be one number")
    del opt.found_inf

    params[5].grad = None
    params[5].grad_dtype = None  # torch then takes a gradient of any dtype
    params[5].grad = torch.zeros(2, 300, dtype=BF16)
    expect(ValueError, "gradient of parameter 5 must be torch.float32")


def test_parameters_without_data_are_refused() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3, device="meta"))
    opt = SM3([p, q])
    p.grad, q.grad = torch.ones(3), torch.zeros(3, device="meta")
    with pytest.raises(RuntimeError, match="parameter 1 must have data, got a meta tensor"):
        opt.step()
    assert p.tolist() == [1.0] * 3


def test_parameters_that_share_memory_are_refused() -> None:
    base = torch.zeros(6)
    a, b = nn.Parameter(base[:4]), nn.Parameter(base[2:])
    opt = SM3([a, b])
    a.grad, b.grad = torch.ones(4), torch.ones(4)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] must not overlap"):
        opt.step()
    assert not base.any()


@pytest.mark.parametrize("size", [6, 300])
def test_what_a_later_group_refuses_leaves_the_earlier_ones_as_they_are(size: int) -> None:
    a, b, c = (nn.Parameter(torch.ones(size, size)) for _ in range(3))
    opt = SM3([{"params": [a]}, {"params": [b, c]}])
    set_grads([a, b, c], 0)
    opt.step()
    own, c.data = c.data, b.data
    for _ in range(2):
        with nothing_changes(opt, [a, b, c]), pytest.raises(ValueError, match=r"params\[0\] and params\[1\] must not"):
            opt.step()
    c.grad, c.data = None, own[: size // 2]  # at the same address
    c.grad = torch.ones_like(c)
    for _ in range(2):
        with nothing_changes(opt, [a, b, c]), pytest.raises(ValueError, match=r"covers\[1\] must have shape"):
            opt.step()


def test_marks_of_a_scaler_may_be_numbers() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = SM3([p], lr=0.1, momentum=0.0)
    opt.grad_scale, opt.found_inf = 2.0, 0.0
    for _ in range(2):
        p.grad = torch.ones(3)
        opt.step()
    assert float(opt.state[p]["step"]) == 2
    opt.found_inf = 1.0
    with nothing_changes(opt, [p]):
        opt.step()


def test_state_of_inference_mode_is_not_written_outside_of_it() -> None:
    params = parameters()
    opt = SM3(params)
    set_grads(params, 0)
    with torch.inference_mode():
        opt.step()
    for _ in range(2):
        with nothing_changes(opt, params), pytest.raises(RuntimeError, match="inference_mode"):
            opt.step()
    with torch.inference_mode():
        opt.step()
    opt.load_state_dict(opt.state_dict())
    opt.step()
    assert all(float(s["step"]) == 3 for s in opt.state.values())


def test_rates_that_are_no_numbers_are_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = SM3([p])
    for lr in (None, "high", 1j):
        with pytest.raises(TypeError, match="SM3: lr must be a number or a one-element tensor, got"):
            SM3([p], lr=lr)  # type: ignore[arg-type]
        opt.param_groups[0]["lr"] = lr
        with nothing_changes(opt, [p]), pytest.raises(TypeError, match="SM3: lr must be a number"):
            opt.step()


def test_backward_notices_that_a_weight_moved_under_it() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = SM3([p])
    for _ in range(2):  # the step that checks everything, and the one that does so no more
        loss = (p**2).sum()
        p.grad = torch.ones(3)
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
