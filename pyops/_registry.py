"""One operator, described once.

An :class:`OpSpec` holds everything the package knows about an operator; :func:`register` makes a torch operator of
it. The generic test suites, the benchmarks and the tuner take OpSpecs as they come, so a new operator gets all of
them by being described.

How a call travels, from the outside in::

    Autocast          switched off: an operator, and its backward, computes in the dtypes of its inputs
    Autograd          the spec's backward (register_autograd), or a fallthrough
    BackendSelect     bad input is refused, before any backend has run; after it, a mutating operator's version counters
                      are bumped (one Python kernel for both, since each costs as much as a small operator)
    CPU / CUDA / ...  a native library or a Triton launcher where one is loaded, else the reference
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from leanops.common.written_memory import WrittenMemory

NAMESPACE = "leanops"
_library = torch.library.Library(NAMESPACE, "DEF")
_specs: dict[str, OpSpec] = {}
_T = TypeVar("_T")

# what to warn of at the first call on a device that the reference alone serves; leanops._native fills it
unserved: dict[torch._C.DispatchKey, str] = {}

Kernel = Callable[..., Any]  # takes the arguments of the schema, in order
Loader = Callable[[], Kernel]  # imports what the kernel needs


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
    def choice(self, options: Sequence[_T]) -> _T: ...
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
    """Arguments of :func:`torch.library.register_autograd`."""

    setup_context: Callable[..., None]
    backward: Callable[..., Any]


@dataclass(frozen=True)
class Variant:
    """One of several ways to compute an operator: a strategy, or a blocking."""

    load: Loader
    devices: tuple[str, ...] = ("cpu", "cuda")  # types of those that it runs on


@dataclass(frozen=True)
class OpSpec:
    """One operator. ``schema`` is everything after the name: ``(Tensor x) -> Tensor``.

    A mutating operator's name ends in ``_``, its written arguments are ``Tensor(a!)`` or ``Tensor(a!)[]`` and it
    returns ``()``. ``check`` raises for bad input and must not read tensor data on a device. ``inputs`` imports the
    family's ``cases.py`` at its first call: tests and benchmarks alone ask for it. ``backends`` maps a name
    (``"triton"``, ``"nvrtc"``) to a loader that returns a function with the schema's signature; the first that a CUDA
    device has serves it. ``variants`` are further ways to the same result, by name: the generic suites hold each
    against the reference, and a tuner chooses among them.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    check: Callable[..., None]
    inputs: Callable[[], Inputs]
    cost: Callable[..., Cost]
    dtypes: tuple[torch.dtype, ...]
    exact: bool  # every backend gives the reference's bits; else it agrees to `tolerance` x eps x sqrt(K)
    depth: Callable[..., int] = lambda *args: 1  # K of the tolerance policy: the length of the longest sum
    tolerance: float = 4.0
    composite: Callable[..., Any] | None = None  # written in other operators; registered instead of the reference
    plain: Callable[..., Any] | None = None  # what a user would write in the inputs' dtype; its error is the yardstick
    autograd: Autograd | None = None
    backends: Mapping[str, Loader] = field(default_factory=dict)
    variants: Mapping[str, Variant] = field(default_factory=dict)

    @property
    def mutates(self) -> bool:
        return "(a!)" in self.schema

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

    @cached_property
    def op(self) -> torch._ops.OpOverload:
        """The torch operator, ``torch.ops.leanops.<name>.default``."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

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

    def refuse(self, *args: Any) -> None:
        """Raise what the operator would raise for these arguments, for a caller of whose several calls all or none
        shall run."""
        self.check(*args)
        if self.mutates:
            self._memory.check(args)

    def launch(self, device: torch.device, *args: Any, written: list[Tensor] | None = None) -> None:
        """A mutating operator on dense tensors of one device, none of them a wrapper (a subclass with a dispatch of its
        own), for a caller that has made sure of what :meth:`refuse` would raise: ``op(*args)`` without the two hops
        that it costs, a quarter of its price for thousands of tensors. A kernel that is called so has to refuse by
        itself what would read or write outside of a tensor. ``written`` saves looking for the tensors whose version
        counters move (:func:`counted`)."""
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            self.op(*args)
            return
        self.op._handle.redispatch_boxed(_backend_keys(device.type), *args)
        torch._C._increment_version(counted(self.mutated(args)) if written is None else written)

    def variants_on(self, device: torch.device) -> list[str]:
        """The names of the variants that run on a device."""
        return [name for name, variant in self.variants.items() if device.type in variant.devices]

    def kernel(self, name: str) -> Kernel:
        """The function of a backend or a variant, with the schema's signature and without the operator's checks: what a
        tuner times. Loaded at the first call."""
        if name not in self._kernels:
            loader = self.variants[name].load if name in self.variants else self.backends[name]
            self._kernels[name] = loader()
        return self._kernels[name]

    def run(self, name: str, *args: Any) -> Any:
        """``op(*args)`` as a backend or a variant computes it, with all that the operator does around its kernel: bad
        input is refused, version counters move, autocast and autograd stay out."""
        self.refuse(*args)
        device = next((t.device.type for t in tree_leaves(args) if isinstance(t, Tensor)), "cpu")
        with torch._C._AutoDispatchBelowAutograd():
            result = _without_autocast(device, self.kernel(name))(*args)
        torch._C._increment_version(counted(self.mutated(args)))
        return result

    @cached_property
    def _kernels(self) -> dict[str, Kernel]:
        return {}

    @cached_property
    def _arguments(self) -> list[Any]:
        return list(torch._C.parse_schema(f"{NAMESPACE}::{self.name}{self.schema}").arguments)

    @cached_property
    def _memory(self) -> WrittenMemory:
        return WrittenMemory(self.name, [a.name for a in self._arguments], self._written_places)

    @cached_property
    def _written_places(self) -> list[int]:
        return [i for i, a in enumerate(self._arguments) if a.alias_info is not None and a.alias_info.is_write]


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


def import_families() -> None:
    """Imports every family, which registers its operators. A family is a folder with a ``specs.py``."""
    for path in sorted(Path(__file__).parent.glob("*/specs.py")):
        importlib.import_module(f"leanops.{path.parent.name}")


def counted(written: list[Tensor]) -> list[Tensor]:
    """Those that have a version counter: not the tensors of inference mode.

    Native kernels do not bump version counters; autograd relies on them to notice a changed saved tensor.
    """
    return [t for t in written if not t.is_inference()] if any(map(Tensor.is_inference, written)) else written


def specs() -> Iterator[OpSpec]:
    """Every registered operator, in the order of registration."""
    return iter(_specs.values())


def spec(name: str) -> OpSpec:
    return _specs[name]


def register(spec: OpSpec) -> OpSpec:
    """Define the operator and register its reference, fake, checks, version bump and autograd."""
    if spec.name in _specs:
        raise ValueError(f"register: operator {spec.name} is registered already")
    if spec.mutates != spec.name.endswith("_"):
        raise ValueError(f"register: {spec.name}: an operator's name ends in '_' exactly when it mutates")
    name = spec.name
    _library.define(name + spec.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _specs[name] = spec
    op = spec.op

    if spec.composite is not None:
        _library.impl(name, spec.composite, "CompositeExplicitAutograd")
    else:
        _library.impl(name, _warns_once(spec.reference), "CompositeExplicitAutograd", with_keyset=True)

    def fake(*args: Any, **kwargs: Any) -> Any:
        spec.check(*args, **kwargs)
        return spec.fake(*args, **kwargs)

    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)

    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
    redispatch = op._handle.redispatch_boxed

    lists = [i for i, a in enumerate(op._schema.arguments) if isinstance(a.type, torch.ListType)]

    def whole(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """AOTInductor's executor leaves an empty list out, as None (pytorch/pytorch#194324 tells of integers)."""
        for i in lists:
            if i < len(args) and args[i] is None:
                args = (*args[:i], [], *args[i + 1 :])
        return args

    def checked(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        args = whole(args)
        spec.check(*args, **kwargs)
        return redispatch(keyset & below, *args, **kwargs)

    def checked_and_bumped(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        args = whole(args)
        spec.refuse(*args)
        redispatch(keyset & below, *args)
        torch._C._increment_version(counted(spec.mutated(args)))

    if spec.mutates:
        _library.impl(name, checked_and_bumped, "BackendSelect", with_keyset=True)
    else:
        _library.impl(name, checked, "BackendSelect", with_keyset=True)
    for device in ("CPU", "CUDA"):
        _library.impl(name, _without_autocast(device.lower(), op), f"Autocast{device}")
    if spec.autograd is None:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}",
            _backward(spec.autograd),
            setup_context=spec.autograd.setup_context,
            lib=_library,
        )
    return spec


def _warns_once(reference: Kernel) -> Kernel:
    """The reference, which warns at the first call on a device that no backend serves."""

    def call(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        for key in [key for key in unserved if keyset.has(key)]:
            if (message := unserved.pop(key, None)) is not None:
                warnings.warn(message, stacklevel=_caller_level())
        return reference(*args, **kwargs)

    return call


def _caller_level() -> int:
    """The ``stacklevel`` that names the line outside of leanops and torch."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in (NAMESPACE, "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _without_autocast(device_type: str, function: Kernel) -> Kernel:
    """What a kernel asks of torch would come back in another dtype than that of the memory it is meant for."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return call


def _backward(autograd: Autograd) -> Kernel:
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        device = next(g for g in grads if g is not None).device.type
        return _without_autocast(device, autograd.backward)(ctx, *grads)

    return backward


def implement(name: str, dispatch_key: str, kernel: Kernel) -> None:
    """Register a Python kernel (a Triton launcher, say) for one dispatch key, over the reference."""
    _library.impl(name, kernel, dispatch_key, allow_override=True)
