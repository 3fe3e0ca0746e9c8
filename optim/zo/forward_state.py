"""State of forward passes that is no weight: generators of random numbers, and buffers of modules.

Every evaluation of a step starts from the state before the step. After the step, the state is what the last evaluation
made of it. So a step draws from a generator, and moves a running mean, as one forward pass does.
"""

from __future__ import annotations

import ctypes
import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leanops.common.written_memory import byte_range
from leanops.optim.common.parameters import canonical_name
from leanops.optim.zo.slots import Slot

_LARGE = 1 << 20  # bytes: a larger buffer is saved in later steps only if the first evaluation changed it
_OBJECTS = 10_000  # so many objects at most are searched for the modules of a closure
_DEPTH = 4  # so many references away from the closure
_ITEMS = 1_000  # a longer list holds data, not modules
_MT19937_BYTES = 625 * 4  # NumPy's mt19937_state: 624 words and a position


class Generators:
    """The global generators: torch's on the CPU and on the devices in use, NumPy's, and Python's ``random``."""

    def __init__(self) -> None:
        self._numpy = _NumPyGenerator()

    def save(self, devices: Sequence[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = {d: getattr(torch, d.type).get_rng_state(d) for d in devices if d.type in ("cuda", "xpu")}
        self._python = random.getstate()
        self._numpy.save()

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            getattr(torch, device.type).set_rng_state(state, device)
        random.setstate(self._python)
        self._numpy.restore()


class _NumPyGenerator:
    """NumPy's global generator. To get and set its state takes 80 us, to compare its memory 1 us. So the state is saved
    at the first step, and later only if an evaluation has drawn from the generator."""

    def __init__(self) -> None:
        self._drawn: bool | None = None
        self._random: Any = None

    def save(self) -> None:
        self._random = sys.modules.get("numpy.random")
        if self._random is None:
            return
        self._address = self._find()
        self._memory = b"" if self._address is None else ctypes.string_at(self._address, _MT19937_BYTES)
        self._state = None
        if self._drawn is not False or self._address is None:
            self._state = self._random.get_state(legacy=False)

    def restore(self) -> None:
        if self._random is None:
            return
        if self._state is None:
            assert self._address is not None
            if ctypes.string_at(self._address, _MT19937_BYTES) != self._memory:
                ctypes.memmove(self._address, self._memory, _MT19937_BYTES)
                self._drawn = True
            return
        if self._drawn is None and self._address is not None:
            now = self._random.get_state(legacy=False)
            self._drawn = now["gauss"] != self._state["gauss"] or now["has_gauss"] != self._state["has_gauss"]
            self._drawn |= ctypes.string_at(self._address, _MT19937_BYTES) != self._memory
        if self._drawn is not False:
            self._random.set_state(self._state)

    def _find(self) -> int | None:
        """The address of the generator's state, if it is an MT19937, as usual; else None."""
        find = getattr(self._random, "get_bit_generator", None)  # from NumPy 1.24 on
        generator: Any = None if find is None else find()
        return int(generator.ctypes.state_address) if type(generator).__name__ == "MT19937" else None


class _Buffer(NamedTuple):
    module: nn.Module
    key: str
    name: str
    before: Tensor | None
    copy: Tensor | None  # None if the tensor is not saved


class Buffers:
    """Buffers of modules (running statistics, counters). A buffer that was replaced by another tensor is put back."""

    def __init__(self, watched: Sequence[tuple[nn.Module, str, str]], slots: Sequence[Slot]) -> None:
        self._weights = _Ranges([s.local for s in slots])
        self._watched = list(watched)  # a module, a buffer's name in the module, and the name in the model
        self._saved: list[_Buffer] = []
        self._first = True

    def save(self) -> None:
        self._saved = [
            _Buffer(m, key, name, b, b.clone() if b is not None and self._can_save(b) else None)
            for m, key, name in self._watched
            for b in [m._buffers.get(key)]
        ]

    def restore(self) -> None:
        for module, key, _, before, copy in self._saved:
            if module._buffers.get(key) is not before:
                module._buffers[key] = before
            if before is not None and copy is not None and before.shape == copy.shape:
                before.copy_(copy)

    def changed(self) -> list[str]:
        """Names of the buffers that differ from what was saved."""
        return [b.name for b in self._saved if self._differs(b)]

    def settle(self) -> None:
        """Called after the first evaluation: stop watching the large buffers that it has not changed."""
        self._first = False
        unwatched = {
            (id(b.module), b.key)
            for b in self._saved
            if b.before is not None and b.before.nbytes > _LARGE and not self._differs(b)
        }
        self._watched = [w for w in self._watched if (id(w[0]), w[1]) not in unwatched]

    def _differs(self, b: _Buffer) -> bool:
        now = b.module._buffers.get(b.key)
        if now is not b.before:
            return True
        return b.before is not None and b.copy is not None and not _equal(b.before, b.copy)

    def _can_save(self, b: Tensor) -> bool:
        plain = type(b) in (Tensor, nn.Parameter) and b.layout == torch.strided and not (b.is_meta or b.is_quantized)
        if not plain or (b.is_inference() and not torch.is_inference_mode_enabled()):
            return False
        if self._first and b.nbytes > _LARGE and not (b.is_floating_point() or b.is_complex()):
            return False  # quantised weights, which settle() stops watching
        expanded = any(s == 0 and n > 1 for s, n in zip(b.stride(), b.shape, strict=True))
        return not expanded and not self._weights.overlap(b)


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same bits."""
    if a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))


class _Ranges:
    """The byte ranges of some tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._ranges = [(t.device, *byte_range(t)) for t in tensors if t.numel()]
        self._answers: dict[tuple[torch.device, int, int], bool] = {}

    def overlap(self, t: Tensor) -> bool:
        device, start, end = key = t.device, *byte_range(t)
        if key not in self._answers:
            self._answers[key] = any(d == device and start < e and s < end for d, s, e in self._ranges)
        return self._answers[key]


class ForwardState:
    """Generators, and buffers of the modules that an optimizer's closures use."""

    def __init__(self, model: nn.Module | None, closure: Callable[[], Any], slots: Sequence[Slot], same_rng: bool):
        roots = [("", model)] if model is not None else []
        roots += [(f"{type(m).__name__}.", m) for m in modules_of(closure)]
        seen: set[int] = set()
        devices = {s.local.device for s in slots}
        buffers = []
        for prefix, root in roots:
            for path, module in root.named_modules():
                if id(module) in seen or isinstance(module, torch.jit.ScriptModule):
                    continue
                seen.add(id(module))
                devices |= {t.device for t in module._parameters.values() if t is not None}
                for key in module._buffers:
                    name = canonical_name(root, f"{path}.{key}" if path else key)
                    buffers.append((module, key, prefix + name))
        self._devices = list(devices)
        self._generators = Generators() if same_rng else None
        self._buffers = Buffers(buffers, slots)
        self._settled = False
        self.changed_buffers: list[str] = []

    def save(self) -> None:
        """Before the first evaluation of a step."""
        if self._generators is not None:
            self._generators.save(self._devices)
        self._buffers.save()

    def restore(self) -> None:
        """Before every further evaluation."""
        if not self._settled:
            self._settled = True
            self.changed_buffers = self._buffers.changed()
            self._buffers.settle()
        if self._generators is not None:
            self._generators.restore()
        self._buffers.restore()

    def undo(self) -> None:
        """After evaluations that do not count: give the buffers their values before the step."""
        self._buffers.restore()


def modules_of(closure: Callable[[], Any]) -> list[nn.Module]:
    """The modules that a function refers to: in its free variables, its defaults, the globals that it names, and the
    attributes and items of these objects, to a depth of four."""
    found: list[nn.Module] = []
    queue: deque[tuple[Any, int]] = deque([(closure, 0)])
    seen: set[int] = set()
    while queue and len(seen) < _OBJECTS:
        value, depth = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if issubclass(type(value), nn.Module):
            found.append(value)
        elif depth < _DEPTH:
            queue += [(v, depth + 1) for v in _referents(value)]
    return found


def _referents(value: Any) -> Iterator[Any]:
    kind = type(value)  # isinstance() would get the class that a proxy claims
    if kind is FunctionType:
        yield from _globals_of(value)
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield getattr(value, "__wrapped__", None)
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not assigned yet
                continue
    elif kind is MethodType:
        yield value.__self__
        yield value.__func__
    elif kind is functools.partial:
        yield value.func
        yield from value.args
        yield from value.keywords.values()
    elif kind in (list, tuple, set, frozenset):
        yield from value if len(value) <= _ITEMS else ()
    elif kind is dict:
        yield from value.values() if len(value) <= _ITEMS else ()
    elif not issubclass(kind, (Tensor, ModuleType, type)):
        with suppress(AttributeError, TypeError):
            yield from list(object.__getattribute__(value, "__dict__").values())


def _globals_of(function: FunctionType) -> Iterator[Any]:
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, type(code))]  # functions defined inside
        for name in code.co_names:
            yield function.__globals__.get(name)
