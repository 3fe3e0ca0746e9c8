"""LISA: the blocks that it draws from, and the models and options that it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from selection.runs import (
    LAYERS,
    assert_same,
    net,
    net_with_lisa,
    snapshot,
)
from torch import nn

from leanops.optim import LISA, HalfFineTuning, MeZO, TensorSelector


@pytest.mark.parametrize(
    "blocks",
    [
        None,
        "layers",
        r"layers\.\d",
        lambda m: m.layers,
        lambda m: list(m.layers),
        lambda m: [f"layers.{i}" for i in range(LAYERS)],
    ],
)
def test_blocks_are_found_or_given_by_name_pattern_or_module(blocks: Any) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    lisa = LISA(model, optimizer, blocks=blocks(model) if callable(blocks) else blocks)
    assert lisa.blocks == [f"layers.{i}" for i in range(LAYERS)]


def test_experts_inside_blocks_are_not_taken_for_blocks() -> None:
    model = nn.ModuleDict(
        {
            "h": nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(8))}) for _ in range(3)
            )
        }
    )
    assert LISA(model, torch.optim.SGD(model.parameters())).blocks == ["h.0", "h.1", "h.2"]


def test_blocks_without_trainable_parameters_are_not_drawn() -> None:
    model = net()
    for p in [*model.layers[1].parameters(), *model.embed.parameters(), *model.layers[0].norm.parameters()]:
        p.requires_grad_(False)
    lisa = LISA(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), period=1)
    assert lisa.blocks == ["layers.0", "layers.2", "layers.3", "layers.4"]
    for steps in range(20):
        lisa.seek(steps)
        assert not any(n.startswith(("layers.1.", "embed", "layers.0.norm")) for n in lisa.trainable)


def test_a_weight_tied_to_a_block_trains_when_either_does() -> None:
    model = net()
    model.layers[1].up_proj.weight = model.layers[0].up_proj.weight  # a weight that two blocks share
    model.head.weight = model.embed.weight  # a shared weight outside the blocks counts once
    lisa = LISA(model, torch.optim.SGD(model.parameters()), active=1, period=1)
    for steps in range(20):
        lisa.seek(steps)
        shared = {"layers.0", "layers.1"} & set(lisa.active_blocks)
        assert model.layers[0].up_proj.weight.requires_grad == bool(shared)
        assert model.embed.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 6}, "LISA: active must be at most the number of blocks with trainable parameters, 5, got 6"),
        ({"active": 0}, "LISA: active must be an integer >= 1, got 0"),
        ({"active": 1.0}, "LISA: active must be an integer >= 1, got 1.0"),
        ({"period": 0}, "LISA: period must be an integer >= 1, got 0"),
        ({"period": True}, "LISA: period must be an integer >= 1, got True"),
        ({"seed": 2**64}, r"LISA: seed must be an integer in \[-2\^63, 2\^64\), got"),
        (
            {"blocks": "decoder"},
            "LISA: blocks must name modules of the model, got 'decoder', which matches none; "
            "its lists of modules: 'layers'",
        ),
        ({"blocks": "("}, r"LISA: blocks must be a name or a regular expression, got '\('"),
        ({"blocks": [nn.Linear(1, 1)]}, "LISA: blocks must be modules of the model or their names, got a Linear that"),
        ({"blocks": 5}, "LISA: blocks must be a regular expression, a module or a list, got 5"),
        ({"always": 5}, "LISA: always must be a regular expression, a module or a list, got 5"),
        ({"blocks": ["layers.9"]}, "LISA: blocks must be modules of the model or their names, got 'layers.9'"),
        ({"blocks": r"layers\.0.*"}, "LISA: blocks must not lie within one another, got layers.0 and layers.0.norm"),
        ({"always": "decoder"}, "LISA: always must match a trainable parameter's name, got 'decoder'"),
        ({"always": [nn.Linear(1, 1)]}, "LISA: always must hold modules or trainable parameters of the model, got a L"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_frozen(options: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message):
        LISA(model, torch.optim.SGD(model.parameters()), **options)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_that_another_selection_froze_is_refused() -> None:
    model, optimizer, lisa = net_with_lisa()
    before = snapshot(model, optimizer)
    for kind in (LISA, HalfFineTuning, TensorSelector):
        with pytest.raises(
            ValueError, match=rf"{kind.__name__}: model must be released first, got .* as LISA froze it"
        ):
            kind(model, optimizer)
    assert_same(snapshot(model, optimizer), before)
    lisa.release()
    assert LISA(model, optimizer).blocks == lisa.blocks


def test_bad_models_and_optimizers_are_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match=r"LISA: model must be a torch.nn.Module, got list"):
        LISA([model], optimizer)
    with pytest.raises(TypeError, match=r"LISA: optimizer must be a torch.optim.Optimizer, got float"):
        LISA(model, 0.1)
    with pytest.raises(ValueError, match="LISA: optimizer must keep its state by parameter, got LBFGS"):
        LISA(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="LISA: optimizer must not be MeZO with momentum_mode='store'"):
        LISA(model, MeZO(model.parameters(), momentum=0.9, momentum_mode="store"))
    with pytest.raises(ValueError, match="variant='hizoo': its log would not replay"):
        LISA(model, MeZO(model.parameters(), variant="hizoo"))
    some = [p for n, p in model.named_parameters() if not n.startswith("layers.3.")]
    with pytest.raises(ValueError, match=r"got one without layers.3.norm.weight \(6 of 34 are absent\)"):
        LISA(model, torch.optim.SGD(some))
    two = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(1, 1)]), "b": nn.ModuleList([nn.Linear(1, 1)])})
    with pytest.raises(ValueError, match=r"several stacks, got None; .*: 'a' \(1\), 'b' \(1\)"):
        LISA(two, torch.optim.SGD(two.parameters()), active=1)
    plain = nn.Sequential(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"blocks must be given for a model without a torch.nn.ModuleList, got None"):
        LISA(plain, torch.optim.SGD(plain.parameters()))
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="LISA: model must have parameters that require grad, got none"):
        LISA(model, optimizer)


class VisionLanguage(nn.Module):
    """The vision tower is deeper than the language model, whose blocks hold experts."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(6))})
        experts = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(9))}) for _ in range(4)]
        self.language = nn.ModuleDict({"layers": nn.ModuleList(experts)})
        self.heads = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize("selection", [LISA, HalfFineTuning])
def test_a_model_with_several_stacks_is_refused_with_their_names(selection: Any) -> None:
    model = VisionLanguage()
    sgd = torch.optim.SGD(model.parameters())
    with pytest.raises(
        ValueError, match=r"several stacks, got None; .*: 'tower.layers' \(6\), 'language.layers' \(4\)"
    ):
        selection(model, sgd)
    assert all(p.requires_grad for p in model.parameters())
    assert len(selection(model, sgd, blocks="language.layers").blocks) == 4


@pytest.mark.parametrize("selection", [LISA, HalfFineTuning])
def test_a_frozen_stack_is_ignored(selection: Any) -> None:
    model = VisionLanguage()
    model.tower.requires_grad_(False)
    assert selection(model, torch.optim.SGD(model.parameters())).blocks == [f"language.layers.{i}" for i in range(4)]


def test_numpy_integers_are_taken_as_integers() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    lisa = LISA(model, optimizer, active=np.int64(2), period=np.int32(3))
    assert (type(lisa.active), type(lisa.period), len(lisa.active_blocks)) == (int, int, 2)
