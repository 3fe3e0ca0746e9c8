"""An exact solver of the knapsack with a price for depth: which tensors to train for a given number of FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOLERANCE = 1e-12  # times the sum of the positive importances: smaller differences are rounding errors of the sums
_CHUNK = 16  # depths that share one bound before each gets its own
_WINDOW = 10  # tensors around the break: all their combinations are tried first
_SORT = 64  # with more partial solutions, remove dominated ones
_COUNTS = 1 << 14  # try at most this many combinations of counts when tensors share prices
_STATES = 1 << 16  # with more partial solutions, drop the least promising; optimality is then not proven


@dataclass(frozen=True)
class Chosen:
    """A solution. ``selected``: positions, from shallow to deep. ``bound``: no solution's importance exceeds it."""

    selected: tuple[int, ...]
    importance: float
    cost: int
    bound: float
    exact: bool


def prefix_knapsack(importance: ArrayLike, dw: ArrayLike, dy: ArrayLike, budget: int) -> Chosen:
    r"""The most important tensors whose gradients fit a budget.

    .. math::

        \max_m \sum_k m_k I_k \quad \text{subject to} \quad
        \sum_k m_k\, dw_k + \sum_{j \le d} dy_j \le B, \qquad d = \max\{k : m_k = 1\}

    Tensors are numbered from the output (0) to the input: the gradient of tensor d needs the gradients of all
    activations above it. So the deepest tensor sets the price of the activations' gradients, and every tensor adds its
    own price.

    For each choice of d this is a knapsack over the first d tensors. Its capacity is the budget without the price of
    the activations' gradients. Bounds of the relaxed knapsack rule out nearly every d. For each remaining d:

    1. Fix the tensors that the bound decides.
    2. Round the capacity down to a multiple of the greatest common divisor of the other tensors' costs.
    3. Solve for the other tensors by a dynamic program over partial solutions, with dominance and bounds.

    Args:
        importance: I, [n], finite; a tensor that is not above 0 is never chosen.
        dw, dy: [n], whole numbers >= 0 (FLOPs), each sum below 2^62.
        budget: B, an integer of any size, in the same unit. Negative: nothing fits.

    Returns:
        The solution. Costs are integers, and the budget is kept exactly. ``exact``: no other choice has an importance
        that is larger by more than 1e-12 of the sum of all positive importances, which is the precision of sums of
        doubles. It is False only if the dynamic program had to drop partial solutions, because there were more than
        65,536 at once. That takes hundreds of tensors with unrelated costs and nearly equal price per importance; no
        network is known to have them. ``bound`` then still limits the missed importance.

    Raises:
        ValueError: different lengths, importances that are not finite, costs that are negative or not whole, a budget
            that is no integer.

    Source: the selection problem of GreenTrainer (2309.13192), whose own dynamic program keeps one solution for each
    depth and budget and so misses the optimum.
    """
    v, w, way = _checked(importance, dw, dy)
    if isinstance(budget, bool) or not isinstance(budget, Integral):
        raise ValueError(f"prefix_knapsack: budget must be an integer, got {budget!r}")
    budget = max(-1, min(int(budget), int(w.sum()) + int(way.sum())))  # an equivalent budget that fits 64 bits
    cap = budget - np.cumsum(way)  # for each deepest tensor: the budget left for gradients of weights
    items = np.flatnonzero((v > 0) & (w <= cap))
    if not len(items):
        return Chosen((), 0.0, 0, 0.0, True)
    solver = _Solver(v[items], w[items], cap[items])
    found = np.zeros(len(v), bool)
    found[items[solver.run()]] = True
    found = _fill(found, v, w, cap)
    selected = np.flatnonzero(found)
    value = float(v[selected].sum())
    cost = int(way[: selected[-1] + 1].sum() + w[selected].sum())
    return Chosen(tuple(selected.tolist()), value, cost, max(value, solver.bound), solver.exact)


def _checked(importance: ArrayLike, dw: ArrayLike, dy: ArrayLike) -> tuple[Floats, Ints, Ints]:
    v = np.asarray(importance, np.float64)
    if v.ndim != 1 or not np.isfinite(v).all():
        raise ValueError(f"prefix_knapsack: importance must be a list of finite numbers, got {importance!r}")
    costs = []
    for name, given in (("dw", dw), ("dy", dy)):
        raw = np.asarray(given)
        if raw.shape != v.shape:
            raise ValueError(f"prefix_knapsack: {name} must have the shape of importance, {v.shape}, got {raw.shape}")
        whole = raw.astype(np.int64) if raw.dtype.kind in "iufb" else None
        if whole is None or (raw < 0).any() or (whole != raw).any() or float(raw.sum(dtype=np.float64)) >= 2.0**62:
            raise ValueError(f"prefix_knapsack: {name} must be whole numbers >= 0 with a sum below 2^62, got {given!r}")
        costs.append(whole)
    return v, costs[0], costs[1]


def _fill(found: NDArray[np.bool_], v: Floats, w: Ints, cap: Ints) -> NDArray[np.bool_]:
    """Add tensors above the deepest that still fit: the search skips importances below the tolerance."""
    deepest = int(np.flatnonzero(found)[-1])
    room = int(cap[deepest] - w[found].sum())
    for k in np.flatnonzero(~found[:deepest] & (v[:deepest] > 0) & (w[:deepest] <= room)):
        if w[k] <= room:
            found[k] = True
            room -= int(w[k])
    return found


class _Solver:
    """The best solution so far, and the search for a better one."""

    def __init__(self, v: Floats, w: Ints, cap: Ints) -> None:
        self.v, self.w = v, w
        # a depth is left out if the next one has the same capacity for more tensors
        self.last = np.flatnonzero(np.append(cap[1:] < cap[:-1], True))
        self.cap = cap[self.last]
        ratio = np.where(w > 0, v / np.maximum(w, 1), np.inf)
        self.order = np.argsort(-ratio, kind="stable")
        self.ratio = np.where(w > 0, ratio, 0.0)[self.order]
        self.tol = TOLERANCE * float(v.sum())
        self.best = 0.0
        self.chosen = np.zeros(0, np.int64)
        self.exact = True
        self.bound = 0.0

    def run(self) -> NDArray[np.int64]:
        starts = np.arange(0, len(self.last), _CHUNK)
        stops = np.minimum(starts + _CHUNK, len(self.last)) - 1
        # one bound a chunk: the tensors of its deepest depth, the capacity of its shallowest
        high = self._relax(stops, self.cap[starts])
        rows = [np.arange(a, b + 1) for a, b, h in zip(starts, stops, high, strict=True) if h > self.best + self.tol]
        if rows:
            depths = np.concatenate(rows)
            high = self._relax(depths, self.cap[depths])
            for i in np.argsort(-high, kind="stable"):
                if high[i] <= self.best + self.tol:
                    break
                self._depth(int(depths[i]))
        self.bound = max(self.bound, self.best)
        return self.chosen

    def _relax(self, rows: NDArray[np.int64], cap: Ints) -> Floats:
        """Upper bounds of some depths, with the break tensor cut. The tensors before the break are a solution."""
        v, w = self.v[self.order], self.w[self.order]
        inside = self.order[None, :] <= self.last[rows, None]
        used, value = np.cumsum(inside * w, 1), np.cumsum(inside * v, 1)
        each = np.arange(len(rows))

        def until_break(room: Ints) -> tuple[Ints, Floats, Ints]:
            n = (used <= room[:, None]).sum(1)
            some = n > 0
            return n, np.where(some, value[each, n - 1], 0.0), np.where(some, used[each, n - 1], 0)

        n, low, _ = until_break(self.cap[rows])
        i = int(low.argmax())
        if low[i] > self.best:
            taken = self.order[: n[i]]
            self.best, self.chosen = float(low[i]), taken[taken <= self.last[rows[i]]]
        n, low, spent = until_break(cap)
        high: Floats = low + np.where(n < len(v), (cap - spent) * self.ratio[np.minimum(n, len(v) - 1)], 0.0)
        return high

    def _depth(self, row: int) -> None:
        tensors = self.order[self.order <= self.last[row]]
        core = _Core(self.v[tensors], self.w[tensors], int(self.cap[row]), self.best, self.tol)
        core.run()
        self.exact &= core.exact
        self.bound = max(self.bound, core.given_up)
        if core.mask is not None:
            self.best, self.chosen = core.best, tensors[core.mask]


class _Core:
    """One knapsack over tensors sorted by importance per FLOP: bounds fix most, a dynamic program solves the rest."""

    def __init__(self, v: Floats, w: Ints, cap: int, best: float, tol: float) -> None:
        self.v, self.w, self.cap, self.best, self.tol = v, w, cap, best, tol
        self.fixed = np.zeros(len(v), bool)  # part of every better solution
        self.mask: NDArray[np.bool_] | None = None  # a better solution
        self.exact = True
        self.given_up = 0.0

    def run(self) -> None:
        self.fixed[self.w == 0] = True
        open_ = np.flatnonzero(self.w)
        base, tried = float(self.v[self.fixed].sum()), False
        while len(open_):
            v, w = self.v[open_], self.w[open_]
            self.cap -= self.cap % int(np.gcd.reduce(w))
            used, value = np.cumsum(w), np.cumsum(v)
            s = int(used.searchsorted(self.cap, side="right"))
            low = base + (float(value[s - 1]) if s else 0.0)
            room = self.cap - (int(used[s - 1]) if s else 0)
            self._offer(low, open_[:s])
            if s == len(open_):
                return
            ratio = v[s] / w[s]
            if low + room * ratio <= self.best + self.tol:
                return
            if not tried:
                self._window(open_, v, w, used, value, s, base)
                tried = True
            inside = np.arange(len(open_)) < s
            # the bound if a tensor changed from in to out, or from out to in
            bound = low + (room + np.where(inside, w, -w)) * ratio + np.where(inside, -v, v)
            free = bound > self.best + self.tol
            if free.all():
                return None if self._counts(open_, v, w, base) else self._program(open_, v, w, base)
            taken = open_[:s][~free[:s]]
            self.fixed[taken] = True
            self.cap -= int(self.w[taken].sum())
            base = float(self.v[self.fixed].sum())
            open_ = open_[free]
        self._offer(base, open_)

    def _offer(self, value: float, added: Any) -> None:
        if value > self.best + self.tol:
            self.best, self.mask = value, self.fixed.copy()
            self.mask[added] = True

    def _window(self, open_: Ints, v: Floats, w: Ints, used: Ints, value: Floats, s: int, base: float) -> None:
        """Try every combination of the tensors around the break: an early good solution saves most of the search."""
        lo = max(0, min(s - _WINDOW // 2, len(v) - _WINDOW))
        hi = min(len(v), lo + _WINDOW)
        sums, costs = np.zeros(1), np.zeros(1, np.int64)
        for a, b in zip(v[lo:hi], w[lo:hi], strict=True):
            sums, costs = np.concatenate((sums, sums + a)), np.concatenate((costs, costs + b))
        room = self.cap - (int(used[lo - 1]) if lo else 0)
        i = int(np.where(costs <= room, sums, -np.inf).argmax())
        inside = lo + np.flatnonzero((i >> np.arange(hi - lo)) & 1)
        total = base + (float(value[lo - 1]) if lo else 0.0) + float(sums[i])
        self._offer(total, open_[np.concatenate((np.arange(lo), inside))])

    def _counts(self, open_: Ints, v: Floats, w: Ints, base: float) -> bool:
        """Choose how many tensors of each price to take, the most important first. A network's layers repeat, so few
        prices differ. The count of the most frequent price follows from the other counts."""
        prices, which, n = np.unique(w, return_inverse=True, return_counts=True)
        most = int(n.argmax())
        others = [g for g in range(len(n)) if g != most]
        if np.prod(n[others] + 1.0) > _COUNTS:
            return False
        tensors = [np.flatnonzero(which == g) for g in range(len(n))]  # sorted by importance per price already
        sums = [np.concatenate(([0.0], np.cumsum(v[i]))) for i in tensors]
        cost, value = np.zeros(1, np.int64), np.full(1, base)
        for g in others:
            cost = np.add.outer(cost, prices[g] * np.arange(n[g] + 1)).ravel()
            value = np.add.outer(value, sums[g]).ravel()
        rest = np.clip((self.cap - cost) // prices[most], 0, n[most])
        value = np.where(cost <= self.cap, value + sums[most][rest], -np.inf)
        i = int(value.argmax())
        counts = np.unravel_index(i, tuple(n[others] + 1)) if others else ()
        taken = [tensors[g][:c] for g, c in zip([*others, most], [*counts, rest[i]], strict=True)]
        self._offer(float(value[i]), open_[np.concatenate(taken)])
        return True

    def _program(self, open_: Ints, v: Floats, w: Ints, base: float) -> None:
        """Dynamic program: partial solutions (cost, value) over the first tensors; the relaxed rest bounds each."""
        used, value = np.concatenate(([0], np.cumsum(w))), np.concatenate(([0.0], np.cumsum(v)))
        ratio = np.append(v / w, 0.0)
        cost, sums = np.zeros(1, np.int64), np.full(1, base)
        trace: list[tuple[Ints, int]] = []  # for each tensor: the kept partial solutions, and their number before it
        end: tuple[int, int, int] | None = None  # the best: tensor, partial solution, first tensor that no longer fits
        for t in range(len(open_)):
            half = len(cost)
            cost, sums = np.concatenate((cost, cost + w[t])), np.concatenate((sums, sums + v[t]))
            goal = (self.cap + used[t + 1]) - cost
            stop = used.searchsorted(goal, side="right") - 1  # at most t where the partial solution does not fit
            low = np.where(stop > t, sums + (value[stop] - value[t + 1]), -np.inf)
            i = int(low.argmax())
            if low[i] > self.best + self.tol:
                self.best, end = float(low[i]), (t, i, int(stop[i]))
            bound = low + (goal - used[stop]) * ratio[stop]
            kept = np.flatnonzero(bound > self.best + self.tol)
            if len(kept) > _SORT:
                kept = kept[np.lexsort((-sums[kept], cost[kept]))]
                ahead = np.maximum.accumulate(sums[kept])
                kept = kept[np.append(True, sums[kept][1:] > ahead[:-1])]
                if len(kept) > _STATES:
                    ranked = kept[np.argsort(-bound[kept], kind="stable")]
                    kept = ranked[:_STATES]
                    self.exact = False
                    self.given_up = max(self.given_up, float(bound[ranked[_STATES]]))
            trace.append((kept, half))
            cost, sums = cost[kept], sums[kept]
            if not len(kept):
                break
        if end is not None:
            self.mask = self.fixed.copy()
            self.mask[open_[_path(trace, *end)]] = True


def _path(trace: Sequence[tuple[Ints, int]], t: int, i: int, stop: int) -> list[int]:
    """The tensors of a partial solution, and all tensors after it up to ``stop``."""
    path = list(range(t + 1, stop))
    while True:
        half = trace[t][1]
        if i >= half:
            path.append(t)
            i -= half
        t -= 1
        if t < 0:
            return path
        i = int(trace[t][0][i])
