"""``OpSpec.launch`` skips the operator's checks, so native kernels check for themselves; every call is checked once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from opsuite import SPECS, assert_same_bits, clone, make, over_specs, tensors

from leanops._registry import BadInput, OpSpec


def is_refused_by_the_check(spec: OpSpec, bad: BadInput) -> bool:
    """False for tensors that overlap or require grad: the caller of ``launch`` must not pass such."""
    try:
        spec.check(spec.bind(*bad.make(torch.device("cpu"))))
    except bad.error:
        return True
    return False


MUTATING = [spec for spec in SPECS if spec.mutates]
BAD = [(s, b) for s in MUTATING for b in s.bad_inputs if is_refused_by_the_check(s, b)]
over_bad_inputs = pytest.mark.parametrize(("spec", "bad"), BAD, ids=[f"{s.name}-{b.name}" for s, b in BAD])


def test_the_check_misses_only_overlaps_and_tensors_that_require_grad():
    for spec in MUTATING:
        missed = {b.name for b in spec.bad_inputs} - {b.name for s, b in BAD if s is spec}
        assert missed <= {"expanded", "overlap", "shared storage", "requires grad"}
        assert len(spec.bad_inputs) - len(missed) >= 7


@contextmanager
def kernels_in_python(spec: OpSpec) -> Iterator[None]:
    """As if no native library were loaded."""
    native = set(spec.native_on)
    spec.native_on.clear()
    try:
        yield
    finally:
        spec.native_on.update(native)


def assert_launch_refuses(spec, bad, device, error):
    """``launch`` raises the operator's message before a byte or a version counter changes."""
    args = bad.make(device)
    before, versions = clone(args), [t._version for t in tensors(args)]
    with pytest.raises(error, match=bad.message):
        spec.launch(device, *args)
    for now, then in zip(tensors(args), tensors(before), strict=True):
        if not now.is_meta:
            assert_same_bits([now.detach().to_dense()], [then.to_dense()])
    assert [t._version for t in tensors(args)] == versions


@over_bad_inputs
def test_the_kernel_refuses_what_the_check_refuses(spec, bad, device):
    assert_launch_refuses(spec, bad, device, RuntimeError if device.type in spec.native_on else bad.error)


@over_bad_inputs
def test_launch_refuses_for_a_kernel_in_python(spec, bad, device):
    with kernels_in_python(spec):
        assert_launch_refuses(spec, bad, device, bad.error)


@over_bad_inputs
def test_bad_input_reaches_no_launcher_in_python(spec, bad, device, monkeypatch):
    for name in (*spec.backends, *spec.variants_on(device)):
        monkeypatch.setitem(spec._kernels, name, lambda *args: pytest.fail("a kernel is launched"))
        with pytest.raises(bad.error, match=bad.message):
            spec.run(name, *bad.make(device))


@over_specs(where=lambda spec: spec.mutates)
def test_each_way_to_call_checks_once(spec, device):
    """The check in Python costs as much as a small kernel."""
    checked = []
    check = spec.check

    def count(call):
        checked.append(call)
        check(call)

    case = next(c for c in spec.cases if not c.bench)
    args = make(case, device, torch.float32)
    object.__setattr__(spec, "check", count)  # the spec is frozen
    try:
        counts = []
        for call in (spec.op, lambda *args: spec.launch(device, *args)):
            call(*args)
            counts.append(len(checked))
            checked.clear()
        with kernels_in_python(spec):
            spec.launch(device, *args)
        counts.append(len(checked))
    finally:
        object.__setattr__(spec, "check", check)
    assert counts == [1, 0 if device.type in spec.native_on else 1, 1]
