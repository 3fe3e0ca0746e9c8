"""Checks that every CUDA backend of SM3 must pass, on any device. A backend is an object with the launcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from opsuite import assert_same_bits, clone
from torch.utils._pytree import tree_map_only

from leanops import _registry
from leanops.sm3 import reference
from leanops.sm3.calls import Step
from leanops.sm3.cases import Options, step_case

SPEC = _registry.spec("sm3_step_")
DTYPES = SPEC.dtypes
MOMENTA = (None, torch.float32, torch.bfloat16, torch.int8)

# shapes that together take every path through the kernels
ALL_SHAPES: Sequence[tuple[int, ...]] = (
    *((64, 256), (128, 512), (256, 64), (8, 2048)),  # tiles that are whole, one and several
    *((70, 600), (65, 257), (130, 40), (3, 1, 5), (9, 777), (30, 1000)),  # and cut off, rows on no 16-byte boundary
    *((2100, 8), (300, 1), (1, 300), (700, 3), (600, 33), (520, 384)),  # rows shorter than a warp's
    *((5, 3000), (2, 5000), (17, 2049), (1, 1), (0, 7), (3, 0, 2)),  # too few rows for all threads
    *((20000,), (16384,), (300,), (1,), (), (0,), (256,)),  # vectors
    *((3, 4, 5, 6), (6, 70, 130), (40, 30, 3, 3), (3, 5, 256), (2, 3, 4, 3, 2), (2, 2, 4000)),  # more axes
)
# few elements, for where each of them costs much: the interpreter and the sanitizers
SMALL_SHAPES: Sequence[tuple[int, ...]] = (
    *((64, 256), (130, 40), (9, 777), (3, 1, 5), (300, 1), (70, 33), (0, 7)),
    *((3000,), (1,), (), (3, 4, 5, 6), (6, 7, 130), (3, 5, 256)),
)
NAMED_OPTIONS: dict[str, Options] = {
    "sum": Options(),
    "average, coupled, maximized, scaled": Options(
        beta=0.9, weight_decay=0.1, decoupled=False, maximize=True, grad_scale=3.0
    ),
    "decoupled, stochastic, eps 0": Options(weight_decay=0.01, stochastic_rounding=True, eps=0.0, momentum=0.5),
}


def make(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, options: Options, device: str, seed: int = 0) -> Step:
    case = step_case("", shapes, options)
    args = SPEC.bind(*case.make(torch.device(device), dtype, torch.Generator().manual_seed(seed)))
    offsets = [(0, 8, 5, 2**33 + 1, 2**62)[i % 5] for i in range(len(shapes))]
    return args._replace(offsets=offsets, tensor_ids=[(i * 2654435761) % 2**32 for i in range(len(shapes))])


def numbers_to(args: Step, device: str) -> Step:
    """The call with its numbers on a device."""
    numbers = {n: getattr(args, n) for n in ("lr", "seed", "grad_scale", "found_inf", "lr_factors")}
    return args._replace(**{n: None if t is None else t.to(device) for n, t in numbers.items()})


def check(backend: Any, args: Step, what: str = "") -> None:
    """One step gives the reference's bits and writes no gradient."""
    expected = Step(*tree_map_only(torch.Tensor, lambda t: t.cpu(), clone(tuple(args))))
    before = [g.clone() for g in args.grads]
    backend.sm3_step_(args)
    reference.sm3_step_(expected)
    assert_same_bits(SPEC.mutated(args), SPEC.mutated(expected), what)
    assert_same_bits(args.grads, before, f"{what} gradients")


def step(
    backend: Any,
    device: str,
    dtype: torch.dtype,
    momentum: torch.dtype | None,
    options: str,
    numbers: str = "cpu",
    shapes: Sequence[tuple[int, ...]] = ALL_SHAPES,
) -> None:
    chosen = NAMED_OPTIONS[options]._replace(momentum_dtype=momentum)
    check(backend, numbers_to(make(shapes, dtype, chosen, device), numbers), options)


def averaged_gradients(backend: Any, device: str) -> None:
    """Momenta of gradients, which may be far larger than the root of their accumulator, and rates of their own."""
    pairs = zip((torch.float32, torch.bfloat16, torch.float16, torch.float64), (*MOMENTA[1:], torch.int8), strict=True)
    for (dtype, momentum), numbers in zip(pairs, ("cpu", device, "cpu", device), strict=True):
        options = Options(momentum, beta=0.9, weight_decay=0.1, average_gradient=True, factors=True)
        args = make(SMALL_SHAPES, dtype, options._replace(stochastic_rounding=True), device)
        for m in args.momenta:
            if m.is_floating_point() and m.numel():
                m.view(-1)[:: 1 + m.numel() // 9] = 3e38 if momentum == torch.float32 else torch.inf
                m.view(-1)[1 :: 1 + m.numel() // 9] = 1e30
        check(backend, numbers_to(args, numbers), f"averaged gradients, {dtype}, {momentum}")
    check(
        backend, make(SMALL_SHAPES, torch.float32, Options(average_gradient=True, factors=True), device), "no momentum"
    )


def unaligned(backend: Any, device: str, dtype: torch.dtype, momentum: torch.dtype | None) -> None:
    """Tensors that are not aligned for wide accesses, between guards that must keep their values."""
    args = make([(70, 256), (33, 64), (5, 1024), (700,), (3, 4, 64)], dtype, Options(momentum), device)
    guards = []

    def move(t: torch.Tensor, shift: int) -> torch.Tensor:
        storage = torch.full((t.numel() + 64,), 77, dtype=t.dtype, device=t.device)
        place = slice(shift, shift + t.numel())
        storage[place] = t.flatten()
        guards.append((storage, place))
        return storage[place].view(t.shape)

    for position, tensors in enumerate(args[:5]):
        for i, t in enumerate(tensors):
            tensors[i] = move(t, (1 + i + position) % 7)
    check(backend, args, "unaligned")
    for storage, place in guards:
        assert (storage[: place.start] == 77).all()
        assert (storage[place.stop :] == 77).all()


def strided(backend: Any, device: str, dtype: torch.dtype, momentum: torch.dtype | None) -> None:
    options = Options(momentum, strided=True, weight_decay=0.1)
    check(backend, make([(70, 300), (6, 7, 8), (50,)], dtype, options, device), "strided")


def special_values(backend: Any, device: str, dtype: torch.dtype, momentum: torch.dtype | None) -> None:
    """NaN, infinities, zeros of both signs, and numbers whose squares over- or underflow; in covers too."""
    inf, nan = torch.inf, torch.nan
    values = [0.0, -0.0, 1e-20, -1e-23, 1e-30, 1e-38, -1e-42, 1e-45, 1e19, -3e20, 3e38, 6e-8, 65504.0, inf, -inf, nan]
    generator = torch.Generator().manual_seed(5)
    for eps in (1e-30, 0.0, 1e-8, 1e13, 1e-38):
        for beta in (1.0, 0.9, 1 - 2**-53):
            args = make([(64, 256), (40, 72), (900,), (3, 4, 5)], dtype, Options(momentum, beta=beta, eps=eps), device)
            for tensors in (args.params, args.grads, args.momenta, args.covers):
                for t in tensors:
                    if t.dtype == torch.int8:
                        continue
                    which = torch.randint(0, len(values), t.shape, generator=generator)
                    rare = torch.rand(t.shape, generator=generator) < 0.03
                    some = torch.tensor(values, dtype=torch.float64)[which].to(device, t.dtype)
                    t.copy_(torch.where(rare.to(device), some, t))
                    if t.dim() and tensors is not args.params:
                        t[: t.shape[0] // 4] = 0.0  # where gradient and covers are zero, so is nu
            for cover in args.covers:
                cover.abs_()
            check(backend, args, f"special values, eps {eps}, beta {beta}")


def codes(backend: Any, device: str, dtype: torch.dtype) -> None:
    """int8 blocks of zeros, of the smallest and largest magnitudes, and with what is not finite."""
    args = make([(16, 700), (900,)], dtype, Options(torch.int8), device)
    units = torch.tensor([0.0, 2.0**-121, 2.0**-120, 2.0**-119, 1e-30, 1.0, 1e30, 3e38, torch.inf, torch.nan])
    for t, scale, m in zip(args.grads, args.scales, args.momenta, strict=True):
        t.mul_(0.0)  # the new momentum is then 0.9 times code times scale
        scale.copy_(units.repeat(1 + scale.numel() // 10)[: scale.numel()].view(scale.shape) / 127)
        m.view(-1)[::3] = 127
    check(backend, args, "codes")


def skips(backend: Any, device: str) -> None:
    """A step with found_inf writes nothing, whether found_inf lies on the host or on the device."""
    for numbers in dict.fromkeys(("cpu", device)):
        for found in (1.0, torch.nan):
            args = make([(70, 300), (50,)], torch.float32, Options(torch.float32, found_inf=found), device)
            before = clone(tuple(args))
            backend.sm3_step_(numbers_to(args, numbers))
            assert_same_bits(SPEC.mutated(args), SPEC.mutated(before))
        check(backend, numbers_to(make([(70, 300)], torch.float32, Options(found_inf=0.0), device), numbers))


def learning_rates(backend: Any, device: str) -> None:
    for numbers in dict.fromkeys(("cpu", device)):
        for dtype in (torch.float32, torch.float64):
            for lr, decay in ((0.1, 0.1), (1e-3, 0.1), (0.0, 0.1), (torch.inf, 0.0)):
                args = make([(70, 300)], dtype, Options(weight_decay=decay), device)
                args.params[0][::2] = -0.0  # the sign after a step of 0 must be the reference's
                check(backend, numbers_to(args._replace(lr=torch.tensor([lr], dtype=dtype)), numbers))


def many(backend: Any, device: str, count: int) -> None:
    """Many tensors in one call, whose table may be too large for a kernel's parameters."""
    shapes = [((64, 64), (100, 300), (77,), (3, 4, 5))[i % 4] for i in range(count)]
    check(backend, make(shapes, torch.bfloat16, Options(torch.bfloat16), device), f"{count} tensors")


def mixed(backend: Any, device: str) -> None:
    """Parameters and momenta of several dtypes in one call."""
    parts = [make([(70, 300), (50,)], d, Options(m), device) for d, m in zip(DTYPES, MOMENTA[1:] * 2, strict=False)]
    lists = [[t for p in parts for t in p[i]] for i in range(5)]
    rest = parts[0]._replace(tensor_ids=list(range(8)), offsets=[0] * 8)[5:]
    check(backend, Step(*lists, *rest), "mixed")


def empty(backend: Any, device: str) -> None:
    for shapes in ([], [(0,)], [(0, 3), (3, 0)]):
        check(backend, make(shapes, torch.float32, Options(torch.int8), device), "empty")


def every_kernel(backend: Any, device: str) -> None:
    """Small calls that launch every CUDA kernel of the family."""
    for dtype in DTYPES:
        for momentum in MOMENTA:
            for options in NAMED_OPTIONS:
                step(backend, device, dtype, momentum, options, shapes=SMALL_SHAPES)
            unaligned(backend, device, dtype, momentum)
    many(backend, device, 40)
