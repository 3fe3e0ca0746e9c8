"""From the weights at the start and a log to the weights at the end, the same bits as the run's."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leanops.common import seeds as seed_rule
from leanops.common.checks import is_integer
from leanops.common.dtypes import dtype_name
from leanops.optim.common import parameters
from leanops.optim.common.parameters import Params
from leanops.optim.zo.directions import Seed, left_seeds
from leanops.optim.zo.log import LogError, ZoLog
from leanops.optim.zo.momentum_window import MomentumWindow
from leanops.optim.zo.names import names_of
from leanops.optim.zo.slots import Slot, by_device, fixed_kept, slot_of
from leanops.optim.zo.strategy import Strategy
from leanops.optim.zo.update import State, Update
from leanops.optim.zo.variants import VARIANTS, strategy_of
from leanops.zo import VERSION, zo_axpy_

_CALL = 8192  # seeds a call
_SLICE = 1 << 18  # elements that stay in a cache while steps of several terms pass over them


@dataclass
class Program:
    """The updates of a parameter group."""

    updates: list[Update] = field(default_factory=list)
    frozen: list[frozenset[int]] = field(default_factory=list)  # of each update, the ids that it does not move

    def updates_of(self, tensor_id: int) -> list[Update]:
        return [u for u, ids in zip(self.updates, self.frozen, strict=True) if tensor_id not in ids]


def replayable(header: Mapping[str, Any], fused: bool = False) -> Strategy:
    """The strategy of a log; LogError where this version cannot replay it."""
    if header["zo"] != VERSION or header["seed_rule"] != seed_rule.RULE:
        raise LogError(
            f"replay_: the log's noise is {header['zo']} with seeds {header['seed_rule']}, "
            f"this version has {VERSION} with {seed_rule.RULE}"
        )
    if header["variant"] not in VARIANTS:
        raise LogError(f"replay_: the log's variant must be one of {', '.join(VARIANTS)}, got {header['variant']!r}")
    strategy = strategy_of(header)
    if fused and strategy.not_fused_because:
        raise LogError(f"replay_: fused=True cannot replay {strategy.variant}, {strategy.not_fused_because}")
    return strategy


def programs(log: ZoLog, strategy: Strategy, start: int = 0, stop: int | None = None) -> list[Program]:
    """Every group's updates of steps [start, stop)."""
    end = len(log) if stop is None else stop
    if not (is_integer(start) and is_integer(end) and 0 <= start <= end <= len(log)):
        text = f"must be integers in order within [0, {len(log)}]"
        raise ValueError(f"replay: start and stop {text}, got {start!r} and {stop!r}")
    window, base = MomentumWindow(), log.header["seed"]
    found: list[Program] = []
    for step, seeds in window.follow(log.steps(stop=stop), lambda index: strategy.seeds(base, index)):
        found += [Program() for _ in range(len(step.groups) - len(found))]
        if step.scalars is None:
            continue
        for program, group in zip(found, step.groups, strict=True):
            options = {**group, "lr": 0.0} if step.index < start else group  # before start, only the state changes
            update = strategy.update(window, seeds, step.scalars, options)
            if update is not None:
                program.updates.append(update)
                program.frozen.append(step.frozen)
    return found


def _fusable(updates: Sequence[Update], dtype: torch.dtype) -> bool:
    """Whether one sequential pass has the run's bits: a step has one term, or nothing is rounded between its terms."""
    if any(u.terms is None for u in updates):
        return False
    return dtype in (torch.float32, torch.float64) or all(len(u.terms[0]) == 1 for u in updates if u.terms)


def run_(slots: Sequence[Slot], updates: Sequence[Update], strategy: Strategy, fused: bool) -> None:
    """Apply a program to tensors of one device and of one kind of dtype."""
    with fixed_kept(slots):
        _run(slots, updates, strategy, fused)


def _run(slots: Sequence[Slot], updates: Sequence[Update], strategy: Strategy, fused: bool) -> None:
    tensors = [s.local for s in slots]

    def pass_over(seeds: list[Seed], coeffs: list[float], decay: float | list[float], sequential: bool) -> None:
        if seeds:
            options: dict[str, Any] = {"decay": decay, "rounding": strategy.rounding, "sequential": sequential}
            zo_axpy_(tensors, left_seeds(seeds), coeffs, **options, **strategy.noise.arguments(slots, seeds))

    if fused:
        pass_over(*_combined(updates), False)
    elif _fusable(updates, slots[0].local.dtype):
        seeds: list[Seed] = []
        coeffs: list[float] = []
        decays: list[float] = []
        for u in updates:
            assert u.terms is not None
            seeds += u.terms[0]
            coeffs += u.terms[1]
            decays += [u.decay] + [0.0] * (len(u.terms[0]) - 1)
            if len(seeds) >= _CALL:
                pass_over(seeds, coeffs, decays, True)
                seeds, coeffs, decays = [], [], []
        pass_over(seeds, coeffs, decays, True)
    else:
        for piece in _slices(slots):  # step by step, as in the run
            state: State = defaultdict(dict)
            with_state = [strategy.with_state(piece, state)]
            for u in updates:
                strategy.apply_(with_state, u, state)


def _slices(slots: Sequence[Slot]) -> Iterator[Slot]:
    for s in slots:
        if not s.local.is_contiguous():
            yield s
            continue
        flat = s.local.view(-1)
        for start in range(0, flat.numel(), _SLICE):
            yield s._replace(local=flat[start : start + _SLICE], offset=s.offset + start)


def _combined(updates: Sequence[Update]) -> tuple[list[Seed], list[float], float]:
    """All steps as one: (1 - decay) p + sum c z, in double precision."""
    total: dict[Seed, float] = {}
    momentum: dict[Seed, float] = {}
    keep = 1.0
    after: list[float] = []  # of each step, the product of the later (1 - decay), the last step first
    for u in reversed(updates):  # what a step adds is decayed by the steps after it
        after.append(keep)
        if u.terms is not None:
            for seed, c in zip(*u.terms, strict=True):
                total[seed] = total.get(seed, 0.0) + keep * c
        keep *= 1.0 - u.decay
    for u, later in zip(updates, reversed(after), strict=True):
        if u.terms is None:
            momentum = {s: m * u.beta for s, m in momentum.items()}
            for seed, g in zip(u.seeds, u.scalars, strict=True):
                momentum[seed] = momentum.get(seed, 0.0) + g / len(u.scalars)
            if u.lr:
                for seed, m in momentum.items():
                    total[seed] = total.get(seed, 0.0) - u.lr * later * m
    return list(total), list(total.values()), 1.0 - keep


def moved_by(log: ZoLog, found: Sequence[Program]) -> dict[int, list[Update]]:
    """For each parameter that moves in these steps, its updates; parameters that move alike share one list."""
    shared: dict[tuple[int, tuple[bool, ...]], list[Update]] = {}
    out: dict[int, list[Update]] = {}
    for entry in log.params():
        i, g = entry["id"], entry["group"]
        if g >= len(found):
            continue
        frozen = set().union(*found[g].frozen) if found[g].frozen else set()
        key = (g, tuple(i in ids for ids in found[g].frozen) if i in frozen else ())
        if key not in shared:
            shared[key] = found[g].updates_of(i)
        if shared[key]:
            out[i] = shared[key]
    return out | {i: out[first] for i, first in log.ties().items() if first in out}


def loaded(op: str, log: Any) -> ZoLog:
    if not isinstance(log, (ZoLog, str, os.PathLike)):
        raise TypeError(f"{op}: log must be a ZoLog or the name of its file, got {type(log).__name__}")
    found = log if isinstance(log, ZoLog) else ZoLog.load(log)
    if buffers := found.header.get("buffers"):
        more = f" and {len(buffers) - 8} more" if len(buffers) > 8 else ""
        warnings.warn(
            f"{op}: the run's forward passes changed buffers. The log does not hold their values, and replay leaves "
            f"them as they are: {', '.join(buffers[:8])}{more}. Take them from a checkpoint of the run",
            stacklevel=3,
        )
    return found


def _match(params: Params, log: ZoLog, moved: Mapping[int, Any], names: Mapping[str, str] | None) -> dict[int, Tensor]:
    """id -> tensor: by name if ``params`` has names, else by position. LogError where a tensor is missing or does not
    fit."""
    pairs, named = parameters.named("replay_", params)
    entries = log.params()
    if not named:
        if names is not None:
            raise ValueError("replay_: names need params that have names, got tensors alone")
        if len(pairs) != len(entries):
            raise LogError(
                f"replay_: params must be the log's {len(entries)} parameters, or have names, got {len(pairs)} tensors"
            )
        tensors = {e["id"]: t for e, (_, t) in zip(entries, pairs, strict=True) if e["id"] in moved}
    else:
        table = dict(pairs)
        wanted, _ = names_of("replay_", log, moved, names, table)
        if missing := [n for n in wanted.values() if n not in table]:  # `wanted` omits absent twins
            raise LogError(f"replay_: the log moves parameters that are not there: {', '.join(map(str, missing[:8]))}")
        tensors = {i: table[n] for i, n in wanted.items()}
    for entry in entries:
        if entry["id"] in tensors:
            t = tensors[entry["id"]]
            parameters.check("replay_", entry["name"], t)
            check_fits("replay_", entry, list(t.shape), dtype_name(t.dtype))
    return tensors


def check_fits(where: object, entry: Mapping[str, Any], shape: list[int], dtype: str) -> None:
    """LogError where a tensor has another shape or dtype than its entry in the log."""
    if (entry["shape"], entry["dtype"]) != (shape, dtype):
        raise LogError(
            f"{where}: parameter {entry['name']} must be {entry['dtype']} {entry['shape']}, got {dtype} {shape}"
        )


@torch.no_grad()
def replay_(
    params: Params,
    log: ZoLog | str | os.PathLike[str],
    *,
    start: int = 0,
    stop: int | None = None,
    fused: bool = False,
    names: Mapping[str, str] | None = None,
) -> None:
    r"""Repeat the updates of a run, :math:`\theta_T` from :math:`\theta_0` and the log, without evaluating anything.

    The result has the bits of the run, on any device, for nearest and stochastic rounding. Where a step has one
    term (one direction, no momentum), and always in fp32 and fp64, thousands of steps are one pass that reads and
    writes the weights once. Half-precision weights with several terms a step are rounded once a step, which a single
    pass cannot repeat: there the steps run one after another over slices that stay in the cache.

    Args:
        params: the start weights, which become the end weights: a module, a mapping, (name, tensor) pairs, or as many
            tensors as the run had parameters, in its order. DTensors are replayed shard by shard.
        log: the log, or its file.
        start, stop: only steps [start, stop); the weights given are those before step ``start``.
        fused: all steps as one sum, in one pass, whatever the dtype. **Loses the bits of the run**: the weights are
            rounded once instead of once a step, so in half precision (nearest) small updates that the run lost arrive.
        names: the log's name of a parameter -> its name in ``params``, where they differ.

    Raises:
        LogError: a damaged log; another definition of the noise; parameters that are missing or differ in shape or
            dtype.
        ValueError: ``start`` or ``stop`` outside the run; ``names`` of no parameter of the log; tensors that overlap.
        Nothing is written when an error is raised.
    """
    log = loaded("replay_", log)
    strategy = replayable(log.header, fused)
    moved = moved_by(log, programs(log, strategy, start, stop))
    entries = {e["id"]: e for e in log.params()}
    tensors, ties = _match(params, log, moved, names), log.ties()
    tied_here = parameters.tied(tensors.values())
    slots = []
    for position, (i, t) in enumerate(tensors.items()):
        if i in ties and position in tied_here:
            continue  # it has the memory of its original, and moves with it
        source = entries[ties.get(i, i)]
        slots.append(slot_of("replay_", entries[i]["name"], source["id"], t, source.get("fixed_rows", ())))
    parameters.check_apart("replay_", ((s.name, s.local) for s in slots))
    alike: dict[tuple[int, bool], list[Slot]] = {}
    for s in slots:
        wide = s.local.dtype in (torch.float32, torch.float64)
        alike.setdefault((id(moved[s.tensor_id]), wide), []).append(s)
    for together in alike.values():
        for part in by_device(together):
            run_(part, moved[part[0].tensor_id], strategy, fused)
