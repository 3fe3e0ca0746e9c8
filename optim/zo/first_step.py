"""The trace of a run's first evaluation: fingerprints of its tensors, and whether compiled functions have run.

These are diagnostics: they raise no error, whatever classes of tensors a closure uses.
"""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_leaves

_PIECE = 1 << 18  # elements of a tensor that are summed at a time
_LAYOUTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


class Trace:
    """The tensors and the compiled functions of one evaluation.

    ``sums`` has the fingerprints of all tensors that torch functions were given, except managed parameters. A changed
    hidden weight changes the fingerprints of what is computed from it. ``compiled`` says that a compiled function ran
    eagerly, and ``compiled_weights`` that it used a managed parameter.
    """

    def __init__(self, managed: set[int], evaluation: CodeType) -> None:
        self._managed = managed
        self._evaluation = evaluation
        self._wrapper = _compiled_wrapper()
        self.sums: list[float] = []
        self.compiled = self.compiled_weights = False

    def note(self, args: Any, has_weights: bool) -> None:
        """Add one call of a torch function."""
        with suppress(Exception):
            for leaf in tree_leaves(args):
                if isinstance(leaf, Tensor) and id(leaf) not in self._managed:
                    self.sums.extend(fingerprint(leaf))
        if self._wrapper is not None and not (self.compiled_weights if has_weights else self.compiled):
            inside = self._inside_compiled()
            self.compiled |= inside
            self.compiled_weights |= inside and has_weights

    def _inside_compiled(self) -> bool:
        """Whether a compiled function lies on the stack between here and the evaluation."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not self._evaluation:
            if frame.f_code is self._wrapper:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False

    def agrees(self, other: Trace) -> bool:
        return len(self.sums) == len(other.sums) and all(map(same, self.sums, other.sums))


def _compiled_wrapper() -> CodeType | None:
    """The code object that all functions of torch.compile share; None where torch's compiler is not imported yet."""
    if "torch._dynamo" not in sys.modules:
        return None
    try:
        code: CodeType = torch.compile(_nothing, backend="eager").__code__
    except Exception:  # torch.compile does not support this Python
        return None
    return code


def _nothing() -> None:
    pass


def fingerprint(t: Tensor) -> list[float]:
    """The sum of the elements of each of a tensor's components; NaN for a tensor without a sum."""
    try:
        return [s for part in _components(t) for s in _sums(part)]
    except Exception:  # quantised, without data, or of a class that has neither components nor sums
        return [math.nan]


def _components(t: Tensor) -> list[Tensor]:
    """The plain dense tensors that hold a tensor's values."""
    if is_functorch_wrapped_tensor(t):
        return []
    if hasattr(type(t), "__tensor_flatten__"):
        names, _ = t.__tensor_flatten__()  # type: ignore[attr-defined]
        return [c for name in names for c in _components(getattr(t, name))]
    if t.is_nested:
        return [c for part in t.unbind() for c in _components(part)]
    if t.layout in _LAYOUTS:
        return [c for name in _LAYOUTS[t.layout] for c in _components(getattr(t, name)())]
    if t.is_quantized:
        return _components(t.int_repr())
    return [torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t.detach()]


def _sums(t: Tensor) -> list[float]:
    if t.element_size() == 1 and t.is_floating_point():
        t = t.view(torch.uint8)  # float8 has no sum
    wide = torch.float64 if t.is_floating_point() else torch.int64
    # in pieces: a sum in a wider dtype makes a copy of what it sums
    return [float(piece.sum(dtype=wide)) for piece in t.reshape(-1).split(_PIECE)]


def same(a: Tensor | float, b: Tensor | float) -> bool:
    """Equal numbers, NaN included."""
    x, y = float(a), float(b)
    return x == y or (math.isnan(x) and math.isnan(y))
