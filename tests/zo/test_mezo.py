"""MeZO's arithmetic: the estimate, the update in every variant, and what torch.optim's users rely on."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from zo.runs import loss_of, mlp

import leanops as lo
from leanops.common import seeds as seed_rule
from leanops.optim import MeZO
from leanops.optim.zo import estimate
from leanops.optim.zo.perturb_at_use import Scratch

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
        assert calls == (8 if variant == "sign" else 5) + 1  # the first step repeats one evaluation
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
    assert loss == pytest.approx(sum(seen[1:]) / 2)  # the first step repeats its first evaluation
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_copies_what_is_small_and_has_the_bits_of_every_exact_mode(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, kinds = [], []
    elements = sum(p.numel() for p in nn.TransformerEncoderLayer(16, 2, 32).parameters())
    for perturb, small in (("scratch", 1), ("copy", 1), ("auto", elements - 1), ("auto", elements)):
        monkeypatch.setattr(estimate, "SMALL", small)
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).to(dtype)
        opt = MeZO(model.parameters(), lr=1e-3, perturb=perturb)
        x = torch.randn(2, 5, 16, dtype=dtype)
        for _ in range(3):
            opt.step(lambda model=model, x=x: model(x)[..., 0].float().square().sum())
        runs.append((opt.log.scalars().tolist(), [p.detach() for p in model.parameters()]))
        perturber = opt._evaluator._perturber
        kinds.append(type(perturber).__name__)
        if isinstance(perturber, Scratch):  # beyond the limit there is no copy, and scratch for one use at a time
            assert perturber.held is None
    assert kinds == ["Scratch", "Copy", "Scratch", "Copy"]
    assert all(scalars == runs[0][0] and all(map(torch.equal, weights, runs[0][1])) for scalars, weights in runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["spsa", "one_sided", "sign", "fzoo"])
def test_a_loss_in_half_precision_that_hides_every_difference_gets_a_warning(variant: str, dtype: torch.dtype) -> None:
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


def test_a_loss_in_half_precision_that_shows_differences_gets_no_warning() -> None:
    p = nn.Parameter(torch.ones(40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MeZO([p], lr=0.0, eps=0.5).step(lambda: p.sum().bfloat16())


def test_small_bf16_updates_vanish_with_nearest_rounding_and_arrive_with_stochastic() -> None:
    """lr 1e-7, g 10, weights of 0.02: cosine of the wanted change and the change, a mean over sets of rounding bits."""
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
