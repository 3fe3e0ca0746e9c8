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
from leanops.sm3.calls import Step
from leanops.sm3.cases import Options, step_case, step_inputs
from leanops.sm3.reference import BLOCK, axes_of

_PIECE = 4096  # elements of a tensor that one probe compares; more where a single row has more
_SLICE = 1 << 18  # elements of the largest slice whose maximum a probe compares

_MINILM = "minilm-weights-fp32"


class Optimizer(Protocol):
    def step(self) -> object: ...


# --- the parts that the gate compares ---------------------------------------------------------------------------------


def _rows(call: Step, j: int) -> Iterator[Probe]:
    """The start, the middle and the end of tensor j, cut along its first axis: a shard has all that they need."""
    sizes = axes_of(call.params[j].shape)
    row = call.params[j].numel() // sizes[0]
    length = max(1, _PIECE // row)
    middle = sizes[0] // 2 // BLOCK * BLOCK if len(sizes) == 1 else sizes[0] // 2  # int8 blocks of a vector stay whole
    for start in sorted({0, middle, max(0, (sizes[0] - length) // BLOCK * BLOCK if row == 1 else sizes[0] - length)}):
        stop = min(start + length, sizes[0])
        blocks = (slice(None), slice(start // BLOCK, -(-stop // BLOCK))) if len(sizes) == 1 else slice(start, stop)

        def part(tensors: Sequence[Tensor], start: int = start, stop: int = stop) -> list[Tensor]:
            return [tensors[j].view(sizes)[start:stop]] if tensors else []

        def scales(blocks: Any = blocks) -> list[Tensor]:
            if not call.scales:
                return []
            return [call.scales[j][blocks] if call.scales[j].numel() else call.scales[j]]

        def actual(
            _: Any, start: int = start, stop: int = stop, part: Any = part, scales: Any = scales
        ) -> list[Tensor]:
            return [*part(call.params), call.covers[j][start:stop], *part(call.momenta), *scales()]

        def wanted(results: list[Tensor], rows: int = stop - start) -> list[Tensor]:
            return [results[0], results[1][:rows], *results[2:]]

        reference = call._replace(
            params=_clones(part(call.params)),
            grads=_clones(part(call.grads)),
            covers=[torch.cat([call.covers[j][start:stop], call.covers[j][sizes[0] :]])],
            momenta=_clones(part(call.momenta)),
            scales=_clones(scales()),
            tensor_ids=[call.tensor_ids[j]],
            offsets=[call.offsets[j] + start * row],
        )
        yield Probe(reference, actual, wanted)


def _clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def _slices(call: Step, j: int) -> Iterator[Probe]:
    """Maxima of tensor j over whole slices of every axis but the first. Momentum and rounding do not change them."""
    sizes = axes_of(call.params[j].shape)
    axes = call.covers[j].split(list(sizes))
    options = call.options._replace(momentum=0.0, stochastic_rounding=False)
    for k in range(1, len(sizes)):
        if (size := call.params[j].numel() // sizes[k]) > _SLICE:
            continue
        length = min(max(1, _PIECE // size), sizes[k])
        start, before = sizes[k] - length, sum(sizes[:k])
        reference = call._replace(
            params=[call.params[j].narrow(k, start, length).clone()],
            grads=[call.grads[j].narrow(k, start, length).clone()],
            covers=[torch.cat([a[start:] if i == k else a for i, a in enumerate(axes)])],
            momenta=[],
            scales=[],
            tensor_ids=[0],
            offsets=[0],
            options=options,
        )
        yield Probe(
            reference,
            lambda _, a=before + start, b=before + sizes[k]: [call.covers[j][a:b]],  # type: ignore[misc]
            lambda results, a=before, b=before + length: [results[1][a:b]],  # type: ignore[misc]
        )


def _probes(call: Step) -> list[Probe]:
    """Parts of the first tensor, of the last, and of every eighth part of the list."""
    params = call.params
    picked = sorted({0, len(params) - 1, *range(0, len(params), max(1, len(params) // 8))}) if params else []
    return [probe for j in picked if params[j].numel() for find in (_rows, _slices) for probe in find(call, j)]


# --- other optimizers -------------------------------------------------------------------------------------------------


Build = Callable[[list[torch.nn.Parameter], Step], Optimizer]


def _optimizer(build: Build) -> Callable[[Step], Callable[[], object]]:
    """An optimizer's step over the operator's parameters and gradients, its state allocated and its code compiled."""

    def make(call: Step) -> Callable[[], object]:
        params = [torch.nn.Parameter(p) for p in call.params]
        for p, g in zip(params, call.grads, strict=True):
            p.grad = g
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = build(params, call)
            optimizer.step()
        return optimizer.step

    return make


def _package(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name.split('.')[0]} cannot be imported (pip install {install}): {error}") from None


def _momentum_dtype(call: Step) -> torch.dtype | None:
    return call.momenta[0].dtype if call.momenta else None


def _require_int8(call: Step) -> None:
    if _momentum_dtype(call) != torch.int8:
        raise OtherInputs("int8 momentum only")


def _own(params: list[torch.nn.Parameter], call: Step) -> Optimizer:
    options = call.options
    return SM3(
        params, float(call.lr), options.momentum, options.beta, options.eps, options.weight_decay,
        decoupled=options.decoupled, maximize=options.maximize, momentum_dtype=_momentum_dtype(call),
        stochastic_rounding=options.stochastic_rounding,
    )  # fmt: skip


def _adamw(params: list[torch.nn.Parameter], call: Step) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)


def _sm3(params: list[torch.nn.Parameter], call: Step) -> Optimizer:
    rules = _package("pytorch_optimizer", "pytorch-optimizer")
    options = call.options
    beta = 0.0 if options.beta == 1 else options.beta  # its beta of 0 is the sum of squares
    optimizer: Optimizer = rules.SM3(params, lr=1e-4, momentum=options.momentum, beta=beta, eps=options.eps)
    return optimizer


def _torchao(params: list[torch.nn.Parameter], call: Step) -> Optimizer:
    _require_int8(call)
    optimizer: Optimizer = _package("torchao.optim", "torchao").AdamW8bit(params, lr=1e-4, weight_decay=0.0)
    return optimizer


def _bitsandbytes(params: list[torch.nn.Parameter], call: Step) -> Optimizer:
    _require_int8(call)
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
        timed=_optimizer(_own),
        timed_name="leanops.optim.SM3",
        cases=_minilm_cases,
        unavailable_cases=_absent,
        quick=lambda case: False,
        headline=("llama-21M-fp32" if isinstance(minilm_file(), str) else _MINILM,),
        small=step_case("64K-fp32", [(256, 256)], Options(torch.float32), bench=True),
    )
)
