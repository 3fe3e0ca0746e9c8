"""LOZO: MeZO with z = U V^T. The noise's law, the estimate along it, exact weights, and the bits of a replay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zo.runs import DTYPES, bits, run, same

import leanops as lo
from leanops.common import seeds as seed_rule
from leanops.optim import MeZO, ZoLog, replay_
from leanops.optim.zo.directions import Noise

F64 = torch.float64


def z_of(shape: tuple[int, ...], left: int, right: int, *, rank: int = 2, tensor_id: int = 0) -> Tensor:
    """Z itself: an axpy onto zeros."""
    z = torch.zeros(shape)
    lo.zo_axpy_(z, left, 1.0, right_seeds=right, rank=rank, tensor_ids=[tensor_id], distribution="lowrank")
    return z


def direction(opt: MeZO, p: Tensor, k: int = 0, *, tensor_id: int = 0) -> Tensor:
    """The Z of the next step's direction k."""
    header = opt.log.header
    seed = Noise.of(header).seeds(header["seed"], opt.steps, k + 1)[k]
    return z_of(p.shape, *seed, rank=header["rank"], tensor_id=tensor_id).to(F64)


# --- the noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_z_has_mean_0_and_second_moment_r(rank: int) -> None:
    """Over draws, for every entry; E z^4 = 3 r (r + 2) bounds the spread of the second moment."""
    draws = torch.stack([z_of((6, 7), s, 10_000 + s, rank=rank) for s in range(4000)]).to(F64)
    n = draws.numel()  # entries of a draw are uncorrelated
    assert abs(float(draws.mean())) < 5 * math.sqrt(rank / n)
    spread = math.sqrt(3 * rank * (rank + 2) - rank**2)
    assert float((draws.square().mean(0) - rank).abs().max()) < 5 * spread / math.sqrt(len(draws))


@pytest.mark.parametrize("shape", [(30, 40), (9, 4, 3, 3), (200, 5)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_z_has_rank_r_with_rows_along_the_first_axis(shape: tuple[int, ...], rank: int) -> None:
    z = z_of(shape, 3, 4, rank=rank).flatten(1).to(F64)
    values = torch.linalg.svdvals(z)
    assert values[rank - 1] > 1e-2 * values[0]
    assert (values[rank:] < 1e-6 * values[0]).all()


def test_u_follows_the_seed_and_v_the_right_seed() -> None:
    a, b, c = z_of((20, 30), 1, 9), z_of((20, 30), 2, 9), z_of((20, 30), 1, 8)

    def rank(x: Tensor, y: Tensor, dim: int) -> int:
        return int(torch.linalg.matrix_rank(torch.cat((x, y), dim).to(F64), rtol=1e-5))

    assert rank(a, b, 0) == 2  # rows in the span of one V
    assert rank(a, b, 1) == 4  # columns in those of two U
    assert rank(a, c, 0) == 4
    assert rank(a, c, 1) == 2


def test_a_vector_has_plain_gaussian_z() -> None:
    for shape in ((50,), ()):
        assert torch.equal(z_of(shape, 5, 6, tensor_id=3), lo.zo_noise(shape, 5, tensor_id=3))


def test_a_part_of_a_matrix_gets_its_part_of_z() -> None:
    whole = z_of((11, 13), 5, 6)
    for a, b in ((0, 143), (13, 39), (5, 6), (7, 140)):
        part = torch.zeros(b - a)
        lo.zo_axpy_(part, 5, 1.0, right_seeds=6, offsets=[a], columns=[13], distribution="lowrank")
        assert torch.equal(part, whole.view(-1)[a:b])


# --- MeZO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-3, 0.5])
@pytest.mark.parametrize("variant", ["spsa", "one_sided", "sign", "fzoo"])
def test_on_a_quadratic_the_estimate_is_that_of_its_formula(variant: str, eps: float) -> None:
    g = torch.Generator().manual_seed(0)
    p, bias = (nn.Parameter(torch.randn(s, generator=g, dtype=F64)) for s in ((6, 5), (4,)))
    root = torch.randn(34, 34, generator=g, dtype=F64)
    a, b = root @ root.T / 34, torch.randn(34, generator=g, dtype=F64)

    def f(*parts: Tensor) -> Tensor:
        w = torch.cat([t.reshape(-1) for t in parts])
        return 0.5 * w @ a @ w + b @ w

    opt = MeZO([p, bias], lr=1e-3, eps=eps, distribution="lowrank", directions=3, variant=variant)
    zs = [(direction(opt, p, k), direction(opt, bias, k, tensor_id=1)) for k in range(3)]
    start = [p.detach().clone(), bias.detach().clone()]
    moved = [[f(*(w + s * eps * z for w, z in zip(start, pair, strict=True))) for pair in zs] for s in (1, -1)]
    plus, minus = (torch.stack(m) for m in moved)
    gradient = a @ torch.cat([t.reshape(-1) for t in start]) + b
    wanted = {
        "spsa": torch.stack([torch.cat([t.reshape(-1) for t in pair]) @ gradient for pair in zs]),  # for any eps
        "one_sided": (plus - f(*start)) / eps,
        "sign": torch.sign(plus - minus),
        "fzoo": (plus - f(*start)) / plus.std(correction=0),
    }[variant]
    opt.step(lambda: f(p, bias))
    got = torch.from_numpy(opt.log.scalars()[0]).double()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for i, q in enumerate((p, bias)):
        step = sum(s * pair[i] for s, pair in zip(got, zs, strict=True)) / 3
        torch.testing.assert_close(q.detach(), start[i] - 1e-3 * step, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("momentum_mode", ["recompute", "store"])
def test_momentum_sums_past_estimates_across_periods(momentum_mode: str) -> None:
    p = nn.Parameter(torch.randn(5, 4, dtype=F64))
    options: dict[str, Any] = {"momentum": 0.8, "momentum_mode": momentum_mode, "period": 3}
    opt = MeZO([p], lr=1e-3, distribution="lowrank", **options)
    m, w = torch.zeros_like(p.detach()), p.detach().clone()
    for step in range(8):
        z = direction(opt, p)
        opt.step(lambda: (p**2).sum())
        m = 0.8 * m + float(opt.log.scalars()[step, 0]) * z
        w = w - 1e-3 * m
    torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-13)


def test_v_lives_for_a_period_and_u_for_a_direction() -> None:
    noise = Noise("lowrank", 2, 50)
    steps = [noise.seeds(7, step, 2) for step in range(150)]
    assert [[s[0].right for s in steps].index(s[0].right) for s in steps] == [t // 50 * 50 for t in range(150)]
    assert all(a.right == b.right for a, b in steps)
    lefts = [s.left for pair in steps for s in pair]
    assert len(set(lefts)) == 300
    assert not {s[0].right for s in steps} & set(lefts)
    assert steps[3][1].left == seed_rule.derive(7, 3, 1)


def test_updates_of_a_period_stay_within_the_span_of_v() -> None:
    p = nn.Parameter(torch.randn(20, 30, dtype=F64))
    opt = MeZO([p], lr=1e-3, distribution="lowrank", rank=3, period=10)
    before = p.detach().clone()
    for _ in range(10):
        opt.step(lambda: (p**2).sum())
    assert int(torch.linalg.matrix_rank(p.detach() - before, rtol=1e-6)) == 3
    opt.step(lambda: (p**2).sum())
    assert int(torch.linalg.matrix_rank(p.detach() - before, rtol=1e-6)) == 6


def test_it_descends_on_a_small_regression() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    x = torch.randn(32, 5)
    y = x.sum(1, keepdim=True).tanh()
    opt = MeZO(model.parameters(), lr=1e-2, directions=4, distribution="lowrank", model=model)
    with torch.no_grad():
        first = float(nn.functional.mse_loss(model(x), y))
        for _ in range(150):
            opt.step(lambda: nn.functional.mse_loss(model(x), y))
        assert float(nn.functional.mse_loss(model(x), y)) < 0.3 * first


# --- exact weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["scratch", "copy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_bit_equal_after_evaluations(dtype: torch.dtype, mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.LayerNorm(5)).to(dtype)
    before = [bits(p) for p in model.parameters()]
    opt = MeZO(model.parameters(), lr=0.0, perturb=mode, distribution="lowrank", directions=2)
    for _ in range(60):
        opt.step(lambda: model(torch.tensor([1, 8])).double().sum())
    assert all(torch.equal(a, bits(p)) for a, p in zip(before, model.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="stop"):
        opt.step(lambda: model(torch.tensor([1])) + _stop())
    assert all(torch.equal(a, bits(p)) for a, p in zip(before, model.parameters(), strict=True))


def _stop() -> None:
    raise RuntimeError("stop")


def test_scratch_gives_looked_up_rows_and_tied_weights_the_bits_of_a_copy() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(40_000, 4)
    tokens = torch.tensor([5, 39_999, 0, 5])
    seen: dict[str, list[Tensor]] = {"scratch": [], "copy": [], "inplace": []}
    for mode, values in seen.items():
        start = table.weight.detach().clone()

        def closure(values: list[Tensor] = values) -> Tensor:
            values.append(table(tokens).detach().clone())  # few rows, then all of them
            values.append(nn.functional.linear(torch.eye(4), table.weight).detach().clone())
            return torch.zeros(())

        MeZO([table.weight], lr=0.0, eps=1e-2, perturb=mode, distribution="lowrank").step(closure)
        table.weight.data.copy_(start)  # "inplace" is not exact
    assert all(map(torch.equal, seen["scratch"], seen["copy"]))
    for a, b in zip(seen["inplace"], seen["copy"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(seen["copy"][1].T[tokens], seen["copy"][0])


# --- the log ----------------------------------------------------------------------------------------------------------


def test_the_header_names_rank_and_period_and_a_run_resumes_only_with_the_same() -> None:
    start, end, opt = run(torch.float32, distribution="lowrank", rank=3, period=7)
    header = ZoLog.from_bytes(opt.log.to_bytes()).header
    assert (header["distribution"], header["rank"], header["period"]) == ("lowrank", 3, 7)
    plain = MeZO([nn.Parameter(torch.zeros(2))])
    assert not {"rank", "period"} & plain.log.header.keys()
    other = MeZO(end.parameters(), distribution="lowrank", rank=3, period=8)
    with pytest.raises(ValueError, match="period must be the saved run's, 7, got 8"):
        other.load_state_dict(opt.state_dict())
    resumed = MeZO(end.parameters(), distribution="lowrank", rank=3, period=7)
    resumed.load_state_dict(opt.state_dict())
    resumed.step(lambda: sum((p**2).sum() for p in end.parameters()))
    replay_(start, resumed.log)
    assert same(start, end)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank must be an integer in \[1, 64\], got 0"),
        ({"rank": 65}, "rank"),
        ({"rank": 2.0}, "rank"),
        ({"period": 0}, "period must be an integer .*got 0"),
        ({"period": True}, "period"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeZO([nn.Parameter(torch.zeros(2, 2))], distribution="lowrank", **options)


def test_no_factor_is_stored() -> None:
    """The operator allocates nothing of the weights' size; its factors live in fixed buffers of a tile."""
    p = torch.zeros(2000, 3000)
    with torch.profiler.profile(profile_memory=True) as seen:
        lo.zo_axpy_(p, [1, 2], [1e-3, 1e-3], right_seeds=[3, 3], distribution="lowrank")
    assert sum(max(e.self_cpu_memory_usage, 0) for e in seen.events()) < 1000
