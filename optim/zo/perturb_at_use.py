"""Evaluating a function at perturbed weights that exist only where they are used: W itself is never written.

While the closure runs, a ``TorchFunctionMode`` sees every torch function. Managed parameters among its arguments are
replaced by ``round(W + scale z)``, made on the spot in an arena as large as the largest need of one function and used
again by the next. Each use makes the same bits, so tied weights are perturbed once. Weights that the mode is never
shown (compiled graphs, scripted modules, C++ code use them) are found at the first evaluation and held perturbed in
place, with a saved copy. A weight that is used both in sight and out of sight (in another thread, too), or out of sight
from a later step on only, is not found. Nor are gradients to be had of weights that are made on the spot, and what a
function writes into them (an embedding with ``max_norm``) is gone. Such functions need
:class:`~leanops.optim.zo.perturb_in_place.Copy`.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _DisableFuncTorch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from leanops.optim.zo.directions import Seed
from leanops.optim.zo.perturb_in_place import Closure, Copy
from leanops.optim.zo.slots import Slot
from leanops.optim.zo.strategy import Strategy

_ALIGN = 64
_ROW = 16384  # a row of its own costs an operator as much as this many elements (about 10 us; measured on Zen 5)
_GPU_ROW = 1 << 22  # as many as an H200 passes in the 4 us that the host takes for a row: an estimate, not measured
_PIECE = 1 << 18  # elements of an intermediate result that are summed at a time
_VALUES = frozenset({"data", "T", "H", "mT", "mH", "real", "imag"})  # attributes that read the weights
_INERT = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout)  # share no memory


def _metadata() -> frozenset[Any]:
    """Functions that ask about a tensor, not about its values."""
    methods = (
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "storage_offset", "get_device"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_pinned", "is_inference", "is_shared"),
        *("is_same_size", "is_set_to", "has_names", "__len__", "__hash__", "_is_view", "requires_grad_", "retain_grad"),
        *("register_hook", "new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
    )
    functions = (
        *("numel", "is_tensor", "is_floating_point", "is_complex", "is_signed", "is_same_size", "zeros_like"),
        *("ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "result_type"),
    )
    pairs = [(Tensor, n) for n in methods] + [(torch, n) for n in functions]
    return frozenset(getattr(owner, n) for owner, n in pairs if hasattr(owner, n))  # not every torch has them all


_METADATA = _metadata()


def _has_memory(t: Tensor) -> bool:
    """Dense, and no wrapper of torch.func's transforms."""
    return t.layout == torch.strided and not is_functorch_wrapped_tensor(t)


def _dense_strides(t: Tensor) -> Sequence[int]:
    """The tensor's own where no element of its memory is left out, else those of its shape in rows."""
    if t.is_contiguous() or torch._prims_common.is_non_overlapping_and_dense_or_false(t):
        return t.stride()
    return torch._prims_common.make_contiguous_strides_for(t.shape)


class _Arena:
    """Memory for the perturbed weights of one function at a time, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer: Tensor | None = None
        self._need = 0

    def take(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Uninitialised tensors with the shapes, dtypes and (where they are dense) the strides of ``like``."""
        starts, end = [], 0
        for t in like:
            starts.append(end)
            end += -(-t.numel() * t.element_size() // _ALIGN) * _ALIGN
        self._need = max(self._need, end)
        if self._buffer is None or self._buffer.numel() < end:
            self._buffer = None
            self._buffer = torch.empty(self._need, dtype=torch.uint8, device=self._device)
        memory = {dtype: self._buffer.view(dtype) for dtype in {t.dtype for t in like}}
        return [
            memory[t.dtype].as_strided(t.shape, _dense_strides(t), start // t.element_size())
            for t, start in zip(like, starts, strict=True)
        ]

    def let_go(self, result: object) -> bool:
        """Leave the memory to the result where it may share it; a later use takes new memory."""
        if self._buffer is None:
            return False
        own = self._buffer.untyped_storage().data_ptr()
        for leaf in tree_leaves(result):
            if isinstance(leaf, _INERT):
                continue
            plain = type(leaf) in (Tensor, nn.Parameter) and _has_memory(leaf)
            if plain and not leaf.requires_grad and leaf.untyped_storage().data_ptr() != own:
                continue  # neither it nor a graph behind it holds the memory
            self._buffer = None
            return True
        return False


class _Mode(TorchFunctionMode):
    """Shows ``W + scale z(seed)`` to torch functions in place of W; at ``scale`` 0 W itself, through the same path."""

    def __init__(self, owner: Scratch, seed: Seed, scale: float, trace: list[float] | None) -> None:
        super().__init__()
        self._slots = owner.slots
        self._seen = owner.seen
        self._all = {id(p) for s in owner.all for p in (s.param, *s.twins)}
        self._arenas = owner.arenas
        self._perturb = owner.strategy.prepared(seed, scale)
        self._active = scale != 0.0
        self._trace = trace
        self._kept: list[object] = []  # memory that foreign code may hold by address

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found: dict[int, Slot] = {}
        self._find(args, found)
        if kwargs:
            self._find(kwargs.values(), found)
        if self._trace is not None:
            _fingerprint(self._trace, args, self._all)
        if not found or func in _METADATA:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__"):
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if attribute not in _VALUES:
                return func(*args, **kwargs)
        self._seen.update(found)
        if not self._active:
            return func(*args, **kwargs)
        if func is torch.nn.functional.embedding and (result := self._embedding(found, *args, **kwargs)) is not None:
            return result
        return self._call(func, args, kwargs, found)

    def _find(self, values: Any, found: dict[int, Slot]) -> None:
        slots = self._slots
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in slots:
                    found[id(value)] = slots[id(value)]
            elif isinstance(value, (list, tuple)):
                self._find(value, found)
            elif isinstance(value, dict):
                self._find(value.values(), found)

    def _call(self, func: Any, args: Any, kwargs: Any, found: dict[int, Slot]) -> Any:
        replaced: dict[int, Tensor] = {}
        used = []
        for device in {s.local.device for s in found.values()}:
            arena = self._arenas.setdefault(device, _Arena(device))
            used.append(arena)
            slots = [s for s in found.values() if s.local.device == device]
            with _DisableFuncTorch():  # weights are constants to torch.func's transforms
                out = arena.take([s.local for s in slots])
                self._perturb(out, slots)
            replaced |= {id(s.param): o for s, o in zip(slots, out, strict=True)}
        result = func(*_replace(args, replaced), **_replace(kwargs, replaced))
        for arena in used:
            buffer = arena._buffer
            if func is Tensor.data_ptr:
                self._kept.append(buffer)
                arena._buffer = None
            elif arena.let_go(result) and not isinstance(result, Tensor):
                self._kept.append(buffer)
        return result

    def _embedding(
        self,
        found: dict[int, Slot],
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *rest: Any,
        **options: Any,
    ) -> Tensor | None:
        """The rows that are looked up, and no others, where that is less work; the bits are those of the whole."""
        slot = found.get(id(weight))
        if slot is None or max_norm is not None or weight.dim() != 2 or input.device != weight.device:
            return None
        if not _has_memory(input):
            return None
        width, own = weight.shape[1], _ROW if weight.device.type == "cpu" else _GPU_ROW
        if not 0 < input.numel() * (own + width) < weight.numel():
            return None
        ids, places = torch.unique(input.long(), return_inverse=True)
        if int(ids[0]) < 0:
            return None  # the original raises
        rows = weight.detach()[ids]
        out = torch.empty_like(rows)
        offsets = (slot.offset + ids * width).tolist()
        states = zip(*(t[ids].unbind() for t in slot.state), strict=True) if slot.state else repeat(())
        parts = zip(rows.unbind(), offsets, states, strict=False)
        self._perturb(list(out.unbind()), [slot._replace(local=r, offset=o, state=s) for r, o, s in parts])
        return out[places]


def _by_identity(slots: Sequence[Slot]) -> dict[int, Slot]:
    """The slot of each parameter, those of the same memory included."""
    return {id(p): s._replace(param=p) for s in slots for p in (s.param, *s.twins)}


def _replace(values: Any, replaced: dict[int, Tensor]) -> Any:
    if isinstance(values, Tensor):
        return replaced.get(id(values), values)
    if isinstance(values, dict):
        return {k: _replace(v, replaced) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        items = [_replace(v, replaced) for v in values]
        if isinstance(values, list):
            return items
        return type(values)(*items) if hasattr(values, "_fields") else tuple(items)
    return values


def _fingerprint(trace: list[float], args: Any, managed: set[int]) -> None:
    """Note a sum of every tensor argument that is no managed parameter: what hidden weights change shows here."""
    for leaf in tree_leaves(args):
        if isinstance(leaf, Tensor) and id(leaf) not in managed and _has_memory(leaf) and not leaf.is_complex():
            wide = torch.float64 if leaf.is_floating_point() else torch.int64
            # in pieces: a sum in a wider dtype makes a copy of what it sums
            trace.extend(float(piece.sum(dtype=wide)) for piece in leaf.detach().reshape(-1).split(_PIECE))


class Scratch:
    """Weights perturbed at each use, W never written: exact, with scratch as large as the largest use.

    At the first evaluation of a run, parameters that no torch function was shown are perturbed in place, with a saved
    copy, and the evaluation is repeated once. If the loss and every intermediate result are bit-equal those
    parameters play no part and stay untouched; else they are perturbed that way in every evaluation from then on.
    """

    def __init__(self, slots: Sequence[Slot], strategy: Strategy, op: str) -> None:
        self._op = op
        self.all = list(slots)
        self.slots = _by_identity(slots)
        self.strategy = strategy
        self.seen: dict[int, Slot] = {}
        self.arenas: dict[torch.device, _Arena] = {}
        self.held: Copy | None = None
        self._checked = False
        self._stack = ExitStack()

    @contextmanager
    def session(self) -> Iterator[None]:
        with ExitStack() as stack:
            self._stack = stack
            if self.held is not None:
                stack.enter_context(self.held.session())
            yield

    def evaluate(self, closure: Closure, seed: Seed, scale: float, again: Callable[[], None]) -> Tensor | float:
        if self._checked or scale == 0.0:
            return self._run(closure, seed, scale)
        trace: list[float] = []
        loss = self._run(closure, seed, scale, trace)
        seen = {s.tensor_id for s in self.seen.values()}
        unseen = [s for s in self.all if s.tensor_id not in seen]
        if not math.isfinite(loss):
            return loss  # tells nothing about what it depends on; the step will not count
        if unseen:
            loss = self._check(closure, seed, scale, again, unseen, trace, loss)
        self._checked = True
        return loss

    def _run(self, closure: Closure, seed: Seed, scale: float, trace: list[float] | None = None) -> Tensor | float:
        if self.held is not None:
            self.held.place(seed, scale)
        with _eager(), _Mode(self, seed, scale, trace):
            return closure()

    def _check(
        self,
        closure: Closure,
        seed: Seed,
        scale: float,
        again: Callable[[], None],
        unseen: list[Slot],
        trace: list[float],
        loss: Tensor | float,
    ) -> Tensor | float:
        held = Copy(unseen, self.strategy)
        for identity in _by_identity(unseen):
            del self.slots[identity]
        second_trace: list[float] = []
        with ExitStack() as stack:
            stack.enter_context(held.session())
            held.place(seed, scale)
            again()
            second = self._run(closure, seed, scale, second_trace)
            if _same(loss, second) and len(trace) == len(second_trace) and all(map(_same, trace, second_trace)):
                self.slots |= _by_identity(unseen)
                return second
            self.held = held
            self._stack.push(stack.pop_all())
        warnings.warn(
            f"{self._op}: of these parameters some reach the loss without passing a torch function (scripted modules, "
            "C++ code, views made beforehand); they are perturbed in place and restored from a copy: "
            + ", ".join(s.name for s in unseen[:8])
            + (f" and {len(unseen) - 8} more" if len(unseen) > 8 else ""),
            stacklevel=2,
        )
        return second


def _eager() -> AbstractContextManager[object]:
    """Compiled functions run as they were written, so that the mode sees into them."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _same(a: Tensor | float, b: Tensor | float) -> bool:
    """Equal numbers, NaN included."""
    x, y = float(a), float(b)
    return x == y or (math.isnan(x) and math.isnan(y))
