"""Replay in memory and from file to file: the bits of the run, or an error before anything changes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from zo.runs import DTYPES, VARIANTS, run, same

import leanops as lo
from leanops.optim import LogError, MeZO, ZoLog, replay_, replay_file
from leanops.optim.zo import replay as replay_module
from leanops.optim.zo import replay_file as replay_file_module

FUSABLE = {name: options for name, options in VARIANTS.items() if options.get("variant") != "hizoo"}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replay_gives_the_bits_of_the_run(
    dtype: torch.dtype, options: dict[str, Any], rounding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a module, of its parameters in two parts, and of a file."""
    monkeypatch.setattr(replay_file_module, "_SLICE", 2)  # 16 bytes at a time: slices begin anywhere in a row
    monkeypatch.setattr(replay_module, "_SLICE", 7)
    start, end, opt = run(dtype, rounding=rounding, **options)
    assert not same(start, end)
    base, log, out = tmp_path / "base.safetensors", tmp_path / "run.zolog", tmp_path / "out.safetensors"
    buffers = {"count": torch.arange(5), "empty": torch.empty(0)}
    save_file({**{n: p.detach() for n, p in start.named_parameters()}, **buffers}, base, metadata={"format": "pt"})
    opt.log.save(log)
    seen: list[tuple[int, int]] = []
    replay_file(base, log, out, progress=lambda done, total: seen.append((done, total)))
    got = load_file(out)
    assert all(torch.equal(got[n], p) for n, p in end.named_parameters())
    assert all(torch.equal(got[n], t) for n, t in buffers.items())
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in got.values())
    halfway = copy.deepcopy(start)
    replay_(start, opt.log)
    assert same(start, end)
    replay_(list(halfway.parameters()), opt.log, stop=5)
    assert not same(halfway, end)
    replay_(dict(halfway.named_parameters()), ZoLog.from_bytes(opt.log.to_bytes()), start=5)
    assert same(halfway, end)


@pytest.mark.parametrize("name", ["plain", "low rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replay_reads_the_weights_once(dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start, end, opt = run(dtype, steps=40, **VARIANTS[name])
    calls: list[int] = []

    def counted(tensors: Any, seeds: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(len(seeds))
        lo.zo_axpy_(tensors, seeds, *args, **kwargs)

    monkeypatch.setattr(replay_module, "zo_axpy_", counted)
    replay_(start, opt.log)
    assert same(start, end)
    assert sorted(calls) == [36, 38]  # one call for the bias that was frozen for two steps, one for the others


@pytest.mark.parametrize("options", FUSABLE.values(), ids=FUSABLE.keys())
def test_fused_replay_is_the_same_sum(options: dict[str, Any]) -> None:
    start, end, opt = run(torch.float64, **options)
    replay_(start, opt.log, fused=True)
    for p, q in zip(start.parameters(), end.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_fused_replay_takes_a_step_that_decays_the_weights_to_nothing(mode: str) -> None:
    """At lr * weight_decay = 1 a step keeps nothing of the weights; what it and later steps add stays."""
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    start = p.detach().clone()
    opt = MeZO([p], lr=1.0, momentum=0.5, momentum_mode=mode, eps=0.1)
    for decay in (0.1, 1.0, 0.1, 0.2):
        opt.param_groups[0]["weight_decay"] = decay
        opt.step(lambda: p.square().sum())
    replay_([start], opt.log, fused=True)
    torch.testing.assert_close(start, p.detach(), rtol=1e-12, atol=1e-13)


def test_groups_that_join_replay_too() -> None:
    a, b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4))
    start = [a.detach().clone(), b.detach().clone()]
    opt = MeZO([a], lr=1e-2, momentum=0.5)
    for step in range(6):
        if step == 3:
            opt.add_param_group({"params": [b], "lr": 0.5})
        opt.step(lambda: (a**2).sum() + (b**2).sum())
    replay_(start, ZoLog.from_bytes(opt.log.to_bytes()))
    assert torch.equal(start[0], a)
    assert torch.equal(start[1], b)


def test_replay_refuses_other_parameters_and_changes_nothing() -> None:
    start, _, opt = run(torch.float32)
    before = copy.deepcopy(start)
    named = dict(start.named_parameters())
    with pytest.raises(LogError, match=r"not there: 3\.bias"):
        replay_({n: p for n, p in named.items() if n != "3.bias"}, opt.log)
    with pytest.raises(LogError, match="must be the log's 4 parameters, or have names, got 3 tensors"):
        replay_(list(named.values())[:3], opt.log)
    with pytest.raises(LogError, match=r"3\.bias must be float32 \[1\], got float32 \[2\]"):
        replay_({**named, "3.bias": torch.zeros(2)}, opt.log)
    with pytest.raises(LogError, match=r"3\.bias must be float32 \[1\], got float64 \[1\]"):
        replay_({**named, "3.bias": torch.zeros(1, dtype=torch.float64)}, opt.log)
    with pytest.raises(ValueError, match="start and stop"):
        replay_(start, opt.log, start=3, stop=99)
    with pytest.raises(ValueError, match=r"must be integers in order within \[0, 11\], got 0.5 and None"):
        replay_(start, opt.log, start=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="replay_: log must be a ZoLog or the name of its file, got int"):
        replay_(start, 3)  # type: ignore[arg-type]
    for params in (torch.ones(3), None, [1, 2, 3, 4], {"0.weight": 1}):
        with pytest.raises(TypeError, match="replay_: params must"):
            replay_(params, opt.log)  # type: ignore[arg-type]
    for names, error, message in (
        ({"typo": "0.weight"}, ValueError, "replay_: names must be of parameters of the log, got typo"),
        (3, TypeError, "replay_: names must be a mapping from the log's names, got 3"),
        ({"0.bias": 3}, LogError, "replay_: the log moves parameters that are not there: 3"),
        ({"0.bias": "0.weight"}, LogError, r"must have a name each, got 0\.weight for several"),
    ):
        with pytest.raises(error, match=message):
            replay_(start, opt.log, names=names)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names need params that have names"):
        replay_(list(named.values()), opt.log, names={"0.bias": "0.bias"})
    with pytest.raises(ValueError, match=r"replay_: parameter 0\.bias must not overlap itself"):
        replay_({**named, "0.bias": torch.zeros(1).expand(4)}, opt.log)
    other = ZoLog({**opt.log.header, "zo": "zo/9"})
    with pytest.raises(LogError, match="zo/9"):
        replay_(start, other)
    assert same(start, before)


def test_file_errors_leave_no_output(tmp_path: Path) -> None:
    start, _, opt = run(torch.float32)
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    tensors = {n: p.detach() for n, p in start.named_parameters()}
    for change, message in (
        ({"0.weight": torch.zeros(4, 2, 3).half()}, "got float16"),
        ({"0.weight": torch.zeros(5, 9)}, r"got float32 \[5, 9\]"),
    ):
        save_file({**tensors, **change}, base)
        with pytest.raises(LogError, match=message):
            replay_file(base, opt.log, out)
    save_file({n: t for n, t in tensors.items() if n != "3.bias"}, base)
    with pytest.raises(LogError, match=r"3\.bias, which is not in the file"):
        replay_file(base, opt.log, out)
    save_file(tensors, base)
    base.write_bytes(base.read_bytes()[:-3])
    with pytest.raises(LogError, match="truncated"):
        replay_file(base, opt.log, out)
    for data in (b"no safetensors at all", b"", (2).to_bytes(8, "little") + b"[]"):
        base.write_bytes(data)
        with pytest.raises(LogError, match="not a safetensors file"):
            replay_file(base, opt.log, out)
    save_file(tensors, base)
    with pytest.raises(ValueError, match="replay_file: names must be of parameters of the log, got typo"):
        replay_file(base, opt.log, out, names={"typo": "0.weight"})
    with pytest.raises(IsADirectoryError, match=f"{tmp_path}'"):
        replay_file(base, opt.log, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'/nowhere/out\.safetensors'"):
        replay_file(base, opt.log, "/nowhere/out.safetensors")
    with pytest.raises(FileNotFoundError, match=r"'/nowhere/run\.zolog'"):
        opt.log.save("/nowhere/run.zolog")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors"]
    opt.log.save(tmp_path / "run.zolog")
    with pytest.raises(ValueError, match="replay_file: out must be another file than the log"):
        replay_file(base, tmp_path / "run.zolog", tmp_path / "run.zolog")
    assert len(ZoLog.load(tmp_path / "run.zolog")) == 11


def move_border(count: int, table: dict[str, Any]) -> None:
    """Move the border between the first two tensors by ``count`` bytes."""
    first, second = sorted(table, key=lambda name: table[name]["data_offsets"])[:2]
    table[first]["data_offsets"][1] += count
    table[second]["data_offsets"][0] += count


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t["0.bias"].pop("dtype"), r"tensor 0\.bias must have a dtype, a shape and two data_offsets"),
        (lambda t: t["0.bias"].pop("shape"), r"tensor 0\.bias must have a dtype"),
        (lambda t: t["0.bias"].update(dtype=5), r"tensor 0\.bias must have a dtype"),
        (lambda t: t["0.bias"].update(shape="ab"), r"tensor 0\.bias must have a dtype"),
        (lambda t: t["0.bias"].update(shape=[-4]), r"tensor 0\.bias must have a dtype"),
        (lambda t: t["0.bias"].update(data_offsets=[0.0, 16.0]), r"tensor 0\.bias must have a dtype"),
        (lambda t: t["0.bias"].update(data_offsets=[0]), r"tensor 0\.bias must have a dtype"),
        (lambda t: t.update({"0.bias": 3}), r"tensor 0\.bias must have a dtype"),
        (lambda t: move_border(4, t), r"tensor 0\.bias must have the 16 bytes of F32 \[4\], got 20"),
        (lambda t: move_border(1, t), r"tensor 0\.bias must have the 16 bytes of F32 \[4\], got 17"),
        (lambda t: t.pop("0.bias"), "begins at byte 16 of the data, expected 0"),
    ],
)
def test_a_damaged_header_of_a_file_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    start, _, opt = run(torch.float32)
    base = tmp_path / "base.safetensors"
    save_file({n: p.detach() for n, p in start.named_parameters()}, base)
    data = base.read_bytes()
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    damage(table)
    text = json.dumps(table).encode()
    base.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(LogError, match=message):
        replay_file(base, opt.log, tmp_path / "out.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["base.safetensors"]


def test_files_of_tied_weights(tmp_path: Path) -> None:
    """The log has one name for tied weights. A file has one of the names, or both with a copy each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    start = model[0].weight.detach().clone()
    opt = MeZO(model.parameters(), lr=0.1, model=model)
    opt.step(lambda: model(torch.ones(3)).sum())
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({"1.weight": start}, base)
    replay_file(base, opt.log, out, names={"0.weight": "1.weight"})
    assert torch.equal(load_file(out)["1.weight"], model[0].weight)
    save_file({"0.weight": start, "1.weight": start.clone(), "other": start + 1}, base)
    with pytest.warns(UserWarning, match=r"1\.weight is a copy of 0\.weight, .* stays as it is") as told:
        replay_file(base, opt.log, out)
    assert len(told) == 1
    assert torch.equal(load_file(out)["1.weight"], start)
