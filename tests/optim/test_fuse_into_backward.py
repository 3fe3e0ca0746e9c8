"""fuse_into_backward: the updates equal the optimizer's, and memory never holds all gradients."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from sm3.parameters import equal
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from leanops.optim import SM3, fuse_into_backward

CLASSES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (SM3, {"momentum_dtype": torch.int8}),
    (torch.optim.AdamW, {"lr": 1e-2, "foreach": True}),
    (torch.optim.AdamW, {"lr": 1e-2, "fused": True, "amsgrad": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adagrad, {"lr": 0.1}),
    (torch.optim.Adafactor, {"lr": 0.1}),
    (torch.optim.NAdam, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Rprop, {}),
]
every_class = pytest.mark.parametrize(("cls", "options"), CLASSES, ids=lambda v: getattr(v, "__name__", str(v)))


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 1))


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed))
    return (model(x) - x.sum(1, keepdim=True)).pow(2).mean()


def train(model: nn.Module, opt: Any, steps: int, schedule: Any = None) -> None:
    for step in range(steps):
        loss_of(model, step).backward()
        opt.step()
        if schedule is not None:
            schedule.step()
        opt.zero_grad()


@every_class
def test_the_updates_are_those_of_the_optimizer(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    model, plain = model_of(), model_of()

    def groups(m: nn.Sequential) -> list[dict[str, Any]]:
        return [{"params": m[0].parameters(), "weight_decay": 0.1}, {"params": m[2:].parameters(), "lr": 0.05}]

    if cls is torch.optim.Rprop:
        fused, ref = fuse_into_backward(cls, model, **options), cls(plain.named_parameters(), **options)
    else:
        fused, ref = fuse_into_backward(cls, groups(model), **options), cls(groups(plain), **options)
    for opt, m in ((fused, model), (ref, plain)):
        train(m, opt, 6, torch.optim.lr_scheduler.ExponentialLR(opt, 0.8))
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert equal(fused.state_dict()["state"], ref.state_dict()["state"])
    assert fused.state_dict()["param_groups"] == ref.state_dict()["param_groups"]


@every_class
def test_states_are_interchangeable(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    model, plain = model_of(), model_of()
    fused, ref = fuse_into_backward(cls, model.parameters(), **options), cls(plain.parameters(), **options)
    train(model, fused, 3)
    train(plain, ref, 3)
    theirs, mine = copy.deepcopy(ref.state_dict()), copy.deepcopy(fused.state_dict())
    fused.load_state_dict(theirs)
    ref.load_state_dict(mine)
    train(model, fused, 2)
    train(plain, ref, 2)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    other = fuse_into_backward(cls, model_of().parameters(), **options)
    other.load_state_dict(theirs)
    assert equal(other.state_dict()["state"], theirs["state"])
    assert other.param_groups[0]["lr"] == theirs["param_groups"][0]["lr"]


def test_a_gradient_is_freed_before_the_next_one_is_made() -> None:
    """12 layers of 4 MiB: the peak of torch's allocator is one gradient instead of 12."""
    layers, size = 12, 4 << 20

    def peak(fused: bool) -> int:
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(layers)))
        make: Any = partial(fuse_into_backward, torch.optim.SGD) if fused else torch.optim.SGD
        opt = make(model.parameters(), lr=1e-6)
        x = torch.randn(4, 1024)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            model(x).sum().backward()
            opt.step()
        live = most = 0
        for event in trace.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                most = max(most, live)
        return most

    assert peak(False) > layers * size
    assert peak(True) < 1.1 * size


def test_an_exact_count_of_live_gradients() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    opt = fuse_into_backward(SM3, model)
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        held = [p.grad for p in model.parameters() if p.grad is not None]
        most = max(most, sum(g.untyped_storage().nbytes() if type(g) is Tensor else 0 for g in held))

    for layer in model:
        layer.register_full_backward_hook(look)
    model(torch.randn(4, 64, requires_grad=True)).sum().backward()
    assert most <= 64 * 64 * 4
    assert "Used(gradient of 0.weight)" in repr(model[0].weight.grad)
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_accumulation_is_refused_until_zero_grad() -> None:
    model = model_of()
    opt = fuse_into_backward(torch.optim.SGD, model, lr=0.1)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"gradient of 3.bias was used and freed.*one backward pass a step"):
        loss_of(model).backward()
    for clear in (opt.zero_grad, lambda: opt.zero_grad(set_to_none=False), model.zero_grad):
        clear()
        loss_of(model).backward()


@pytest.mark.parametrize(
    "use",
    [
        lambda ps, opt: nn.utils.clip_grad_norm_(ps, 1.0),
        lambda ps, opt: nn.utils.clip_grad_norm_(ps, 1.0, foreach=False),
        lambda ps, opt: nn.utils.clip_grad_value_(ps, 1.0),
        lambda ps, opt: torch.amp.GradScaler("cpu").unscale_(opt),
        lambda ps, opt: ps[0].grad.norm(),
        lambda ps, opt: ps[0].grad.mul_(2),
        lambda ps, opt: torch._foreach_add_([p.grad for p in ps], 1),
    ],
    ids=["clip_grad_norm_", "clip_grad_norm_ one by one", "clip_grad_value_", "GradScaler", "norm", "mul_", "foreach"],
)
def test_what_needs_all_gradients_at_once_is_refused(use: Any) -> None:
    model = model_of()
    opt = fuse_into_backward(torch.optim.SGD, model, lr=0.1)
    loss_of(model).backward()
    if "unscale_" in use.__code__.co_names:
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        with pytest.raises(RuntimeError, match=r"fuse_into_backward: the gradient of .* no GradScaler"):
            scaler.unscale_(opt)
        return
    with pytest.raises(RuntimeError, match=r"fuse_into_backward: the gradient of .* max_grad_norm=0"):
        use(list(model.parameters()), opt)


def test_a_weight_that_is_used_twice_moves_once_by_the_sum() -> None:
    def make() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"embed": nn.Embedding(6, 4), "mid": nn.Linear(4, 4)})

    def loss(m: nn.ModuleDict) -> Tensor:
        return (m["mid"](m["embed"](torch.arange(6))) @ m["embed"].weight.t()).pow(2).mean()

    model, plain = make(), make()
    fused, ref = fuse_into_backward(SM3, model), SM3(plain.parameters())
    for m, opt in ((model, fused), (plain, ref)):
        for _ in range(3):
            loss(m).backward()
            opt.step()
            opt.zero_grad()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_checkpointed_segments_work_and_reentrant_ones_that_share_a_weight_are_refused() -> None:
    layer = nn.Linear(4, 4)
    opt = fuse_into_backward(torch.optim.SGD, layer, lr=0.1)
    x = torch.randn(3, 4, requires_grad=True)
    checkpoint(layer, checkpoint(layer, x, use_reentrant=False), use_reentrant=False).sum().backward()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"used and freed"):
        checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True).sum().backward()


def test_gradients_that_no_backward_pass_made_are_used_by_step() -> None:
    model, plain = model_of(), model_of()
    fused, ref = fuse_into_backward(SM3, model), SM3(plain.parameters())
    for m, opt in ((model, fused), (plain, ref)):
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_a_closure_moves_the_parameters_and_gives_the_loss() -> None:
    model, plain = model_of(), model_of()
    fused, ref = fuse_into_backward(SM3, model), SM3(plain.parameters())
    losses = []
    for m, opt in ((model, fused), (plain, ref)):

        def closure(m: nn.Module = m, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            loss = loss_of(m)
            loss.backward()
            return loss

        losses.append([opt.step(closure).item() for _ in range(3)])
    assert losses[0] == losses[1]
    assert losses[0][2] < losses[0][0]


def test_frozen_parameters_stay_and_may_be_thawed() -> None:
    model, plain = model_of(), model_of()
    for m in (model, plain):
        m[0].requires_grad_(False)
    fused, ref = fuse_into_backward(SM3, model), SM3(plain.parameters())
    start = model[0].weight.detach().clone()
    for m, opt in ((model, fused), (plain, ref)):
        train(m, opt, 2)
    assert torch.equal(model[0].weight, start)
    for m, opt in ((model, fused), (plain, ref)):
        m[0].requires_grad_(True)
        train(m, opt, 2)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_groups_may_be_added_and_hooks_removed() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = fuse_into_backward(torch.optim.SGD, [a], lr=1.0)
    opt.add_param_group({"params": [b], "lr": 0.5})
    (a.sum() + b.sum()).backward()
    assert (a.tolist(), b.tolist()) == ([0.0, 0.0], [0.5, 0.5])
    opt.remove()
    assert a.grad is None
    (a.sum() + b.sum()).backward()
    assert (a.tolist(), b.tolist()) == ([0.0, 0.0], [0.5, 0.5])
    assert a.grad.tolist() == [1.0, 1.0]
    assert len(opt.state_dict()["param_groups"]) == 2


def test_no_parameter_moves_by_what_was_refused() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    b.grad = torch.ones(2)
    with pytest.raises(ValueError, match="parameter 1 has a gradient already"):
        fuse_into_backward(SM3, [{"params": [a]}, {"params": [b]}])
    a.sum().backward()
    assert a.tolist() == [1.0, 1.0]
    assert a.grad is not None
    assert a.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("cls", [SM3, torch.optim.AdamW], ids=lambda cls: cls.__name__)
def test_a_schedule_writes_into_a_rate_that_was_loaded(cls: type[torch.optim.Optimizer]) -> None:
    """All parameters share one tensor lr, before and after a state is loaded."""
    model, plain = model_of(), model_of()
    fused, ref = fuse_into_backward(cls, model, lr=torch.tensor(0.1)), cls(plain.parameters(), lr=torch.tensor(0.1))  # type: ignore[call-arg]
    for opt, m in ((fused, model), (ref, plain)):
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        train(m, opt, 2, schedule)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(m, opt, 3, schedule)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_model_and_optimizer_go_together() -> None:
    """Neither keeps the other alive forever, and the optimizer lives as long as the parameters that it moves."""
    model = model_of()
    opt = fuse_into_backward(SM3, model)
    train(model, opt, 2)
    start = [p.detach().clone() for p in model.parameters()]
    gone = weakref.ref(opt), weakref.ref(model[0].weight)
    del opt
    gc.collect()
    loss_of(model).backward()
    assert not any(map(torch.equal, start, model.parameters()))
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_what_cannot_work_is_refused() -> None:
    model = model_of()
    with pytest.raises(ValueError, match=r"LBFGS.step needs a closure"):
        fuse_into_backward(torch.optim.LBFGS, model)
    with pytest.raises(TypeError, match=r"must be a module or an iterable.*got Tensor"):
        fuse_into_backward(SM3, torch.zeros(3))
    with pytest.raises(TypeError, match="wieght_decay"):
        fuse_into_backward(SM3, model, wieght_decay=1.0)
    with pytest.raises(ValueError, match="momentum must be in"):
        fuse_into_backward(SM3, model, momentum=2.0)
    for empty in ([], nn.Sequential()):
        with pytest.raises(ValueError, match="empty parameter list"):
            fuse_into_backward(SM3, empty)
    for wrong in ("SM3", SM3(model.parameters()), nn.Linear):
        with pytest.raises(TypeError, match="optimizer_class must be a class of optimizers, got"):
            fuse_into_backward(wrong, model)  # type: ignore[arg-type]
    loss_of(model).backward()
    with pytest.raises(ValueError, match=r"0.weight has a gradient already; call zero_grad\(\)"):
        fuse_into_backward(SM3, model)
    model.zero_grad()
    opt = fuse_into_backward(SM3, model)
    with pytest.raises(ValueError, match=r"0.weight moves in the backward pass already; call remove\(\)"):
        fuse_into_backward(SM3, model)
    for copier in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"use state_dict\(\)"):
            copier(opt)
    bad = opt.state_dict()
    bad["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match=r"must have groups of \[6\] parameters, got \[5\]"):
        opt.load_state_dict(bad)
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.zeros(2)
    with pytest.raises(ValueError, match="has a gradient already"):
        opt.add_param_group({"params": [("p", p)]})
    assert len(opt.param_groups) == 1
    opt.remove()
    fuse_into_backward(SM3, model).remove()


def test_another_optimizer_of_the_same_parameters_raises_an_error_with_the_name() -> None:
    """The former optimizer has made steps and keeps its lists of tensors."""
    model, other = model_of(), nn.Linear(3, 3)
    old = SM3([{"params": other.parameters()}, {"params": model.parameters()}])
    for _ in range(2):
        loss_of(model).backward()
        other(torch.ones(3)).sum().backward()
        old.step()
        old.zero_grad()
    fuse_into_backward(SM3, model)
    loss_of(model).backward()
    other(torch.ones(3)).sum().backward()
    before = [p.detach().clone() for p in (*model.parameters(), *other.parameters())]
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"fuse_into_backward: the gradient of 0.weight was used and freed"):
            old.step()
    assert all(map(torch.equal, before, (*model.parameters(), *other.parameters())))


def test_a_negated_gradient_keeps_its_sign() -> None:
    p, q = [[nn.Parameter(torch.full((), x)) for x in (0.3, -0.2)] for _ in range(2)]
    fused, ref = fuse_into_backward(SM3, p), SM3(q)
    for _ in range(3):
        for opt, (a, b) in ((fused, p), (ref, q)):
            opt.zero_grad()
            (torch.complex(a, b).conj() - (1 + 2j)).abs().backward()
        q[1].grad = q[1].grad.resolve_neg().clone()
        ref.step()
        assert [a.item() for a in p] == [a.item() for a in q]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed; another has")
def test_distributed_data_parallel_is_refused(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(model_of())
        with pytest.raises(ValueError, match="DistributedDataParallel averages gradients after"):
            fuse_into_backward(SM3, model)
    finally:
        torch.distributed.destroy_process_group()
