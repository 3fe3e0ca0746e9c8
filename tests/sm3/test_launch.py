"""Kernels below the operator's checks, where the optimizer calls them."""

from __future__ import annotations

import importlib

import pytest
import torch
from opsuite import assert_same_bits, clone, tensors

from leanops import _registry
from leanops.common import nvrtc
from leanops.sm3 import nvrtc as sm3_nvrtc

SPEC = _registry.spec("sm3_step_")
# overlaps, which the memory check finds, and numbers that no memory depends on
ELSEWHERE = {"expanded", "shared storage", "requires grad", "offset overflow", "momentum 1", "momentum nan", "beta 0"}
ELSEWHERE |= {"beta 2", "eps", "eps inf", "decay", "decay nan", "eps of fp64", "decay of fp64"}


over_bad_inputs = pytest.mark.parametrize(
    "bad", [b for b in SPEC.bad_inputs if b.name not in ELSEWHERE], ids=lambda b: b.name
)


def assert_the_kernel_refuses(bad, device):
    """Before a byte changes."""
    args = bad.make(device)
    before = clone(args)
    with pytest.raises(RuntimeError):
        SPEC.launch(device, *args)
    for now, then in zip(tensors(args), tensors(before), strict=True):
        if not now.is_meta:
            assert_same_bits([now.detach().to_dense()], [then.to_dense()])


@over_bad_inputs
def test_what_would_leave_a_tensor_is_refused_before_a_byte_changes(bad):
    assert_the_kernel_refuses(bad, torch.device("cpu"))


@pytest.mark.parametrize("backend", ["nvrtc", "triton"])
@over_bad_inputs
def test_no_launcher_in_python_gets_as_far_as_its_kernel(bad, backend, monkeypatch):
    def launched(*args: object) -> None:
        pytest.fail("a kernel is launched")

    if backend == "nvrtc":
        launchers = sm3_nvrtc
        monkeypatch.setattr(nvrtc, "launch", launched)
    else:
        pytest.importorskip("triton", reason="Triton is not installed: pip install 'leanops[triton]'")
        launchers = importlib.import_module("leanops.sm3.triton")
        monkeypatch.setattr(launchers, "_table", launched)
    with pytest.raises(bad.error, match=bad.message):
        launchers.sm3_step_(*bad.make(torch.device("cpu")))
