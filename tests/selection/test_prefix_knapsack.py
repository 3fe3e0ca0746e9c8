"""The knapsack of GreenTrainer: as good as brute force, and quick."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from selection.runs import brute_force

from leanops.optim import prefix_knapsack

Case = tuple[np.ndarray, np.ndarray, np.ndarray, int]


def cases(kind: str, count: int, rng: np.random.Generator) -> Iterator[Case]:
    for _ in range(count):
        n = int(rng.integers(1, 12))
        high = 10**9 if kind in ("large", "negative") else 20
        dw, dy = rng.integers(0, high, n), rng.integers(0, high // 2, n)
        importance = rng.normal(size=n) if kind == "negative" else rng.random(n)
        if kind == "equal ratios":  # all tensors have the same importance for a FLOP, so that bounds cannot order them
            importance = dw * 0.7
        elif kind == "few prices":
            dw = rng.choice([0, 6, 15, 35], n)
        elif kind == "small numbers":
            importance = rng.integers(-2, 5, n).astype(float)
        elif kind == "dw alone":
            dy = np.zeros(n, np.int64)
        yield importance, dw, dy, int((dw.sum() + dy.sum()) * rng.random())


@pytest.mark.parametrize("kind", ["large", "negative", "equal ratios", "few prices", "small numbers", "dw alone"])
def test_the_selection_is_the_best_of_all(kind: str) -> None:
    """6 x 1,000 random cases of up to 11 tensors, against all 2^n choices."""
    rng = np.random.default_rng(0)
    for importance, dw, dy, budget in cases(kind, 1000, rng):
        found = prefix_knapsack(importance, dw, dy, budget)
        best = brute_force(importance, dw, dy, budget)
        assert found.exact
        assert found.importance == pytest.approx(best, rel=1e-11, abs=1e-11)
        picked = list(found.selected)
        assert found.importance == pytest.approx(importance[picked].sum())
        assert found.cost == (int(dw[picked].sum() + dy[: picked[-1] + 1].sum()) if picked else 0) <= budget
        assert found.bound >= found.importance
        assert (importance[picked] > 0).all()


def published(importance: np.ndarray, dw: np.ndarray, dy: np.ndarray, budget: int) -> float:
    """The dynamic program as published. It keeps one best value for each depth k and budget t, and adds a tensor only
    to such a best of an earlier depth that itself ends in a selected tensor."""
    n = len(importance)
    best = np.zeros((n + 1, budget + 1))
    ends = np.zeros((n + 1, budget + 1), bool)
    ends[0] = True
    top = 0.0
    for k in range(1, n + 1):
        for t in range(budget + 1):
            best[k, t] = best[k - 1, t]
            left = t - dw[k - 1]
            for before in range(k - 1, -1, -1):
                left -= dy[before]
                if left >= 0 and ends[before, left] and best[before, left] + importance[k - 1] > best[k, t]:
                    best[k, t] = best[before, left] + importance[k - 1]
                    ends[k, t] = True
            top = max(top, best[k, t])
    return float(top)


def test_the_published_dynamic_program_misses_the_best() -> None:
    """In about a quarter of cases such as these: 8 to 12 tensors, costs below 10, 60% of the full price."""
    rng = np.random.default_rng(1)
    missed, total = 0, 100
    for _ in range(total):
        n = int(rng.integers(8, 13))
        importance, dw, dy = rng.random(n), rng.integers(0, 10, n), rng.integers(0, 10, n)
        budget = int((dw.sum() + dy.sum()) * 0.6)
        best = prefix_knapsack(importance, dw, dy, budget).importance
        theirs = published(importance, dw, dy, budget)
        assert theirs <= best + 1e-12
        missed += theirs < best - 1e-12
    assert 15 < missed < 40


def test_importances_of_any_size_are_added_where_they_cost_nothing() -> None:
    """Next to 1, an importance of 1e-20 is less than a rounding error. A tensor of no cost is selected all the same."""
    found = prefix_knapsack([1e-20, 1.0, 1e-20, -1e-20], [0, 5, 0, 0], [1, 1, 1, 0], 7)
    assert found.selected == (0, 1)
    assert prefix_knapsack([1e-300], [1], [0], 1).selected == (0,)


def test_edges_of_the_knapsack() -> None:
    assert prefix_knapsack([], [], [], 5).selected == ()
    assert prefix_knapsack([1.0], [3], [2], 4).selected == ()
    assert prefix_knapsack([1.0], [3], [2], 5).selected == (0,)
    assert prefix_knapsack([1.0], [0], [0], -1).selected == ()
    assert prefix_knapsack([0.0, -1.0], [0, 0], [0, 0], 10).selected == ()
    big = 2**60
    for budget in (-(2**63), -(2**63) - 1, -(10**30)):
        assert prefix_knapsack([1.0], [1], [2], budget).selected == ()
    for budget in (2**63 - 1, 2**63, 10**30, np.int64(2**63 - 1)):
        found = prefix_knapsack([1.0, 2.0], [2**60, 2**60 - 1], [2**61, 1], budget)
        assert (found.selected, found.cost) == ((0, 1), 2**62)
    assert prefix_knapsack([1.0, 1.5], [big, big + 1], [1, 0], 2 * big).selected == (1,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1, 2], [0], 1), r"dw must have the shape of importance, \(1,\), got \(2,\)"),
        (([1.0], [1], [0.5], 1), "dy must be whole numbers >= 0 with a sum below 2\\^62, got \\[0.5\\]"),
        (([1.0], [-1], [0], 1), "dw must be whole numbers >= 0"),
        (([1.0], [2**62], [0], 1), "dw must be whole numbers >= 0 with a sum below 2\\^62"),
        (([float("nan")], [1], [0], 1), "importance must be a list of finite numbers"),
        (([float("inf")], [1], [0], 1), "importance must be a list of finite numbers"),
        (([1.0], [1], [0], 6.5), "budget must be an integer, got 6.5"),
        (([1.0], [1], [0], float("nan")), "budget must be an integer, got nan"),
        (([1.0], [1], [0], float("inf")), "budget must be an integer, got inf"),
        (([1.0], [1], [0], "5"), "budget must be an integer, got '5'"),
        (([1.0], [1], [0], True), "budget must be an integer, got True"),
    ],
)
def test_bad_numbers_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"prefix_knapsack: {message}"):
        prefix_knapsack(*arguments)


def decoder(layers: int, d: int, ff: int, tokens: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs by tensor of a decoder with biases and norms, from the head down."""
    dw, dy = [0, 0], [2 * tokens * d * 50272, 0]
    product, wide = 2 * tokens * d * d, 2 * tokens * d * ff
    for _ in range(layers):
        dw += [0, wide, 0, wide, 0, 0, 0, product, 0, product, 0, product, 0, product, 0, 0]
        dy += [0, 0, wide, 0, wide, 0, 0, 0, product + 4 * tokens**2 * d, 0, 0, 0, 0, 0, 3 * product, 0]
    return np.array(dw), np.array(dy)


def experts(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs by tensor of layers of attention and 16 experts, which differ in the tokens that they get."""
    product, expert = 2 * 512 * 768 * 768, 2 * 768 * 3072
    dw, dy = [], []
    for _ in range(10):
        dw += [product] * 6
        dy += [product] * 6
        for tokens in rng.multinomial(1024, rng.dirichlet(np.full(16, 3.0))):
            dw += [tokens * expert] * 3
            dy += [tokens * expert] * 2 + [0]
    return np.array(dw[:500]), np.array(dy[:500])


def large(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Importance, dw and dy of 500 tensors."""
    rng = np.random.default_rng(seed)
    kind, _, spread = kind.partition(", spread ")
    if kind == "decoder":
        dw, dy = decoder(31, 2560, 10240)
    elif kind == "experts":
        dw, dy = experts(rng)
    else:
        dw, dy = rng.integers(1, 10**9, 500), rng.integers(0, 10**9, 500)
    if spread:
        importance = np.exp(float(spread) * rng.normal(size=len(dw)))
    elif kind == "unrelated costs":
        importance = rng.random(len(dw))
    else:  # importance for a FLOP almost equal, or equal
        importance = dw * 1e-9 + (0.1 if kind == "importance near cost" else 0.0)
    return importance, dw, dy


QUICK = ["decoder, spread 1", "decoder, spread 0.01", "experts, spread 1", "experts, spread 0.3", "unrelated costs"]
SLOW = ["experts, spread 0.1", "experts, spread 0.03", "importance near cost", "importance in proportion to cost"]


def milliseconds(kind: str, repeats: int, seeds: int) -> tuple[float, bool]:
    """Milliseconds of the slowest of four budgets and ``seeds`` seeds, each the best of ``repeats`` runs, and whether
    all results were exact. CPU time, so that other work on the machine counts little."""
    slowest, exact = 0.0, True
    for seed in range(2, 2 + seeds):
        importance, dw, dy = large(kind, seed)
        assert 498 <= len(dw) <= 500
        for share in (0.15, 0.35, 0.6, 0.9):
            budget = int(share * (dw.sum() + dy.sum()))
            took = []
            for _ in range(repeats):
                start = time.process_time()
                found = prefix_knapsack(importance, dw, dy, budget)
                took.append(time.process_time() - start)
            assert found.cost <= budget
            exact &= found.exact
            slowest = max(slowest, 1e3 * min(took))
    return slowest, exact


@pytest.mark.parametrize("kind", QUICK)
def test_500_tensors_take_less_than_5_ms(kind: str) -> None:
    slowest, exact = milliseconds(kind, repeats=10, seeds=1)
    assert exact
    assert slowest < 5


if __name__ == "__main__":
    for kind in QUICK + SLOW:
        print("{}: {:.1f} ms, exact {}".format(kind, *milliseconds(kind, repeats=5, seeds=6)))
