"""The torch function mode that gives perturbed weights to every torch function, in place of the parameters."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch._C import _DisableFuncTorch
from torch._C._functorch import is_functorch_wrapped_tensor, maybe_current_level
from torch.overrides import TorchFunctionMode

from leanops.optim.zo.arena import Arena, Released
from leanops.optim.zo.first_step import Trace
from leanops.optim.zo.slots import Slot
from leanops.optim.zo.strategy import Write

_ROW = 16384  # a separate row costs an operator as much as this many elements (about 10 us; measured on Zen 5)
_GPU_ROW = 1 << 22  # elements that an H200 passes over in the host's 4 us for a row: an estimate, not measured
_ADDRESSES = frozenset({"__cuda_array_interface__", "__array_interface__"})  # attributes that hold the bare address
_VALUES = frozenset({"data", "T", "H", "mT", "mH", "real", "imag"}) | _ADDRESSES  # attributes that read the weights


def _metadata() -> frozenset[Any]:
    """Functions that do not read a tensor's values."""
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


class PerturbingMode(TorchFunctionMode):
    """Replaces the parameters of ``slots`` among a function's arguments by tensors that ``write`` fills.

    Without ``write`` the functions get the parameters themselves. ``seen`` collects the slots that a function was
    given, ``released`` the memory that a result refers to, and ``trace`` every call.
    """

    def __init__(
        self,
        slots: dict[int, Slot],
        arenas: dict[torch.device, Arena],
        write: Write | None,
        seen: dict[int, Slot],
        released: list[Released],
        trace: Trace | None,
    ) -> None:
        super().__init__()
        self._slots = slots
        self._arenas = arenas
        self._write = write
        self._seen = seen
        self._released = released
        self._trace = trace
        self._addressed: list[Tensor] = []  # memory that foreign code may hold by address

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found: dict[int, Slot] = {}
        self._find(args, found)
        if kwargs:
            self._find(kwargs.values(), found)
        if self._trace is not None:
            self._trace.note(args, bool(found))
        if not found or func in _METADATA:
            return func(*args, **kwargs)
        attribute = ""
        if getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__"):
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if attribute not in _VALUES:
                return func(*args, **kwargs)
        self._seen.update(found)
        if self._write is None:
            return func(*args, **kwargs)
        if func is torch.nn.functional.embedding:
            result = self._embedding(self._write, found, *args, **kwargs)
            if result is not None:
                return result
        return self._call(self._write, func, args, kwargs, found, func is Tensor.data_ptr or attribute in _ADDRESSES)

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

    def _call(
        self, write: Write, func: Any, args: Any, kwargs: Any, found: dict[int, Slot], gives_address: bool
    ) -> Any:
        """Call the function with perturbed weights in the arenas of their devices. If the result refers to an arena's
        memory, the arena gives it up."""
        replaced: dict[int, Tensor] = {}
        used: list[tuple[Arena, list[Slot]]] = []
        # torch chooses a matrix product by whether the weight requires grad, even under no_grad. But where grad is
        # enabled, a graph would keep all weights, and torch.func's transforms do not allow requires_grad
        requires_grad = not (
            torch.is_grad_enabled() or torch.is_inference_mode_enabled() or maybe_current_level() is not None
        )
        for device in {s.local.device for s in found.values()}:
            arena = self._arenas.setdefault(device, Arena(device))
            slots = [s for s in found.values() if s.local.device == device]
            with _DisableFuncTorch():  # weights are constants to torch.func's transforms
                out = arena.take([s.local for s in slots], requires_grad)
                write(out, slots)
            replaced |= {id(s.param): o for s, o in zip(slots, out, strict=True)}
            used.append((arena, slots))
        result = func(*_replace(args, replaced), **_replace(kwargs, replaced))
        out = []
        replaced.clear()
        for arena, slots in used:
            if gives_address or arena.shared or isinstance(result, (torch.UntypedStorage, torch.TypedStorage)):
                memory, released = arena.release(slots)
                self._released.append(released)
                if gives_address:
                    self._addressed.append(memory)
        return result

    def _embedding(
        self,
        write: Write,
        found: dict[int, Slot],
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *rest: Any,
        **options: Any,
    ) -> Tensor | None:
        """The embedding, from perturbed rows that are looked up; the bits are those from the whole weight. None where
        the whole weight is less work, and for arguments that need it."""
        slot = found.get(id(weight))
        if slot is None or max_norm is not None or weight.dim() != 2 or input.device != weight.device:
            return None
        if input.layout != torch.strided or is_functorch_wrapped_tensor(input):
            return None
        width, row_cost = weight.shape[1], _ROW if weight.device.type == "cpu" else _GPU_ROW
        if not 0 < input.numel() * (row_cost + width) < weight.numel():
            return None
        ids, places = torch.unique(input.long(), return_inverse=True)
        if int(ids[0]) < 0:
            return None  # torch's function raises
        rows = weight.detach()[ids]
        out = torch.empty_like(rows)
        offsets = (slot.offset + ids * width).tolist()
        states = zip(*(t[ids].unbind() for t in slot.state), strict=True) if slot.state else repeat(())
        parts = zip(rows.unbind(), offsets, states, strict=False)
        write(list(out.unbind()), [slot._replace(local=r, offset=o, state=s) for r, o, s in parts])
        return out[places]


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
