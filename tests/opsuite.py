"""What the generic suites share: operators and cases to run over, and how results are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from tiers import rotating
from torch import Tensor
from torch.utils._pytree import tree_map_only

from leanops import _native, _registry
from leanops._registry import Case, OpSpec

SPECS = list(_registry.specs())
SMALL = [(s, c) for s in SPECS for c in s.cases if not c.bench]


def over_specs(*, where: Callable[[OpSpec], bool] = lambda spec: True) -> Any:
    """Parametrize a test over every operator for which ``where`` holds."""
    chosen = [s for s in SPECS if where(s)]
    return pytest.mark.parametrize("spec", chosen, ids=[s.name for s in chosen])


def over_cases(*, where: Callable[[OpSpec], bool] = lambda spec: True, every_dtype: str = "exhaustive") -> Any:
    """Parametrize a test over every small case of every operator for which ``where`` holds: in one dtype a case, which
    rotates, and from the tier ``every_dtype`` on in every dtype."""
    rows = rotating([[(s, c, d) for d in s.dtypes] for s, c in SMALL if where(s)], until=every_dtype)
    ids = [f"{s.name}-{c.name}-{str(d).removeprefix('torch.')}" for s, c, d in rows]
    return pytest.mark.parametrize(("spec", "case", "dtype"), rows, ids=ids)


def make(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    return case.make(device, dtype, torch.Generator().manual_seed(seed))


def clone(args: Any) -> Any:
    """A copy of the arguments with the same strides and storage offsets."""

    def copy(t: Tensor) -> Tensor:
        if t.is_meta:
            return t
        if t.layout != torch.strided:
            return t.clone()
        storage = t.untyped_storage().clone()
        return torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, t.storage_offset(), t.shape, t.stride())

    return tree_map_only(Tensor, copy, args)


def tensors(values: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, Tensor)]


def outputs(spec: OpSpec, args: Sequence[Any], returned: Any) -> list[Tensor]:
    return spec.mutated(args) if spec.mutates else tensors(returned)


def run(spec: OpSpec, args: Sequence[Any], function: Callable[..., Any] | None = None) -> list[Tensor]:
    """What a call writes or returns, leaving ``args`` as they are."""
    args = clone(args)
    return outputs(spec, args, (function or spec.op)(*args))


def run_reference(spec: OpSpec, args: Sequence[Any], widen: bool = False) -> list[Tensor]:
    """The reference's results, with ``widen`` in float64 from the same input values."""
    if widen:
        args = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
    return run(spec, args, spec.kernel("reference"))


def backends(spec: OpSpec, device: torch.device) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every way to compute an operator on a device, by name: what the dispatcher picks, each launcher in Python, and
    each variant."""
    yield "dispatched", spec.op
    if device.type == "cuda":
        for name in spec.backends:
            if _native.backends()[name].state != "absent":
                yield name, partial(spec.run, name)
    for name in spec.variants_on(device):
        yield name, partial(spec.run, name)


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str = "") -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype, f"{what} output {i}: {a.dtype} != {e.dtype}"
        assert a.shape == e.shape, f"{what} output {i}: {a.shape} != {e.shape}"
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        same = a.contiguous().view(integer) == e.contiguous().view(integer).to(a.device)
        same |= a.isnan() & e.isnan().to(a.device)
        if not same.all():
            bad = (~same).nonzero()
            index = tuple(bad[0].tolist())
            raise AssertionError(
                f"{what} output {i}: {len(bad)} of {a.numel()} differ, first at {index}: {a[index]} != {e[index]}"
            )


def error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root of the summed squares of all differences from float64 results."""
    return math.sqrt(sum(float((a.double() - e.double()).square().sum()) for a, e in zip(actual, exact, strict=True)))


def norm(values: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(v.double().square().sum()) for v in values))


def policy_bound(spec: OpSpec, args: Sequence[Any], dtype: torch.dtype, magnitude: float) -> float:
    """The tolerance policy's absolute bound: c eps sqrt(K) times the size of the result."""
    return spec.tolerance * torch.finfo(dtype).eps * math.sqrt(spec.depth(spec.bind(*args))) * magnitude


def assert_agrees(
    spec: OpSpec,
    args: Sequence[Any],
    actual: Sequence[Tensor],
    dtype: torch.dtype,
    what: str = "",
    *,
    yardstick: bool = True,
) -> None:
    """Exact operators give the reference's bits; others stay within the policy, and (with ``yardstick``) within twice
    the error that plain PyTorch makes in the same dtype. float64 has no wider reference to measure that error with."""
    if spec.exact:
        assert_same_bits(actual, run_reference(spec, args), what)
        return
    exact = run_reference(spec, args, widen=True)
    assert [a.shape for a in actual] == [e.shape for e in exact]
    assert all(a.dtype == dtype for a in actual)
    seen = error(actual, exact)
    absolute = tree_map_only(Tensor, lambda t: t.abs() if t.is_floating_point() else t, args)
    magnitude = max(norm(exact), norm(run_reference(spec, absolute, widen=True)))
    bound = policy_bound(spec, args, dtype, magnitude)
    assert seen <= bound, f"{what}: error {seen:.3e} beyond {bound:.3e}"
    if yardstick and spec.plain is not None and dtype != torch.float64:
        plain = error(run(spec, args, spec.unpacked(spec.plain)), exact)
        assert seen <= 2 * plain + 1e-300, f"{what}: error {seen:.3e} is over twice that of plain PyTorch, {plain:.3e}"
