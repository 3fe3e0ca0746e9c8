"""SM3 as an optimizer: the operator's arithmetic, what moves and what does not, and the defects of other ports."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from sm3.parameters import equal, parameters, set_grads, snapshot
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import leanops as lo
from leanops.optim import SM3

F32, BF16, F16, F64, I8 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8


class Calls(TorchDispatchMode):
    """Counts the operator's calls, and the parameters in them."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.leanops.sm3_step_.default:
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


# --- a step is the operator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.0},
        {"momentum_dtype": I8, "beta": 0.9},
        {"momentum_dtype": BF16, "weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled": False, "maximize": True, "eps": 1e-8},
    ],
    ids=str,
)
def test_a_step_is_the_operator_on_the_state(dtype: torch.dtype, options: dict[str, Any]) -> None:
    params, mine = parameters(dtype), [p.detach().clone() for p in parameters(dtype)]
    opt = SM3(params, lr=0.05, **options)
    momentum, kind = options.get("momentum", 0.9), options.get("momentum_dtype") or F32
    covers = [lo.sm3_cover(p) for p in mine]
    pairs = [lo.sm3_momentum(p, kind if p.dim() > 1 else (F32 if kind == I8 else kind)) for p in mine]
    momenta, scales = ([m for m, _ in pairs], [s for _, s in pairs]) if momentum else ([], [])
    for step in range(4):
        set_grads(params, step)
        opt.step()
        rest = {k: v for k, v in options.items() if k not in ("momentum", "momentum_dtype")}
        lo.sm3_step_(mine, [p.grad for p in params], covers, momenta, scales, lr=0.05, momentum=momentum, **rest)
    for i, p in enumerate(params):
        assert torch.equal(p, mine[i])
        assert torch.equal(opt.state[p]["cover"], covers[i])
        if momentum:
            assert equal(opt.state[p]["momentum_buffer"], momenta[i])
        assert ("momentum_scale" in opt.state[p]) == (kind == I8 and p.dim() > 1)
        assert float(opt.state[p]["step"]) == 4


def test_a_step_makes_one_call_a_group_whatever_is_in_it() -> None:
    params = [p for dtype in (F32, BF16, F64) for p in parameters(dtype)]
    opt = SM3([{"params": params[:9]}, {"params": params[9:], "lr": 0.5, "momentum_dtype": I8}])
    set_grads(params, 0)
    with Calls() as calls:
        for _ in range(3):
            opt.step()
    assert calls.sizes == [9, 9] * 3


def test_groups_have_their_own_options_and_named_parameters_keep_their_names() -> None:
    (a, *_), (b, *_) = parameters(), parameters()
    opt = SM3([{"params": [("a", a)], "lr": 1.0, "momentum": 0.0}, {"params": [("b", b)], "maximize": True}], lr=0.5)
    assert [g["param_names"] for g in opt.param_groups] == [["a"], ["b"]]
    before = a.detach().clone()
    set_grads([a, b], 0)
    b.grad = a.grad.clone()
    opt.step()
    torch.testing.assert_close(a.detach(), before - a.grad.sign())  # the first step of SM3 is the sign, as Adagrad's is
    torch.testing.assert_close(b.detach(), before + 0.05 * a.grad.sign())
    c = nn.Parameter(torch.zeros(2))
    opt.add_param_group({"params": [("c", c)], "lr": 2.0, "momentum": 0.0})
    c.grad = torch.ones(2)
    opt.step()
    assert c.tolist() == [-2.0, -2.0]
    with pytest.raises(ValueError, match="with/without names"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_no_gradient_no_step_and_frozen_parameters_stay() -> None:
    params = parameters()
    params[1].requires_grad_(False)
    opt = SM3(params)
    set_grads(params[:1] + params[2:], 0)
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        opt.step()
    assert torch.equal(before[1], params[1])
    assert params[1] not in opt.state
    params[0].grad, params[1].grad = None, torch.ones(4)
    kept = snapshot(opt)[0]
    middle = params[0].detach().clone()
    opt.step()
    assert torch.equal(middle, params[0])
    assert equal(dict(opt.state[params[0]]), kept)
    assert [float(opt.state[p]["step"]) for p in params] == [2, 1, 3, 3, 3, 3]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_zero_gradients_change_no_bit_without_decay(dtype: torch.dtype) -> None:
    """A defect of other ports: eps = 1e-30 is 0 in fp16, and 0 / 0 makes the weights NaN."""
    params = parameters(dtype)
    before = [p.detach().clone() for p in params]
    opt = SM3(params, lr=1.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(map(torch.equal, before, params))
    assert not any(s["cover"].any() for s in opt.state.values())


def test_strided_parameters_and_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    whole, base = torch.randn(8, 6, 2, generator=g), torch.randn(6, 8, generator=g)
    plain = nn.Parameter(whole[..., 0].clone())
    strided = nn.Parameter(whole[..., 0])
    a, b = SM3([plain], momentum_dtype=I8), SM3([strided], momentum_dtype=I8)
    for _ in range(3):
        plain.grad, strided.grad = base.t().clone(), base.t()
        a.step()
        b.step()
    assert not strided.is_contiguous()
    assert torch.equal(plain, strided)


@pytest.mark.parametrize("options", [{"maximize": True}, {"weight_decay": 0.5, "decoupled": False}, {}], ids=str)
def test_gradients_are_never_written(options: dict[str, Any]) -> None:
    """A defect of other ports: ``maximize`` negates ``.grad`` in place."""
    params = parameters()
    set_grads(params, 3)
    before = [p.grad.clone() for p in params]
    opt = SM3(params, **options)
    opt.grad_scale = torch.tensor(8.0)
    for _ in range(2):
        opt.step()
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))


def test_a_closure_is_run_with_gradients_and_its_value_returned() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = SM3([p], lr=0.1, momentum=0.0)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    loss = opt.step(closure)
    assert loss.item() == 3.0
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))
    assert opt.step() is None


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [torch.tensor(0.3), torch.tensor([0.3], dtype=F64), torch.tensor(0.3, dtype=BF16)])
def test_lr_may_be_a_tensor_that_schedulers_fill(lr: Tensor) -> None:
    params, others = parameters(), parameters()
    a, b = SM3(params, lr=lr), SM3(others, lr=float(lr))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (a, b)]
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        for o, s in ((a, schedules[0]), (b, schedules[1])):
            o.step()
            s.step()
    assert a.param_groups[0]["lr"] is not None
    assert isinstance(a.param_groups[0]["lr"], Tensor)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_every_scheduler_of_torch_drives_it() -> None:
    from torch.optim import lr_scheduler as s

    makers: list[Any] = [
        lambda o: s.LambdaLR(o, lambda t: 0.9**t),
        lambda o: s.StepLR(o, 2),
        lambda o: s.OneCycleLR(o, 0.5, total_steps=6, cycle_momentum=True),
        lambda o: s.CyclicLR(o, 0.01, 0.1, cycle_momentum=True),
        lambda o: s.CosineAnnealingWarmRestarts(o, 3),
        lambda o: s.SequentialLR(o, [s.ConstantLR(o), s.LinearLR(o)], [2]),
        lambda o: torch.optim.swa_utils.SWALR(o, 0.01),
    ]
    for make in makers:
        params, by_hand = parameters(), parameters()
        opt, ref = SM3(params, lr=0.1), SM3(by_hand, lr=0.1)
        schedule = make(opt)
        for step in range(5):
            ref.param_groups[0].update(lr=opt.param_groups[0]["lr"], momentum=opt.param_groups[0]["momentum"])
            for o, ps in ((opt, params), (ref, by_hand)):
                set_grads(ps, step)
                o.step()
            schedule.step()
        assert all(map(torch.equal, params, by_hand)), schedule
        assert opt.param_groups[0]["lr"] != 0.1


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "most"),
    [({"momentum": 0.0}, 0.01), ({"momentum_dtype": I8}, 1.03), ({"momentum_dtype": BF16}, 2.01), ({}, 4.01)],
    ids=str,
)
def test_bytes_of_state_a_parameter(options: dict[str, Any], most: float) -> None:
    """21 million parameters in the shapes of Llama 3.2 1B. A defect of other ports: they allocate momentum where
    momentum is 0, which takes 4.007 bytes a parameter instead of .007."""
    params = [torch.zeros(s, dtype=BF16) for s in [(2048, 2048), (8192, 2048), (2048,)]]
    opt = SM3(params, lr=0.0, **options)
    for p in params:
        p.grad = torch.zeros((), dtype=BF16).expand(p.shape)
    opt.step()
    storages: dict[int, int] = {}  # bytes by address: entries may share a storage
    for state in opt.state.values():
        for t in state.values():
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    assert sum(storages.values()) / sum(p.numel() for p in params) <= most


@pytest.mark.parametrize("shape", [(64, 64), (3, 300), (50, 2), (50, 1), (7,), ()])
def test_bytes_of_an_int8_momentum_follow_from_a_rows_length(shape: tuple[int, ...]) -> None:
    """Rows of C elements take 1 + 4 ceil(C / 256) / C bytes a parameter; rows of one element stay in fp32, 4 bytes."""
    p = nn.Parameter(torch.zeros(shape))
    p.grad = torch.ones(shape)
    opt = SM3([p], momentum_dtype=I8)
    opt.step()
    state = opt.state[p]
    used = sum(state[k].nbytes for k in ("momentum_buffer", "momentum_scale") if k in state)
    row = math.prod(shape[1:])
    assert used == (p.numel() * 4 if row == 1 else p.numel() + p.numel() // row * 4 * -(-row // 256))


# --- defects of other ports -------------------------------------------------------------------------------------------


def test_an_average_forgets() -> None:
    """A defect of other ports: the new maximum includes the old value, so the accumulators of an average never fall."""
    p = nn.Parameter(torch.zeros(3, 4))
    opt = SM3([p], beta=0.9)
    p.grad = torch.full((3, 4), 100.0)
    opt.step()
    high = opt.state[p]["cover"].clone()
    p.grad = torch.zeros(3, 4)
    for _ in range(50):
        opt.step()
    torch.testing.assert_close(opt.state[p]["cover"], high * 0.9**50, rtol=1e-5, atol=0)


def test_accumulators_of_bf16_weights_do_not_get_stuck() -> None:
    """A defect of other ports: in bf16, 256 + 1 = 256."""
    p = nn.Parameter(torch.zeros(2, 2, dtype=BF16))
    opt = SM3([p], lr=0.0, momentum=0.0)
    p.grad = torch.ones(2, 2, dtype=BF16)
    for _ in range(300):
        opt.step()
    assert opt.state[p]["cover"].dtype == F32
    assert opt.state[p]["cover"].tolist() == [300.0] * 4


def test_sparse_gradients_are_refused_by_name_before_anything_moves() -> None:
    """A defect of other ports: rows without a gradient are zeroed."""
    first, table = nn.Linear(2, 2), nn.Embedding(5, 3, sparse=True)
    opt = SM3([*first.named_parameters(), ("table", table.weight)])
    (first(torch.ones(2)).sum() + table(torch.tensor([1, 3])).sum()).backward()
    before = [p.detach().clone() for p in (*first.parameters(), table.weight)]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="SM3 does not support sparse gradients; parameter table"):
            opt.step()
    assert all(map(torch.equal, before, (*first.parameters(), table.weight)))
    assert not opt.state
    sparse, table.weight.grad = table.weight.grad, table.weight.grad.to_dense()
    opt.step()
    table.weight.grad = sparse
    before = [p.detach().clone() for p in (*first.parameters(), table.weight)]
    with pytest.raises(RuntimeError, match="parameter table"):
        opt.step()
    assert all(map(torch.equal, before, (*first.parameters(), table.weight)))


# --- gradient scaling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "fused"), [(F32, None), (F32, True), (F16, True)])
def test_a_scaled_step_is_the_step(dtype: torch.dtype, fused: bool | None) -> None:
    params, others = parameters(dtype), parameters(dtype)
    scaled, plain = SM3(params, fused=fused), SM3(others)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    for step in range(4):
        set_grads(others, step, scale=0.25)
        for p, q in zip(params, others, strict=True):
            p.grad = q.grad * scaler.get_scale()
        scaler.scale(torch.ones(()))
        scaler.step(scaled)
        scaler.update()
        plain.step()
    assert all(map(torch.equal, params, others))
    assert scaler.get_scale() == 1024.0
    assert not hasattr(scaled, "grad_scale")


def test_gradscaler_treats_it_as_it_treats_adamw() -> None:
    """Only fused=True takes scaled gradients; the flag survives a copy."""
    for fused in (None, False, True):
        params, others = parameters(), parameters()
        ours, theirs = SM3(params, fused=fused), torch.optim.AdamW(others, fused=fused)
        flags = [getattr(opt, "_step_supports_amp_scaling", False) for opt in (ours, theirs, copy.deepcopy(ours))]
        assert flags == [bool(fused)] * 3
    half = parameters(F16)
    set_grads(half, 0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(SM3(half))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("options", [{}, {"momentum_dtype": I8, "beta": 0.9, "weight_decay": 0.1}], ids=str)
def test_a_step_with_an_infinity_changes_nothing(bad: float, fused: bool | None, options: dict[str, Any]) -> None:
    params = parameters()
    opt = SM3(params, fused=fused, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    for first in (True, False):  # the step that makes the state, and a later one
        set_grads(params, 0)
        params[0].grad[1, 2] = bad
        before = [p.detach().clone() for p in params], snapshot(opt)
        scaler.step(opt)
        scaler.update()
        assert all(map(torch.equal, before[0], params))
        if first:
            assert all(float(s["step"]) == 0 and not s["cover"].any() for s in opt.state.values())
            set_grads(params, 1)
            scaler.step(opt)
            scaler.update()
        else:
            assert equal(snapshot(opt), before[1])
    assert scaler.get_scale() == 16.0


@pytest.mark.parametrize("fused", [None, True])
def test_unscaled_gradients_may_be_clipped_before_the_step(fused: bool | None) -> None:
    params, others = parameters(), parameters()
    scaled, plain = SM3(params, fused=fused), SM3(others)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    set_grads(others, 1)
    for p, q in zip(params, others, strict=True):
        p.grad = q.grad * 64
    scaler.scale(torch.ones(()))
    scaler.unscale_(scaled)
    for ps in (params, others):
        nn.utils.clip_grad_norm_(ps, 0.5)
    scaler.step(scaled)
    plain.step()
    assert all(map(torch.equal, params, others))


# --- stochastic rounding ----------------------------------------------------------------------------------------------


def test_stochastic_rounding_follows_from_seed_and_step_and_differs_at_every_step() -> None:
    def run(seed: int, steps: int = 6) -> list[Tensor]:
        p = nn.Parameter(torch.full((400,), 0.5, dtype=BF16))
        opt = SM3([p], lr=1e-4, momentum=0.0, beta=0.5, stochastic_rounding=True, seed=seed)
        seen = []
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            before = p.detach().clone()
            opt.step()
            seen.append(p.detach() != before)
        return seen

    a, b, c = run(0), run(0), run(1)
    assert all(map(torch.equal, a, b))
    assert not torch.equal(a[0], c[0])
    assert all(0 < int(m.sum()) < 60 for m in a)  # 1e-4 is a twentieth of the spacing of bf16 below 0.5
    assert len({tuple(m.tolist()) for m in a}) == len(a)
    assert not torch.equal(a[1], c[0])  # seed 1 does not begin with the bits of seed 0's second step


def test_equal_tensors_are_rounded_by_different_bits() -> None:
    params = [nn.Parameter(torch.full((400,), 0.5, dtype=BF16)) for _ in range(3)]
    opt = SM3([{"params": params[:2]}, {"params": params[2:]}], lr=1e-4, stochastic_rounding=True, momentum=0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        opt.step()
    assert not torch.equal(params[0], params[1])
    assert not torch.equal(params[0], params[2])


@pytest.mark.parametrize("name", ["lr", "momentum", "beta", "eps", "weight_decay"])
def test_a_number_that_is_text_is_refused(name: str) -> None:
    """YAML reads 1e-30 as text."""
    w = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=rf"SM3: {name} must be a number.*, got '0.5'"):
        SM3([w], **{name: "0.5"})
    optimizer = SM3([w])
    optimizer.param_groups[0][name] = "0.5"
    w.grad = torch.ones(3)
    with pytest.raises(TypeError, match=rf"SM3: {name} must be a number.*, got '0.5'"):
        optimizer.step()
    assert torch.equal(w.detach(), torch.ones(3))
