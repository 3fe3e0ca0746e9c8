"""Peers, probes and real weights of the zeroth-order family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanops._registry import Case
from leanops.bench.peers import Args, OtherInputs, Peer, Probe, Subject, add
from leanops.bench.weights import minilm, minilm_file
from leanops.zo import columns_of
from leanops.zo.calls import Axpy, AxpyInto, Linear, NoiseInPlace
from leanops.zo.cases import AXPY_DISTRIBUTIONS, axpy_inputs, linear_case, noise_case

AnyAxpy = Axpy | AxpyInto

_PIECE = 2048  # elements of a tensor that one probe compares
_PIECE_OF_MANY = 64  # the same with many seeds
_MANY = 16  # with more seeds than this, eager peers time one pass of them


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


def _noise_probes(call: NoiseInPlace) -> list[Probe]:
    call.out.fill_(torch.nan)
    flat = call.out.view(-1)
    return [
        Probe(
            call._replace(out=torch.full_like(flat[start:stop], torch.nan), offset=call.offset + start),
            lambda returned, start=start, stop=stop: [flat[start:stop]],  # type: ignore[misc]
        )
        for start, stop in _pieces(flat.numel(), _PIECE)
    ]


def _pieces(n: int, size: int) -> list[tuple[int, int]]:
    """The first elements of n, some from the middle at an index that is aligned to nothing, and the last."""
    if n <= 3 * size:
        return [(0, n)]
    middle = n // 2 + 5
    return [(0, size), (middle, middle + size), (n - size, n)]


def _distribution(call: NoiseInPlace | AnyAxpy) -> str:
    return call.distribution if isinstance(call, NoiseInPlace) else call.noise.distribution


def _only(distribution: str, make: Callable[[Any], Callable[[], object]]) -> Callable[[Any], Callable[[], object]]:
    """``make`` for the calls of one distribution."""

    def checked(call: Any) -> Callable[[], object]:
        if _distribution(call) != distribution:
            raise OtherInputs(f"{distribution} only")
        return make(call)

    return checked


def _normal_in_place(call: NoiseInPlace) -> Callable[[], object]:
    return lambda: call.out.normal_()


def _randn(call: NoiseInPlace) -> Callable[[], object]:
    out = call.out
    return lambda: torch.randn(out.shape, dtype=out.dtype, device=out.device)


def _signs_in_place(call: NoiseInPlace) -> Callable[[], object]:
    return lambda: call.out.bernoulli_(0.5).mul_(2).sub_(1)


def _noise_tiny(device: torch.device, dtype: torch.dtype) -> Args:
    return torch.empty(1, device=device, dtype=dtype), torch.tensor([1]), 0, 0, "gaussian"


add(
    Subject(
        name="zo_noise_",
        peers=(
            Peer("Tensor.normal_", "torch", _only("gaussian", _normal_in_place)),
            Peer("torch.randn", "torch", _only("gaussian", _randn)),
            Peer("Tensor.bernoulli_, 2z - 1", "torch", _only("rademacher", _signs_in_place)),
        ),
        probes=_noise_probes,
        tiny=_noise_tiny,
        headline=("gaussian-16M",),
        small=noise_case("gaussian-64K", (1 << 16,), "gaussian", bench=True),
    )
)


# --- axpy -------------------------------------------------------------------------------------------------------------


def _written(call: AnyAxpy) -> Sequence[Tensor]:
    return call.out if isinstance(call, AxpyInto) else call.tensors


def _axpy_probes(call: AnyAxpy) -> list[Probe]:
    """Pieces of the first tensor, of the last, and of every eighth part of the list."""
    written, tensors, noise = _written(call), call.tensors, call.noise
    if isinstance(call, AxpyInto):
        for t in written:
            t.fill_(torch.nan)
    many = len(noise.seeds) > _MANY
    picked = sorted({0, len(tensors) - 1, *range(0, len(tensors), max(1, len(tensors) // 8))})
    probes = []
    for j in picked if tensors else []:
        flat, result = tensors[j].view(-1), written[j].view(-1)
        pieces = [(0, min(flat.numel(), _PIECE_OF_MANY))] if many else _pieces(flat.numel(), _PIECE)
        for start, stop in pieces:
            piece = flat[start:stop].clone()
            own_noise = noise._replace(
                tensor_ids=[noise.tensor_ids[j]],
                offsets=[noise.offsets[j] + start],
                columns=None if noise.columns is None else [noise.columns[j]],
            )
            if isinstance(call, AxpyInto):
                reference: AnyAxpy = AxpyInto([torch.full_like(piece, torch.nan)], [piece], own_noise)
            else:
                reference = Axpy([piece], own_noise)
            probes.append(
                Probe(reference, lambda _, r=result, start=start, stop=stop: [r[start:stop]])  # type: ignore[misc]
            )
    return probes


def _timed_coeffs(call: AnyAxpy) -> list[float]:
    """The coefficients of the passes that an eager peer makes: all of them, or one that stands for many."""
    coeffs: list[float] = call.noise.coeffs.tolist()
    return coeffs if len(coeffs) <= _MANY else coeffs[:1]


def _times(call: AnyAxpy) -> int:
    """How many passes the passes of :func:`_timed_coeffs` stand for."""
    return len(call.noise.coeffs) if len(call.noise.coeffs) > _MANY else 1


def _loop(draw: Callable[[Tensor], Tensor]) -> Callable[[AnyAxpy], Callable[[], object]]:
    """MeZO's loop: for each tensor draw noise of its size, then add it."""

    def make(call: AnyAxpy) -> Callable[[], object]:
        written, tensors, coeffs = _written(call), call.tensors, _timed_coeffs(call)
        into = isinstance(call, AxpyInto)

        def run() -> None:
            for i, c in enumerate(coeffs):
                for out, p in zip(written, tensors, strict=True):
                    z = draw(p)
                    if into:
                        torch.add(out if i else p, z, alpha=c, out=out)
                    else:
                        p.add_(z, alpha=c)

        return run

    return make


def _normal(p: Tensor) -> Tensor:
    return torch.normal(mean=0.0, std=1.0, size=p.size(), device=p.device, dtype=p.dtype)


def _signs(p: Tensor) -> Tensor:
    return torch.empty(p.size(), dtype=p.dtype, device=p.device).bernoulli_(0.5).mul_(2).sub_(1)


def _foreach(call: Axpy) -> Callable[[], object]:
    tensors, coeffs = list(call.tensors), _timed_coeffs(call)

    def run() -> None:
        for c in coeffs:
            torch._foreach_add_(tensors, [torch.randn_like(p) for p in tensors], alpha=c)

    return run


def _lozo(call: AnyAxpy) -> Callable[[], object]:
    """LOZO's loop: for each matrix draw U, multiply by the V that is kept, and add; noise for the other tensors."""
    written, tensors, coeffs = _written(call), call.tensors, _timed_coeffs(call)
    into, rank = isinstance(call, AxpyInto), call.noise.rank

    def draw(p: Tensor, lines: int) -> Tensor:
        return torch.randn(lines, rank, device=p.device, dtype=p.dtype)

    kept = [draw(p, p[0].numel()) if p.dim() >= 2 and p.numel() else None for p in tensors]

    def run() -> None:
        for i, c in enumerate(coeffs):
            for out, p, v in zip(written, tensors, kept, strict=True):
                z = torch.randn_like(p) if v is None else (draw(p, len(p)) @ v.t()).view_as(p)
                if into:
                    torch.add(out if i else p, z, alpha=c, out=out)
                else:
                    p.add_(z, alpha=c)

    return run


def _tiled(like: Tensor) -> Tensor:
    """Random values of a tensor's shape, a few drawn and repeated: drawing a billion takes longer than timing them."""
    drawn = torch.randn(min(like.numel(), 1 << 16), device=like.device).to(like.dtype)
    return drawn.repeat(-(-like.numel() // max(drawn.numel(), 1)))[: like.numel()].view(like.shape)


def _stored(call: AnyAxpy) -> Callable[[], object]:
    """An axpy that reads its direction from memory: the floor for noise that costs nothing to make."""
    written, tensors, coeffs = _written(call), call.tensors, _timed_coeffs(call)
    into = isinstance(call, AxpyInto)
    directions = [_tiled(t) for t in tensors]

    def run() -> None:
        for i, c in enumerate(coeffs):
            for out, p, q in zip(written, tensors, directions, strict=True):
                if into:
                    torch.add(out if i else p, q, alpha=c, out=out)
                else:
                    p.add_(q, alpha=c)

    return run


def _axpy_tiny(into: bool) -> Callable[[torch.device, torch.dtype], Args]:
    def tiny(device: torch.device, dtype: torch.dtype) -> Args:
        tensors = [torch.zeros(1, device=device, dtype=dtype)]
        zero, one = torch.zeros(1, dtype=torch.float64), torch.tensor([1])
        rest = (one, zero, zero, [0], [0], "gaussian", "nearest", False)
        return ([torch.zeros(1, device=device, dtype=dtype)], tensors, *rest) if into else (tensors, *rest)

    return tiny


def _quick_axpy() -> str:
    """How the names of the cases that --quick measures end."""
    return "-16M" if isinstance(minilm_file(), str) else "-minilm-weights"


def _axpy_subject(name: str) -> Subject:
    into = name == "zo_axpy_into_"
    peers = [
        Peer("mezo eager", "re-expressed", _only("gaussian", _loop(_normal)), _times),
        Peer("eager loop, bernoulli", "torch", _only("rademacher", _loop(_signs)), _times),
        Peer("lozo eager", "re-expressed", _only("lowrank", _lozo), _times),
        Peer("torch.add alpha", "torch", _stored, _times),
    ]
    if not into:
        peers.insert(1, Peer("torch foreach", "torch", _only("gaussian", _foreach), _times))
    return Subject(
        name=name,
        peers=tuple(peers),
        probes=_axpy_probes,
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


def _linear_probes(call: Linear) -> list[Probe]:
    n, m = call.weight.shape
    probes = []
    for start, stop in _pieces(n, 8):
        reference = call._replace(
            weight=call.weight[start:stop],
            bias=None if call.bias is None else call.bias[start:stop],
            offset=call.offset + start * m,
        )
        probes.append(
            Probe(
                reference,
                lambda returned, start=start, stop=stop: [y[..., start:stop] for y in returned],  # type: ignore[misc]
            )
        )
    return probes


def _two_linears(inside: bool) -> Callable[[Linear], Callable[[], object]]:
    """Two plain linears over perturbed weights, which are made in the timed function or before it."""

    def make(call: Linear) -> Callable[[], object]:
        x, weight, bias, scale = call.x, call.weight, call.bias, call.scale
        x_minus = x if call.x_minus is None else call.x_minus

        def perturbed() -> tuple[Tensor, Tensor]:
            z = torch.empty_like(weight)
            torch.ops.leanops.zo_noise_(z, call.seed, call.tensor_id, call.offset, call.distribution)
            return torch.add(weight, z, alpha=scale), torch.add(weight, z, alpha=-scale)

        if inside:

            def run() -> object:
                plus, minus = perturbed()
                return F.linear(x, plus, bias), F.linear(x_minus, minus, bias)

            return run
        plus, minus = perturbed()
        return lambda: (F.linear(x, plus, bias), F.linear(x_minus, minus, bias))

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
