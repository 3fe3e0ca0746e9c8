"""``leanops agreement``: the optimizers beside the published updates, on the same noise, seeds and data.

The weights of both sides after some steps are compared in float64, in which neither side rounds. What is left is the
rounding of each estimate to fp32, the number that a log holds: 6e-8 of an update. SM3's state and update are fp32 for
weights of any dtype. The second table drives perturb-and-restore cycles in each dtype of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from leanops.bench import published, report, terminal
from leanops.bench.markdown import head, table
from leanops.bench.progress import Progress
from leanops.bench.published import Loss, Noise, Weights
from leanops.bench.results import Results, header
from leanops.bench.terminal import Entry, Line, Table
from leanops.common import seeds as seed_rule
from leanops.common import streams
from leanops.common.dtypes import dtype_name
from leanops.optim import SM3, MeZO, SeedPool
from leanops.zo import zo_axpy_, zo_noise

BOUND = 1e-6  # of the largest movement of a weight; one rounding to fp32 is 6e-8
_SHAPES = ((24, 16), (24,), (8, 24), (8,))
_SEED = 5
_STEPS = 20
_EPS, _LR = 1e-3, 1e-2
_CYCLES = 2000


@dataclass
class Comparison:
    """``difference`` is the largest one between two weights, over the largest movement of a weight."""

    name: str
    source: str
    compared: str
    steps: int
    difference: float

    @property
    def agrees(self) -> bool:
        return self.difference <= BOUND


@dataclass
class Drift:
    """What the cycles changed: the norm of the change over the norm of the weights."""

    dtype: str
    loop: float
    leanops: float


@dataclass(kw_only=True)
class AgreementResults(Results):
    SCHEMA = "leanops-agreement/1"

    bound: float = BOUND
    cycles: int = _CYCLES
    rows: list[Comparison] = field(default_factory=list)
    drifts: list[Drift] = field(default_factory=list)


# --- the problem ------------------------------------------------------------------------------------------------------


def _start() -> Weights:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator, dtype=torch.float64) / 4 for s in _SHAPES]


def _loss(client: int = 0) -> Loss:
    """The squared error of a network with one hidden layer, on data of the client's own."""
    generator = torch.Generator().manual_seed(100 + client)
    x = torch.randn(32, 16, generator=generator, dtype=torch.float64)
    y = torch.randn(32, 8, generator=generator, dtype=torch.float64)

    def loss(weights: Weights) -> Tensor:
        first, bias, second, last = weights
        return (torch.tanh(x @ first.T + bias) @ second.T + last - y).square().mean()

    return loss


def _noise(distribution: str = "gaussian") -> Noise:
    def z(seed: int) -> Weights:
        return [
            zo_noise(s, seed, tensor_id=i, distribution=distribution, dtype=torch.float64)
            for i, s in enumerate(_SHAPES)
        ]

    return z


def _seeds(steps: int = _STEPS) -> list[int]:
    return [seed_rule.derive(_SEED, step) for step in range(steps)]


def _directions(n: int) -> list[list[int]]:
    return [[seed_rule.derive(_SEED, step, k) for k in range(n)] for step in range(_STEPS)]


def _mezo(**options: Any) -> Weights:
    losses: Sequence[Loss] = options.pop("losses", (_loss(),))
    parameters = [nn.Parameter(w) for w in _start()]
    optimizer = MeZO(parameters, lr=_LR, eps=_EPS, seed=_SEED, **options)
    for _ in range(_STEPS):
        optimizer.step(lambda: sum(loss([*parameters]) for loss in losses) / len(losses))
    return [p.detach() for p in parameters]


# --- the comparisons --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    peer: str
    source: str
    compared: str
    ours: Callable[[], Weights]
    theirs: Callable[[Weights], None]
    steps: int = _STEPS


def _lozo(weights: Weights) -> None:
    """MeZO's loop with Z = U V^T, V new every four steps; LOZO's code has no 1 / r."""

    def noise_of_step(step: int) -> Weights:
        right = seed_rule.derive(_SEED, step // 4, stream=streams.RIGHT_SEEDS)
        z = [torch.zeros(s, dtype=torch.float64) for s in _SHAPES]
        zo_axpy_(z, seed_rule.derive(_SEED, step), 1.0, distribution="lowrank", right_seeds=right, rank=2)
        return z

    published.mezo(weights, _loss(), noise_of_step, range(_STEPS), _EPS, _LR, 0.0)


_CHOSEN = ((3, 1, 4, 1, 5), (9, 2, 6, 5, 3))  # candidates of each client
_SHARES = (0.25, 0.75)


def _fedkseed_ours() -> Weights:
    server, weights = SeedPool(size=16, seed=_SEED), _start()
    learnt = []
    for client, chosen in enumerate(_CHOSEN):
        pool, own, loss = SeedPool(size=16, seed=_SEED), [w.clone() for w in weights], _loss(client)
        for k in chosen:
            pool.step_(own, lambda own=own, loss=loss: loss(own), k, lr=_LR, eps=_EPS)  # type: ignore[misc]
        learnt.append(pool)
    for pool, share in zip(learnt, _SHARES, strict=True):
        server.merge(pool, share)
    server.apply_(weights, _LR)
    return weights


def _fedkseed_theirs(weights: Weights) -> None:
    candidates = SeedPool(size=16, seed=_SEED).seeds.tolist()
    chosen = [[candidates[k] for k in ks] for ks in _CHOSEN]
    losses = [_loss(client) for client in range(len(_CHOSEN))]
    published.fedkseed(weights, losses, _SHARES, _noise(), chosen, _EPS, _LR)


def _gradients() -> list[Weights]:
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(s, generator=generator, dtype=torch.float64) for s in _SHAPES] for _ in range(_STEPS)]


def _sm3(momentum: float, beta: float) -> tuple[Callable[[], Weights], Callable[[Weights], None]]:
    def ours() -> Weights:
        parameters = [nn.Parameter(w) for w in _start()]
        optimizer = SM3(parameters, lr=_LR, momentum=momentum, beta=beta)
        for step in _gradients():
            for p, g in zip(parameters, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
        return [p.detach() for p in parameters]

    return ours, lambda weights: published.sm3(weights, _gradients(), _LR, momentum, beta)


def _pairs() -> list[_Pair]:
    seeds, one, gaussian = _seeds(), _loss(), _noise()
    two = (_loss(0), _loss(1))
    loop = {"eps": _EPS, "lr": _LR}
    rows = [
        _Pair(
            "MeZO",
            "2305.17333, algorithm 1, and its code",
            "two-sided estimate, weight decay 0.1",
            lambda: _mezo(weight_decay=0.1),
            lambda w: published.mezo(w, one, gaussian, seeds, **loop, decay=0.1),
        ),
        _Pair(
            "MeZO",
            "2305.17333, algorithm 2",
            "three directions a step",
            lambda: _mezo(directions=3),
            lambda w: published.mezo_directions(w, one, gaussian, _directions(3), **loop),
        ),
        _Pair(
            "zo2",
            "2503.12668",
            "each update held back until the next step",
            _mezo,
            lambda w: published.mezo_late(w, one, gaussian, seeds, **loop),
        ),
        _Pair(
            "ZO-Bench",
            "2402.11592, its code",
            "sign of the estimate",
            lambda: _mezo(variant="sign"),
            lambda w: published.sign_descent(w, one, gaussian, seeds, **loop),
        ),
        _Pair(
            "DeComFL",
            "2405.15861",
            "one-sided estimates of two clients, three perturbations",
            lambda: _mezo(variant="one_sided", directions=3, losses=two),
            lambda w: published.decomfl(w, two, gaussian, _directions(3), **loop),
        ),
        _Pair(
            "FedKSeed",
            "2312.06353",
            "one round of two clients, five steps each",
            _fedkseed_ours,
            _fedkseed_theirs,
            5,
        ),
        _Pair(
            "LOZO",
            "2410.07698, its code (no 1/r)",
            "rank 2, V new every 4 steps",
            lambda: _mezo(distribution="lowrank", rank=2, period=4),
            _lozo,
        ),
        _Pair(
            "FZOO",
            "2506.09034",
            "four random signs a step",
            lambda: _mezo(variant="fzoo", directions=4, distribution="rademacher"),
            lambda w: published.fzoo(w, one, _noise("rademacher"), _directions(4), **loop),
        ),
        _Pair(
            "HiZOO",
            "2402.15173",
            "smoothing 1e-3",
            lambda: _mezo(variant="hizoo", smoothing=1e-3),
            lambda w: published.hizoo(w, one, gaussian, seeds, **loop, smoothing=1e-3),
        ),
    ]
    for compared, momentum, beta, source in (
        ("no momentum", 0.0, 1.0, "its code"),
        ("momentum 0.9", 0.9, 1.0, "its code"),
        ("momentum 0.9, beta 0.99", 0.9, 0.99, "the README of its code"),
    ):
        rows.append(_Pair("SM3 (Google)", f"1901.11150, {source}", compared, *_sm3(momentum, beta)))
    return rows


def compare(pair: _Pair) -> Comparison:
    start, ours, theirs = _start(), pair.ours(), _start()
    pair.theirs(theirs)
    largest = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    moved = max(float((a - b).abs().max()) for a, b in zip(theirs, start, strict=True))
    return Comparison(pair.peer, pair.source, pair.compared, pair.steps, largest / moved)


# --- perturb and restore ----------------------------------------------------------------------------------------------


def drift(dtype: torch.dtype, cycles: int) -> Drift:
    """The published loop, and MeZO's own evaluations at rate 0, on 256 x 256 weights of deviation 0.02."""
    start = (torch.randn(256, 256, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)

    def change(w: Tensor) -> float:
        return float((w.double() - start.double()).norm() / start.double().norm())

    looped = start.clone()
    published.perturb_and_restore(
        [looped], lambda seed: [zo_noise(start.shape, seed, dtype=dtype)], _seeds(cycles), _EPS
    )
    weight = nn.Parameter(start.clone())
    optimizer = MeZO([weight], lr=0.0, eps=_EPS, seed=_SEED)
    for _ in range(cycles):
        optimizer.step(lambda: weight.float().square().mean())
    return Drift(dtype_name(dtype), change(looped), change(weight.detach()))


def run(progress: Progress, command: Sequence[str] = (), cycles: int = _CYCLES) -> AgreementResults:
    """Every comparison, then the cycles in each dtype."""
    pairs = _pairs()
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    progress.start(len(pairs) + len(dtypes))
    rows, drifts = [], []
    for pair in pairs:
        progress.step(f"{pair.peer}, {pair.compared}")
        rows.append(compare(pair))
    for dtype in dtypes:
        progress.step(f"{cycles} cycles in {dtype_name(dtype)}")
        drifts.append(drift(dtype, cycles))
    return AgreementResults(**header(torch.device("cpu"), command), cycles=cycles, rows=rows, drifts=drifts)


# --- what is shown ----------------------------------------------------------------------------------------------------

_COLUMNS = ("peer", "compared", "steps", "difference", "source")
_DRIFT_COLUMNS = ("dtype", "published loop", "leanops")


def _cells(row: Comparison) -> list[str]:
    return [row.name, row.compared, str(row.steps), f"{row.difference:.1e}", row.source]


def _drift_cells(row: Drift) -> list[str]:
    return [row.dtype, *(f"{100 * x:.2g}%" if x else "0: the same bits" for x in (row.loop, row.leanops))]


def _titles(results: AgreementResults) -> tuple[str, str]:
    return (
        "largest difference of two weights, over the largest movement of a weight",
        f"change of the weights' norm after {results.cycles:,} perturb-and-restore cycles",
    )


def lines(results: AgreementResults, width: int | None) -> list[Line]:
    first, second = _titles(results)
    entries = [Entry(_cells(row), style="" if row.agrees else "red") for row in results.rows]
    found = [*terminal.paragraphs([results.processor, first], width)]
    found += terminal.table_lines(Table(_COLUMNS, _COLUMNS, entries), width)
    found += [Line(""), *terminal.paragraphs([second], width)]
    return found + Table(_DRIFT_COLUMNS, _DRIFT_COLUMNS, [Entry(_drift_cells(d)) for d in results.drifts]).lines(width)


def print_table(results: AgreementResults, stream: TextIO) -> None:
    terminal.show(lines(results, terminal.width_of(stream)), stream)


def markdown(results: AgreementResults) -> str:
    first, second = _titles(results)
    return "\n".join(
        [
            *head(results, [results.processor]),
            f"The {first}:",
            "",
            *table(_COLUMNS, map(_cells, results.rows)),
            "",
            f"The {second}, on 256 x 256 weights of deviation 0.02, eps 1e-3:",
            "",
            *table(_DRIFT_COLUMNS, map(_drift_cells, results.drifts)),
            "",
        ]
    )


def write_markdown(results: AgreementResults, target: str) -> None:
    report.write_text(target, markdown(results))
