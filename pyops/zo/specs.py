"""The OpSpecs of the zeroth-order family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from leanops._registry import Autograd, BadInput, Case, Cost, Draw, Kernel, Loader, OpSpec, register
from leanops.zo import checks, reference
from leanops.zo.autograd import linear_backward, linear_setup_context

DISTRIBUTIONS = ("gaussian", "rademacher")
ROUNDINGS = ("nearest", "stochastic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_LARGE = 2**31 + 1777  # elements: past what a 32-bit index reaches

# the parameter lists of two models, as {shape: how many}
OPT_125M = {(50272, 768): 1, (2050, 768): 1, (768, 768): 48, (768,): 122, (3072, 768): 12, (3072,): 12, (768, 3072): 12}
LLAMA_1B = {(128256, 2048): 1, (2048, 2048): 32, (512, 2048): 32, (8192, 2048): 32, (2048, 8192): 16, (2048,): 33}


def _triton(name: str) -> Loader:
    def load() -> Kernel:
        from leanops.zo import triton

        return getattr(triton, name)

    return load


def _nvrtc(name: str) -> Loader:
    def load() -> Kernel:
        from leanops.zo import nvrtc

        return getattr(nvrtc, name)

    return load


def _backends(name: str) -> dict[str, Loader]:
    return {"triton": _triton(name), "nvrtc": _nvrtc(name)}


def _i64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# --- zo_noise_ and zo_noise -------------------------------------------------------------------------------------------


def _noise_case(name: str, shape: Sequence[int], distribution: str, offset: int = 0, bench: bool = False) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        return torch.empty(shape, device=device, dtype=dtype), _i64(7), 3, offset, distribution

    return Case(name, make, bench)


def _noise_fuzz(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = [draw.integer(0, 40) for _ in range(draw.integer(0, 3))]
    return (
        draw.tensor(shape, dtype),
        _i64(draw.integer(-(2**63), 2**63 - 1)),
        draw.integer(0, 2**32 - 1),
        draw.choice((0, draw.integer(0, 1000), draw.integer(0, 2**62))),
        draw.choice(DISTRIBUTIONS),
    )


def _noise_large(device: torch.device) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    def make(n: int, offset: int) -> tuple[Any, ...]:
        return torch.empty(n, device=device, dtype=torch.bfloat16), _i64(7), 3, offset, "gaussian"

    return make(_LARGE, 0), make(1000, _LARGE - 1000)


def _noise_bad() -> tuple[BadInput, ...]:
    def make(**change: Any) -> Callable[[torch.device], tuple[Any, ...]]:
        def build(device: torch.device) -> tuple[Any, ...]:
            values = {"out": torch.ones(8, device=device), "seed": _i64(1), "id": 0, "offset": 0, "dist": "gaussian"}
            values |= {k: v(device) if callable(v) else v for k, v in change.items()}
            return tuple(values.values())

        return build

    return (
        BadInput("dtype", make(out=lambda d: torch.ones(8, device=d, dtype=torch.int32)), "zo_noise_: out .*int32"),
        BadInput("overlap", make(out=lambda d: torch.ones(1, device=d).expand(8)), "zo_noise_: out .*overlap"),
        BadInput("seed dtype", make(seed=_f64(1.0)), "zo_noise_: seed .*int64.*float64"),
        BadInput("two seeds", make(seed=_i64(1, 2)), "zo_noise_: seed .*one.*2"),
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


register(
    OpSpec(
        name="zo_noise_",
        schema="(Tensor(a!) out, Tensor seed, int tensor_id, int offset, str distribution) -> ()",
        reference=reference.zo_noise_,
        fake=lambda *args: None,
        check=checks.noise_,
        cases=(
            *(_noise_case(f"{d}-257x3", (257, 3), d, 5) for d in DISTRIBUTIONS),
            *(_noise_case(f"{d}-16M", (1 << 24,), d, bench=True) for d in DISTRIBUTIONS),
        ),
        fuzz=_noise_fuzz,
        bad_inputs=_noise_bad(),
        cost=lambda out, *_: Cost(read=0, written=_bytes([out])),
        dtypes=DTYPES,
        exact=True,
        large=_noise_large,
        backends=_backends("zo_noise_"),
    )
)


def _zo_noise(
    shape: Sequence[int],
    seed: int,
    tensor_id: int = 0,
    offset: int = 0,
    distribution: str = "gaussian",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=device)
    torch.ops.leanops.zo_noise_(out, _i64(seed), tensor_id, offset, distribution)
    return out


def _noise_like(name: str, shape: Sequence[int], distribution: str) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        return shape, 7, 3, 5, distribution, dtype, device

    return Case(name, make)


register(
    OpSpec(
        name="zo_noise",
        schema="(SymInt[] shape, SymInt seed, SymInt tensor_id=0, SymInt offset=0, str distribution='gaussian', "
        "ScalarType? dtype=None, Device? device=None) -> Tensor",
        reference=reference.zo_noise,
        composite=_zo_noise,
        fake=lambda shape, *args, dtype=None, device=None: torch.empty(
            shape, dtype=args[4] if len(args) > 4 else dtype, device=args[5] if len(args) > 5 else device
        ),
        check=checks.noise,
        cases=tuple(_noise_like(f"{d}-33x5", (33, 5), d) for d in DISTRIBUTIONS),
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
            BadInput("distribution", lambda d: ([4], 1, 0, 0, "cauchy", torch.float32, d), "zo_noise: .*cauchy"),
        ),
        cost=lambda shape, *_: Cost(read=0, written=4 * torch.Size(shape).numel()),
        dtypes=DTYPES,
        exact=True,
    )
)


# --- zo_axpy_ and zo_axpy_into_ ---------------------------------------------------------------------------------------


def _axpy_inputs(
    shapes: Sequence[Sequence[int]], terms: int, distribution: str, rounding: str, sequential: bool, into: bool
) -> Callable[[torch.device, torch.dtype, torch.Generator], tuple[Any, ...]]:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        tensors = [(0.02 * torch.randn(s, generator=generator)).to(device, dtype) for s in shapes]
        seeds = torch.randint(-(2**63), 2**63 - 1, (terms,), generator=generator)
        coeffs = 1e-3 * torch.randn(terms, generator=generator, dtype=torch.float64)
        decays = _f64(*([1e-3] * terms)) if sequential else _f64(1e-3)
        rest = (seeds, coeffs, decays, list(range(len(shapes))), [0] * len(shapes), distribution, rounding, sequential)
        return ([torch.empty_like(t) for t in tensors], tensors, *rest) if into else (tensors, *rest)

    return make


def _axpy_cases(into: bool) -> tuple[Case, ...]:
    small = [(33, 7), (), (5,), (0, 3), (129,)]
    cases = [
        Case(f"{d}-{r}-K{k}{'-sequential' if s else ''}", _axpy_inputs(small, k, d, r, s, into))
        for d in DISTRIBUTIONS
        for r, k, s in (("nearest", 1, False), ("stochastic", 3, False), ("stochastic", 3, True))
    ]
    real: dict[str, list[tuple[int, ...]]] = {
        "16M": [(1 << 24,)],
        "opt-125m": [shape for shape, count in OPT_125M.items() for _ in range(count)],
        "llama-3.2-1b": [shape for shape, count in LLAMA_1B.items() for _ in range(count)],
        "1000x64x64": [(64, 64)] * 1000,
    }
    cases += [
        Case(f"{d}-{name}", _axpy_inputs(shapes, 1, d, "nearest", False, into), bench=True)
        for d in DISTRIBUTIONS
        for name, shapes in real.items()
    ]
    cases += [
        Case(f"{d}-1M-K4096", _axpy_inputs([(1 << 20,)], 4096, d, "nearest", False, into), bench=True)
        for d in DISTRIBUTIONS
    ]
    return tuple(cases)


def _axpy_fuzz(draw: Draw, dtype: torch.dtype, into: bool) -> tuple[Any, ...]:
    shapes = [[draw.integer(0, 20) for _ in range(draw.integer(0, 3))] for _ in range(draw.integer(0, 4))]
    tensors = [draw.tensor(s, dtype) for s in shapes]
    terms = draw.integer(1, 5)
    sequential = draw.choice((False, True))
    rest = (
        _i64(*(draw.integer(-(2**63), 2**63 - 1) for _ in range(terms))),
        _f64(*(draw.choice((0.0, 1e-3, -2.5, 1e4)) for _ in range(terms))),
        _f64(*(draw.choice((0.0, 1e-2)) for _ in range(draw.choice((1, terms)) if sequential else 1))),
        [draw.integer(0, 2**32 - 1) for _ in shapes],
        [draw.choice((0, draw.integer(0, 300), draw.integer(0, 2**62))) for _ in shapes],
        draw.choice(DISTRIBUTIONS),
        draw.choice(ROUNDINGS),
        sequential,
    )
    return ([draw.tensor(s, dtype) for s in shapes], tensors, *rest) if into else (tensors, *rest)


def _axpy_large(into: bool) -> Callable[[torch.device], tuple[tuple[Any, ...], tuple[Any, ...]]]:
    def build(device: torch.device) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        def make(n: int, offset: int) -> tuple[Any, ...]:
            p = torch.full((n,), 0.02, device=device, dtype=torch.bfloat16)
            rest = (_i64(7), _f64(0.01), _f64(0.0), [3], [offset], "rademacher", "stochastic", False)
            return ([torch.empty_like(p)], [p], *rest) if into else ([p], *rest)

        return make(_LARGE, 0), make(1000, _LARGE - 1000)

    return build


def _axpy_bad(name: str) -> tuple[BadInput, ...]:
    into = name == "zo_axpy_into_"

    def make(**change: Any) -> Callable[[torch.device], tuple[Any, ...]]:
        def build(device: torch.device) -> tuple[Any, ...]:
            values: dict[str, Any] = (
                {"out": [torch.ones(8, device=device), torch.ones(4, device=device)]} if into else {}
            )
            values |= {"tensors": [torch.ones(8, device=device), torch.ones(4, device=device)]}
            values |= {"seeds": _i64(1, 2), "coeffs": _f64(1.0, 2.0), "decays": _f64(0.0), "ids": [0, 1]}
            values |= {"offsets": [0, 0], "dist": "gaussian", "rounding": "nearest", "sequential": False}
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

    bad = [
        BadInput("lengths", make(coeffs=_f64(1.0)), f"{name}: seeds and coeffs must have the same length, got 2 and 1"),
        BadInput("no seeds", make(seeds=_i64(), coeffs=_f64()), f"{name}: seeds must not be empty"),
        BadInput("seeds dtype", make(seeds=_f64(1.0, 2.0)), f"{name}: seeds .*int64.*float64"),
        BadInput("coeffs dtype", make(coeffs=_i64(1, 2)), f"{name}: coeffs .*float64.*int64"),
        BadInput("two decays", make(decays=_f64(0.0, 0.0)), f"{name}: decay .*one.*2"),
        BadInput("three decays", make(decays=_f64(0.0, 0.0, 0.0), sequential=True), f"{name}: decay .*3"),
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
        ]
    return tuple(bad)


_AXPY_REST = (
    "Tensor seeds, Tensor coeffs, Tensor decays, int[] tensor_ids, int[] offsets, str distribution, str rounding, "
    "bool sequential) -> ()"
)

register(
    OpSpec(
        name="zo_axpy_",
        schema=f"(Tensor(a!)[] tensors, {_AXPY_REST}",
        reference=reference.zo_axpy_,
        fake=lambda *args: None,
        check=checks.axpy_,
        cases=_axpy_cases(into=False),
        fuzz=lambda draw, dtype: _axpy_fuzz(draw, dtype, into=False),
        bad_inputs=_axpy_bad("zo_axpy_"),
        cost=lambda tensors, *_: Cost(read=_bytes(tensors), written=_bytes(tensors)),
        dtypes=DTYPES,
        exact=True,
        large=_axpy_large(into=False),
        backends=_backends("zo_axpy_"),
    )
)

register(
    OpSpec(
        name="zo_axpy_into_",
        schema=f"(Tensor(a!)[] out, Tensor[] tensors, {_AXPY_REST}",
        reference=reference.zo_axpy_into_,
        fake=lambda *args: None,
        check=checks.axpy_into_,
        cases=_axpy_cases(into=True),
        fuzz=lambda draw, dtype: _axpy_fuzz(draw, dtype, into=True),
        bad_inputs=_axpy_bad("zo_axpy_into_"),
        cost=lambda out, *_: Cost(read=_bytes(out), written=_bytes(out)),
        dtypes=DTYPES,
        exact=True,
        large=_axpy_large(into=True),
        backends=_backends("zo_axpy_into_"),
    )
)


# --- zo_linear --------------------------------------------------------------------------------------------------------


def _linear_case(name: str, t: int, n: int, m: int, distribution: str, pair: bool = False, bench: bool = False) -> Case:
    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        def random(*shape: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(shape, generator=generator)).to(device, dtype)

        x, weight, bias = random(t, m), random(n, m, std=m**-0.5), random(n)
        return x, random(t, m) if pair else None, weight, bias, _i64(11), 1e-2, 2, 0, distribution

    return Case(name, make, bench)


def _linear_fuzz(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    m, n = draw.integer(0, 70), draw.integer(0, 40)
    batch = [draw.integer(0, 9) for _ in range(draw.integer(0, 2))]
    return (
        draw.tensor([*batch, m], dtype),
        draw.choice((None, draw.tensor([*batch, m], dtype))),
        draw.tensor([n, m], dtype),
        draw.choice((None, draw.tensor([n], dtype))),
        _i64(draw.integer(-(2**63), 2**63 - 1)),
        draw.choice((0.0, 1e-2, -0.5)),
        draw.integer(0, 2**32 - 1),
        draw.choice((0, draw.integer(0, 2**62))),
        draw.choice(DISTRIBUTIONS),
    )


def _linear_bad() -> tuple[BadInput, ...]:
    def make(**change: Any) -> Callable[[torch.device], tuple[Any, ...]]:
        def build(device: torch.device) -> tuple[Any, ...]:
            values: dict[str, Any] = {
                "x": torch.ones(2, 6, device=device),
                "x_minus": None,
                "weight": torch.ones(3, 6, device=device),
                "bias": torch.ones(3, device=device),
                "seed": _i64(1),
                "scale": 1.0,
                "id": 0,
                "offset": 0,
                "dist": "rademacher",
            }
            values |= {k: v(device) if callable(v) else v for k, v in change.items()}
            return tuple(values.values())

        return build

    return (
        BadInput("x width", make(x=lambda d: torch.ones(2, 5, device=d)), "zo_linear: x .*6.*5"),
        BadInput("x 0-d", make(x=lambda d: torch.ones((), device=d)), "zo_linear: x"),
        BadInput("weight 1-d", make(weight=lambda d: torch.ones(6, device=d)), "zo_linear: weight"),
        BadInput("bias", make(bias=lambda d: torch.ones(4, device=d)), r"zo_linear: bias .*\[3\].*\[4\]"),
        BadInput("x_minus", make(x_minus=lambda d: torch.ones(3, 6, device=d)), "zo_linear: x_minus"),
        BadInput("dtype", make(weight=lambda d: torch.ones(3, 6, device=d).half()), "zo_linear: weight .*float16"),
        BadInput("integers", make(x=lambda d: torch.ones(2, 6, device=d, dtype=torch.int64)), "zo_linear: x .*int64"),
        BadInput("seed", make(seed=_i64(1, 2)), "zo_linear: seed .*one.*2"),
        BadInput("id", make(id=-1), "zo_linear: tensor_id .*-1"),
        BadInput("distribution", make(dist="normal"), "zo_linear: distribution .*normal"),
    )


def _linear_fake(x: Tensor, x_minus: Any, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


def _linear_plain(
    x: Tensor,
    x_minus: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    scale: float,
    tensor_id: int,
    offset: int,
    distribution: str,
) -> tuple[Tensor, Tensor]:
    z = _zo_noise(weight.shape, int(seed), tensor_id, offset, distribution, weight.dtype, weight.device)
    minus = x if x_minus is None else x_minus
    return linear(x, weight + scale * z, bias), linear(minus, weight - scale * z, bias)


def _linear_cost(x: Tensor, x_minus: Tensor | None, weight: Tensor, bias: Tensor | None, *_: Any) -> Cost:
    tokens = x.numel() // max(x.shape[-1], 1)
    tensors = [t for t in (x, x_minus, weight, bias) if t is not None]
    written = 2 * tokens * weight.shape[0] * x.element_size()
    return Cost(_bytes(tensors), written, flops=4 * tokens * weight.numel(), flops_dtype=x.dtype)


register(
    OpSpec(
        name="zo_linear",
        schema="(Tensor x, Tensor? x_minus, Tensor weight, Tensor? bias, Tensor seed, float scale, int tensor_id, "
        "int offset, str distribution) -> (Tensor, Tensor)",
        reference=reference.zo_linear,
        fake=_linear_fake,
        check=checks.linear,
        cases=(
            *(_linear_case(f"{d}-9x33x65", 9, 33, 65, d) for d in DISTRIBUTIONS),
            *(_linear_case(f"{d}-9x33x65-pair", 9, 33, 65, d, pair=True) for d in DISTRIBUTIONS),
            _linear_case("rademacher-70000x8x8", 70000, 8, 8, "rademacher"),
            *(
                _linear_case(f"rademacher-{t}x2048x2048", t, 2048, 2048, "rademacher", bench=True)
                for t in (1, 32, 128, 512, 2048)
            ),
            _linear_case("gaussian-512x2048x2048", 512, 2048, 2048, "gaussian", bench=True),
            _linear_case("rademacher-512x2048x2048-pair", 512, 2048, 2048, "rademacher", pair=True, bench=True),
        ),
        fuzz=_linear_fuzz,
        bad_inputs=_linear_bad(),
        cost=_linear_cost,
        dtypes=DTYPES,
        exact=False,
        depth=lambda x, *_: max(x.shape[-1], 1),
        plain=_linear_plain,
        autograd=Autograd(linear_setup_context, linear_backward),
        backends=_backends("zo_linear"),
    )
)
