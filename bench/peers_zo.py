"""Peers, probes and real weights of the zeroth-order family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanops._registry import Case
from leanops.bench.peers import Args, OtherInputs, Peer, Probe, Subject, add
from leanops.bench.weights import minilm, minilm_file
from leanops.zo import columns_of
from leanops.zo.cases import AXPY_DISTRIBUTIONS, axpy_inputs, linear_case, noise_case

_PIECE = 2048  # elements of a tensor that one probe compares
_MANY = 16  # beyond so many seeds, eager peers time one pass of them


# --- real weights -----------------------------------------------------------------------------------------------------


def _minilm_case(distribution: str, into: bool) -> Case:
    real = minilm()
    right = (torch.tensor([7]), [columns_of(t.shape) for t in real], 2) if distribution == "lowrank" else ()

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Args:
        weights = [t.to(device, dtype, copy=True) for t in real]
        seeds = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator)
        numbers = (seeds, torch.tensor([1e-3], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64))
        places = (list(range(len(weights))), [0] * len(weights))
        rest = (*numbers, *places, distribution, "nearest", False, *right)
        return ([torch.empty_like(t) for t in weights], weights, *rest) if into else (weights, *rest)

    return Case(f"{distribution}-minilm-weights", make, bench=True)


def _minilm_cases(into: bool) -> tuple[Case, ...]:
    if isinstance(minilm_file(), str):
        return ()
    return tuple(_minilm_case(d, into) for d in AXPY_DISTRIBUTIONS)


def _minilm_absent() -> dict[str, str]:
    file = minilm_file()
    return {f"{d}-minilm-weights": file for d in AXPY_DISTRIBUTIONS} if isinstance(file, str) else {}


# --- noise ------------------------------------------------------------------------------------------------------------


def _noise_probes(args: Args) -> list[Probe]:
    out, seed, tensor_id, offset, distribution = args
    out.fill_(torch.nan)
    flat = out.view(-1)
    return [
        Probe(
            (torch.full_like(flat[a:b], torch.nan), seed, tensor_id, offset + a, distribution),
            lambda result, a=a, b=b: [flat[a:b]],  # type: ignore[misc]
        )
        for a, b in _pieces(flat.numel(), _PIECE)
    ]


def _pieces(n: int, size: int) -> list[tuple[int, int]]:
    """The start, a middle that is aligned to nothing, and the end of n elements."""
    if n <= 3 * size:
        return [(0, n)]
    middle = n // 2 + 5
    return [(0, size), (middle, middle + size), (n - size, n)]


def _only(distribution: str, make: Callable[[Args], Callable[[], object]], at: int) -> Callable[[Args], Any]:
    def build(args: Args) -> Callable[[], object]:
        if args[at] != distribution:
            raise OtherInputs(f"{distribution} only")
        return make(args)

    return build


def _signs(size: torch.Size, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device).bernoulli_(0.5).mul_(2).sub_(1)


add(
    Subject(
        name="zo_noise_",
        peers=(
            Peer("Tensor.normal_", "torch", _only("gaussian", lambda a: lambda: a[0].normal_(), 4)),
            Peer(
                "torch.randn",
                "torch",
                _only(
                    "gaussian",
                    lambda a: lambda: torch.randn(a[0].shape, dtype=a[0].dtype, device=a[0].device),
                    4,
                ),
            ),
            Peer(
                "Tensor.bernoulli_, 2z - 1",
                "torch",
                _only("rademacher", lambda a: lambda: a[0].bernoulli_(0.5).mul_(2).sub_(1), 4),
            ),
        ),
        probes=_noise_probes,
        tiny=lambda device, dtype: (
            torch.empty(1, device=device, dtype=dtype),
            torch.tensor([1]),
            0,
            0,
            "gaussian",
        ),
        headline=("gaussian-16M",),
        small=noise_case("gaussian-64K", (1 << 16,), "gaussian", bench=True),
    )
)


# --- axpy -------------------------------------------------------------------------------------------------------------


def _axpy_probes(into: bool) -> Callable[[Args], list[Probe]]:
    def probes(args: Args) -> list[Probe]:
        written, tensors = (args[0], args[1]) if into else (args[0], args[0])
        seeds, coeffs, decays, ids, offsets, distribution, rounding, sequential, *right = args[2:] if into else args[1:]
        if into:
            for t in written:
                t.fill_(torch.nan)
        size = _PIECE if len(seeds) <= _MANY else 64
        picked = sorted({0, len(tensors) - 1, *range(0, len(tensors), max(1, len(tensors) // 8))})
        found = []
        for j in picked if tensors else []:
            flat, result = tensors[j].view(-1), written[j].view(-1)
            for a, b in _pieces(flat.numel(), size)[: 3 if size == _PIECE else 1]:
                b = min(b, a + size) if size != _PIECE else b
                piece = flat[a:b].clone()
                mine = (right[0], [right[1][j]], right[2]) if distribution == "lowrank" else ()
                rest = (distribution, rounding, sequential, *mine)
                numbers = (seeds, coeffs, decays, [ids[j]], [offsets[j] + a], *rest)
                reference = ([torch.full_like(piece, torch.nan)], [piece], *numbers) if into else ([piece], *numbers)
                found.append(Probe(reference, lambda _, r=result, a=a, b=b: [r[a:b]]))  # type: ignore[misc]
        return found

    return probes


def _passes(args: Args, at: int) -> list[float]:
    """The coefficients of the passes that a call makes: all of them, or one that stands for many."""
    coeffs: list[float] = args[at].tolist()
    return coeffs if len(coeffs) <= _MANY else coeffs[:1]


def _times(at: int) -> Callable[[Args], int]:
    return lambda args: len(args[at]) if len(args[at]) > _MANY else 1


def _loop(draw: Callable[[torch.Size, Tensor], Tensor], into: bool) -> Callable[[Args], Callable[[], object]]:
    """MeZO's loop: for each tensor draw noise of its size, then add it."""

    def make(args: Args) -> Callable[[], object]:
        written, tensors = (args[0], args[1]) if into else (args[0], args[0])
        coeffs = _passes(args, 3 if into else 2)

        def call() -> None:
            for i, c in enumerate(coeffs):
                for o, p in zip(written, tensors, strict=True):
                    z = draw(p.size(), p)
                    if into:
                        torch.add(o if i else p, z, alpha=c, out=o)
                    else:
                        p.add_(z, alpha=c)

        return call

    return make


def _normal(size: torch.Size, like: Tensor) -> Tensor:
    return torch.normal(mean=0.0, std=1.0, size=size, device=like.device, dtype=like.dtype)


def _foreach(args: Args) -> Callable[[], object]:
    tensors, coeffs = args[0], _passes(args, 2)

    def call() -> None:
        for c in coeffs:
            torch._foreach_add_(tensors, [torch.randn_like(p) for p in tensors], alpha=c)

    return call


def _lozo(into: bool) -> Callable[[Args], Callable[[], object]]:
    """LOZO's loop: for each matrix draw U, multiply by the V that is kept, and add; noise for the others."""

    def make(args: Args) -> Callable[[], object]:
        written, tensors = (args[0], args[1]) if into else (args[0], args[0])
        coeffs, rank = _passes(args, 3 if into else 2), args[-1]

        def drawn(p: Tensor, lines: int) -> Tensor:
            return torch.randn(lines, rank, device=p.device, dtype=p.dtype)

        kept = [drawn(p, p[0].numel()) if p.dim() >= 2 and p.numel() else None for p in tensors]

        def call() -> None:
            for i, c in enumerate(coeffs):
                for o, p, v in zip(written, tensors, kept, strict=True):
                    z = torch.randn_like(p) if v is None else (drawn(p, len(p)) @ v.t()).view_as(p)
                    if into:
                        torch.add(o if i else p, z, alpha=c, out=o)
                    else:
                        p.add_(z, alpha=c)

        return call

    return make


def _tiled(like: Tensor) -> Tensor:
    """Random values of a tensor's shape, a few drawn and repeated: drawing a billion takes longer than timing them."""
    drawn = torch.randn(min(like.numel(), 1 << 16), device=like.device).to(like.dtype)
    return drawn.repeat(-(-like.numel() // max(drawn.numel(), 1)))[: like.numel()].view(like.shape)


def _stored(into: bool) -> Callable[[Args], Callable[[], object]]:
    """An axpy that reads its direction from memory: the floor for noise that costs nothing to make."""

    def make(args: Args) -> Callable[[], object]:
        written, tensors = (args[0], args[1]) if into else (args[0], args[0])
        coeffs = _passes(args, 3 if into else 2)
        directions = [_tiled(t) for t in tensors]

        def call() -> None:
            for i, c in enumerate(coeffs):
                for o, p, q in zip(written, tensors, directions, strict=True):
                    if into:
                        torch.add(o if i else p, q, alpha=c, out=o)
                    else:
                        p.add_(q, alpha=c)

        return call

    return make


def _axpy_tiny(into: bool) -> Callable[[torch.device, torch.dtype], Args]:
    def tiny(device: torch.device, dtype: torch.dtype) -> Args:
        tensors = [torch.zeros(1, device=device, dtype=dtype)]
        zero, one = torch.zeros(1, dtype=torch.float64), torch.tensor([1])
        rest = (one, zero, zero, [0], [0], "gaussian", "nearest", False)
        return ([torch.zeros(1, device=device, dtype=dtype)], tensors, *rest) if into else (tensors, *rest)

    return tiny


def _quick_axpy() -> str:
    return "-16M" if isinstance(minilm_file(), str) else "-minilm-weights"


def _axpy_subject(name: str) -> Subject:
    into = name == "zo_axpy_into_"
    coeffs, distribution = (3, 7) if into else (2, 6)
    times = _times(coeffs)
    peers = [
        Peer("mezo eager", "re-expressed", _only("gaussian", _loop(_normal, into), distribution), times),
        Peer("eager loop, bernoulli", "torch", _only("rademacher", _loop(_signs, into), distribution), times),
        Peer("lozo eager", "re-expressed", _only("lowrank", _lozo(into), distribution), times),
        Peer("torch.add alpha", "torch", _stored(into), times),
    ]
    if not into:
        peers.insert(1, Peer("torch foreach", "torch", _only("gaussian", _foreach, distribution), times))
    return Subject(
        name=name,
        peers=tuple(peers),
        probes=_axpy_probes(into),
        tiny=_axpy_tiny(into),
        cases=lambda: _minilm_cases(into),
        unavailable_cases=_minilm_absent,
        quick=lambda case: not into and case.endswith(_quick_axpy()),
        headline=("gaussian-16M" if into else f"gaussian{_quick_axpy()}",),
        small=Case("gaussian-64K", axpy_inputs([(256, 256)], 1, "gaussian", "nearest", False, into), bench=True),
    )


add(_axpy_subject("zo_axpy_"))
add(_axpy_subject("zo_axpy_into_"))


# --- linear -----------------------------------------------------------------------------------------------------------


def _linear_probes(args: Args) -> list[Probe]:
    x, x_minus, weight, bias, seed, scale, tensor_id, offset, distribution = args
    n, m = weight.shape
    found = []
    for a, b in _pieces(n, 8):
        rows = (weight[a:b], None if bias is None else bias[a:b])
        reference = (x, x_minus, *rows, seed, scale, tensor_id, offset + a * m, distribution)
        found.append(Probe(reference, lambda result, a=a, b=b: [y[..., a:b] for y in result]))  # type: ignore[misc]
    return found


def _noise_like(weight: Tensor, args: Args) -> Tensor:
    z = torch.empty_like(weight)
    torch.ops.leanops.zo_noise_(z, args[4], args[6], args[7], args[8])
    return z


def _two_linears(inside: bool) -> Callable[[Args], Callable[[], object]]:
    def make(args: Args) -> Callable[[], object]:
        x, x_minus, weight, bias, _, scale, *_ = args
        minus = x if x_minus is None else x_minus

        def perturbed() -> tuple[Tensor, Tensor]:
            z = _noise_like(weight, args)
            return torch.add(weight, z, alpha=scale), torch.add(weight, z, alpha=-scale)

        if inside:

            def call() -> object:
                plus, less = perturbed()
                return F.linear(x, plus, bias), F.linear(minus, less, bias)

            return call
        plus, less = perturbed()
        return lambda: (F.linear(x, plus, bias), F.linear(minus, less, bias))

    return make


def _linear_tiny(device: torch.device, dtype: torch.dtype) -> Args:
    one = torch.ones(1, 1, device=device, dtype=dtype)
    return one, None, one.clone(), None, torch.tensor([1]), 1e-3, 0, 0, "rademacher"


add(
    Subject(
        name="zo_linear",
        peers=(
            Peer("2 F.linear, W±cz stored", "torch", _two_linears(inside=False), same_result=True),
            Peer("2 F.linear, W±cz made in the call", "torch", _two_linears(inside=True), same_result=True),
        ),
        probes=_linear_probes,
        tiny=_linear_tiny,
        quick=lambda case: case == "rademacher-512x2048x2048",
        headline=("rademacher-128x2048x2048", "rademacher-1x2048x2048"),
        small=linear_case("rademacher-32x256x256", 32, 256, 256, "rademacher", bench=True),
    )
)
