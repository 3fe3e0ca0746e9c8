"""Makes a torch operator of an :class:`OpSpec`, and keeps all OpSpecs.

The generic test suites, the benchmarks and the tuner need only an OpSpec, so they serve a new operator as soon as it is
described.

The dispatch keys of a call, from the outside in::

    Autocast          switched off: an operator, and its backward, computes in the dtypes of its inputs
    Autograd          the spec's backward (register_autograd), or a fallthrough
    BackendSelect     before the backend, bad input is refused; after it, the versions of written tensors are bumped
                      (one Python kernel for both, since each costs as much as a small operator)
    CPU / CUDA / ...  a native library or a Triton launcher where one is loaded, else the reference
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanops._opspec import (
    NAMESPACE,
    Autograd,
    BadInput,
    C,
    Case,
    Cost,
    Draw,
    Inputs,
    Kernel,
    Loader,
    OpSpec,
    Variant,
    bytes_of,
    counted,
    late,
    without_autocast,
)
from leanops.common.call import check_schema

__all__ = [  # everything that a family needs to describe its operators
    "NAMESPACE",
    "Autograd",
    "BadInput",
    "Case",
    "Cost",
    "Draw",
    "Inputs",
    "Kernel",
    "Loader",
    "OpSpec",
    "Variant",
    "bytes_of",
    "counted",
    "implement",
    "import_families",
    "late",
    "register",
    "spec",
    "specs",
    "unserved",
]

_library = torch.library.Library(NAMESPACE, "DEF")
_specs: dict[str, OpSpec] = {}

# the warning at the first call on a device that only the reference serves, by dispatch key; leanops._native fills it
unserved: dict[torch._C.DispatchKey, str] = {}


def import_families() -> None:
    """Imports every family, which registers its operators. A family is a folder with a ``specs.py``."""
    for path in sorted(Path(__file__).parent.glob("*/specs.py")):
        importlib.import_module(f"leanops.{path.parent.name}")


def specs() -> Iterator[OpSpec]:
    """Every registered operator, in the order of registration."""
    return iter(_specs.values())


def spec(name: str) -> OpSpec:
    return _specs[name]


def register(spec: OpSpec[C]) -> OpSpec[C]:
    """Define the operator and register its reference, fake, checks, version bump and autograd."""
    if spec.name in _specs:
        raise ValueError(f"register: operator {spec.name} is registered already")
    if spec.mutates != spec.name.endswith("_"):
        raise ValueError(f"register: {spec.name}: an operator's name ends in '_' exactly when it mutates")
    check_schema(spec.name, spec.call, spec.parsed_schema)
    name = spec.name
    _library.define(name + spec.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _specs[name] = spec
    if spec.composite is not None:
        _library.impl(name, spec.unpacked(spec.composite), "CompositeExplicitAutograd")
    else:
        _library.impl(name, _warns_once(spec), "CompositeExplicitAutograd", with_keyset=True)

    def fake(*args: Any, **kwargs: Any) -> Any:
        call = spec.bind(*args, **kwargs)
        spec.check(call)
        return spec.fake(call)

    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _library.impl(name, _checked(spec), "BackendSelect", with_keyset=True)
    for device in ("CPU", "CUDA"):
        _library.impl(name, without_autocast(device.lower(), spec.op), f"Autocast{device}")
    if spec.autograd is None:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        _register_autograd(spec, spec.autograd)
    return spec


def _checked(spec: OpSpec[C]) -> Kernel:
    """The kernel that refuses bad input, calls the backend, and bumps version counters."""
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
    redispatch = spec.op._handle.redispatch_boxed
    lists = [i for i, a in enumerate(spec.parsed_schema.arguments) if isinstance(a.type, torch.ListType)]

    def with_lists(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """AOTInductor's executor passes None for an empty list (pytorch/pytorch#194324 reports it for integers)."""
        for i in lists:
            if i < len(args) and args[i] is None:
                args = (*args[:i], [], *args[i + 1 :])
        return args

    def checked(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        args = with_lists(args)
        spec.check(spec.bind(*args, **kwargs))
        return redispatch(keyset & below, *args, **kwargs)

    make, memory = spec.make, spec.written_memory

    def checked_and_bumped(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        args = with_lists(args)
        spec.check(make(*args))
        memory.check(args)
        redispatch(keyset & below, *args)
        torch._C._increment_version(counted(spec.mutated(args)))

    return checked_and_bumped if spec.mutates else checked


def _warns_once(spec: OpSpec[C]) -> Kernel:
    """The reference, with a warning at the first call on a device that no backend serves."""
    reference = spec.unpacked(spec.reference)

    def call(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        for key in [key for key in unserved if keyset.has(key)]:
            if (message := unserved.pop(key, None)) is not None:
                warnings.warn(message, stacklevel=_caller_level())
        return reference(*args)

    return call


def _caller_level() -> int:
    """The ``stacklevel`` of the first frame outside of leanops and torch."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in (NAMESPACE, "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _register_autograd(spec: OpSpec[C], autograd: Autograd) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        autograd.setup_context(ctx, spec.bind(*inputs), output)

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        device = next(g for g in grads if g is not None).device.type
        return without_autocast(device, autograd.backward)(ctx, *grads)

    name = f"{NAMESPACE}::{spec.name}"
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_library)


def implement(name: str, dispatch_key: str, launcher: Callable[[Any], Any]) -> None:
    """Register a kernel in Python (a Triton launcher, say) for one dispatch key, over the reference."""
    _specs[name].native_on.discard(dispatch_key.lower())
    _library.impl(name, _specs[name].unpacked(launcher), dispatch_key, allow_override=True)
