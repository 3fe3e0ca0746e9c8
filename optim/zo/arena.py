"""Memory for weights that are perturbed where they are used, and what still refers to it after an evaluation."""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from leanops.optim.zo.slots import Slot

_ALIGN = 64
_COLLECTIONS = 3  # a run of the garbage collector takes a tenth of a second


def _references(storage: int) -> int:
    """How many tensors, and other owners, a storage has."""
    count: int = torch._C._storage_Use_Count(storage)
    return count


def _dense_strides(t: Tensor) -> Sequence[int]:
    """The tensor's own strides if it is dense, else the row-major strides of its shape."""
    if t.is_contiguous() or torch._prims_common.is_non_overlapping_and_dense_or_false(t):
        return t.stride()
    return torch._prims_common.make_contiguous_strides_for(t.shape)


class Released:
    """Memory that an arena gave up because a function's result refers to it. It is freed with its last reference."""

    def __init__(self, memory: Tensor, starts: Sequence[int], slots: Sequence[Slot]) -> None:
        self.slots = list(slots)
        self._starts = list(starts)  # the first byte of each slot's weight
        self._memory = StorageWeakRef(memory.untyped_storage())

    @property
    def address(self) -> int:
        """The storage's, as ``_cdata`` gives it."""
        return int(self._memory.cdata)

    @property
    def referred_to(self) -> bool:
        return not self._memory.expired()

    def alias_of_weight(self, t: Tensor) -> Tensor | None:
        """The view of the parameter that corresponds to ``t``, a view of this memory; None if there is none."""
        byte = t.storage_offset() * t.element_size()
        index = bisect_right(self._starts, byte) - 1
        weight = self.slots[index].local
        if tuple(_dense_strides(weight)) != tuple(weight.stride()):
            return None
        byte += weight.storage_offset() * weight.element_size() - self._starts[index]
        offset, rest = divmod(int(byte), t.element_size())
        if rest:
            return None
        alias = torch.empty(0, dtype=t.dtype, device=t.device)
        return alias.set_(weight.untyped_storage(), offset, t.size(), t.stride())


class Arena:
    """Memory for the perturbed weights of one function at a time, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer: Tensor | None = None
        self._typed: dict[tuple[torch.dtype, bool], Tensor] = {}  # the buffer as a dtype, and whether it requires grad
        self._storage = self._unshared = 0
        self._starts: list[int] = []
        self._need = 0  # bytes of the largest use

    def take(self, like: Sequence[Tensor], requires_grad: bool) -> list[Tensor]:
        """Uninitialised tensors with the shapes, dtypes and (where they are dense) the strides of ``like``.

        With ``requires_grad`` they require grad where ``like`` does.
        """
        self._starts, end = [], 0
        for t in like:
            self._starts.append(end)
            end += -(-t.numel() * t.element_size() // _ALIGN) * _ALIGN
        self._need = max(self._need, end)
        if self._buffer is None or self._buffer.numel() < end:
            self._drop()
            self._buffer = torch.empty(self._need, dtype=torch.uint8, device=self._device)
            self._storage = self._buffer.untyped_storage()._cdata
            self._unshared = _references(self._storage)
        return [
            self._as(t.dtype, requires_grad and t.requires_grad).as_strided(
                t.shape, _dense_strides(t), start // t.element_size()
            )
            for t, start in zip(like, self._starts, strict=True)
        ]

    def _as(self, dtype: torch.dtype, requires_grad: bool) -> Tensor:
        """The buffer in a tensor that is no view itself, so that its views require grad exactly if it does."""
        found = self._typed.get((dtype, requires_grad))
        if found is None:
            assert self._buffer is not None
            found = torch.empty(0, dtype=dtype, device=self._device).set_(self._buffer.untyped_storage())
            if requires_grad:
                found.requires_grad_()
            self._typed[dtype, requires_grad] = found
            self._unshared += 1
        return found

    def _drop(self) -> None:
        self._buffer = None
        self._typed = {}

    @property
    def shared(self) -> bool:
        """Whether anything but the arena refers to the memory. Delete the tensors of :meth:`take` first."""
        return _references(self._storage) > self._unshared

    def release(self, slots: Sequence[Slot]) -> tuple[Tensor, Released]:
        """Leave the memory to what refers to it; the next use takes new memory. ``slots`` are those of the last use."""
        buffer = self._buffer
        assert buffer is not None
        self._drop()
        return buffer, Released(buffer, self._starts, slots)


class Outliving:
    """Finds released memory that something still refers to after the evaluation."""

    def __init__(self) -> None:
        self.released: list[Released] = []
        self._collections = 0

    def take(self) -> list[Released]:
        """The memory that something still refers to. Forgets all released memory."""
        self._sift()
        if self.released and self._collections < _COLLECTIONS:
            self._collections += 1
            gc.collect()  # only a cycle of dead objects may refer to it
            self._sift()
        outliving, self.released = self.released, []
        return outliving

    def _sift(self) -> None:
        self.released = [r for r in self.released if r.referred_to]


def point_at_weights(released: Sequence[Released]) -> int:
    """Turn each Python tensor in the released memory into the same view of the parameter. Returns their number."""
    table = {r.address: r for r in released}
    count = 0
    for t in gc.get_objects():
        if type(t) not in (Tensor, nn.Parameter):
            continue
        try:
            storage = t.untyped_storage()
            owner = table.get(storage._cdata)
            alias = None if owner is None else owner.alias_of_weight(t)
            if alias is not None:
                t._leanops_memory = storage  # for a NumPy array made from t, which holds only the address
                t.data = alias
                count += 1
        except Exception as error:  # a tensor without storage, or whose data cannot be set, stays as it is
            del error
    return count
