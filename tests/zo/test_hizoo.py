"""HiZOO: MeZO along z / sqrt(h). The formula in float64, what h learns, exact weights, and the bits of a replay."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zo.runs import DTYPES, HIZOO, VARIANTS, model_of, run, same, take

import leanops as lo
from leanops.optim import LogError, MeZO, ZoLog, replay_
from leanops.optim.zo import hizoo, perturbing_mode
from leanops.optim.zo.directions import Noise, Seed
from leanops.optim.zo.hizoo import Hizoo
from leanops.optim.zo.slots import Slot
from leanops.optim.zo.update import Update

F64 = torch.float64


@pytest.fixture(params=[1 << 17, 3])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tensors, and pieces of three elements."""
    monkeypatch.setattr(hizoo, "_SLICE", request.param)


def noise(opt: MeZO, params: list[Tensor], k: int) -> list[Tensor]:
    """z of the next step's direction k."""
    header = opt.log.header
    seed = Noise.of(header).seeds(header["seed"], opt.steps, k + 1)[k].left
    return [lo.zo_noise(p.shape, seed, tensor_id=i, dtype=F64) for i, p in enumerate(params)]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_roots_are_rounded_correctly(dtype: torch.dtype) -> None:
    """NumPy, the processor and CUDA round roots correctly; torch on a CPU does not."""
    g = torch.Generator().manual_seed(0)
    p, h = torch.randn(1 << 16, generator=g, dtype=dtype), torch.rand(1 << 16, generator=g, dtype=dtype) * 1e3
    slot = Slot(p, p, 3, 0, "p", 0, (h,))
    out = torch.empty_like(p)
    Hizoo(Noise("gaussian")).perturb_into_([out], [slot], Seed(7), 1e-2)
    step = torch.zeros_like(p)
    lo.zo_axpy_(step, 7, 1e-2, tensor_ids=[3])
    assert np.array_equal(out.numpy(), step.numpy() / np.sqrt(h.numpy()) + p.numpy())


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "mode"), [(0.0, "recompute"), (0.7, "store")])
@pytest.mark.parametrize("directions", [1, 3])
def test_a_run_is_that_of_the_formula(slices: None, directions: int, momentum: float, mode: str) -> None:
    """Five steps against the formula of leanops.optim.zo.hizoo, written out in float64."""
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=g, dtype=F64)) for s in ((3, 4), (5,))]
    root = torch.randn(17, 17, generator=g, dtype=F64)
    a = root @ root.T / 17

    def f(parts: Any) -> Tensor:
        w = torch.cat([t.reshape(-1) for t in parts])
        return w.sin() @ a @ w

    lr, eps, decay, alpha = 0.05, 1e-2, 0.1, 0.2
    opt = MeZO(
        params, lr, eps, weight_decay=decay, momentum=momentum, momentum_mode=mode, directions=directions,
        variant="hizoo", smoothing=alpha,
    )  # fmt: skip
    wanted = [p.detach().clone() for p in params]
    h, m = [torch.ones_like(p) for p in wanted], [torch.zeros_like(p) for p in wanted]
    for _ in range(5):
        zs = [noise(opt, wanted, k) for k in range(directions)]
        base = f(wanted)
        estimates, curvatures = [], []
        for z in zs:
            plus, minus = (
                f([p + s * eps * u / v.sqrt() for p, u, v in zip(wanted, z, h, strict=True)]) for s in (1, -1)
            )
            estimates.append(float((plus - minus) / (2 * eps)))
            curvatures.append(float((plus + minus - 2 * base).abs() / (2 * eps**2)))
        opt.step(lambda: f(params))
        logged = torch.from_numpy(opt.log.scalars()[-1]).double()
        torch.testing.assert_close(logged, torch.tensor(estimates + curvatures, dtype=F64), rtol=2e-5, atol=1e-6)
        g_k, c_k = logged[:directions], logged[directions:]  # as the log rounds them
        for i in range(2):
            h[i] = h[i] * (1 - alpha + alpha * sum(c * z[i] ** 2 for c, z in zip(c_k, zs, strict=True)) / directions)
            q = sum(e * z[i] for e, z in zip(g_k, zs, strict=True)) / h[i].sqrt() / directions
            m[i] = momentum * m[i] + q
            wanted[i] = (1 - lr * decay) * wanted[i] - lr * m[i]
    for p, q, v in zip(params, wanted, h, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(opt.state[p]["curvature"], v, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(h[0], torch.ones(()).to(F64), atol=0.1)


def test_the_curvature_is_the_diagonal_and_half_the_trace() -> None:
    """On w A w / 2 at h = 1: E c z_i^2 = a_ii + tr(A) / 2, whatever eps is."""
    diagonal = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0], dtype=F64)
    w, n = nn.Parameter(torch.randn(6, dtype=F64)), 4000
    opt = MeZO([w], lr=0.0, eps=0.3, directions=n, variant="hizoo", smoothing=0.5)
    opt.step(lambda: (w.square() * diagonal).sum() / 2)
    learnt = (opt.state[w]["curvature"] - 0.5) / 0.5
    wanted = diagonal + diagonal.sum() / 2
    # (c z_i^2) has a standard deviation of some 3.5 times its mean
    assert (((learnt - wanted) / wanted).abs() < 5 * 3.5 / math.sqrt(n)).all()
    assert learnt[0] > 1.4 * learnt[-1]


def test_where_the_curvature_is_large_directions_and_steps_are_short() -> None:
    w = nn.Parameter(torch.zeros(20_000))
    opt = MeZO([w], lr=1.0, variant="hizoo", smoothing=1e-12)
    opt.step(lambda: w.sum())  # makes the state
    before = w.detach().clone()
    opt.state[w]["curvature"] = torch.ones(20_000).index_fill_(0, torch.arange(10_000), 16.0)
    opt.step(lambda: w.sum())
    step = (w.detach() - before).square()
    assert 0.9 / 16 < float(step[:10_000].mean() / step[10_000:].mean()) < 1.1 / 16


# --- evaluations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", [1, 3])
def test_a_step_evaluates_twice_a_direction_and_once_and_logs_two_scalars_a_direction(directions: int) -> None:
    w, calls = nn.Parameter(torch.ones(3)), []
    opt = MeZO([w], variant="hizoo", directions=directions)
    opt.step(lambda: calls.append(1) or w.square().sum())
    assert len(calls) == 2 * directions + 2  # the first step repeats an evaluation
    assert opt.log.scalars().shape == (1, 2 * directions)
    assert (opt.log.scalars()[:, directions:] >= 0).all()
    size = len(opt.log.to_bytes())
    opt.step(lambda: w.square().sum())
    assert len(opt.log.to_bytes()) - size == 8 * directions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scratch_and_copy_take_the_same_steps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturbing_mode, "_ROW", 1)  # an embedding's rows one by one
    monkeypatch.setattr(hizoo, "_SLICE", 50)
    found = []
    for mode in ("scratch", "copy"):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Embedding(100, 8), nn.Flatten(), nn.Linear(32, 3), nn.LayerNorm(3)).to(dtype)
        opt = MeZO(model.parameters(), lr=1e-2, variant="hizoo", smoothing=0.3, perturb=mode)
        for step in range(3):
            opt.step(lambda m=model, s=step: m(torch.tensor([[5, 9, 9, s]])).double().square().sum())
        assert not bool((opt.state[model[0].weight]["curvature"] == 1).all())
        found.append([*model.parameters(), *(s["curvature"] for s in opt.state.values())])
    assert all(map(torch.equal, *found))


def test_non_contiguous_parameters_move_as_contiguous_ones() -> None:
    torch.manual_seed(0)
    start = torch.randn(7, 5)
    weights = [nn.Parameter(start.clone()), nn.Parameter(start.t().contiguous().t())]
    for w in weights:
        opt = MeZO([w], lr=1e-2, variant="hizoo", smoothing=0.3)
        for _ in range(3):
            opt.step(lambda w=w: w.contiguous().square().sum())
    assert torch.equal(*weights)
    assert weights[1].stride() == (1, 7)


@pytest.mark.parametrize("mode", ["scratch", "copy"])
def test_an_exception_or_a_loss_that_is_not_finite_changes_nothing(mode: str) -> None:
    model = model_of(torch.bfloat16)
    opt = MeZO(model.parameters(), lr=1e-2, variant="hizoo", smoothing=0.3, perturb=mode)
    x = torch.randn(4, 2, 5, dtype=torch.bfloat16)
    opt.step(lambda: model(x).square().mean())
    kept = [t.clone() for t in (*model.parameters(), *(s["curvature"] for s in opt.state.values()))]

    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError):
            opt.step(lambda bad=bad: model(x).square().mean() * bad)
    for finished in range(3):
        calls: list[int] = []

        def closure(calls: list[int] = calls, finished: int = finished) -> Tensor:
            calls.append(1)
            if len(calls) > finished:
                raise RuntimeError
            return model(x).square().mean()

        with pytest.raises(RuntimeError):
            opt.step(closure)
    assert all(map(torch.equal, kept, [*model.parameters(), *(s["curvature"] for s in opt.state.values())]))


def test_a_step_allocates_a_few_slices_and_no_whole_tensor() -> None:
    w = nn.Parameter(torch.zeros(1 << 21, dtype=torch.bfloat16))
    opt = MeZO([w], variant="hizoo", rounding="stochastic")
    opt.step(lambda: w[0])
    assert opt.state[w]["curvature"].dtype == torch.float32
    slot = opt._slots()[0]
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as seen:
        strategy = Hizoo(Noise("gaussian"))
        strategy.apply_(slot, Update(strategy.seeds(0, 1), [1.0, 1.0], None, 1e-3, 0.0, 0.0), {})
    largest = max(e.self_cpu_memory_usage for e in seen.events())
    assert 0 < largest <= 4 * hizoo._SLICE


def test_state_made_in_inference_mode_works_outside_it() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = MeZO([p], variant="hizoo", smoothing=0.01, momentum=0.5, momentum_mode="store")
    with torch.inference_mode():
        opt.step(lambda: p.square().sum())
    opt.step(lambda: p.square().sum())
    assert not any(value.is_inference() for value in opt.state[p].values())
    assert opt.steps == 2


# --- state, log and replay --------------------------------------------------------------------------------------------

RUNS = {name: options for name, options in VARIANTS.items() if name.startswith("hizoo")}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_run_resumes_to_the_same_bits(dtype: torch.dtype, options: dict[str, Any]) -> None:
    _, whole, _ = run(dtype, **options)
    _, model, opt = run(dtype, steps=5, **options)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    resumed = MeZO(model.parameters(), on_nonfinite="skip", **options)
    resumed.step(lambda: model[0].weight.sum() * math.nan)  # makes a state, which loading replaces
    resumed.load_state_dict(torch.load(file))
    assert all(s["curvature"].dtype == (F64 if dtype == F64 else torch.float32) for s in resumed.state.values())
    take(resumed, model, range(5, 11))
    assert same(model, whole)


def test_the_header_names_the_smoothing_and_a_run_resumes_only_with_the_same() -> None:
    _, model, opt = run(torch.float32, **HIZOO)
    header = ZoLog.from_bytes(opt.log.to_bytes()).header
    assert (header["variant"], header["smoothing"]) == ("hizoo", 0.01)
    assert "smoothing" not in MeZO([nn.Parameter(torch.zeros(2))]).log.header
    other = MeZO(model.parameters(), variant="hizoo", smoothing=0.2)
    with pytest.raises(ValueError, match=r"smoothing must be the saved run's, 0\.01, got 0\.2"):
        other.load_state_dict(opt.state_dict())


def test_fused_replay_is_refused_and_writes_nothing() -> None:
    start, _, opt = run(torch.float32, **HIZOO)
    kept = copy.deepcopy(start)
    with pytest.raises(LogError, match="fused=True cannot replay hizoo"):
        replay_(start, opt.log, fused=True)
    assert same(start, kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distribution": "rademacher"}, "hizoo needs distribution='gaussian', got 'rademacher'"),
        ({"distribution": "lowrank"}, "hizoo needs distribution='gaussian', got 'lowrank'"),
        ({"momentum": 0.9}, "momentum of hizoo needs momentum_mode='store'"),
        ({"smoothing": 0.0}, r"smoothing must be in \(0, 1\), got 0\.0"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"smoothing": math.nan}, "smoothing"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeZO([nn.Parameter(torch.zeros(2, 2))], variant="hizoo", **options)


def test_momentum_that_is_set_later_is_refused_too() -> None:
    w = nn.Parameter(torch.ones(2))
    opt = MeZO([w], variant="hizoo")
    opt.param_groups[0]["momentum"] = 0.5
    with pytest.raises(ValueError, match="momentum_mode='store'"):
        opt.step(lambda: w.sum())
    assert torch.equal(w.detach(), torch.ones(2))
