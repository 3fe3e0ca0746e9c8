"""MeZO's exclude=: parameters and rows that keep their bits, in the run and in its replay."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from zo.runs import DTYPES, HIZOO

from leanops.optim import MeZO, ZoLog, replay_, replay_file
from leanops.optim.zo import hizoo
from leanops.optim.zo import replay as replay_module
from leanops.optim.zo import replay_file as replay_file_module

ROWS = {"0.weight": [0, 3, 4, -1]}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stochastic": {"rounding": "stochastic"},
    "momentum": {"momentum": 0.6},
    "stored momentum": {"momentum": 0.6, "momentum_mode": "store"},
    "low rank": {"distribution": "lowrank", "directions": 2},
    "hizoo": {**HIZOO, "momentum": 0.6, "momentum_mode": "store"},
}


def make(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Flatten(), nn.Linear(8, 2), nn.LayerNorm(2)).to(dtype)


def steps(opt: MeZO, model: nn.Module, n: int = 4) -> None:
    ids = torch.tensor([[0, 3], [1, 8], [5, 2]])
    for _ in range(n):
        opt.step(lambda: model(ids).double().square().sum() + model[2].bias.double().sum())  # type: ignore[index]


@pytest.mark.parametrize("perturb", ["scratch", "copy", "inplace"])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_excluded_rows_keep_their_bits(
    dtype: torch.dtype, options: dict[str, Any], perturb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_module, "_SLICE", 7)
    monkeypatch.setattr(replay_file_module, "_SLICE", 2)
    monkeypatch.setattr(hizoo, "_SLICE", 5)
    model = make(dtype)
    start, again = copy.deepcopy(model), copy.deepcopy(model)
    opt = MeZO(model.parameters(), lr=0.05, weight_decay=0.3, model=model, perturb=perturb, exclude=ROWS, **options)
    steps(opt, model)
    same = (model[0].weight == start[0].weight).all(1).tolist()
    assert same == [i in (0, 3, 4, 8) for i in range(9)]
    log = ZoLog.from_bytes(opt.log.to_bytes())
    assert [e.get("fixed_rows") for e in log.params()] == [[[0, 1], [3, 5], [8, 9]], None, None, None, None]
    assert "fixed_rows" not in MeZO(start.parameters()).log.params()[0]
    if perturb == "inplace":
        return
    save_file({n: p.detach() for n, p in start.named_parameters()}, tmp_path / "base")
    replay_(start, log)
    assert all(map(torch.equal, start.parameters(), model.parameters()))
    replay_file(tmp_path / "base", log, tmp_path / "out")
    assert all(torch.equal(load_file(tmp_path / "out")[n], p) for n, p in model.named_parameters())
    half = MeZO(again.parameters(), lr=0.05, weight_decay=0.3, model=again, perturb=perturb, exclude=ROWS, **options)
    steps(half, again, 2)
    resumed = MeZO(again.parameters(), model=again, perturb=perturb, exclude=ROWS, **{**options, "momentum": 0})
    resumed.load_state_dict(half.state_dict())
    steps(resumed, again, 2)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


@pytest.mark.parametrize("perturb", ["scratch", "copy", "inplace"])
@pytest.mark.parametrize("options", [{}, HIZOO], ids=["spsa", "hizoo"])
def test_excluded_rows_are_not_perturbed(perturb: str, options: dict[str, Any]) -> None:
    """Scratch perturbs a large table row by row, where rows are looked up."""
    table = nn.Embedding(40_000, 4)
    before = table.weight.detach().clone()
    seen: list[torch.Tensor] = []
    opt = MeZO(table.parameters(), lr=0.1, exclude={table.weight: [5, 39_999]}, perturb=perturb, **options)
    opt.step(lambda: seen.append(table(torch.tensor([5, 6, 39_999, 5]))) or seen[-1].sum())
    for rows in seen[:2]:
        assert torch.equal(rows[[0, 2, 3]], before[[5, 39_999, 5]])
        assert not torch.equal(rows[1], before[6])
    assert torch.equal(table.weight[[5, 39_999]], before[[5, 39_999]])
    assert not torch.equal(table.weight[6], before[6])


def test_rows_of_a_matrix_that_is_not_contiguous_keep_their_bits() -> None:
    w = nn.Parameter(torch.randn(4, 6).t())
    before = w.detach().clone()
    for perturb in ("scratch", "copy", "inplace"):
        opt = MeZO([w], lr=0.1, exclude={w: slice(1, 3)}, perturb=perturb)
        opt.step(lambda: w.square().sum())
        assert (w == before).all(1).tolist() == [False, True, True, False, False, False]


@pytest.mark.parametrize(
    "exclude",
    ["2.bias", ["2.bias"], re.compile(r"^2\.bias$"), {"2.bias": None}, {re.compile("bias"): slice(None)}, "parameter"],
    ids=str,
)
def test_a_parameter_is_excluded_by_name_pattern_or_itself(exclude: Any) -> None:
    model = make(torch.float32)
    model[3].bias.requires_grad_(False)
    start = copy.deepcopy(model)
    opt = MeZO(
        model.parameters(),
        lr=0.05,
        momentum=0.5,
        weight_decay=0.1,
        model=model,
        exclude=[model[2].bias] if exclude == "parameter" else exclude,
    )
    steps(opt, model)
    moved = {n for (n, p), q in zip(model.named_parameters(), start.parameters(), strict=True) if not torch.equal(p, q)}
    assert moved == {"0.weight", "2.weight", "3.weight"}
    replay_(start, opt.log)
    assert all(map(torch.equal, start.parameters(), model.parameters()))
    same, twin = copy.deepcopy((model, opt))
    steps(twin, same, 1)
    assert torch.equal(same[2].bias, model[2].bias)
    assert not torch.equal(same[2].weight, model[2].weight)


@pytest.mark.parametrize(
    ("exclude", "moved"),
    [({re.compile("[ab]"): 1}, ([0], [0, 2])), ([re.compile("[ab]")], ([], []))],
    ids=["a row", "a parameter"],
)
def test_a_group_that_joins_is_excluded_too(exclude: Any, moved: tuple[list[int], list[int]]) -> None:
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3, 2))
    starts = [a.detach().clone(), b.detach().clone()]
    opt = MeZO([("a", a)], lr=0.1, exclude=exclude)
    for _ in range(3):
        opt.step(lambda: a.square().sum() + b.square().sum())
        if len(opt.log) == 1:
            opt.add_param_group({"params": [("b", b)]})
    for p, start, rows in zip((a, b), starts, moved, strict=True):
        assert (p != start).any(1).nonzero().flatten().tolist() == rows
    replay_(starts, ZoLog.from_bytes(opt.log.to_bytes()))
    assert torch.equal(starts[0], a)
    assert torch.equal(starts[1], b)


@pytest.mark.parametrize(
    ("exclude", "error", "message"),
    [
        ("embed", ValueError, "exclude must name parameters of the optimizer, got 'embed'"),
        (re.compile("x"), ValueError, "exclude must name parameters"),
        (torch.ones(2), ValueError, r"exclude must name parameters .* a tensor of shape \[2\]"),
        (3, TypeError, "exclude must hold names, patterns or parameters, got 3"),
        ([3], TypeError, "exclude must hold names, patterns or parameters, got int"),
        ({"0.weight": [9]}, ValueError, r"rows of 0\.weight in \[-9, 9\), got 9"),
        ({"0.weight": ["a"]}, ValueError, "got 'a'"),
        ({"0.weight": True}, ValueError, "got True"),
    ],
)
def test_a_bad_exclude_is_refused(exclude: Any, error: type[Exception], message: str) -> None:
    model = make(torch.float32)
    with pytest.raises(error, match=message):
        MeZO(model.parameters(), model=model, exclude=exclude)


def test_a_run_resumes_only_with_the_same_excluded_rows() -> None:
    model = make(torch.float32)
    opt = MeZO(model.parameters(), model=model, exclude=ROWS)
    for exclude in (None, {"0.weight": [0]}):
        other = MeZO(model.parameters(), model=model, exclude=exclude)
        with pytest.raises(ValueError, match=r"exclude must have the saved run's rows of 0\.weight"):
            other.load_state_dict(opt.state_dict())
