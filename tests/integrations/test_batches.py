"""Copies of batches: nothing is shared, and no more is copied than the batch holds."""

from __future__ import annotations

import subprocess
import sys
from collections import UserDict
from typing import Any

import pytest
import torch

from leanops.integrations.batches import copy_of


class Holder:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


def test_a_copy_shares_nothing_with_the_batch() -> None:
    x = torch.arange(6.0)
    batch: Any = UserDict({"x": x, "again": x, "nested": [{"y": (x[:2], "text")}], "held": Holder(x.clone()), "n": 3})
    own = copy_of(batch)
    assert type(own) is UserDict
    own["x"].zero_()
    own["nested"][0]["y"][0].zero_()
    own["held"].x.zero_()
    own["nested"][0].clear()
    del own["n"]
    assert torch.equal(x, torch.arange(6.0))
    assert torch.equal(batch["held"].x, x)
    assert batch["nested"][0]["y"][1] == "text"
    assert batch["n"] == 3
    assert own["again"] is own["x"]


def test_a_slice_is_copied_without_the_tensor_behind_it() -> None:
    rows = torch.zeros(1000, 8)
    assert copy_of({"x": rows[:2]})["x"].untyped_storage().nbytes() == 2 * 8 * 4


@pytest.mark.parametrize(
    ("module", "missing", "message"),
    [
        ("transformers", ["transformers"], "transformers must be installed with accelerate"),
        ("lightning", ["lightning", "pytorch_lightning"], "lightning must be installed, as in pip install lightning"),
    ],
)
def test_a_trainer_that_is_not_installed_is_named(module: str, missing: list[str], message: str) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import leanops.integrations.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"ImportError: leanops.integrations.{module}: {message}" in done.stderr
