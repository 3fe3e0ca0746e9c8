"""How the tensors of a model's file lie in the model's parameters.

Saving converts parameters into tensors: it splits fused experts into a tensor each, for example. The conversion runs
once on tensors without data, and :class:`ViewTrace` notes which view of which parameter each result is. Where a result
is no strided view, a conversion of indices shows which elements it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Shape = tuple[int, ...]
_COPIES = {torch.clone, Tensor.clone, Tensor.contiguous, torch.reshape, Tensor.reshape}  # same elements, same order


class View(NamedTuple):
    """A tensor of the file as a view of one parameter: element (i, j, ...) has the index offset + i strides[0] + ..."""

    shape: Shape
    strides: Shape
    offset: int

    @property
    def is_run(self) -> bool:
        """Whether its elements follow one another in the parameter."""
        pairs = zip(self.shape, self.strides, strides_of(self.shape), strict=True)
        return all(n == 1 or stride == compact for n, stride, compact in pairs)


@dataclass(frozen=True)
class Group:
    """Parameters of the model, and the tensors of the file that together hold their elements, each element once.

    A tensor's view is None where there are several parameters, or where the conversion gives no view. Then ``indices``
    gives for each tensor the indices of its elements in the parameters laid one after another.
    """

    parameters: dict[str, Shape]
    tensors: dict[str, View | None]
    indices: Callable[[], dict[str, Tensor]] = field(default=dict, repr=False)

    @property
    def in_runs(self) -> bool:
        return all(view is not None and view.is_run for view in self.tensors.values())


def strides_of(shape: Sequence[int]) -> Shape:
    """The strides of a contiguous tensor."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return tuple(reversed(strides)) if shape else ()


def alone(name: str, shape: Sequence[int]) -> Group:
    """A parameter that its file holds as it is."""
    return Group({name: tuple(shape)}, {name: View(tuple(shape), strides_of(shape), 0)})


class ViewTrace(TorchFunctionMode):
    """Follows tensors on the meta device through functions of torch. It notes which of them a result comes from, and
    which view of them it is."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._alive: list[Tensor] = []  # so that no new storage gets the identity of a freed one
        self._sources: dict[int, frozenset[str]] = {}  # storage -> names of the tensors that its elements are from
        self._copied: dict[int, tuple[Shape, View] | None] = {}  # storage -> shape and view that it holds contiguously
        for name, t in tensors.items():
            view = View(tuple(t.shape), t.stride(), 0)
            self._note(t, frozenset([name]), (tuple(t.shape), view))

    def _note(self, t: Tensor, sources: frozenset[str], copied: tuple[Shape, View] | None) -> None:
        self._alive.append(t)
        self._sources[_storage(t)] = sources
        self._copied[_storage(t)] = copied

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = list(_tensors((args, kwargs)))
        for t in _tensors(result):
            if _storage(t) not in self._sources:
                sources = frozenset[str]().union(*(self.sources(i) for i in inputs))
                view = self.view(inputs[0]) if func in _COPIES and len(inputs) == 1 else None
                copied = None if view is None else (tuple(inputs[0].shape), view)
                self._note(t, sources, copied)
        return result

    def sources(self, t: Tensor) -> frozenset[str]:
        """The names of the tensors whose elements a tensor has."""
        return self._sources.get(_storage(t), frozenset())

    def view(self, t: Tensor) -> View | None:
        """A tensor as a view of its only source; None where it is not known to be one."""
        if (copied := self._copied.get(_storage(t))) is None:
            return None
        shape, inner = copied
        compact = strides_of(shape)
        starts, rest = [], int(t.storage_offset())
        for stride in compact:
            start, rest = divmod(rest, max(stride, 1))
            starts.append(start)
        strides = []
        for n, stride in zip(t.shape, t.stride(), strict=True):
            dims = [d for d, m in enumerate(shape) if m > 1 and compact[d] == stride]
            if n != 1 and (not dims or starts[dims[0]] + n > shape[dims[0]]):
                return None
            strides.append(0 if n == 1 else inner.strides[dims[0]])
        offset = inner.offset + sum(i * s for i, s in zip(starts, inner.strides, strict=True))
        return View(tuple(t.shape), tuple(strides), offset)


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
