"""MeZO's arithmetic: the estimate, the update in every variant, and what torch.optim's users rely on."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import leanops as lo
from leanops.common import seeds as seed_rule
from leanops.optim import MeZO, ZoLog, replay_
from leanops.optim.zo import estimate, strategy

F64 = torch.float64


def quadratic(n: int = 40, seed: int = 0) -> tuple[nn.Parameter, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=g, dtype=F64)
    return (
        nn.Parameter(torch.randn(n, generator=g, dtype=F64)),
        root @ root.T / n,
        torch.randn(n, generator=g, dtype=F64),
    )


def noise(opt: MeZO, p: Tensor, direction: int = 0, *, step: int | None = None, tensor_id: int = 0) -> Tensor:
    seed = seed_rule.derive(opt.log.header["seed"], opt.steps if step is None else step, direction)
    return lo.zo_noise(p.shape, seed, tensor_id=tensor_id, dtype=F64, distribution=opt.log.header["distribution"])


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def loss_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(32, 5, generator=g).to(dtype)
    y = x.sum(1, keepdim=True).tanh()
    return lambda: nn.functional.mse_loss(model(x), y)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_on_a_quadratic_g_is_z_times_the_gradient_whatever_eps_is(distribution: str, eps: float) -> None:
    p, a, b = quadratic()
    opt = MeZO([p], lr=1e-3, eps=eps, distribution=distribution)
    gradient = (a @ p + b).detach()
    z = noise(opt, p)
    before = p.detach().clone()
    opt.step(lambda: 0.5 * p @ a @ p + b @ p)
    g = float(opt.log.scalars()[0, 0])
    assert g == pytest.approx(float(z @ gradient), rel=1e-6)  # the log's fp32
    torch.testing.assert_close(p.detach(), before - 1e-3 * g * z, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("distribution", "factor"), [("gaussian", 2), ("rademacher", 0)])
def test_mean_square_of_the_estimate(distribution: str, factor: int) -> None:
    """E |g z|^2 = (d + 2) |grad|^2 for Gaussian z, d |grad|^2 for random signs; on a linear function g is exact."""
    d, trials = 6, 1500
    weights = torch.linspace(-1, 1, d, dtype=F64)
    p = nn.Parameter(torch.zeros(d, dtype=F64))
    opt = MeZO([p], lr=1.0, eps=1.0, distribution=distribution)
    squares = []
    for _ in range(trials):
        before = p.detach().clone()
        opt.step(lambda: weights @ p)
        squares.append(float(((p.detach() - before) ** 2).sum()))
    values = torch.tensor(squares, dtype=F64)
    wanted = (d + factor) * float(weights @ weights)
    assert abs(float(values.mean()) - wanted) < 5 * float(values.std()) / math.sqrt(trials)
    if factor == 0:
        assert float(values.mean()) < (d + 1) * float(weights @ weights)


def test_directions_are_averaged_in_one_update() -> None:
    p, a, b = quadratic()
    opt = MeZO([p], lr=1e-3, directions=3)
    before = p.detach().clone()
    zs = [noise(opt, p, k) for k in range(3)]
    opt.step(lambda: 0.5 * p @ a @ p + b @ p)
    g = opt.log.scalars()[0].tolist()
    wanted = before - 1e-3 * sum(gk * z for gk, z in zip(g, zs, strict=True)) / 3
    torch.testing.assert_close(p.detach(), wanted, rtol=1e-13, atol=1e-14)


def test_one_sided_sign_and_fzoo_follow_their_formulas() -> None:
    eps = 1e-2
    for variant in ("one_sided", "sign", "fzoo"):
        p, a, b = quadratic()
        opt = MeZO([p], lr=1e-3, eps=eps, directions=4, variant=variant, distribution="rademacher")

        def f(w: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return 0.5 * w @ a @ w + b @ w

        w = p.detach().clone()
        zs = [noise(opt, p, k) for k in range(4)]
        plus, minus = (torch.stack([f(w + s * eps * z) for z in zs]) for s in (1, -1))
        wanted = {
            "one_sided": (plus - f(w)) / eps,
            "sign": torch.sign(plus - minus),
            "fzoo": (plus - f(w)) / plus.std(correction=0),
        }[variant]
        calls = 0

        def closure(p: Tensor = p) -> Tensor:
            nonlocal calls
            calls += 1
            return f(p)

        opt.step(closure)
        assert calls == (8 if variant == "sign" else 5) + 1  # the first step repeats an evaluation
        torch.testing.assert_close(torch.from_numpy(opt.log.scalars()[0]).double(), wanted, rtol=1e-5, atol=1e-6)
        moved = w - 1e-3 * sum(g * z for g, z in zip(wanted, zs, strict=True)) / 4
        torch.testing.assert_close(p.detach(), moved, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["recompute", "store"])
def test_momentum_is_the_sum_over_past_estimates(mode: str) -> None:
    p, a, b = quadratic()
    opt = MeZO([p], lr=1e-3, momentum=0.8, weight_decay=0.1, momentum_mode=mode)
    m, w = torch.zeros_like(p.detach()), p.detach().clone()
    for step in range(12):
        z = noise(opt, p, step=step)
        opt.step(lambda: 0.5 * p @ a @ p + b @ p)
        m = 0.8 * m + float(opt.log.scalars()[step, 0]) * z
        w = (1 - 1e-3 * 0.1) * w - 1e-3 * m
    torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-13)
    assert bool(opt.state) == (mode == "store")


def test_groups_have_their_own_lr_and_decay_and_ids_run_through_them() -> None:
    a, b = nn.Parameter(torch.ones(4, dtype=F64)), nn.Parameter(torch.ones(3, dtype=F64))
    opt = MeZO([{"params": [a], "lr": 1e-2}, {"params": [b], "weight_decay": 0.5}], lr=1e-3)
    za, zb = noise(opt, a), noise(opt, b, tensor_id=1)
    opt.step(lambda: a.sum() + b.sum())
    g = float(opt.log.scalars()[0, 0])
    torch.testing.assert_close(a.detach(), 1 - 1e-2 * g * za, rtol=1e-13, atol=0)
    torch.testing.assert_close(b.detach(), (1 - 5e-4) - 1e-3 * g * zb, rtol=1e-13, atol=0)


def test_only_parameters_that_require_grad_move() -> None:
    model = mlp()
    for p in model[0].parameters():
        p.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    MeZO(model.parameters(), lr=1e-2).step(loss_of(model))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("0.")


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_it_descends_on_a_small_regression(distribution: str) -> None:
    model = mlp()
    closure = loss_of(model)
    opt = MeZO(model.parameters(), lr=2e-2, directions=4, distribution=distribution)
    with torch.no_grad():
        first = float(closure())
        for _ in range(150):
            opt.step(closure)
        assert float(closure()) < 0.3 * first


def test_the_loss_is_the_mean_of_the_evaluations_and_a_number_stays_a_number() -> None:
    p = nn.Parameter(torch.zeros(()))
    opt = MeZO([p], lr=0.0)
    seen: list[float] = []

    def closure() -> float:
        seen.append(float(p) + 7)
        return seen[-1]

    loss = opt.step(closure)
    assert isinstance(loss, float)
    assert loss == pytest.approx(sum(seen[1:]) / 2)  # the first evaluation is repeated
    assert isinstance(opt.step(lambda: p + 7), Tensor)


def test_evaluations_see_the_same_dropout_and_the_state_advances_once() -> None:
    drop, x = nn.Dropout(0.5), torch.ones(64)
    p = nn.Parameter(torch.ones(()))
    masks: list[Tensor] = []

    def closure() -> Tensor:
        masks.append(drop(x))
        return (p * masks[-1]).sum()

    torch.manual_seed(0)
    MeZO([p], lr=0.0).step(closure)
    after = torch.rand(3)
    assert torch.equal(masks[0], masks[1])
    torch.manual_seed(0)
    drop(x)
    assert torch.equal(torch.rand(3), after)
    masks.clear()
    MeZO([p], lr=0.0, same_rng=False).step(closure)
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("options", [{}, {"momentum": 0.7}, {"momentum": 0.7, "momentum_mode": "store"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_resumes_to_the_same_bits(options: dict[str, Any], dtype: torch.dtype) -> None:
    def start() -> tuple[nn.Module, MeZO, Any]:
        model = mlp(dtype)
        opt = MeZO(model.parameters(), lr=1e-2, seed=11, rounding="stochastic", **options)
        return model, opt, torch.optim.lr_scheduler.LinearLR(opt, total_iters=6)

    whole, opt, schedule = start()
    for _ in range(6):
        opt.step(loss_of(whole, dtype))
        schedule.step()
    half, opt, schedule = start()
    for _ in range(3):
        opt.step(loss_of(half, dtype))
        schedule.step()
    file = io.BytesIO()
    torch.save([half.state_dict(), opt.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    weights, state, scheduled = torch.load(file, weights_only=True)
    model, opt, schedule = start()
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    schedule.load_state_dict(scheduled)
    for _ in range(3):
        opt.step(loss_of(model, dtype))
        schedule.step()
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    assert opt.steps == 6


@pytest.mark.parametrize("before", [0, 3])
def test_a_run_resumes_right_after_a_group_has_joined(before: int) -> None:
    """Momentum starts anew where the group joins, and the state tells so although no step has followed."""

    def start(groups: int) -> tuple[nn.Module, MeZO]:
        model = mlp()
        layers = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.1}]
        return model, MeZO(layers[:groups], lr=1e-2, momentum=0.7)

    whole, opt = start(1)
    for _ in range(before):
        opt.step(loss_of(whole))
    opt.add_param_group({"params": whole[3].parameters(), "lr": 0.1})
    model, again = start(2)
    model.load_state_dict(whole.state_dict())
    again.load_state_dict(opt.state_dict())
    for _ in range(3):
        opt.step(loss_of(whole))
        again.step(loss_of(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    assert again.log.to_bytes() == opt.log.to_bytes()


def test_the_log_before_the_first_step_is_that_of_the_run() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = MeZO([p], lr=1e-2)
    log = opt.log
    p.data = p.data.bfloat16()
    state = opt.state_dict()
    opt.step(lambda: p.sum())
    assert log is opt.log
    assert len(log) == 1
    again = MeZO([nn.Parameter(torch.ones(3).bfloat16())])
    again.load_state_dict(state)
    assert again.steps == 0


def test_an_update_that_fails_is_no_step(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no trace in the momentum, in the log or in what is resumed from it, but the log's file."""
    p = nn.Parameter(torch.ones(3))
    opt = MeZO([p], lr=0.1, momentum=0.5, log_file=tmp_path / "run.zolog")
    for step in range(6):
        if step in (0, 3):
            opt.param_groups[0]["lr"] = 0.3
            with monkeypatch.context() as patch:
                patch.setattr(strategy, "apply_", failing)
                with pytest.raises(MemoryError):
                    opt.step(lambda: p.square().sum())
            opt.param_groups[0]["lr"] = 0.1
            saved = p.detach().clone(), opt.state_dict()
        opt.step(lambda: p.square().sum())
    opt.log.close()
    start, resumed = torch.ones(3), nn.Parameter(saved[0])
    replay_([start], tmp_path / "run.zolog")
    assert torch.equal(start, p)
    again = MeZO([resumed])
    again.load_state_dict(saved[1])
    for _ in range(3):
        again.step(lambda: resumed.square().sum())
    assert torch.equal(resumed, p)
    start = torch.ones(3)
    replay_([start], again.log)
    assert torch.equal(start, p)


def failing(*_: Any) -> None:
    raise MemoryError


def test_copies_and_pickles_continue_alike() -> None:
    model = mlp()
    opt = MeZO(model.parameters(), lr=1e-2, momentum=0.5, momentum_mode="store")
    opt.step(loss_of(model))
    runs = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt))), (model, opt)]
    for m, o in runs:
        o.step(loss_of(m))
        o.step(loss_of(m))
    for m, o in runs[:2]:
        assert all(torch.equal(a, b) for a, b in zip(m.parameters(), model.parameters(), strict=True))
        assert o.log.to_bytes() == opt.log.to_bytes()


def test_hooks_run_and_added_groups_move() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    opt = MeZO([a], lr=1e-2)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    opt.step(lambda: a.sum() + b.sum())
    assert calls == ["pre", "post"]
    assert not b.any()
    opt.add_param_group({"params": [b], "lr": 1.0})
    opt.step(lambda: a.sum() + b.sum())
    assert b.all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_change_nothing(bad: float) -> None:
    p = nn.Parameter(torch.randn(5))
    before = p.detach().clone()
    opt = MeZO([p], lr=1.0, weight_decay=0.5)
    with pytest.raises(FloatingPointError, match="step 0: a loss, or the estimate from it in fp32, is not finite"):
        opt.step(lambda: p.sum() * bad)
    assert torch.equal(p, before)
    assert len(opt.log) == 0
    opt = MeZO([p], lr=1.0, weight_decay=0.5, on_nonfinite="skip")
    opt.step(lambda: p.sum() * bad)
    assert torch.equal(p, before)
    assert [s.scalars for s in opt.log.steps()] == [None]
    opt.step(lambda: p.sum())
    assert not torch.equal(p, before)


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({}, 1e308),  # two of them overflow
        ({"variant": "fzoo", "directions": 3}, 1e200),  # their squares do
        ({"variant": "hizoo", "eps": 1e-170}, 1.0),  # eps^2 underflows
    ],
)
def test_losses_at_the_edge_of_fp64_are_handled_as_any(options: dict[str, Any], loss: float) -> None:
    p = nn.Parameter(torch.randn(5))
    before = p.detach().clone()
    opt = MeZO([p], lr=1e-3, on_nonfinite="skip", **options)
    values = iter([loss, 0.5 * loss] * 4)
    opt.step(lambda: next(values) * float(p.abs().sum() > 0))
    assert [s.scalars for s in opt.log.steps()] == [None]
    assert torch.equal(p, before)


def test_a_first_step_that_fails_leaves_no_log_file(tmp_path: Any) -> None:
    p = nn.Parameter(torch.randn(5))
    opt = MeZO([p], log_file=tmp_path / "run.zolog")
    for bad, error in ((lambda: 1 / 0, ZeroDivisionError), (lambda: math.nan, FloatingPointError)):
        with pytest.raises(error):
            opt.step(bad)
        assert not (tmp_path / "run.zolog").exists()
    opt.step(lambda: p.sum())
    opt.log.close()
    assert len(ZoLog.load(tmp_path / "run.zolog")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps must be .*> 0"),
        ({"eps": math.nan}, "eps"),
        ({"lr": -1.0}, "lr must be .*>= 0"),
        ({"lr": math.nan}, "lr"),
        ({"lr": torch.ones(2)}, r"lr must be a finite number >= 0, got tensor"),
        ({"eps": None}, "eps must be a finite number > 0, got None"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"momentum": 1.0}, "momentum must be below 1"),
        ({"directions": 0}, "directions must be an integer >= 1, got 0"),
        ({"directions": 1.5}, "directions"),
        ({"directions": True}, "directions must be an integer >= 1, got True"),
        ({"distribution": "lowrank", "rank": True}, "rank must be an integer in .*got True"),
        ({"distribution": "lowrank", "period": "5"}, "period must be an integer in .*got '5'"),
        ({"variant": "fzoo"}, "at least 2 directions"),
        ({"variant": "spsb"}, "variant must be one of .*spsb"),
        ({"distribution": "normal"}, "distribution must be one of .*normal"),
        ({"rounding": "up"}, "rounding must be one of .*up"),
        ({"perturb": "maybe"}, "perturb must be one of .*maybe"),
        ({"momentum_mode": "x"}, "momentum_mode"),
        ({"on_nonfinite": "x"}, "on_nonfinite"),
        ({"parallel": "x"}, "parallel"),
        ({"parallel": "direction"}, "process_group"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeZO([nn.Parameter(torch.zeros(2))], **options)


@pytest.mark.parametrize("text", ["1e-6", "0.5", b"0.5", np.str_("0.5"), "fast"])
def test_numbers_that_are_text_are_a_type_error_wherever_they_come(text: Any) -> None:
    """YAML reads 1e-6 as text, and float() takes text: a scheduler would fail later, when it multiplies."""
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for name in ("lr", "eps", "weight_decay", "momentum", "smoothing"):
        with pytest.raises(TypeError, match=rf"MeZO: {name} must be a finite number .*, which is text"):
            MeZO([p], **{name: text})
    opt = MeZO([p])
    with pytest.raises(TypeError, match="MeZO: eps must be"):
        opt.eps = text
    for name in ("lr", "weight_decay", "momentum"):
        with pytest.raises(TypeError, match=f"MeZO: {name} must be"):
            opt.add_param_group({"params": [q], name: text})
        assert len(opt.param_groups) == 1
        kept, opt.param_groups[0][name] = opt.param_groups[0][name], text
        with pytest.raises(TypeError, match=f"MeZO: {name} must be"):
            opt.step(lambda: p.sum())
        opt.param_groups[0][name] = kept
    assert torch.equal(p.detach(), torch.ones(2))
    opt.step(lambda: p.sum())
    assert len(opt.log) == 1


def test_integers_of_numpy_and_other_libraries_are_integers() -> None:
    p = nn.Parameter(torch.ones(3, 2))
    numbers = {"directions": np.int64(2), "rank": np.uint8(1), "period": np.int32(3), "seed": np.int16(5)}
    opt = MeZO([p], distribution="lowrank", **numbers)
    opt.step(lambda: p.square().sum())
    header = ZoLog.from_bytes(opt.log.to_bytes()).header
    assert [header[name] for name in numbers] == [2, 1, 3, 5]
    with pytest.raises(ValueError, match="directions must be an integer"):
        MeZO([p], directions=np.bool_(True))  # type: ignore[arg-type]


def test_bad_parameters_are_refused_and_nothing_is_added() -> None:
    whole, matrix = torch.zeros(8), torch.zeros(3, 4)
    bad: list[tuple[Any, str]] = [
        ([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], "complex64"),
        ([torch.eye(3).to_sparse().requires_grad_()], "dense"),
        ([nn.Parameter(torch.zeros(2, device="meta"))], "parameter . must have data, got a meta tensor"),
        ([nn.Parameter(torch.zeros(3).expand(2, 3))], "parameter . must not overlap itself"),
        ([nn.Parameter(whole[:5]), nn.Parameter(whole[3:])], "parameter 0 and parameter 1 must not overlap in memory"),
        ([nn.Parameter(matrix), nn.Parameter(matrix.t())], "parameter 0 and parameter 1 must not overlap in memory"),
        ([], "empty parameter list"),
    ]
    for params, message in bad:
        with pytest.raises(ValueError, match=message):
            MeZO(params)
    with pytest.raises(TypeError):
        MeZO(torch.zeros(3))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module or None, got int"):
        MeZO([nn.Parameter(torch.zeros(3))], model=3)  # type: ignore[arg-type]
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="twice"), pytest.warns(UserWarning, match="duplicate"):
        MeZO([p, p])
    opt = MeZO([p])
    opt.add_param_group({"params": [nn.Parameter(matrix[:, :3])]})
    bad.append(([nn.Parameter(matrix[:, 1:])], "parameter 1 and parameter 2 must not overlap in memory"))
    for params, message in [*bad[:4], bad[-1]]:
        with pytest.raises(ValueError, match=message):
            opt.add_param_group({"params": params})
    assert len(opt.param_groups) == 2


def test_frozen_parameters_may_be_of_any_kind_until_they_move() -> None:
    """A quantised base under adapters."""
    codes, p = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False), nn.Parameter(torch.ones(3))
    opt = MeZO([codes, p], lr=1.0)
    opt.step(lambda: p.sum() * codes.sum())
    assert codes.tolist() == [1, 1]
    assert not torch.equal(p, torch.ones(3))
    other = nn.Parameter(p.detach()[1:], requires_grad=False)
    opt.add_param_group({"params": [other]})
    before = p.detach().clone()
    other.requires_grad_()
    with pytest.raises(ValueError, match=r"MeZO\.step: parameter 1 and parameter 2 must not overlap in memory"):
        opt.step(lambda: p.sum())
    assert torch.equal(p, before)
    assert len(opt.log) == 1


def test_bad_closures_and_states_are_refused_and_nothing_changes() -> None:
    p = nn.Parameter(torch.randn(5))
    before = p.detach().clone()
    opt = MeZO([p], lr=1.0)
    with pytest.raises(RuntimeError, match=r"needs a closure.*opt.step\(lambda"):
        opt.step()
    with pytest.raises(ValueError, match=r"scalar.*\[5\]"):
        opt.step(lambda: p * 2)
    for nothing in (None, {}, "low"):  # of a fresh optimizer as well: its first evaluation is looked at
        for fresh in (opt, MeZO([p, nn.Parameter(torch.randn(2))], lr=1.0)):
            with pytest.raises(TypeError, match=rf"MeZO.step: closure must .* got {type(nothing).__name__}"):
                fresh.step(lambda: nothing)  # noqa: B023
    opt.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr"):
        opt.step(lambda: p.sum())
    opt.param_groups[0]["lr"] = 1.0
    assert torch.equal(p, before)
    with pytest.raises(ValueError, match="no entry 'mezo'"):
        opt.load_state_dict(torch.optim.SGD([p], lr=1.0).state_dict())
    part = MeZO([p], lr=0.25).state_dict()
    del part["mezo"]["eps"]
    with pytest.raises(ValueError, match="'mezo' must hold 'log' and 'eps', it lacks eps"):
        opt.load_state_dict(part)
    assert opt.param_groups[0]["lr"] == 1.0
    with pytest.raises(ValueError, match="rounding must be the saved run's"):
        opt.load_state_dict(MeZO([p], rounding="stochastic").state_dict())
    with pytest.raises(ValueError, match=r"parameter .*must be"):
        opt.load_state_dict(MeZO([nn.Parameter(torch.zeros(6))]).state_dict())
    opt.step(lambda: p.sum())
    p.data = p.data.half()
    with pytest.raises(RuntimeError, match="would not replay"):
        opt.step(lambda: p.sum())


def test_auto_copies_what_is_small_and_has_the_bits_of_every_exact_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    scalars, kinds = [], []
    for perturb, small in (("scratch", 1), ("copy", 1), ("auto", 1), ("auto", 10**6)):
        monkeypatch.setattr(estimate, "SMALL", small)
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        opt = MeZO(model.parameters(), lr=1e-3, perturb=perturb)
        x = torch.randn(2, 5, 16)
        for _ in range(3):
            opt.step(lambda model=model, x=x: model(x)[..., 0].square().sum())
        scalars.append(opt.log.scalars().tolist())
        kinds.append(type(opt._evaluator._perturber).__name__)
    assert kinds == ["Scratch", "Copy", "Scratch", "Copy"]
    assert all(s == scalars[0] for s in scalars)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["spsa", "one_sided", "sign", "fzoo"])
def test_a_loss_in_half_precision_that_hides_every_difference_is_named(variant: str, dtype: torch.dtype) -> None:
    def losses(dtype: torch.dtype) -> MeZO:
        p = nn.Parameter(torch.ones(40))
        opt = MeZO([p], lr=0.0, variant=variant, directions=2)
        for _ in range(3):
            opt.step(lambda: (p * 0.01).sum().add(3.0).to(dtype))
        return opt

    with pytest.warns(UserWarning, match=rf"{str(dtype)[6:]}.*float32") as seen:
        assert not losses(dtype).log.scalars().any()
    assert len([w for w in seen if "float32" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert losses(torch.float32).log.scalars().all()


def test_a_loss_in_half_precision_that_shows_differences_is_no_reason_to_warn() -> None:
    p = nn.Parameter(torch.ones(40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MeZO([p], lr=0.0, eps=0.5).step(lambda: p.sum().bfloat16())


def test_small_bf16_updates_vanish_with_nearest_rounding_and_arrive_with_stochastic() -> None:
    """lr 1e-7, g 10, weights of 0.02: cosine of the change, or of its mean over rounding bits, with the intended."""
    torch.manual_seed(0)
    start = (0.02 * torch.randn(1500)).bfloat16()
    wanted = -1e-6 * lo.zo_noise(start.shape, 5, dtype=F64)

    def cosine(rounding: str, trials: int) -> float:
        total = torch.zeros_like(wanted)
        for key in range(trials):
            p = start.clone()
            # the first seed keys the rounding bits; its term is zero, so that z stays that of seed 5
            lo.zo_axpy_([p], [1000 + key, 5], [0.0, -1e-6], rounding=rounding)
            total += p.double() - start.double()
        return float(total @ wanted / (total.norm() * wanted.norm()))

    assert 0.02 < cosine("nearest", 1) < 0.3
    assert cosine("stochastic", 8000) >= 0.99
