"""The native kernel below the checks, where the optimizer calls it."""

from __future__ import annotations

import pytest
import torch
from opsuite import assert_same_bits, clone, tensors

from leanops import _registry

SPEC = _registry.spec("sm3_step_")
# overlaps, which the memory check finds, and numbers that no memory depends on
ELSEWHERE = {"expanded", "shared storage", "requires grad", "offset overflow", "momentum 1", "momentum nan", "beta 0"}
ELSEWHERE |= {"beta 2", "eps", "eps inf", "decay", "decay nan"}


@pytest.mark.parametrize("bad", [b for b in SPEC.bad_inputs if b.name not in ELSEWHERE], ids=lambda b: b.name)
def test_what_would_leave_a_tensor_is_refused_before_a_byte_changes(bad):
    args = bad.make(torch.device("cpu"))
    before = clone(args)
    with pytest.raises(RuntimeError):
        SPEC.launch(torch.device("cpu"), *args)
    for now, then in zip(tensors(args), tensors(before), strict=True):
        if not now.is_meta:
            assert_same_bits([now.detach().to_dense()], [then.to_dense()])
