"""Parameters with the same memory, tied by ``p.data = q.data``, are one weight under several names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zo.runs import HIZOO

from leanops.optim import MeZO, ZoLog, replay_, replay_file

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.6},
    "stored momentum": {"momentum": 0.6, "momentum_mode": "store"},
    "low rank": {"distribution": "lowrank", "directions": 2},
    "stochastic": {"rounding": "stochastic"},
    "hizoo": {**HIZOO, "momentum": 0.6, "momentum_mode": "store"},
}


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mid, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.table(ids)).tanh())


def by_data(dtype: torch.dtype = torch.float32) -> Net:
    model = Net(dtype)
    model.head.weight.data = model.table.weight.data
    return model


def by_module(dtype: torch.dtype = torch.float32) -> Net:
    model = Net(dtype)
    model.head.weight = model.table.weight
    return model


def steps(opt: MeZO, model: nn.Module, n: int = 4) -> None:
    for _ in range(n):
        opt.step(lambda: model(torch.tensor([1, 6, 3])).double().square().mean())


@pytest.mark.parametrize("perturb", ["scratch", "copy", "inplace"])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_is_that_of_the_tied_module(
    dtype: torch.dtype, options: dict[str, Any], perturb: str, tmp_path: Path
) -> None:
    runs = []
    for make in (by_data, by_module):
        model = make(dtype)
        opt = MeZO(model.parameters(), lr=0.05, weight_decay=0.1, model=model, perturb=perturb, **options)
        steps(opt, model)
        runs.append((model, opt))
    (model, opt), (wanted, other) = runs
    assert torch.equal(torch.from_numpy(opt.log.scalars()), torch.from_numpy(other.log.scalars()))
    assert torch.equal(model.table.weight, wanted.table.weight)
    assert torch.equal(model.mid.weight, wanted.mid.weight)
    assert model.head.weight.data_ptr() == model.table.weight.data_ptr()
    assert not torch.equal(model.table.weight, Net(dtype).table.weight)
    log = ZoLog.from_bytes(opt.log.to_bytes())
    assert [e.get("tied") for e in log.params()] == [None, None, None, 0]
    assert len(opt.state) == len(other.state)
    if perturb == "inplace":
        return
    apart = by_data(dtype)  # the second weight is a copy, as a file may hold it
    apart.head.weight.data = apart.table.weight.data.clone()
    for start in (by_data(dtype), by_module(dtype), apart, list(by_data(dtype).parameters())):
        replay_(start, log)
        found = start if isinstance(start, list) else [p for _, p in start.named_parameters(remove_duplicate=False)]
        assert all(map(torch.equal, found, model.parameters()))
    tensors = {n: p.detach().clone() for n, p in by_data(dtype).named_parameters()}
    for left_out in ((), ("head.weight",)):
        save_file({n: t for n, t in tensors.items() if n not in left_out}, tmp_path / "base")
        replay_file(tmp_path / "base", log, tmp_path / "out")
        out = load_file(tmp_path / "out")
        assert all(torch.equal(out[n], p) for n, p in model.named_parameters() if n not in left_out)
    half = by_data(dtype)
    first = MeZO(half.parameters(), lr=0.05, weight_decay=0.1, model=half, perturb=perturb, **options)
    steps(first, half, 2)
    again = copy.deepcopy(half)
    again.head.weight.data = again.table.weight.data
    second = MeZO(again.parameters(), model=again, perturb=perturb, **options)
    second.load_state_dict(first.state_dict())
    steps(second, again, 2)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


@pytest.mark.parametrize("frozen", ["table", "head"])
def test_a_tied_weight_moves_if_one_of_its_parameters_requires_grad(frozen: str) -> None:
    model = by_data()
    getattr(model, frozen).weight.requires_grad_(False)
    start = by_data()
    opt = MeZO(model.parameters(), lr=0.05, model=model)
    steps(opt, model)
    assert not torch.equal(model.table.weight, start.table.weight)
    assert torch.equal(model.table.weight, model.head.weight)
    replay_(start, opt.log)
    assert torch.equal(model.table.weight, start.table.weight)


def test_groups_that_join_may_be_tied_and_a_weight_may_be_excluded() -> None:
    p = nn.Parameter(torch.ones(3))
    q, start = nn.Parameter(p.data), [torch.ones(3), torch.ones(3)]
    opt = MeZO([p], lr=0.1)
    opt.step(lambda: p.square().sum())
    opt.add_param_group({"params": [q]})
    opt.step(lambda: (p * q).sum())
    assert torch.equal(p, q)
    replay_(start, ZoLog.from_bytes(opt.log.to_bytes()))
    assert torch.equal(start[0], p)
    model = by_data()
    with pytest.raises(ValueError, match=r"exclude must name both of table\.weight and head\.weight"):
        MeZO(model.parameters(), model=model, exclude={"head.weight": [0]})
    for name in ("table.weight", "head.weight"):
        with pytest.raises(ValueError, match="exclude must name both"):
            MeZO(model.parameters(), model=model, exclude=name)
    opt = MeZO(model.parameters(), lr=0.1, model=model, exclude={"table.weight": [0], "head.weight": [0]})
    steps(opt, model)
    kept = (model.table.weight == by_data().table.weight).all(1).tolist()
    assert kept == [True] + [False] * 6


def test_cutting_a_tie_during_a_run_is_refused_and_so_are_partial_overlaps() -> None:
    model = by_data()
    opt = MeZO(model.parameters(), lr=0.1, model=model)
    model.head.weight.data = model.head.weight.data.clone()  # allowed before the first step
    steps(opt, model, 1)
    assert not torch.equal(model.table.weight, model.head.weight)
    assert not opt.log.ties()
    model = by_data()
    opt = MeZO(model.parameters(), lr=0.1, model=model)
    steps(opt, model, 1)
    model.head.weight.data = model.head.weight.data.clone()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"share memory .* were \{3: 0\} when the run began, now they are \{\}"):
        steps(opt, model, 1)
    assert all(map(torch.equal, before.parameters(), model.parameters()))
    whole = torch.zeros(3, 3)
    for part in (whole[1:], whole.t(), whole.view(9)):
        with pytest.raises(ValueError, match="parameter 0 and parameter 1 must not overlap in memory"):
            MeZO([nn.Parameter(whole), nn.Parameter(part)])
