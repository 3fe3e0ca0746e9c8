"""Inputs of the zeroth-order operators: cases, fuzzing, bad input, and tensors of more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from leanops._registry import BadInput, Case, Draw, Inputs
from leanops.zo.ops import columns_of

DISTRIBUTIONS = ("gaussian", "rademacher")
AXPY_DISTRIBUTIONS = (*DISTRIBUTIONS, "lowrank")

ROUNDINGS = ("nearest", "stochastic")

_LARGE = 2**31 + 1777  # elements; a 32-bit index cannot reach the last ones

# the parameter lists of two models, as {shape: how many}
OPT_125M = {(50272, 768): 1, (2050, 768): 1, (768, 768): 48, (768,): 122, (3072, 768): 12, (3072,): 12, (768, 3072): 12}

LLAMA_1B = {(128256, 2048): 1, (2048, 2048): 32, (512, 2048): 32, (8192, 2048): 32, (2048, 8192): 16, (2048,): 33}


def i64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise_case(name: str, shape: Sequence[int], distribution: str, offset: int = 0, bench: bool = False) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        return torch.empty(shape, device=device, dtype=dtype), i64(7), 3, offset, distribution

    return Case(name, make, bench)


def noise_fuzz(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = [draw.integer(0, 40) for _ in range(draw.integer(0, 3))]
    return (
        draw.tensor(shape, dtype),
        i64(draw.integer(-(2**63), 2**63 - 1)),
        draw.integer(0, 2**32 - 1),
        draw.choice((0, draw.integer(0, 1000), draw.integer(0, 2**62))),
        draw.choice(DISTRIBUTIONS),
    )


def noise_large(device: torch.device) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    def make(n: int, offset: int) -> tuple[Any, ...]:
        return torch.empty(n, device=device, dtype=torch.bfloat16), i64(7), 3, offset, "gaussian"

    return make(_LARGE, 0), make(1000, _LARGE - 1000)


def noise_bad() -> tuple[BadInput, ...]:
    def make(**change: Any) -> Callable[[torch.device], tuple[Any, ...]]:
        def build(device: torch.device) -> tuple[Any, ...]:
            values = {"out": torch.ones(8, device=device), "seed": i64(1), "id": 0, "offset": 0, "dist": "gaussian"}
            values |= {k: v(device) if callable(v) else v for k, v in change.items()}
            return tuple(values.values())

        return build

    return (
        BadInput("dtype", make(out=lambda d: torch.ones(8, device=d, dtype=torch.int32)), "zo_noise_: out .*int32"),
        BadInput("overlap", make(out=lambda d: torch.ones(1, device=d).expand(8)), "zo_noise_: out .*overlap"),
        BadInput("seed dtype", make(seed=f64(1.0)), "zo_noise_: seed .*int64.*float64"),
        BadInput("two seeds", make(seed=i64(1, 2)), "zo_noise_: seed .*one.*2"),
        BadInput("negative id", make(id=-1), "zo_noise_: tensor_id .*-1"),
        BadInput("large id", make(id=2**32), f"zo_noise_: tensor_id .*{2**32}"),
        BadInput("negative offset", make(offset=-1), "zo_noise_: offset .*-1"),
        BadInput("offset overflow", make(offset=2**63 - 4), "zo_noise_: offset"),
        BadInput("distribution", make(dist="uniform"), "zo_noise_: distribution .*uniform"),
        BadInput(
            "requires grad",
            make(out=lambda d: torch.ones(8, device=d, requires_grad=True)),
            "zo_noise_: .*requires grad",
            RuntimeError,
        ),
    )


def noise_like(name: str, shape: Sequence[int], distribution: str) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        return shape, 7, 3, 5, distribution, dtype, device

    return Case(name, make)


def low_rank(distribution: str, right_seeds: Tensor, columns: Sequence[int], rank: int = 2) -> tuple[Any, ...]:
    """The last arguments of an axpy: right_seeds, columns and rank. Only low-rank noise has the first two."""
    return (right_seeds, list(columns), rank) if distribution == "lowrank" else (None, None, 2)


def axpy_inputs(
    shapes: Sequence[Sequence[int]], terms: int, distribution: str, rounding: str, sequential: bool, into: bool
) -> Callable[[torch.device, torch.dtype, torch.Generator], tuple[Any, ...]]:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        tensors = [(0.02 * torch.randn(s, generator=generator)).to(device, dtype) for s in shapes]
        seeds = torch.randint(-(2**63), 2**63 - 1, (terms,), generator=generator)
        coeffs = 1e-3 * torch.randn(terms, generator=generator, dtype=torch.float64)
        decays = f64(*([1e-3] * terms)) if sequential else f64(1e-3)
        places = (list(range(len(shapes))), [0] * len(shapes))
        right_seeds = seeds[torch.arange(terms) // 50]  # LOZO keeps V for 50 steps
        right = low_rank(distribution, right_seeds, [columns_of(s) for s in shapes])
        rest = (seeds, coeffs, decays, *places, distribution, rounding, sequential, *right)
        return ([torch.empty_like(t) for t in tensors], tensors, *rest) if into else (tensors, *rest)

    return make


def axpy_cases(into: bool) -> tuple[Case, ...]:
    small = [(33, 7), (), (5,), (0, 3), (129,)]
    cases = [
        Case(f"{d}-{r}-K{k}{'-sequential' if s else ''}", axpy_inputs(small, k, d, r, s, into))
        for d in AXPY_DISTRIBUTIONS
        for r, k, s in (("nearest", 1, False), ("stochastic", 3, False), ("stochastic", 3, True))
    ]
    real: dict[str, list[tuple[int, ...]]] = {
        "16M": [(1 << 12, 1 << 12)],
        "opt-125m": [shape for shape, count in OPT_125M.items() for _ in range(count)],
        "llama-3.2-1b": [shape for shape, count in LLAMA_1B.items() for _ in range(count)],
        "1000x64x64": [(64, 64)] * 1000,
    }
    cases += [
        Case(f"{d}-{name}", axpy_inputs(shapes, 1, d, "nearest", False, into), bench=True)
        for d in AXPY_DISTRIBUTIONS
        for name, shapes in real.items()
    ]
    cases += [
        Case(f"{d}-1M-K4096", axpy_inputs([(1 << 10, 1 << 10)], 4096, d, "nearest", False, into), bench=True)
        for d in AXPY_DISTRIBUTIONS
    ]
    return tuple(cases)


def axpy_fuzz(draw: Draw, dtype: torch.dtype, into: bool) -> tuple[Any, ...]:
    shapes = [[draw.integer(0, 20) for _ in range(draw.integer(0, 3))] for _ in range(draw.integer(0, 4))]
    tensors = [draw.tensor(s, dtype) for s in shapes]
    terms = draw.integer(1, 5)
    sequential = draw.choice((False, True))
    distribution, rank = draw.choice(AXPY_DISTRIBUTIONS), draw.choice((1, 2, 3, 8, 64))
    far = 2**62 if distribution != "lowrank" else 2**62 // rank
    right_seeds = i64(*(draw.choice((5, draw.integer(-(2**63), 2**63 - 1))) for _ in range(terms)))
    columns = [draw.choice((columns_of(s), 0, draw.integer(1, 30), 9000)) for s in shapes]
    rest = (
        i64(*(draw.integer(-(2**63), 2**63 - 1) for _ in range(terms))),
        f64(*(draw.choice((0.0, 1e-3, -2.5, 1e4)) for _ in range(terms))),
        f64(*(draw.choice((0.0, 1e-2)) for _ in range(draw.choice((1, terms)) if sequential else 1))),
        [draw.integer(0, 2**32 - 1) for _ in shapes],
        [draw.choice((0, draw.integer(0, 300), draw.integer(0, far))) for _ in shapes],
        distribution,
        draw.choice(ROUNDINGS),
        sequential,
        *low_rank(distribution, right_seeds, columns, rank),
    )
    return ([draw.tensor(s, dtype) for s in shapes], tensors, *rest) if into else (tensors, *rest)


def axpy_large(into: bool) -> Callable[[torch.device], tuple[tuple[Any, ...], tuple[Any, ...]]]:
    def build(device: torch.device) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        def make(n: int, offset: int) -> tuple[Any, ...]:
            p = torch.full((n,), 0.02, device=device, dtype=torch.bfloat16)
            rest = (i64(7), f64(0.01), f64(0.0), [3], [offset], "rademacher", "stochastic", False)
            return ([torch.empty_like(p)], [p], *rest) if into else ([p], *rest)

        return make(_LARGE, 0), make(1000, _LARGE - 1000)

    return build


def axpy_bad(name: str) -> tuple[BadInput, ...]:
    into = name == "zo_axpy_into_"

    def make(**change: Any) -> Callable[[torch.device], tuple[Any, ...]]:
        def build(device: torch.device) -> tuple[Any, ...]:
            values: dict[str, Any] = (
                {"out": [torch.ones(8, device=device), torch.ones(4, device=device)]} if into else {}
            )
            values |= {"tensors": [torch.ones(8, device=device), torch.ones(4, device=device)]}
            values |= {"seeds": i64(1, 2), "coeffs": f64(1.0, 2.0), "decays": f64(0.0), "ids": [0, 1]}
            values |= {"offsets": [0, 0], "dist": "gaussian", "rounding": "nearest", "sequential": False}
            values |= {"right_seeds": None, "columns": None, "rank": 2}
            values |= {k: v(device) if callable(v) else v for k, v in change.items()}
            return tuple(values.values())

        return build

    first = "out" if into else "tensors"

    def ints(device: torch.device) -> list[Tensor]:
        return [torch.ones(8, device=device), torch.ones(4, device=device, dtype=torch.int64)]

    def expanded(device: torch.device) -> list[Tensor]:
        return [torch.ones(8, device=device), torch.ones(1, device=device).expand(4)]

    def shared(device: torch.device) -> list[Tensor]:
        storage = torch.ones(10, device=device)
        return [storage[:8], storage[6:]]

    def tracked(device: torch.device) -> list[Tensor]:
        return [torch.ones(8, device=device), torch.ones(4, device=device, requires_grad=True)]

    def empty(device: torch.device) -> list[Tensor]:
        return [torch.ones(8, device=device), torch.ones(4, device="meta")]

    def lowrank(**change: Any) -> Callable[[torch.device], tuple[Any, ...]]:
        return make(**({"dist": "lowrank", "right_seeds": i64(1, 2), "columns": [2, 0]} | change))

    bad = [
        BadInput("lowrank without right", lowrank(right_seeds=None), f"{name}: right_seeds must be given .*None"),
        BadInput("lowrank without columns", lowrank(columns=None), f"{name}: columns must be given .*None"),
        BadInput("right lengths", lowrank(right_seeds=i64(1)), f"{name}: seeds and right_seeds .*got 2 and 1"),
        BadInput("right dtype", lowrank(right_seeds=f64(1.0, 2.0)), f"{name}: right_seeds .*int64.*float64"),
        BadInput("right of others", make(right_seeds=i64(1, 2)), f"{name}: right_seeds .*lowrank, got gaussian"),
        BadInput("columns", lowrank(columns=[2]), f"{name}: columns .*2.*got 1"),
        BadInput("column range", lowrank(columns=[2, -4]), rf"{name}: columns\[1\].*-4"),
        BadInput("offset of U", lowrank(offsets=[2**62, 0]), rf"{name}: offsets\[0\].*{2**62}"),
        BadInput("no rank", lowrank(rank=0), f"{name}: rank .*got 0"),
        BadInput("large rank", lowrank(rank=65), f"{name}: rank .*got 65"),
        BadInput("lengths", make(coeffs=f64(1.0)), f"{name}: seeds and coeffs must have the same length, got 2 and 1"),
        BadInput("no seeds", make(seeds=i64(), coeffs=f64()), f"{name}: seeds must not be empty"),
        BadInput("seeds dtype", make(seeds=f64(1.0, 2.0)), f"{name}: seeds .*int64.*float64"),
        BadInput("coeffs dtype", make(coeffs=i64(1, 2)), f"{name}: coeffs .*float64.*int64"),
        BadInput("two decays", make(decays=f64(0.0, 0.0)), f"{name}: decay .*one.*2"),
        BadInput("three decays", make(decays=f64(0.0, 0.0, 0.0), sequential=True), f"{name}: decay .*3"),
        BadInput("ids", make(ids=[0]), f"{name}: tensor_ids .*2.*1"),
        BadInput("id range", make(ids=[0, 2**32]), f"{name}: tensor_ids.*{2**32}"),
        BadInput("offsets", make(offsets=[0]), f"{name}: offsets .*2.*1"),
        BadInput("offset range", make(offsets=[0, -3]), f"{name}: offsets.*-3"),
        BadInput("distribution", make(dist="uniform"), f"{name}: distribution .*uniform"),
        BadInput("rounding", make(rounding="up"), f"{name}: rounding .*up"),
        BadInput("dtype", make(**{first: ints}), f"{name}: {first}.*int64"),
        BadInput("expanded", make(**{first: expanded}), f"{name}: {first}.*overlap"),
        BadInput("shared storage", make(**{first: shared}), f"{name}: {first}.*overlap"),
        BadInput("requires grad", make(**{first: tracked}), f"{name}: {first}.*requires grad", RuntimeError),
        BadInput("meta", make(**{first: empty}), f"{name}: {first}.*meta"),
    ]
    if into:
        bad += [
            BadInput("count", make(out=lambda d: [torch.ones(8, device=d)]), f"{name}: out and tensors .*1 and 2"),
            BadInput(
                "shape",
                make(out=lambda d: [torch.ones(8, device=d), torch.ones(5, device=d)]),
                rf"{name}: out\[1\].*\[4\].*\[5\]",
            ),
            BadInput(
                "out dtype",
                make(out=lambda d: [torch.ones(8, device=d), torch.ones(4, device=d, dtype=torch.bfloat16)]),
                rf"{name}: out\[1\].*float32.*bfloat16",
            ),
            BadInput(
                "sparse source",
                make(
                    out=lambda d: [torch.ones(2, 4, device=d), torch.ones(4, device=d)],
                    tensors=lambda d: [torch.ones(2, 4, device=d).to_sparse(), torch.ones(4, device=d)],
                ),
                rf"{name}: tensors\[0\] must be a dense tensor, got layout torch.sparse_coo",
            ),
        ]
    return tuple(bad)


def linear_case(
    name: str, t: int, n: int, m: int, distribution: str, pair: bool = False, bench: bool = False, std: float = 1.0
) -> Case:
    """x is normal with standard deviation ``std``, and W with m^-1/2."""

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        def random(*shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(shape, generator=generator)).to(device, dtype)

        x, weight, bias = random(t, m, std=std), random(n, m, std=m**-0.5), random(n)
        return x, random(t, m) if pair else None, weight, bias, i64(11), 1e-2, 2, 0, distribution

    return Case(name, make, bench)


def linear_fuzz(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    m, n = draw.integer(0, 70), draw.integer(0, 40)
    batch = [draw.integer(0, 9) for _ in range(draw.integer(0, 2))]
    return (
        draw.tensor([*batch, m], dtype),
        draw.choice((None, draw.tensor([*batch, m], dtype))),
        draw.tensor([n, m], dtype),
        draw.choice((None, draw.tensor([n], dtype))),
        i64(draw.integer(-(2**63), 2**63 - 1)),
        draw.choice((0.0, 1e-2, -0.5)),
        draw.integer(0, 2**32 - 1),
        draw.choice((0, draw.integer(0, 2**62))),
        draw.choice(DISTRIBUTIONS),
    )


def linear_bad() -> tuple[BadInput, ...]:
    def make(**change: Any) -> Callable[[torch.device], tuple[Any, ...]]:
        def build(device: torch.device) -> tuple[Any, ...]:
            values: dict[str, Any] = {
                "x": torch.ones(2, 6, device=device),
                "x_minus": None,
                "weight": torch.ones(3, 6, device=device),
                "bias": torch.ones(3, device=device),
                "seed": i64(1),
                "scale": 1.0,
                "id": 0,
                "offset": 0,
                "dist": "rademacher",
            }
            values |= {k: v(device) if callable(v) else v for k, v in change.items()}
            return tuple(values.values())

        return build

    def dense(name: str) -> str:
        return f"zo_linear: {name} must be a dense tensor, got layout torch.sparse"

    return (
        BadInput("x width", make(x=lambda d: torch.ones(2, 5, device=d)), "zo_linear: x .*6.*5"),
        BadInput("x 0-d", make(x=lambda d: torch.ones((), device=d)), "zo_linear: x"),
        BadInput("weight 1-d", make(weight=lambda d: torch.ones(6, device=d)), "zo_linear: weight"),
        BadInput("bias", make(bias=lambda d: torch.ones(4, device=d)), r"zo_linear: bias .*\[3\].*\[4\]"),
        BadInput("x_minus", make(x_minus=lambda d: torch.ones(3, 6, device=d)), "zo_linear: x_minus"),
        BadInput("dtype", make(weight=lambda d: torch.ones(3, 6, device=d).half()), "zo_linear: weight .*float16"),
        BadInput("integers", make(x=lambda d: torch.ones(2, 6, device=d, dtype=torch.int64)), "zo_linear: x .*int64"),
        BadInput("seed", make(seed=i64(1, 2)), "zo_linear: seed .*one.*2"),
        BadInput("id", make(id=-1), "zo_linear: tensor_id .*-1"),
        BadInput("distribution", make(dist="normal"), "zo_linear: distribution .*normal"),
        BadInput("sparse x_minus", make(x_minus=lambda d: torch.ones(2, 6, device=d).to_sparse()), dense("x_minus")),
        BadInput("sparse weight", make(weight=lambda d: torch.ones(3, 6, device=d).to_sparse()), dense("weight")),
        BadInput("sparse bias", make(bias=lambda d: torch.ones(3, device=d).to_sparse()), dense("bias")),
    )


NOISE_IN_PLACE = Inputs(
    cases=(
        *(noise_case(f"{d}-257x3", (257, 3), d, 5) for d in DISTRIBUTIONS),
        *(noise_case(f"{d}-16M", (1 << 24,), d, bench=True) for d in DISTRIBUTIONS),
    ),
    fuzz=noise_fuzz,
    bad_inputs=noise_bad(),
    large=noise_large,
)

NOISE = Inputs(
    cases=tuple(noise_like(f"{d}-33x5", (33, 5), d) for d in DISTRIBUTIONS),
    fuzz=lambda draw, dtype: (
        [draw.integer(0, 40) for _ in range(draw.integer(0, 3))],
        draw.integer(-(2**63), 2**63 - 1),
        draw.integer(0, 2**32 - 1),
        draw.integer(0, 2**62),
        draw.choice(DISTRIBUTIONS),
        dtype,
        draw.device,
    ),
    bad_inputs=(
        BadInput("dtype", lambda d: ([4], 1, 0, 0, "gaussian", torch.int32, d), "zo_noise: dtype .*int32"),
        BadInput("negative size", lambda d: ([-4], 1, 0, 0, "gaussian", torch.float32, d), "zo_noise: shape .*-4"),
        BadInput("id", lambda d: ([4], 1, -1, 0, "gaussian", torch.float32, d), "zo_noise: tensor_id .*-1"),
        BadInput("offset", lambda d: ([4], 1, 0, -2, "gaussian", torch.float32, d), "zo_noise: offset .*-2"),
        BadInput("end", lambda d: ([4], 1, 0, 2**63 - 4, "gaussian", torch.float32, d), "zo_noise: offset .*5804"),
        BadInput("size", lambda d: ([2**40] * 2, 1, 0, 0, "gaussian", torch.float32, d), "zo_noise: shape .*2\\^63"),
        BadInput("distribution", lambda d: ([4], 1, 0, 0, "cauchy", torch.float32, d), "zo_noise: .*cauchy"),
    ),
)

AXPY = Inputs(axpy_cases(into=False), partial(axpy_fuzz, into=False), axpy_bad("zo_axpy_"), axpy_large(into=False))
AXPY_INTO = Inputs(
    axpy_cases(into=True), partial(axpy_fuzz, into=True), axpy_bad("zo_axpy_into_"), axpy_large(into=True)
)

LINEAR = Inputs(
    cases=(
        *(linear_case(f"{d}-9x33x65", 9, 33, 65, d) for d in DISTRIBUTIONS),
        *(linear_case(f"{d}-9x33x65-pair", 9, 33, 65, d, pair=True) for d in DISTRIBUTIONS),
        linear_case("rademacher-70000x8x8", 70000, 8, 8, "rademacher"),
        linear_case("rademacher-3x9x256-large", 3, 9, 256, "rademacher", std=4000.0),  # x z^T is infinite in fp16
        *(
            linear_case(f"rademacher-{t}x2048x2048", t, 2048, 2048, "rademacher", bench=True)
            for t in (1, 32, 128, 512, 2048)
        ),
        linear_case("gaussian-512x2048x2048", 512, 2048, 2048, "gaussian", bench=True),
        linear_case("rademacher-512x2048x2048-pair", 512, 2048, 2048, "rademacher", pair=True, bench=True),
    ),
    fuzz=linear_fuzz,
    bad_inputs=linear_bad(),
)
