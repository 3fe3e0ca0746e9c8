"""SM3's momentum: the first steps that fill covers only, and the average of the gradient before the division."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sm3.parameters import equal, parameters, set_grads
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import leanops as lo
from leanops.optim import LISA, SM3, fuse_into_backward, reset_momentum_

F32, BF16, F16, F64, I8 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8
GRADIENT = "gradient_unpublished"

# --- cover_warmup -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum_dtype": I8, "beta": 0.9, "weight_decay": 0.1, "stochastic_rounding": True},
        {"momentum": 0.0, "weight_decay": 0.1, "decoupled": False},
        {"momentum_dtype": I8, "momentum_on": GRADIENT, "fused": True},
    ],
    ids=str,
)
def test_a_warm_up_fills_the_covers_and_moves_nothing(dtype: torch.dtype, options: dict[str, Any]) -> None:
    params, others = parameters(dtype), parameters(dtype)
    opt = SM3(params, cover_warmup=3, **options)
    first = SM3(others, **{**options, "lr": 0.0, "momentum": 0.0})
    before = [p.detach().clone() for p in params]
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        opt.step()
        first.step()
        assert all(map(torch.equal, before, params))
        assert [set(opt.state[p]) for p in params] == [{"step", "cover"}] * len(params)
        for p, q in zip(params, others, strict=True):
            assert equal(dict(opt.state[p]), dict(first.state[q]))
    # the steps after it are those of an optimizer with these covers
    rest = SM3(others, **options)
    state = first.state_dict()
    rest.load_state_dict({**state, "param_groups": rest.state_dict()["param_groups"]})
    for step in range(3, 6):
        set_grads(params, step)
        set_grads(others, step)
        opt.step()
        rest.step()
        assert all(map(torch.equal, params, others))
        for p, q in zip(params, others, strict=True):
            assert equal(dict(opt.state[p]), dict(rest.state[q]))


def test_each_parameter_counts_its_own_steps() -> None:
    params = parameters()
    opt = SM3([{"params": params[:4]}, {"params": params[4:], "cover_warmup": 0}], cover_warmup=2, lr=0.1)
    before = [p.detach().clone() for p in params]
    moved: list[list[bool]] = []
    for step in range(5):
        set_grads(params, step)
        if step < 2:
            params[1].grad = None
        opt.step()
        moved.append([not torch.equal(p, b) for p, b in zip(params, before, strict=True) if p.numel()])
        before = [p.detach().clone() for p in params]
    others = [True]  # of the second group, which has an empty parameter
    assert moved[:2] == [[False, False, False, False, *others]] * 2
    assert moved[2:4] == [[True, False, True, True, *others]] * 2
    assert moved[4] == [True, True, True, True, *others]
    opt.free_state(params[0])  # a parameter whose state is made anew warms up anew
    del opt.state[params[2]]
    for step in range(2):
        set_grads(params, step)
        opt.step()
        assert torch.equal(params[0], before[0])
        assert torch.equal(params[2], before[2])
        assert not torch.equal(params[1], before[1])
    set_grads(params, 0)
    opt.step()
    assert not torch.equal(params[0], before[0])


def test_the_first_update_is_not_the_sign() -> None:
    """It is ±1 for every weight without a warm-up, whatever the gradient's size."""
    moves = []
    for count in (0, 1):
        w = nn.Parameter(torch.zeros(20, 30))
        opt = SM3([w], lr=1.0, momentum=0.0, cover_warmup=count)
        for step in range(count + 1):
            set_grads([w], step)
            opt.step()
        moves.append(w.detach().abs())
    assert torch.allclose(moves[0], torch.ones(20, 30))
    assert moves[1].mean() < 0.5


def test_a_skipped_step_does_not_count() -> None:
    params = parameters()
    opt = SM3(params, cover_warmup=2)
    before = [p.detach().clone() for p in params]
    for step, found in enumerate((0.0, 1.0, 0.0)):
        set_grads(params, step)
        opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(found)  # type: ignore[attr-defined]
        opt.step()
        assert all(map(torch.equal, before, params))
    assert [float(opt.state[p]["step"]) for p in params] == [2.0] * len(params)
    set_grads(params, 3)
    opt.step()
    assert not torch.equal(before[0], params[0])


def test_another_number_of_steps_counts_from_then_on() -> None:
    params = parameters()
    opt = SM3(params, cover_warmup=1)
    for count, moves in ((1, False), (1, True), (4, False), (4, False), (0, True), (2, True)):
        opt.param_groups[0]["cover_warmup"] = count
        before = params[0].detach().clone()
        set_grads(params, count)
        opt.step()
        assert torch.equal(before, params[0]) != moves


def test_a_run_is_resumed_within_its_warm_up_and_a_state_of_before_has_none() -> None:
    params, others = parameters(), parameters()
    opt, loaded = SM3(params, cover_warmup=4, momentum_dtype=I8), SM3(others, lr=9.0)
    for step in range(7):
        if step == 2:
            loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
        for ps, o in ((params, opt), (others, loaded)):
            set_grads(ps, step)
            if o is opt or step >= 2:
                o.step()
        assert step < 2 or all(map(torch.equal, params, others))
    old = opt.state_dict()
    for group in old["param_groups"]:
        del group["cover_warmup"], group["momentum_on"]
    loaded.load_state_dict(old)
    assert [loaded.param_groups[0][name] for name in ("cover_warmup", "momentum_on")] == [0, "update"]


@pytest.mark.parametrize("value", [-1, True, 2.0, "3", 2**24])
def test_what_is_no_number_of_steps_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"SM3: cover_warmup must be .*, got"):
        SM3(parameters(), cover_warmup=value)
    params = parameters()
    opt = SM3(params)
    set_grads(params, 0)
    opt.step()
    before = copy.deepcopy([params, opt.state_dict()])
    opt.param_groups[0]["cover_warmup"] = value
    with pytest.raises(ValueError, match=r"SM3: cover_warmup must be .*, got"):
        opt.step()
    assert all(map(torch.equal, before[0], params))
    assert equal(before[1]["state"], opt.state_dict()["state"])


def test_a_state_that_lisa_makes_anew_warms_up_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), nn.Linear(4, 4))
    opt = SM3(model.parameters(), lr=0.1, cover_warmup=2)
    lisa = LISA(model, opt, active=1, period=3, seed=0)
    blocks = [list(block.parameters()) for block in model[1]]
    seen = []
    for step in range(12):
        before = [p.detach().clone() for p in model.parameters()]
        active = [i for i, ps in enumerate(blocks) if ps[0].requires_grad]
        g = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g) if p.requires_grad else None
        opt.step()
        moved = {i for i, ps in enumerate(blocks) for p in ps if not torch.equal(p, before[_place(model, p)])}
        seen.append((active, moved))
        lisa.step()
        opt.zero_grad()
    for start in range(0, 12, 3):
        active, moved = set(seen[start][0]), [m for _, m in seen[start : start + 3]]
        drawn_again = start > 0 and active == set(seen[start - 1][0])  # then it has kept its state
        assert moved == ([active] * 3 if drawn_again else [set(), set(), active])


def _place(model: nn.Module, p: Tensor) -> int:
    return next(i for i, q in enumerate(model.parameters()) if q is p)


def test_a_step_in_the_backward_pass_warms_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    plain = copy.deepcopy(model)
    options: dict[str, Any] = {"lr": 0.05, "cover_warmup": 2, "momentum_on": GRADIENT, "momentum_dtype": I8}
    fused, opt = fuse_into_backward(SM3, model, **options), SM3(plain.parameters(), **options)
    start = copy.deepcopy(list(model.parameters()))
    for step in range(4):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        for m, o in ((model, fused), (plain, opt)):
            m(x).pow(2).mean().backward()
            o.step()
            o.zero_grad()
        assert all(map(torch.equal, model.parameters(), plain.parameters()))
        assert all(map(torch.equal, model.parameters(), start)) == (step < 2)


def test_a_step_on_tensors_without_values_makes_all_of_the_state() -> None:
    with FakeTensorMode():
        params = parameters()
        opt = SM3(params, cover_warmup=3)
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
        assert all("momentum_buffer" in opt.state[p] for p in params)


# --- the average of the gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.9])
def test_the_gradient_is_averaged_before_the_division_with_its_bias_corrected(beta: float) -> None:
    """In float64, and with a momentum that changes: the weights of the gradients in it add up to one."""
    w = nn.Parameter(torch.zeros(6, 8, dtype=F64))
    opt = SM3([w], lr=0.125, momentum_on=GRADIENT, beta=beta, weight_decay=0.5)
    exact, rows, columns = torch.zeros(6, 8, dtype=F64), torch.zeros(6, 1, dtype=F64), torch.zeros(8, dtype=F64)
    past: list[Tensor] = []
    shares: list[float] = []
    for step in range(12):
        momentum = opt.param_groups[0]["momentum"] = 0.9 if step < 7 else 0.5
        set_grads([w], step)
        assert w.grad is not None
        past.append(w.grad)
        shares = [momentum * s for s in shares] + [1 - momentum]
        mean = sum(s * g for s, g in zip(shares, past, strict=True)) / sum(shares)
        nu = torch.minimum(rows, columns)
        nu = nu + w.grad**2 if beta == 1 else beta * nu + (1 - beta) * w.grad**2
        rows, columns = nu.amax(1, keepdim=True), nu.amax(0)
        exact = exact * (1 - 0.125 * 0.5) - 0.125 * mean / nu.sqrt()
        opt.step()
        torch.testing.assert_close(w.detach(), exact, rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(float(opt.state[w]["momentum_weight"]), sum(shares), rtol=1e-6, atol=0)


def test_a_first_step_is_that_without_momentum() -> None:
    params, others = parameters(), parameters()
    opt, plain = SM3(params, momentum_on=GRADIENT), SM3(others, momentum=0.0)
    for ps, o in ((params, opt), (others, plain)):
        set_grads(ps, 0)
        o.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
    assert [float(opt.state[p]["momentum_weight"]) for p in params] == [pytest.approx(0.1)] * len(params)


@pytest.mark.parametrize("options", [{}, {"momentum_dtype": I8, "capturable": True}], ids=str)
def test_a_step_is_the_operator_with_the_correction_as_a_factor_of_the_rate(options: dict[str, Any]) -> None:
    params, mine = parameters(BF16), [p.detach().clone() for p in parameters(BF16)]
    opt = SM3(params, lr=0.05, momentum_on=GRADIENT, weight_decay=0.1, **options)
    covers = [lo.sm3_cover(p) for p in mine]
    kind = options.get("momentum_dtype", F32)
    pairs = [lo.sm3_momentum(p, kind if p.dim() > 1 else F32) for p in mine]
    weight, kept, share = torch.zeros(()), torch.tensor(0.9), torch.tensor(1.0 - 0.9)
    for step in range(4):
        set_grads(params, step)
        opt.step()
        weight = weight * kept + share
        lo.sm3_step_(
            mine, [p.grad for p in params], covers, [m for m, _ in pairs], [s for _, s in pairs], lr=0.05, momentum=0.9,
            weight_decay=0.1, momentum_on=GRADIENT, lr_factors=(1 / weight).repeat(len(mine)),
        )  # fmt: skip
        for p, q, (m, _) in zip(params, mine, pairs, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(opt.state[p]["momentum_buffer"], m)
            assert torch.equal(opt.state[p]["momentum_weight"], weight)


def test_a_reset_starts_the_average_anew() -> None:
    """Also where the parameters have taken different numbers of steps."""
    params, others = parameters(), parameters()
    opt, fresh = SM3(params, momentum_on=GRADIENT), SM3(others, momentum_on=GRADIENT)
    for step in range(4):
        set_grads(params, step)
        if step == 1:
            params[0].grad = None
        opt.step()
    reset_momentum_(opt)
    assert not any(opt.state[p][name].any() for p in params for name in ("momentum_buffer", "momentum_weight"))
    saved = opt.state_dict()
    for entry in saved["state"].values():  # covers alone
        del entry["momentum_buffer"], entry["momentum_weight"]
    fresh.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        opt.step()
        fresh.step()
        assert all(map(torch.equal, params, others))


def test_a_momentum_of_the_other_quantity_is_not_continued() -> None:
    params = parameters()
    opt = SM3(params, momentum_dtype=I8)
    for mode in (GRADIENT, "update"):
        for step in range(3):
            set_grads(params, step)
            opt.step()
        fresh, others = SM3(parameters(), momentum_dtype=I8, momentum_on=mode), parameters()
        fresh = SM3(others, momentum_dtype=I8, momentum_on=mode)
        saved = copy.deepcopy(opt.state_dict())
        for entry in saved["state"].values():
            for name in ("momentum_buffer", "momentum_scale", "momentum_weight"):
                entry.pop(name, None)
        saved["param_groups"] = fresh.state_dict()["param_groups"]
        fresh.load_state_dict(saved)
        opt.param_groups[0]["momentum_on"] = mode
        with torch.no_grad():
            for p, q in zip(params, others, strict=True):
                q.copy_(p)
        set_grads(params, 9)
        set_grads(others, 9)
        opt.step()
        fresh.step()
        assert all(map(torch.equal, params, others))
        assert all(equal(dict(opt.state[p]), dict(fresh.state[q])) for p, q in zip(params, others, strict=True))


def test_a_skipped_step_and_one_without_momentum_leave_the_average() -> None:
    params = parameters()
    opt = SM3(params, momentum_on=GRADIENT)
    set_grads(params, 0)
    opt.step()
    opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(1.0)  # type: ignore[attr-defined]
    opt.step()
    assert [float(opt.state[p]["momentum_weight"]) for p in params] == [pytest.approx(0.1)] * len(params)
    opt.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    opt.param_groups[0]["momentum"] = 0.0
    kept = opt.state[params[0]]["momentum_buffer"].clone()
    opt.step()
    assert float(opt.state[params[0]]["momentum_weight"]) == pytest.approx(0.1)
    assert torch.equal(opt.state[params[0]]["momentum_buffer"], kept)
    opt.param_groups[0]["momentum"] = 0.9
    opt.step()
    assert float(opt.state[params[0]]["momentum_weight"]) == pytest.approx(0.19)


def test_a_mode_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="SM3: momentum_on must be one of update, gradient_unpublished, got gradient"):
        SM3(parameters(), momentum_on="gradient")
    w = torch.zeros(3)
    with pytest.raises(ValueError, match="sm3_step_: momentum_on must be one of update, gradient_unpublished, got m"):
        lo.sm3_step_(w, w.clone(), lo.sm3_cover(w), lr=0.1, momentum_on="m")


def test_callers_of_the_operator_without_the_new_arguments_get_the_published_step() -> None:
    w, other = torch.zeros(4, 3), torch.zeros(4, 3)
    g = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    covers = lo.sm3_cover(w), lo.sm3_cover(w)
    lr, seed = torch.tensor(0.1, dtype=F64), torch.tensor(0)
    rest = (lr, seed, None, None, [0], [0], 0.0, 1.0, 1e-30, 0.0, True, False, False)
    torch.ops.leanops.sm3_step_([w], [g], [covers[0]], [], [], *rest)
    lo.sm3_step_(other, g, covers[1], lr=0.1)
    assert torch.equal(w, other)
    assert torch.equal(*covers)
