"""Peers, probes and real weights of SM3: other optimizers' steps on the same parameters and gradients."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from leanops._registry import Case
from leanops.bench.peers import Args, OtherInputs, Peer, Probe, Subject, Unavailable, add
from leanops.bench.weights import minilm, minilm_file
from leanops.optim import SM3
from leanops.sm3.cases import Options, step_case, step_inputs
from leanops.sm3.reference import BLOCK, axes_of

_PIECE = 4096  # elements of a tensor that one probe compares, where rows allow
_SLICE = 1 << 18  # elements of the largest slice whose maximum a probe compares

_MINILM = "minilm-weights-fp32"


class Optimizer(Protocol):
    def step(self) -> object: ...


# --- where the gate looks ---------------------------------------------------------------------------------------------


def _rows(args: Args, j: int) -> Iterator[Probe]:
    """The start, the middle and the end of a tensor, cut along its first axis: all that a shard gives by itself."""
    params, grads, covers, momenta, scales, lr, seed, grad_scale, found_inf, ids, offsets, *rest = args
    sizes = axes_of(params[j].shape)
    row = params[j].numel() // sizes[0]
    length = max(1, _PIECE // row)
    middle = sizes[0] // 2 // BLOCK * BLOCK if len(sizes) == 1 else sizes[0] // 2  # int8 blocks of a vector stay whole
    for start in sorted({0, middle, max(0, (sizes[0] - length) // BLOCK * BLOCK if row == 1 else sizes[0] - length)}):
        stop = min(start + length, sizes[0])
        blocks = (slice(None), slice(start // BLOCK, -(-stop // BLOCK))) if len(sizes) == 1 else slice(start, stop)

        def part(tensors: Sequence[Tensor], start: int = start, stop: int = stop) -> list[Tensor]:
            return [tensors[j].view(sizes)[start:stop]] if tensors else []

        def factors(start: int = start, stop: int = stop, blocks: Any = blocks) -> list[Tensor]:
            return [scales[j][blocks] if scales[j].numel() else scales[j]] if scales else []

        def actual(
            _: Any, start: int = start, stop: int = stop, part: Any = part, factors: Any = factors
        ) -> list[Tensor]:
            return [*part(params), covers[j][start:stop], *part(momenta), *factors()]

        def wanted(results: list[Tensor], rows: int = stop - start) -> list[Tensor]:
            return [results[0], results[1][:rows], *results[2:]]

        cover = torch.cat([covers[j][start:stop], covers[j][sizes[0] :]])
        copies = ([t.clone() for t in part(tensors)] for tensors in (params, grads))
        state = ([t.clone() for t in tensors] for tensors in (part(momenta), factors()))
        numbers = (lr, seed, grad_scale, found_inf, [ids[j]], [offsets[j] + start * row])
        yield Probe((*copies, [cover], *state, *numbers, *rest), actual, wanted)


def _slices(args: Args, j: int) -> Iterator[Probe]:
    """Maxima over whole slices of every other axis; no momentum and no rounding takes part in them."""
    params, grads, covers, _, _, lr, seed, grad_scale, found_inf, _, _, _, beta, eps, decay, decoupled, up, _ = args
    sizes = axes_of(params[j].shape)
    axes = covers[j].split(list(sizes))
    for k in range(1, len(sizes)):
        if (size := params[j].numel() // sizes[k]) > _SLICE:
            continue
        length = min(max(1, _PIECE // size), sizes[k])
        start, before = sizes[k] - length, sum(sizes[:k])
        cut = (t[j].narrow(k, start, length).clone() for t in (params, grads))
        cover = torch.cat([a[start:] if i == k else a for i, a in enumerate(axes)])
        numbers = (lr, seed, grad_scale, found_inf, [0], [0], 0.0, beta, eps, decay, decoupled, up, False)
        yield Probe(
            (*([t] for t in cut), [cover], [], [], *numbers),
            lambda _, a=before + start, b=before + sizes[k]: [covers[j][a:b]],  # type: ignore[misc]
            lambda results, a=before, b=before + length: [results[1][a:b]],  # type: ignore[misc]
        )


def _probes(args: Args) -> list[Probe]:
    params = args[0]
    picked = sorted({0, len(params) - 1, *range(0, len(params), max(1, len(params) // 8))}) if params else []
    return [probe for j in picked if params[j].numel() for find in (_rows, _slices) for probe in find(args, j)]


# --- other optimizers -------------------------------------------------------------------------------------------------


def _optimizer(build: Callable[[list[torch.nn.Parameter], Args], Optimizer]) -> Callable[[Args], Callable[[], object]]:
    """An optimizer's step over the operator's parameters and gradients, its state allocated and its code compiled."""

    def make(args: Args) -> Callable[[], object]:
        params = [torch.nn.Parameter(p) for p in args[0]]
        for p, g in zip(params, args[1], strict=True):
            p.grad = g
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = build(params, args)
            optimizer.step()
        return optimizer.step

    return make


def _package(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name.split('.')[0]} cannot be imported (pip install {install}): {error}") from None


def _int8(args: Args) -> None:
    if not args[3] or args[3][0].dtype != torch.int8:
        raise OtherInputs("int8 momentum only")


def _own(params: list[torch.nn.Parameter], args: Args) -> Optimizer:
    lr, momentum, beta, eps, decay, decoupled, maximize, stochastic = (args[5], *args[11:])
    return SM3(
        params, float(lr), momentum, beta, eps, decay, decoupled=decoupled, maximize=maximize,
        momentum_dtype=args[3][0].dtype if args[3] else None, stochastic_rounding=stochastic,
    )  # fmt: skip


def _adamw(params: list[torch.nn.Parameter], args: Args) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)


def _sm3(params: list[torch.nn.Parameter], args: Args) -> Optimizer:
    rules = _package("pytorch_optimizer", "pytorch-optimizer")
    momentum, beta, eps = args[11:14]
    # its beta of 0 is the sum of squares
    optimizer: Optimizer = rules.SM3(params, lr=1e-4, momentum=momentum, beta=0.0 if beta == 1 else beta, eps=eps)
    return optimizer


def _torchao(params: list[torch.nn.Parameter], args: Args) -> Optimizer:
    _int8(args)
    optimizer: Optimizer = _package("torchao.optim", "torchao").AdamW8bit(params, lr=1e-4, weight_decay=0.0)
    return optimizer


def _bitsandbytes(params: list[torch.nn.Parameter], args: Args) -> Optimizer:
    _int8(args)
    rules = _package("bitsandbytes", "bitsandbytes").optim
    optimizer: Optimizer = rules.AdamW8bit(params, lr=1e-4, weight_decay=0.0)
    return optimizer


# --- inputs -----------------------------------------------------------------------------------------------------------


def _minilm_cases() -> tuple[Case, ...]:
    if isinstance(minilm_file(), str):
        return ()
    shapes = [tuple(t.shape) for t in minilm()]

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Args:
        _, *rest = step_inputs(shapes, Options(torch.float32), device, dtype, generator)
        return [t.to(device, dtype, copy=True) for t in minilm()], *rest

    return (Case(_MINILM, make, bench=True),)


def _absent() -> dict[str, str]:
    file = minilm_file()
    return {_MINILM: file} if isinstance(file, str) else {}


def _tiny(device: torch.device, dtype: torch.dtype) -> Args:
    return step_inputs([(1,)], Options(), device, dtype, torch.Generator())


add(
    Subject(
        name="sm3_step_",
        peers=(
            Peer("torch AdamW fused", "torch", _optimizer(_adamw)),
            Peer("pytorch_optimizer SM3", "package", _optimizer(_sm3)),
            Peer("torchao AdamW8bit", "package", _optimizer(_torchao)),
            Peer("bitsandbytes AdamW8bit", "package", _optimizer(_bitsandbytes)),
        ),
        probes=_probes,
        tiny=_tiny,
        call=_optimizer(_own),
        called="leanops.optim.SM3",
        cases=_minilm_cases,
        unavailable_cases=_absent,
        quick=lambda case: False,
        headline=("llama-21M-fp32" if isinstance(minilm_file(), str) else _MINILM,),
        small=step_case("64K-fp32", [(256, 256)], Options(torch.float32), bench=True),
    )
)
