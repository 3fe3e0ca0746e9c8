"""The description of an operator, and the ways to call it.

Tests, benchmarks and the tuner need only an :class:`OpSpec`. :func:`leanops._registry.register` makes a torch operator
of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Generic, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import TypeVar  # torch depends on it; Python's own has no default before 3.13

from leanops.common.call import arguments, maker
from leanops.common.written_memory import WrittenMemory

NAMESPACE = "leanops"
T = TypeVar("T")
C = TypeVar("C", default=Any)  # an operator's call

Kernel = Callable[..., Any]  # takes the arguments of the schema, in order
Loader = Callable[[], Callable[[Any], Any]]  # imports a launcher's module, and returns the launcher: it takes a call


@dataclass(frozen=True)
class Cost:
    """The fewest bytes and operations that the work needs, in any implementation."""

    read: int  # bytes of memory
    written: int  # bytes of memory
    flops: int = 0  # counted multiplications and additions of matrix products
    flops_dtype: torch.dtype | None = None


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes that some tensors hold, for a :class:`Cost`."""
    return sum(t.nbytes for t in tensors)


@dataclass(frozen=True)
class Case:
    """A named maker of inputs. ``make(device, dtype, generator)`` returns the operator's positional arguments."""

    name: str
    make: Callable[[torch.device, torch.dtype, torch.Generator], tuple[Any, ...]]
    bench: bool = False  # a real model's shape, for benchmarks; the others are small, for tests


@dataclass(frozen=True)
class BadInput:
    """Arguments that must be refused, and a regular expression for the message."""

    name: str
    make: Callable[[torch.device], tuple[Any, ...]]
    message: str
    error: type[Exception] = ValueError


class Draw(Protocol):
    """The source of a fuzz case's choices; the tests implement it over hypothesis."""

    device: torch.device

    def integer(self, low: int, high: int) -> int: ...
    def choice(self, options: Sequence[T]) -> T: ...
    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Random values in a drawn layout: any strides, a storage offset, elements that never overlap."""
        ...

    def indices(self, n: int, size: int | None = None) -> Tensor:
        """Different numbers of [0, n) in rising order, int64: ``size`` of them, or a drawn number of them."""
        ...

    def padded_indices(self, shape: Sequence[int], n: int) -> Tensor:
        """int32 of a shape. Along the last dimension are 0 to n :meth:`indices`, and then -1."""
        ...


@dataclass(frozen=True)
class Inputs:
    """The inputs that an operator is tested and measured on. ``fuzz`` draws arguments of any shape and layout.
    ``large`` makes arguments whose first written tensor has more than 2^31 elements, and arguments of a small call that
    gives the end of this tensor."""

    cases: tuple[Case, ...]
    fuzz: Callable[[Draw, torch.dtype], tuple[Any, ...]]
    bad_inputs: tuple[BadInput, ...]
    large: Callable[[torch.device], tuple[tuple[Any, ...], tuple[Any, ...]]] | None = None


@dataclass(frozen=True)
class Autograd:
    """The functions for :func:`torch.library.register_autograd`: ``setup_context(ctx, call, output)`` and
    ``backward(ctx, *grads)``, which returns a gradient or None for each argument of the schema."""

    setup_context: Callable[..., None]
    backward: Callable[..., Any]


@dataclass(frozen=True)
class Variant:
    """One of several ways to compute an operator: a strategy, or a blocking."""

    load: Loader
    devices: tuple[str, ...] = ("cpu", "cuda")  # the device types that it runs on


@dataclass(frozen=True)
class OpSpec(Generic[C]):
    """One operator. ``schema`` is everything after the name: ``(Tensor x) -> Tensor``.

    A mutating operator's name ends in ``_``, its written arguments are ``Tensor(a!)`` or ``Tensor(a!)[]`` and it
    returns ``()``. ``call`` is a NamedTuple with a field for each argument (see :mod:`leanops.common.call`); the
    functions of a spec take an instance. ``check`` raises for bad input and must not read tensor data on a device.
    ``inputs`` imports the family's ``cases.py`` at its first call, which only tests and benchmarks make. ``backends``
    maps a name (``"triton"``, ``"nvrtc"``) to a loader of a launcher; the first one available serves a CUDA device.
    ``variants`` are further ways to the same result, by name: the generic suites compare each with the reference, and a
    tuner chooses among them.
    """

    name: str
    schema: str
    call: type[C]
    reference: Callable[[C], Any]
    fake: Callable[[C], Any]
    check: Callable[[C], None]
    inputs: Callable[[], Inputs]
    cost: Callable[[C], Cost]
    dtypes: tuple[torch.dtype, ...]
    exact: bool  # every backend gives the reference's bits; else it agrees to `tolerance` x eps x sqrt(K)
    depth: Callable[[C], int] = lambda call: 1  # K of the tolerance policy: the length of the longest sum
    tolerance: float = 4.0
    composite: Callable[[C], Any] | None = None  # calls other operators; registered instead of the reference
    plain: Callable[[C], Any] | None = None  # plain PyTorch in the inputs' dtype: the limit is twice its error
    autograd: Autograd | None = None
    backends: Mapping[str, Loader] = field(default_factory=dict)
    variants: Mapping[str, Variant] = field(default_factory=dict)

    # --- inputs for tests and benchmarks ------------------------------------------------------------------------------

    @cached_property
    def _inputs(self) -> Inputs:
        return self.inputs()

    @property
    def cases(self) -> tuple[Case, ...]:
        return self._inputs.cases

    @property
    def fuzz(self) -> Callable[[Draw, torch.dtype], tuple[Any, ...]]:
        return self._inputs.fuzz

    @property
    def bad_inputs(self) -> tuple[BadInput, ...]:
        return self._inputs.bad_inputs

    @property
    def large(self) -> Callable[[torch.device], tuple[tuple[Any, ...], tuple[Any, ...]]] | None:
        return self._inputs.large

    # --- arguments ----------------------------------------------------------------------------------------------------

    @cached_property
    def mutates(self) -> bool:
        return "(a!)" in self.schema

    @cached_property
    def parsed_schema(self) -> torch.FunctionSchema:
        return torch._C.parse_schema(f"{NAMESPACE}::{self.name}{self.schema}")

    @cached_property
    def make(self) -> Callable[..., C]:
        """Makes a call from the operator's positional arguments."""
        return maker(self.call)

    def bind(self, *args: Any, **kwargs: Any) -> C:
        """Makes a call from arguments by place and by name."""
        if kwargs:
            rest = arguments(self.call)[len(args) :]
            args = (*args, *(kwargs.get(a.name, a.default) for a in rest))
        return self.make(*args)

    def unpacked(self, function: Callable[[C], Any]) -> Kernel:
        """A function of the call as a function of the schema's arguments."""
        make = self.make
        return lambda *args: function(make(*args))

    @cached_property
    def _written_places(self) -> list[int]:
        places = enumerate(self.parsed_schema.arguments)
        return [i for i, a in places if a.alias_info is not None and a.alias_info.is_write]

    @cached_property
    def written_memory(self) -> WrittenMemory:
        return WrittenMemory(self.name, [a.name for a in self.parsed_schema.arguments], self._written_places)

    def mutated(self, args: Sequence[Any]) -> list[Tensor]:
        """The tensors among ``args`` that a call writes."""
        written: list[Tensor] = []
        for place in self._written_places:
            written.extend([args[place]] if isinstance(args[place], Tensor) else args[place])
        return written

    def updated(self, args: Sequence[Any]) -> list[Tensor]:
        """The tensors of the first written argument: the result of a call. Other written arguments are state."""
        first = args[self._written_places[0]]
        return [first] if isinstance(first, Tensor) else list(first)

    # --- ways to call it ----------------------------------------------------------------------------------------------

    @cached_property
    def op(self) -> torch._ops.OpOverload:
        """The torch operator, ``torch.ops.leanops.<name>.default``."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @cached_property
    def native_on(self) -> set[str]:
        """The device types whose kernel is native code."""
        return set()

    def refuse(self, *args: Any) -> None:
        """Raise what the operator would raise for these arguments. A caller that must run all of several calls or none
        checks them first."""
        self.check(self.make(*args))
        if self.mutates:
            self.written_memory.check(args)

    def launch(self, device: torch.device, *args: Any, written: list[Tensor] | None = None) -> None:
        """``op(*args)`` without two hops of the dispatcher, which take a quarter of its time for thousands of tensors.

        For mutating operators. The caller guarantees that all tensors are on one device, that none is a wrapper (a
        subclass with a dispatch of its own), and that written tensors neither overlap nor require grad. Input that
        ``check`` refuses raises an error here, too: a native kernel checks by itself and raises a RuntimeError; for a
        kernel in Python, ``check`` runs. ``written`` are the tensors whose versions the call bumps, if the caller has
        them (:func:`counted`).
        """
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            self.op(*args)
            return
        if device.type not in self.native_on:
            self.check(self.make(*args))
        self.op._handle.redispatch_boxed(_backend_keys(device.type), *args)
        torch._C._increment_version(counted(self.mutated(args)) if written is None else written)

    def variants_on(self, device: torch.device) -> list[str]:
        """The names of the variants that run on a device."""
        return [name for name, variant in self.variants.items() if device.type in variant.devices]

    def kernel(self, name: str) -> Kernel:
        """``"reference"``, a backend or a variant, as a function of the schema's arguments without the operator's
        checks, for a tuner to time. Loaded at the first call."""
        if name not in self._kernels:
            loaders = {"reference": lambda: self.reference, **self.backends}
            loader = self.variants[name].load if name in self.variants else loaders[name]
            self._kernels[name] = self.unpacked(loader())
        return self._kernels[name]

    def run(self, name: str, *args: Any) -> Any:
        """``op(*args)`` as a backend or a variant computes it. As in the operator, bad input raises, versions are
        bumped, and autocast and autograd are off."""
        self.refuse(*args)
        device = next((t.device.type for t in tree_leaves(args) if isinstance(t, Tensor)), "cpu")
        with torch._C._AutoDispatchBelowAutograd():
            result = without_autocast(device, self.kernel(name))(*args)
        torch._C._increment_version(counted(self.mutated(args)))
        return result

    @cached_property
    def _kernels(self) -> dict[str, Kernel]:
        return {}


@cache
def _backend_keys(device_type: str) -> torch._C.DispatchKeySet:
    """The keys of a device's kernel, and of torch's fallbacks for negated and zero tensors, whose memory does not hold
    their values: 0.05 us a parameter."""
    key = torch._C._parse_dispatch_key(torch._C._dispatch_key_for_device(device_type))
    assert key is not None
    lazy = torch._C.DispatchKeySet(torch._C.DispatchKey.Negative) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.ZeroTensor
    )
    return torch._C.DispatchKeySet(key) | lazy


def late(module: str, name: str) -> Callable[[], Any]:
    """A loader, which imports the module when it is called, and returns the module's attribute ``name``."""
    return lambda: getattr(importlib.import_module(module), name)


def counted(written: list[Tensor]) -> list[Tensor]:
    """The tensors that have a version counter; tensors of inference mode have none.

    Native kernels do not bump version counters. Autograd needs them to notice a saved tensor that has changed.
    """
    return [t for t in written if not t.is_inference()] if any(map(Tensor.is_inference, written)) else written


def without_autocast(device_type: str, function: Kernel) -> Kernel:
    """The function with autocast off, which would change the dtypes of torch's results inside a kernel."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return call
