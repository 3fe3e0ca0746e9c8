"""SM3 notices changes between its steps, and refuses bad input before a byte changes."""

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


def test_state_options_and_weights_that_are_replaced_are_used_from_the_next_step_on() -> None:
    """SM3 reuses its lists of tensors while nothing changes. Here something changes before every step."""
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
def test_the_default_device_changes_nothing(options: dict[str, Any]) -> None:
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


def test_other_parameters_in_a_group_take_the_next_step() -> None:
    """accelerate and FSDP exchange the parameters of a group."""
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
def test_a_parameter_that_refers_to_its_optimizer_is_collected_with_it(size: int) -> None:
    """Python's collector does not see references that C++ holds."""

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


def test_the_old_memory_of_a_large_weight_is_free_once_the_weight_has_moved() -> None:
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
def test_a_weight_with_other_strides_or_another_shape_moves_by_its_new_layout(size: int, turn: Any) -> None:
    """The memory stays. A square matrix gets other strides, another matrix gets another shape."""
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


def test_momentum_starts_anew_where_its_buffer_or_its_scales_were_removed() -> None:
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
    """A defect of other ports: ``**kwargs`` swallows a misspelt name."""
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
def test_a_refusal_in_a_later_group_leaves_the_earlier_groups_unchanged(size: int) -> None:
    a, b, c = (nn.Parameter(torch.ones(size, size)) for _ in range(3))
    opt = SM3([{"params": [a]}, {"params": [b, c]}])
    set_grads([a, b, c], 0)
    opt.step()
    own, c.data = c.data, b.data
    for _ in range(2):
        with nothing_changes(opt, [a, b, c]), pytest.raises(ValueError, match=r"params\[0\] and params\[1\] must not"):
            opt.step()
    c.grad, c.data = None, own[: size // 2]  # fewer rows at the same address
    c.grad = torch.ones_like(c)
    for _ in range(2):
        with nothing_changes(opt, [a, b, c]), pytest.raises(ValueError, match=r"covers\[1\] must have shape"):
            opt.step()


def test_grad_scale_and_found_inf_may_be_numbers() -> None:
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


def test_state_made_in_inference_mode_is_not_written_outside_it() -> None:
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


def test_a_learning_rate_that_is_no_number_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = SM3([p])
    for lr in (None, "high", 1j):
        with pytest.raises(TypeError, match="SM3: lr must be a number or a one-element tensor, got"):
            SM3([p], lr=lr)  # type: ignore[arg-type]
        opt.param_groups[0]["lr"] = lr
        with nothing_changes(opt, [p]), pytest.raises(TypeError, match="SM3: lr must be a number"):
            opt.step()


def test_backward_raises_after_a_step_wrote_a_saved_weight() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = SM3([p])
    for _ in range(2):  # the first step checks everything, the second reuses its lists
        loss = (p**2).sum()
        p.grad = torch.ones(3)
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
