"""Inputs of the SM3 operator: cases, fuzzing, bad input, and a tensor of more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanops._registry import BadInput, Case, Draw, Inputs
from leanops.sm3.reference import axes_of, scale_shape

Shapes = Sequence[tuple[int, ...]]

MOMENTA = (None, torch.float32, torch.bfloat16, torch.int8)

# the weights of a q_proj, a gate_proj and a norm of Llama 3.2 1B: 21 million parameters
LLAMA_21M = [(2048, 2048), (8192, 2048), (2048,)]

# the convolutions of ResNet-50's last two stages, and its head
RESNET_50 = [(256, 256, 3, 3)] * 6 + [(512, 512, 3, 3)] * 3 + [(2048, 512, 1, 1)] * 3 + [(1000, 2048), (1000,)]


class Options(NamedTuple):
    """The options of a case, beside its shapes."""

    momentum_dtype: torch.dtype | None = None
    momentum: float = 0.9  # used if there is a momentum_dtype
    beta: float = 1.0
    eps: float = 1e-30
    weight_decay: float = 0.0
    decoupled: bool = True
    maximize: bool = False
    stochastic_rounding: bool = False
    grad_scale: float | None = None
    found_inf: float | None = None
    strided: bool = False  # parameters and gradients are transposed, gradients also with gaps
    average_gradient: bool = False
    factors: bool = False  # a factor of the rate for each parameter


def numbers(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _state(
    shapes: Shapes, dtype: torch.dtype | None, device: torch.device, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Covers, momenta and scales as after some steps with gradients of about 1e-3."""
    covers = [1e-5 * torch.rand(sum(axes_of(s)), generator=generator).to(device) for s in shapes]
    if dtype is None:
        return covers, [], []
    if dtype == torch.int8:
        momenta = [torch.randint(-127, 128, s, generator=generator, dtype=dtype).to(device) for s in shapes]
        scales = [torch.rand(scale_shape(s), generator=generator).to(device) / 127 for s in shapes]
        return covers, momenta, scales
    momenta = [(0.2 * torch.randn(s, generator=generator)).to(device, dtype) for s in shapes]
    return covers, momenta, [torch.empty(0, device=device) for _ in shapes]


def _rest(shapes: Shapes, o: Options, lr: float = 1e-2) -> tuple[Any, ...]:
    """The arguments after the scales."""
    return (
        numbers(lr, dtype=torch.float64),
        numbers(-0x123456789ABCDEF, dtype=torch.int64),
        None if o.grad_scale is None else numbers(o.grad_scale),
        None if o.found_inf is None else numbers(o.found_inf),
        list(range(len(shapes))),
        [0] * len(shapes),
        0.0 if o.momentum_dtype is None else o.momentum,
        o.beta,
        o.eps,
        o.weight_decay,
        o.decoupled,
        o.maximize,
        o.stochastic_rounding,
        o.average_gradient,
        1 / torch.arange(1.0, len(shapes) + 1) if o.factors else None,
    )


def _strided(t: Tensor, gaps: bool) -> Tensor:
    """The same values, transposed in memory, with every second element unused where ``gaps``."""
    order = list(range(t.dim()))[::-1]
    turned = t.permute(order)
    room = t.new_zeros(*turned.shape, 2 if gaps else 1)[..., 0]
    return room.copy_(turned).permute(order)


def step_inputs(
    shapes: Shapes, o: Options, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Any, ...]:
    """The operator's arguments: weights, gradients and state with the magnitudes of training."""
    params, grads = (
        [(std * torch.randn(s, generator=generator)).to(device, dtype) for s in shapes] for std in (0.02, 1e-3)
    )
    if o.strided:
        params, grads = [_strided(p, False) for p in params], [_strided(g, True) for g in grads]
    return params, grads, *_state(shapes, o.momentum_dtype, device, generator), *_rest(shapes, o)


def step_case(name: str, shapes: Shapes, options: Options, bench: bool = False) -> Case:
    return Case(name, lambda *where: step_inputs(shapes, options, *where), bench)


def step_cases() -> tuple[Case, ...]:
    f32, bf16, i8 = torch.float32, torch.bfloat16, torch.int8
    ranks = [(33, 7), (), (5,), (0, 3), (129,), (1, 300), (6, 1, 5), (3, 4, 2, 17)]
    blocks = [(3, 1000), (2, 256), (4, 511), (700,), (2, 3, 131), ()]
    small: dict[str, tuple[Shapes, Options]] = {
        "no-momentum": (ranks, Options()),
        "fp32-coupled-maximize": (
            ranks,
            Options(f32, weight_decay=0.1, decoupled=False, maximize=True, eps=1e-8),
        ),
        "bf16-average-decoupled-stochastic": (
            ranks,
            Options(bf16, beta=0.95, weight_decay=0.1, stochastic_rounding=True),
        ),
        "int8-strided": (ranks, Options(i8, beta=0.999, strided=True)),
        "int8-blocks-scaled-stochastic": (
            blocks,
            Options(i8, momentum=0.5, grad_scale=1024.0, found_inf=0.0, stochastic_rounding=True),
        ),
        "found-inf": (ranks[:3], Options(f32, found_inf=1.0)),
        "fp32-average-gradient-coupled": (
            ranks,
            Options(f32, weight_decay=0.1, decoupled=False, average_gradient=True, eps=1e-8),
        ),
        "int8-average-gradient-factors": (
            blocks,
            Options(i8, beta=0.95, weight_decay=0.1, average_gradient=True, factors=True, stochastic_rounding=True),
        ),
    }
    real: dict[str, tuple[Shapes, Options]] = {
        **{f"llama-21M-{n}": (LLAMA_21M, Options(d)) for n, d in _momentum_names().items()},
        "llama-21M-int8-stochastic": (LLAMA_21M, Options(i8, stochastic_rounding=True)),
        "1000x64x64-no-momentum": ([(64, 64)] * 1000, Options()),
        "1000x64x64-fp32": ([(64, 64)] * 1000, Options(f32)),
        "resnet-50-fp32": (RESNET_50, Options(f32)),
    }
    return tuple(
        step_case(name, shapes, options, bench)
        for cases, bench in ((small, False), (real, True))
        for name, (shapes, options) in cases.items()
    )


def _momentum_names() -> dict[str, torch.dtype | None]:
    return dict(zip(("no-momentum", "fp32", "bf16", "int8"), MOMENTA, strict=True))


def step_fuzz(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    device = draw.device
    ranks = [draw.integer(0, 4) for _ in range(draw.integer(0, 3))]
    shapes = [tuple(draw.integer(0, (1, 300, 30, 9, 6)[rank]) for _ in range(rank)) for rank in ranks]
    if draw.choice((False, True)):
        shapes.append((draw.integer(1, 3), draw.integer(200, 800)))
    state = draw.choice(MOMENTA)
    unit = draw.choice((1.0, 1e-3, 1e-22, 1e18))
    params = [draw.tensor(s, dtype) for s in shapes]
    grads = [draw.tensor(s, dtype).mul_(unit) for s in shapes]
    for g in grads:
        if g.numel() and draw.choice((False, False, True)):
            g[(draw.integer(0, 0),) * g.dim()] = draw.choice((0.0, -0.0, torch.inf, torch.nan))
    covers = [draw.tensor([sum(axes_of(s))], torch.float32).square().mul(unit * unit).contiguous() for s in shapes]
    momenta, scales = [], []
    if state == torch.int8:
        momenta = [(50 * draw.tensor(s, torch.float32)).clamp(-127, 127).to(state).contiguous() for s in shapes]
        scales = [draw.tensor(scale_shape(s), torch.float32).abs().contiguous() / 127 for s in shapes]
    elif state is not None:
        momenta = [draw.tensor(s, state).contiguous() for s in shapes]
        scales = [torch.empty(0, device=device) for _ in shapes]
    place = draw.choice((device, torch.device("cpu")))
    return (
        params,
        grads,
        covers,
        momenta,
        scales,
        numbers(draw.choice((0.1, 1e-3, 0.0)), dtype=draw.choice((torch.float32, torch.float64))).to(place),
        numbers(draw.integer(-(2**63), 2**63 - 1), dtype=torch.int64).to(place),
        draw.choice((None, numbers(3.0).to(place))),
        draw.choice((None, None, numbers(0.0).to(place), numbers(1.0).to(place))),
        [draw.integer(0, 2**32 - 1) for _ in shapes],
        [draw.choice((0, draw.integer(0, 300), draw.integer(0, 2**62))) for _ in shapes],
        0.0 if state is None else draw.choice((0.9, 0.1)),
        draw.choice((1.0, 0.9, 0.999)),
        draw.choice((1e-30, 0.0, 1e-8)),
        draw.choice((0.0, 0.01)),
        draw.choice((False, True)),
        draw.choice((False, True)),
        draw.choice((False, True)),
        draw.choice((False, False, True)),
        draw.choice((None, None, numbers(*(draw.choice((1.0, 10.0, 0.3)) for _ in shapes)).to(place))),
    )


def step_large(device: torch.device) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A matrix of more than 2^31 elements, whose gradient repeats one row; and its last rows as a shard."""
    rows, columns, last = 2**16 + 1, 2**15 + 3, 3
    generator = torch.Generator().manual_seed(0)
    gradient = (1e-2 * torch.randn(columns, generator=generator)).to(device, torch.bfloat16)
    of_rows, of_columns = (1e-4 * torch.rand(n, generator=generator).to(device) for n in (rows, columns))
    o = Options(torch.int8, stochastic_rounding=True)

    def make(n: int) -> tuple[Any, ...]:
        shape = (n, columns)
        rest = list(_rest([shape], o))
        rest[5] = [(rows - n) * columns]  # offsets
        return (
            [torch.zeros(shape, device=device, dtype=torch.bfloat16)],
            [gradient.expand(shape)],
            [torch.cat([of_rows[rows - n :], of_columns])],
            [torch.zeros(shape, device=device, dtype=torch.int8)],
            [torch.zeros(scale_shape(shape), device=device)],
            *rest,
        )

    return make(rows), make(last)


def step_bad() -> tuple[BadInput, ...]:
    i8, f64 = torch.int8, torch.float64

    def make(**change: Any) -> Callable[[torch.device], tuple[Any, ...]]:
        """Two parameters, [3, 300] and [4], with an int8 and an fp32 momentum; functions make tensors on the device."""

        def build(device: torch.device) -> tuple[Any, ...]:
            ones = torch.ones(3, 300, device=device), torch.ones(4, device=device)
            values: dict[str, Any] = {
                "params": list(ones),
                "grads": [t.clone() for t in ones],
                "covers": [torch.zeros(303, device=device), torch.zeros(4, device=device)],
                "momenta": [torch.zeros(3, 300, device=device, dtype=i8), torch.zeros(4, device=device)],
                "scales": [torch.zeros(3, 2, device=device), torch.zeros(0, device=device)],
                "lr": numbers(0.1),
                "seed": numbers(1, dtype=torch.int64),
                "grad_scale": None,
                "found_inf": None,
                "tensor_ids": [0, 1],
                "offsets": [0, 0],
                "momentum": 0.9,
                "beta": 1.0,
                "eps": 0.0,
                "weight_decay": 0.0,
                "decoupled": True,
                "maximize": False,
                "stochastic_rounding": False,
                "average_gradient": True,
                "lr_factors": None,
            }
            for name, new in change.items():
                values[name] = new(values[name]) if callable(new) else new
            return tuple(values.values())

        return build

    def first(change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
        return lambda tensors: [change(tensors[0]), *tensors[1:]]

    def second(change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
        return lambda tensors: [tensors[0], change(tensors[1])]

    def one(tensors: list[Tensor]) -> list[Tensor]:
        return tensors[:1]

    def shared(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0], tensors[0].view(-1)[:4]]

    bad: list[tuple[Any, ...]] = [
        ("integers", {"params": second(lambda t: t.int())}, r"params\[1\] .*float64.*int32"),
        ("complex", {"params": second(lambda t: t + 0j)}, r"params\[1\] .*complex64"),
        ("sparse", {"params": second(lambda t: t.to_sparse())}, r"params\[1\] .*dense.*sparse_coo"),
        ("meta", {"params": second(lambda t: t.to("meta"))}, r"params\[1\] .*meta"),
        ("expanded", {"params": second(lambda t: t[:1].expand(4))}, r"params\[1\] must not overlap itself"),
        ("shared storage", {"params": shared}, "params.*overlap"),
        ("requires grad", {"params": second(lambda t: t.requires_grad_())}, r"params\[1\] requires grad", RuntimeError),
        ("grads length", {"grads": one}, r"grads .*\(2\).*1"),
        ("grad shape", {"grads": second(lambda t: t[:3])}, r"grads\[1\] .*\[4\].*\[3\]"),
        ("grad dtype", {"grads": second(lambda t: t.half())}, r"grads\[1\] .*float32.*float16"),
        ("grad device", {"grads": second(lambda t: t.to("meta"))}, r"grads\[1\] .*meta"),
        ("sparse grad", {"grads": second(lambda t: t.to_sparse())}, r"grads\[1\] .*dense.*sparse_coo"),
        ("complex grad", {"grads": second(lambda t: t + 0j)}, r"grads\[1\] .*complex64"),
        ("covers length", {"covers": one}, r"covers .*\(2\).*1"),
        (
            "cover size",
            {"covers": first(lambda t: t[:302])},
            r"covers\[0\] .*\[303\] for params\[0\] of shape \[3, 300\], got \[302\]",
        ),
        ("cover shape", {"covers": second(lambda t: t.view(2, 2))}, r"covers\[1\] .*\[4\].*\[2, 2\]"),
        ("cover dtype", {"covers": second(lambda t: t.bfloat16())}, r"covers\[1\] .*float32.*bfloat16"),
        ("cover strides", {"covers": second(lambda t: t.repeat(2)[::2])}, r"covers\[1\] .*contiguous.*\[2\]"),
        ("cover device", {"covers": second(lambda t: t.to("meta"))}, r"covers\[1\] .*meta"),
        ("sparse cover", {"covers": second(lambda t: t.to_sparse())}, r"covers\[1\] .*dense"),
        ("momentum missing", {"momenta": one}, r"momenta .*\(2\).*0.9.*1"),
        ("momentum not wanted", {"momentum": 0.0}, "momenta must have no entry.*0.0.*2"),
        ("momentum shape", {"momenta": second(lambda t: t[:3])}, r"momenta\[1\] .*\[4\].*\[3\]"),
        ("momentum dtype", {"momenta": second(lambda t: t.half())}, r"momenta\[1\] .*int8.*float16"),
        ("momentum strides", {"momenta": second(lambda t: t.repeat(2)[::2])}, r"momenta\[1\] .*contiguous"),
        ("momentum device", {"momenta": second(lambda t: t.to("meta"))}, r"momenta\[1\] .*meta"),
        ("no scales", {"scales": []}, r"scales .*\(2\).*int8.*0"),
        ("scales length", {"scales": one}, r"scales .*\(2\).*1"),
        ("scales shape", {"scales": first(lambda t: t[:, :1])}, r"scales\[0\] .*\[3, 2\].*int8.*\[3, 1\]"),
        ("scales of fp32", {"scales": second(lambda t: t.new_ones(1))}, r"scales\[1\] .*\[0\].*float32.*\[1\]"),
        ("scales dtype", {"scales": first(lambda t: t.double())}, r"scales\[0\] .*float32.*float64"),
        ("scales strides", {"scales": first(lambda t: t.t().contiguous().t())}, r"scales\[0\] .*contiguous"),
        ("lr dtype", {"lr": numbers(1, dtype=torch.int64)}, "lr .*float32 or float64.*int64"),
        ("two lr", {"lr": numbers(1.0, 2.0)}, r"lr .*one.*\[2\]"),
        ("lr device", {"lr": numbers(1.0).to("meta")}, "lr .*CPU.*meta"),
        ("seed dtype", {"seed": numbers(1.0, dtype=f64)}, "seed .*int64.*float64"),
        ("two seeds", {"seed": numbers(1, 2, dtype=torch.int64)}, r"seed .*one.*\[2\]"),
        ("grad_scale dtype", {"grad_scale": numbers(1.0, dtype=f64)}, "grad_scale .*float32.*float64"),
        ("grad_scale size", {"grad_scale": numbers(1.0, 1.0)}, r"grad_scale .*one.*\[2\]"),
        ("found_inf dtype", {"found_inf": numbers(1, dtype=torch.int64)}, "found_inf .*float32.*int64"),
        ("found_inf size", {"found_inf": numbers(1.0, 1.0)}, r"found_inf .*one.*\[2\]"),
        ("ids", {"tensor_ids": [0]}, r"tensor_ids .*\(2\).*1"),
        ("id range", {"tensor_ids": [0, 2**32]}, rf"tensor_ids\[1\].*{2**32}"),
        ("offsets", {"offsets": [0]}, r"offsets .*\(2\).*1"),
        ("offset range", {"offsets": [0, -3]}, r"offsets\[1\].*-3"),
        ("offset overflow", {"offsets": [2**63 - 900, 0]}, r"offsets\[0\]"),
        ("momentum 1", {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ("momentum nan", {"momentum": torch.nan}, "momentum .*nan"),
        ("beta 0", {"beta": 0.0}, r"beta must be in \(0, 1\], got 0.0"),
        ("beta 2", {"beta": 2.0}, "beta .*2.0"),
        ("eps", {"eps": -1e-8}, "eps .*-1e-08"),
        ("eps inf", {"eps": torch.inf}, "eps .*finite.*inf"),
        ("eps of fp64", {"eps": 1e300}, "eps .*finite float32.*1e.300"),
        ("decay of fp64", {"weight_decay": 1e300}, "weight_decay .*finite float32.*1e.300"),
        ("decay", {"weight_decay": -0.1}, "weight_decay .*-0.1"),
        ("decay nan", {"weight_decay": torch.nan}, "weight_decay .*nan"),
        ("factors length", {"lr_factors": numbers(1.0)}, r"lr_factors .*\[2\].*\[1\]"),
        ("factors shape", {"lr_factors": numbers(1.0, 1.0).view(1, 2)}, r"lr_factors .*\[2\].*\[1, 2\]"),
        ("factors dtype", {"lr_factors": numbers(1.0, 1.0, dtype=f64)}, "lr_factors .*float32.*float64"),
        ("factors strides", {"lr_factors": numbers(1, 1, 1, 1)[::2]}, r"lr_factors .*contiguous.*\[2\]"),
        ("factors device", {"lr_factors": numbers(1.0, 1.0).to("meta")}, "lr_factors .*CPU.*meta"),
    ]
    return tuple(
        BadInput(name, make(**change), f"sm3_step_: {message}", *error) for name, change, message, *error in bad
    )


STEP = Inputs(step_cases(), step_fuzz, step_bad(), step_large)
