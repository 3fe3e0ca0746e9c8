"""MeZO refuses bad settings, parameters, closures and states before anything changes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from leanops.optim import MeZO, ZoLog


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps must be .*> 0"),
        ({"eps": math.nan}, "eps"),
        ({"lr": -1.0}, "lr must be .*>= 0"),
        ({"lr": math.nan}, "lr"),
        ({"lr": torch.ones(2)}, r"lr must be a finite number >= 0, got tensor"),
        ({"eps": None}, "eps must be a finite number > 0, got None"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"momentum": 1.0}, "momentum must be below 1"),
        ({"directions": 0}, "directions must be an integer >= 1, got 0"),
        ({"directions": 1.5}, "directions"),
        ({"directions": True}, "directions must be an integer >= 1, got True"),
        ({"distribution": "lowrank", "rank": True}, "rank must be an integer in .*got True"),
        ({"distribution": "lowrank", "period": "5"}, "period must be an integer in .*got '5'"),
        ({"variant": "fzoo"}, "at least 2 directions"),
        ({"variant": "spsb"}, "variant must be one of .*spsb"),
        ({"distribution": "normal"}, "distribution must be one of .*normal"),
        ({"rounding": "up"}, "rounding must be one of .*up"),
        ({"perturb": "maybe"}, "perturb must be one of .*maybe"),
        ({"momentum_mode": "x"}, "momentum_mode"),
        ({"on_nonfinite": "x"}, "on_nonfinite"),
        ({"parallel": "x"}, "parallel"),
        ({"parallel": "direction"}, "process_group"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeZO([nn.Parameter(torch.zeros(2))], **options)


@pytest.mark.parametrize("text", ["1e-6", "0.5", b"0.5", np.str_("0.5"), "fast"])
def test_a_number_given_as_text_is_a_type_error_in_options_groups_and_steps(text: Any) -> None:
    """YAML reads 1e-6 as text and float() takes it, so a scheduler would fail later, when it multiplies."""
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for name in ("lr", "eps", "weight_decay", "momentum", "smoothing"):
        with pytest.raises(TypeError, match=rf"MeZO: {name} must be a finite number .*, which is text"):
            MeZO([p], **{name: text})
    opt = MeZO([p])
    with pytest.raises(TypeError, match="MeZO: eps must be"):
        opt.eps = text
    for name in ("lr", "weight_decay", "momentum"):
        with pytest.raises(TypeError, match=f"MeZO: {name} must be"):
            opt.add_param_group({"params": [q], name: text})
        assert len(opt.param_groups) == 1
        kept, opt.param_groups[0][name] = opt.param_groups[0][name], text
        with pytest.raises(TypeError, match=f"MeZO: {name} must be"):
            opt.step(lambda: p.sum())
        opt.param_groups[0][name] = kept
    assert torch.equal(p.detach(), torch.ones(2))
    opt.step(lambda: p.sum())
    assert len(opt.log) == 1


def test_integers_of_numpy_and_other_libraries_are_integers() -> None:
    p = nn.Parameter(torch.ones(3, 2))
    numbers = {"directions": np.int64(2), "rank": np.uint8(1), "period": np.int32(3), "seed": np.int16(5)}
    opt = MeZO([p], distribution="lowrank", **numbers)
    opt.step(lambda: p.square().sum())
    header = ZoLog.from_bytes(opt.log.to_bytes()).header
    assert [header[name] for name in numbers] == [2, 1, 3, 5]
    with pytest.raises(ValueError, match="directions must be an integer"):
        MeZO([p], directions=np.bool_(True))  # type: ignore[arg-type]


def test_bad_parameters_are_refused_and_nothing_is_added() -> None:
    whole, matrix = torch.zeros(8), torch.zeros(3, 4)
    bad: list[tuple[Any, str]] = [
        ([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], "complex64"),
        ([torch.eye(3).to_sparse().requires_grad_()], "dense"),
        ([nn.Parameter(torch.zeros(2, device="meta"))], "parameter . must have data, got a meta tensor"),
        ([nn.Parameter(torch.zeros(3).expand(2, 3))], "parameter . must not overlap itself"),
        ([nn.Parameter(whole[:5]), nn.Parameter(whole[3:])], "parameter 0 and parameter 1 must not overlap in memory"),
        ([nn.Parameter(matrix), nn.Parameter(matrix.t())], "parameter 0 and parameter 1 must not overlap in memory"),
        ([], "empty parameter list"),
    ]
    for params, message in bad:
        with pytest.raises(ValueError, match=message):
            MeZO(params)
    with pytest.raises(TypeError):
        MeZO(torch.zeros(3))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module or None, got int"):
        MeZO([nn.Parameter(torch.zeros(3))], model=3)  # type: ignore[arg-type]
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="twice"), pytest.warns(UserWarning, match="duplicate"):
        MeZO([p, p])
    opt = MeZO([p])
    opt.add_param_group({"params": [nn.Parameter(matrix[:, :3])]})
    bad.append(([nn.Parameter(matrix[:, 1:])], "parameter 1 and parameter 2 must not overlap in memory"))
    for params, message in [*bad[:4], bad[-1]]:
        with pytest.raises(ValueError, match=message):
            opt.add_param_group({"params": params})
    assert len(opt.param_groups) == 2


def test_frozen_parameters_may_be_of_any_kind_until_they_move() -> None:
    """As a quantised base under adapters is."""
    codes, p = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False), nn.Parameter(torch.ones(3))
    opt = MeZO([codes, p], lr=1.0)
    opt.step(lambda: p.sum() * codes.sum())
    assert codes.tolist() == [1, 1]
    assert not torch.equal(p, torch.ones(3))
    other = nn.Parameter(p.detach()[1:], requires_grad=False)
    opt.add_param_group({"params": [other]})
    before = p.detach().clone()
    other.requires_grad_()
    with pytest.raises(ValueError, match=r"MeZO\.step: parameter 1 and parameter 2 must not overlap in memory"):
        opt.step(lambda: p.sum())
    assert torch.equal(p, before)
    assert len(opt.log) == 1


def test_bad_closures_and_states_are_refused_and_nothing_changes() -> None:
    p = nn.Parameter(torch.randn(5))
    before = p.detach().clone()
    opt = MeZO([p], lr=1.0)
    with pytest.raises(RuntimeError, match=r"needs a closure.*opt.step\(lambda"):
        opt.step()
    with pytest.raises(ValueError, match=r"scalar.*\[5\]"):
        opt.step(lambda: p * 2)
    for nothing in (None, {}, "low"):  # a fresh optimizer as well, since it inspects its first evaluation
        for fresh in (opt, MeZO([p, nn.Parameter(torch.randn(2))], lr=1.0)):
            with pytest.raises(TypeError, match=rf"MeZO.step: closure must .* got {type(nothing).__name__}"):
                fresh.step(lambda: nothing)  # noqa: B023
    opt.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr"):
        opt.step(lambda: p.sum())
    opt.param_groups[0]["lr"] = 1.0
    assert torch.equal(p, before)
    with pytest.raises(ValueError, match="no entry 'mezo'"):
        opt.load_state_dict(torch.optim.SGD([p], lr=1.0).state_dict())
    part = MeZO([p], lr=0.25).state_dict()
    del part["mezo"]["eps"]
    with pytest.raises(ValueError, match="'mezo' must hold 'log' and 'eps', it lacks eps"):
        opt.load_state_dict(part)
    assert opt.param_groups[0]["lr"] == 1.0
    with pytest.raises(ValueError, match="rounding must be the saved run's"):
        opt.load_state_dict(MeZO([p], rounding="stochastic").state_dict())
    with pytest.raises(ValueError, match=r"parameter .*must be"):
        opt.load_state_dict(MeZO([nn.Parameter(torch.zeros(6))]).state_dict())
    opt.step(lambda: p.sum())
    p.data = p.data.half()
    with pytest.raises(RuntimeError, match="would not replay"):
        opt.step(lambda: p.sum())
