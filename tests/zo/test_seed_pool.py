"""FedKSeed's pool: sums, history, sampling, application in one pass, and the size of its messages."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import leanops as lo
from leanops.optim import SeedPool


def random_pool(size: int = 64, n: int = 40, seed: int = 0) -> SeedPool:
    rng = np.random.default_rng(seed)
    pool = SeedPool(size, seed=9)
    for k, g in zip(rng.integers(size, size=n).tolist(), rng.normal(size=n).tolist(), strict=True):
        pool.add(k, g)
    return pool


def test_merging_adds_weighted_sums_and_the_unweighted_history() -> None:
    server, a, b = SeedPool(4), SeedPool(4), SeedPool(4)
    a.add(1, 2.0)
    a.add(1, -5000.0)
    b.add(2, 4.0)
    server.merge(a, 0.25)
    server.merge(b, 0.75)
    assert server.sums.tolist() == [0.0, 0.25 * -4998.0, 3.0, 0.0]
    amplitude = np.array([0.0, (2.0 + 1000.0) / 2, 4.0, 0.0])
    weights = np.exp((amplitude - 0.0) / (501.0 + 1e-10 - 0.0))
    np.testing.assert_allclose(server.probabilities(), weights / weights.sum(), rtol=1e-12)


def published_probabilities(histories: list[list[float]]) -> np.ndarray:
    """As the published code has it, with a list of scalars a candidate that begins with ``grad_initial = 0``."""
    mean = np.array([np.mean(np.abs(np.clip([0.0, *scalars], -1000.0, 1000.0))) for scalars in histories])
    scaled = (mean - mean.min()) / (mean.max() + 1e-10 - mean.min())
    weights: np.ndarray = np.exp(scaled) / np.exp(scaled).sum()
    return weights


@pytest.mark.parametrize("history_starts_with_zero", [False, True])
def test_a_history_may_start_with_a_zero_as_in_the_published_code(history_starts_with_zero: bool) -> None:
    histories = [[], [3.0], [-3.0, 3.0], [1.0, 2.0, -5000.0]]
    pool = SeedPool(4, history_starts_with_zero=history_starts_with_zero)
    for k, scalars in enumerate(histories):
        for g in scalars:
            pool.add(k, g)
    as_published = published_probabilities(histories)
    p = pool.probabilities()
    assert np.allclose(p, as_published, rtol=1e-12) == history_starts_with_zero
    assert (p[1] == p[2]) != history_starts_with_zero  # the mean of 3 and 3 is 3; that of 0, 3 and 3 is 2
    # what the option does not change: the sums, and so the weights
    assert pool.sums.tolist() == [0.0, 3.0, 0.0, -4997.0]


def test_a_pool_is_saved_with_the_start_of_its_history_and_earlier_bytes_stay() -> None:
    for merged in (False, True):
        plain, zero = (SeedPool(64, seed=9, history_starts_with_zero=on) for on in (False, True))
        for pool in (plain, zero):
            if merged:
                pool.merge(random_pool())
            else:
                pool.add(3, 2.0)
                pool.add(5, 1.0)
        copy = SeedPool.from_bytes(zero.to_bytes())
        assert copy.history_starts_with_zero
        assert np.array_equal(copy.probabilities(), zero.probabilities())
        assert not SeedPool.from_bytes(plain.to_bytes()).history_starts_with_zero
        assert zero.to_bytes()[12:] == plain.to_bytes()[12:]
        for pool, other in ((plain, zero), (zero, plain)):  # a bit that changes the option is damage
            with pytest.raises(ValueError, match="the checksum does not fit"):
                SeedPool.from_bytes(other.to_bytes()[:8] + pool.to_bytes()[8:])
        # a reader that does not know the option checks these bytes, and would sample with other probabilities
        assert (plain.to_bytes()[:8], zero.to_bytes()[:8]) == (b"ZOPOOL\x01\n", b"ZOPOOL\x02\n")
        with pytest.raises(ValueError, match="not a pool"):
            SeedPool.from_bytes(b"ZOPOOL\x03\n" + plain.to_bytes()[8:])


def test_sampling_is_uniform_without_history_and_follows_the_probabilities_with_it() -> None:
    pool = SeedPool(8)
    assert pool.probabilities().tolist() == [1 / 8] * 8
    for history in (False, True):
        if history:
            pool.add(3, 10.0)
            pool.add(5, 5.0)
        p = pool.probabilities()
        counts = np.bincount(pool.sample(20_000, generator=1), minlength=8)
        assert (((counts - 20_000 * p) ** 2) / (20_000 * p)).sum() < 30  # chi squared, 7 degrees of freedom
    assert p.argmax() == 3
    assert pool.sample(5, generator=2) == pool.sample(5, generator=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_applying_is_one_fused_pass_over_what_requires_grad(dtype: torch.dtype) -> None:
    pool = random_pool()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    model[0].bias.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    pool.apply_(model, 1e-2)
    used = np.flatnonzero(pool.sums)
    for i, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
        if i == 1:
            assert torch.equal(p, old)
            continue
        coeffs = (-1e-2 * pool.sums[used].astype(np.float64)).tolist()
        lo.zo_axpy_([old], pool.seeds[used].tolist(), coeffs, tensor_ids=[i])
        assert torch.equal(p, old)


def test_client_and_server_agree() -> None:
    """A client's local steps and the application of what it sent differ by rounding only."""
    torch.manual_seed(0)
    model = nn.Linear(5, 1).double()
    x, y = torch.randn(20, 5).double(), torch.randn(20, 1).double()
    start = [p.detach().clone() for p in model.parameters()]
    server, client = SeedPool(32, seed=4), SeedPool(32, seed=4)
    losses = [nn.functional.mse_loss(model(x), y).item()]
    for k in server.sample(60, generator=0):
        client.step_(model.parameters(), lambda: nn.functional.mse_loss(model(x), y), k, lr=1e-2)
    losses.append(nn.functional.mse_loss(model(x), y).item())
    assert losses[1] < losses[0]
    server.merge(SeedPool.from_bytes(client.to_bytes()))
    server.apply_(start, 1e-2)
    for a, b in zip(start, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError):
        client.step_(model.parameters(), lambda: model(x).sum() * float("nan"), 3)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_bytes_round_trip(history: bool, merged: bool) -> None:
    pool = random_pool(n=500)
    if merged:
        server = SeedPool(64, seed=9)
        server.merge(pool, 0.5)
        pool = server
    copy = SeedPool.from_bytes(pool.to_bytes(history=history))
    assert np.array_equal(copy.sums, pool.sums)
    assert np.array_equal(copy.seeds, pool.seeds)
    if history:
        assert np.array_equal(copy.probabilities(), pool.probabilities())
    else:
        assert not copy.counts.any()


@pytest.mark.parametrize(("size", "history"), [(4096, False), (1024, True)])
def test_a_round_stays_under_18_kilobytes_at_the_published_settings(size: int, history: bool) -> None:
    server, client = SeedPool(size), SeedPool(size)
    server.merge(full_pool(size))
    for k in server.sample(200, generator=0):
        client.add(k, 1.5)
    down, up = len(server.to_bytes(history=history)), len(client.to_bytes())
    assert up < 1300
    assert down + up < 18_000


def full_pool(size: int) -> SeedPool:
    pool = SeedPool(size)
    for k in range(size):
        pool.add(k, k - 7.5)
    return pool


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pool"
    random_pool().save(path)

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        SeedPool(64).save(path)
    assert SeedPool.load(path).to_bytes() == random_pool().to_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_bad_input_is_refused() -> None:
    pool = SeedPool(8)
    for call, message in (
        (lambda: SeedPool(0), "size"),
        (lambda: SeedPool(4, distribution="normal"), "distribution"),
        (lambda: SeedPool(4, rounding="up"), "rounding"),
        (lambda: SeedPool(4, clip=0.0), "clip"),
        (lambda: SeedPool(4, history_starts_with_zero=1), r"history_starts_with_zero must be True or False, got 1"),
        (lambda: pool.add(8, 1.0), r"\[0, 8\), got 8"),
        (lambda: pool.add(1, float("nan")), "finite"),
        (lambda: pool.add(1, 1e300), "finite"),
        (lambda: pool.sample(-1), "n must be"),
        (lambda: pool.merge(SeedPool(9)), "size must be 8"),
        (lambda: pool.merge(SeedPool(8, seed=1)), "seed must be 0"),
        (lambda: pool.merge(SeedPool(8), float("inf")), "weight"),
        (lambda: pool.apply_([torch.zeros(2)], float("nan")), "lr"),
        (lambda: pool.apply_([torch.zeros(2)], 1.0, tensor_ids=[1, 2]), "tensor_ids"),
        (lambda: SeedPool.from_bytes(b"something else"), "not a pool"),
        (lambda: SeedPool.from_bytes(pool.to_bytes()[:-1] + b"\xff"), "damaged"),
        (lambda: pool.add(1.5, 1.0), r"SeedPool\.add: k must be an integer, got 1\.5"),
        (lambda: pool.add(True, 1.0), r"SeedPool\.add: k must be an integer, got True"),
        (lambda: pool.add(1, torch.ones(2)), r"SeedPool\.add: g must be a finite number"),
        (lambda: pool.sample(1.5), r"SeedPool\.sample: n must be an integer >= 0, got 1\.5"),
        (lambda: pool.sample(1, generator="x"), r"SeedPool\.sample: generator must be .* got 'x'"),
        (lambda: pool.merge(3), r"SeedPool\.merge: other must be a SeedPool, got int"),
        (lambda: pool.merge(SeedPool(8), None), r"SeedPool\.merge: weight must be a finite number, got None"),
        (lambda: pool.apply_([torch.zeros(2)], 1.0, tensor_ids=[-1]), r"SeedPool\.apply_: tensor_ids\[0\] .* got -1"),
        (lambda: pool.apply_([torch.zeros(2)], 1.0, tensor_ids=3), r"SeedPool\.apply_: tensor_ids must .* got 3"),
        (lambda: pool.apply_([torch.zeros(1).expand(2)], 1.0), r"SeedPool\.apply_: parameter 0 must not overlap"),
        (lambda: pool.apply_(torch.ones(3), 1.0), r"SeedPool\.apply_: params must be a module, .* got Tensor"),
        (lambda: pool.apply_({"a": 1}, 1.0), r"SeedPool\.apply_: params must hold tensors, .* got \('a', 1\)"),
        (lambda: pool.step_(None, float, 1), r"SeedPool\.step_: params must be a module, .* got NoneType"),
        (lambda: SeedPool.from_bytes("x"), r"SeedPool\.from_bytes: data must be bytes, got str"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    assert not pool.counts.any()


def test_a_step_with_bad_input_changes_nothing() -> None:
    pool, model, x = SeedPool(8), nn.Linear(3, 1), torch.ones(2, 3)
    before = [p.detach().clone() for p in model.parameters()]

    def loss() -> torch.Tensor:
        return model(x).sum()

    for closure, k, options, message in (
        (loss, -1, {}, r"k must be in \[0, 8\), got -1"),
        (loss, 8, {}, r"k must be in \[0, 8\), got 8"),
        (loss, 1.5, {}, r"k must be an integer, got 1\.5"),
        (loss, None, {}, "k must be an integer, got None"),
        (loss, 1, {"lr": float("nan")}, "lr must be a finite number, got nan"),
        (loss, 1, {"lr": float("inf")}, "lr must be a finite number, got inf"),
        (loss, 1, {"eps": 0}, "eps must be a finite number > 0, got 0"),
        (loss, 1, {"eps": -1e-3}, r"eps must be a finite number > 0, got -0\.001"),
        (None, 1, {}, "closure must be a function without arguments, got NoneType"),
        (lambda: model(x), 1, {}, r"closure must return a real scalar, got torch\.float32 of shape \[2, 1\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=rf"SeedPool\.step_: {message}"):
            pool.step_(model, closure, k, **options)
    assert all(map(torch.equal, before, model.parameters()))
    assert not pool.counts.any()


def test_sums_stay_within_fp32() -> None:
    pool, other = SeedPool(4), SeedPool(4)
    pool.add(0, 3e38)
    other.add(0, 3e38)
    before = pool.to_bytes()
    with pytest.raises(ValueError, match=r"SeedPool\.add: the sum of candidate 0 must be finite in fp32, got 6e\+38"):
        pool.add(0, 3e38)
    with pytest.raises(ValueError, match=r"SeedPool\.merge: sums must be finite in fp32, got 6e\+38"):
        pool.merge(other)
    p, z = torch.ones(3).double(), lo.zo_noise(3, int(pool.seeds[0]), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"SeedPool\.step_: the sum of candidate 0 must be finite in fp32, got 4e\+38"):
        pool.step_([p], lambda: 1e38 * (p @ z) / (z @ z), 0, lr=1e-38)
    assert torch.equal(p, torch.ones(3).double())
    assert pool.to_bytes() == before


def test_a_step_and_its_application_move_the_same_tensors() -> None:
    """Where no tensor requires grad, all of them move."""
    moved, applied = torch.ones(3), torch.ones(3)
    pool = SeedPool(8)
    g = pool.step_([moved], lambda: moved.square().sum(), np.int64(2), lr=0.1)
    assert g != 0.0
    pool.apply_([applied], 0.1)
    assert torch.equal(moved, applied)
    assert not torch.equal(moved, torch.ones(3))


def test_a_number_given_as_text_is_a_type_error() -> None:
    pool, p = SeedPool(8), torch.zeros(2)
    other = SeedPool(8)
    for call in (
        lambda: SeedPool(4, clip="1.0"),  # type: ignore[arg-type]
        lambda: pool.add(1, "1.0"),  # type: ignore[arg-type]
        lambda: pool.merge(other, "1.0"),  # type: ignore[arg-type]
        lambda: pool.apply_([p], "1e-6"),  # type: ignore[arg-type]
        lambda: pool.step_([p], lambda: p.sum(), 1, lr="1e-6"),  # type: ignore[arg-type]
        lambda: pool.step_([p], lambda: p.sum(), 1, eps="1e-3"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"SeedPool.*must be a .*, which is text"):
            call()
    assert not pool.counts.any()
    assert not p.any()
