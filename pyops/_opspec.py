"""What the package knows about an operator, and how it is called.

Tests, benchmarks and the tuner take an :class:`OpSpec` as it comes. :func:`leanops._registry.register` makes a torch
operator of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
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
Loader = Callable[[], Callable[[Any], Any]]  # imports what a launcher needs, and returns it: it takes a call


@dataclass(frozen=True)
class Cost:
    """The fewest bytes and operations that the work needs, whoever does it."""

    read: int  # bytes of memory
    written: int  # bytes of memory
    flops: int = 0  # counted multiplications and additions of matrix products
    flops_dtype: torch.dtype | None = None


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
    """Where a fuzz case takes its choices from; the tests implement it over hypothesis."""

    device: torch.device

    def integer(self, low: int, high: int) -> int: ...
    def choice(self, options: Sequence[T]) -> T: ...
    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Random values in a layout of the drawer's choice: any strides, a storage offset, never overlapping."""
        ...

    def indices(self, n: int, size: int | None = None) -> Tensor:
        """Different numbers of [0, n) in rising order, int64: ``size`` of them, or as many as the drawer likes."""
        ...

    def padded_indices(self, shape: Sequence[int], n: int) -> Tensor:
        """int32 of a shape whose last dimension holds :meth:`indices`, none to all of them, and -1 behind them."""
        ...


@dataclass(frozen=True)
class Inputs:
    """What an operator is tested and measured on. ``fuzz`` draws arguments of any shape and layout; ``large`` makes
    arguments whose first written tensor has more than 2^31 elements, and arguments that give the end of it."""

    cases: tuple[Case, ...]
    fuzz: Callable[[Draw, torch.dtype], tuple[Any, ...]]
    bad_inputs: tuple[BadInput, ...]
    large: Callable[[torch.device], tuple[tuple[Any, ...], tuple[Any, ...]]] | None = None


@dataclass(frozen=True)
class Autograd:
    """What :func:`torch.library.register_autograd` takes: ``setup_context(ctx, call, output)`` and
    ``backward(ctx, *grads)``, which returns a gradient or None for each argument of the schema."""

    setup_context: Callable[..., None]
    backward: Callable[..., Any]


@dataclass(frozen=True)
class Variant:
    """One of several ways to compute an operator: a strategy, or a blocking."""

    load: Loader
    devices: tuple[str, ...] = ("cpu", "cuda")  # types of those that it runs on


@dataclass(frozen=True)
class OpSpec(Generic[C]):
    """One operator. ``schema`` is everything after the name: ``(Tensor x) -> Tensor``.

    A mutating operator's name ends in ``_``, its written arguments are ``Tensor(a!)`` or ``Tensor(a!)[]`` and it
    returns ``()``. ``call`` is a NamedTuple with a field for each argument (see :mod:`leanops.common.call`); the
    functions of a spec take one. ``check`` raises for bad input and must not read tensor data on a device. ``inputs``
    imports the family's ``cases.py`` at its first call: tests and benchmarks alone ask for it. ``backends`` maps a name
    (``"triton"``, ``"nvrtc"``) to a loader of a launcher; the first that a CUDA device has serves it. ``variants`` are
    further ways to the same result, by name: the generic suites hold each against the reference, and a tuner chooses
    among them.
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
    composite: Callable[[C], Any] | None = None  # written in other operators; registered instead of the reference
    plain: Callable[[C], Any] | None = None  # what a user would write in the inputs' dtype; its error is the yardstick
    autograd: Autograd | None = None
    backends: Mapping[str, Loader] = field(default_factory=dict)
    variants: Mapping[str, Variant] = field(default_factory=dict)

    # --- what it is tested and measured on ----------------------------------------------------------------------------

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

    # --- its arguments ------------------------------------------------------------------------------------------------

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
        """The tensors of the first argument that a call writes: what it is about, where the others are state."""
        first = args[self._written_places[0]]
        return [first] if isinstance(first, Tensor) else list(first)

    # --- ways to call it ----------------------------------------------------------------------------------------------

    @cached_property
    def op(self) -> torch._ops.OpOverload:
        """The torch operator, ``torch.ops.leanops.<name>.default``."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @cached_property
    def native_on(self) -> set[str]:
        """The types of devices whose kernel is native code."""
        return set()

    def refuse(self, *args: Any) -> None:
        """Raise what the operator would raise for these arguments, for a caller of whose several calls all or none
        shall run."""
        self.check(self.make(*args))
        if self.mutates:
            self.written_memory.check(args)

    def launch(self, device: torch.device, *args: Any, written: list[Tensor] | None = None) -> None:
        """``op(*args)`` without the two hops that it costs, a quarter of its price for thousands of tensors.

        For a mutating operator on tensors of one device, none of them a wrapper (a subclass with a dispatch of its
        own), whose written tensors neither overlap nor require grad: the caller has made sure of that. What ``check``
        refuses is refused here, too, once: a native kernel does it by itself and raises a RuntimeError, for a kernel in
        Python ``check`` does. ``written`` saves looking for the tensors whose version counters move (:func:`counted`).
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
        checks: what a tuner times. Loaded at the first call."""
        if name not in self._kernels:
            loaders = {"reference": lambda: self.reference, **self.backends}
            loader = self.variants[name].load if name in self.variants else loaders[name]
            self._kernels[name] = self.unpacked(loader())
        return self._kernels[name]

    def run(self, name: str, *args: Any) -> Any:
        """``op(*args)`` as a backend or a variant computes it, with all that the operator does around its kernel: bad
        input is refused, version counters move, autocast and autograd stay out."""
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
    """Those of a kernel, and of torch's fallbacks for negated and zero tensors, whose memory does not hold their
    values: 0.05 us a parameter."""
    key = torch._C._parse_dispatch_key(torch._C._dispatch_key_for_device(device_type))
    assert key is not None
    lazy = torch._C.DispatchKeySet(torch._C.DispatchKey.Negative) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.ZeroTensor
    )
    return torch._C.DispatchKeySet(key) | lazy


def late(module: str, name: str) -> Callable[[], Any]:
    """A loader: imports a module at its call, and gives what has the name there."""
    return lambda: getattr(importlib.import_module(module), name)


def counted(written: list[Tensor]) -> list[Tensor]:
    """Those that have a version counter: not the tensors of inference mode.

    Native kernels do not bump version counters; autograd relies on them to notice a changed saved tensor.
    """
    return [t for t in written if not t.is_inference()] if any(map(Tensor.is_inference, written)) else written


def without_autocast(device_type: str, function: Kernel) -> Kernel:
    """What a kernel asks of torch would come back in another dtype than that of the memory it is meant for."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return call
