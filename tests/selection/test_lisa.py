"""LISA: the blocks that train, the frozen blocks that cost nothing, and runs that resume to the same bits."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
import weakref
from collections import Counter
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from selection.runs import (
    BLOCK_DW,
    LAYERS,
    OPTIMIZERS,
    Net,
    assert_same,
    backward_flops,
    loss_of,
    net,
    net_with_lisa,
    snapshot,
    state_bytes,
)
from torch import Tensor

from leanops.optim import LISA


def train(model: Net, optimizer: torch.optim.Optimizer, lisa: LISA, first: int, last: int) -> None:
    for step in range(first, last):
        loss_of(model, step).backward()
        optimizer.step()
        lisa.step()
        optimizer.zero_grad()


def blocks_of(names: list[str]) -> set[str]:
    return {n.rpartition(".")[0].rpartition(".")[0] for n in names if n.startswith("layers.")}


# --- the draws ------------------------------------------------------------------------------------------------------


def test_every_set_of_blocks_is_as_likely_as_any_other() -> None:
    """Chi-square over the 10 pairs of 5 blocks in 2,000 rounds: 9 degrees of freedom, 27.9 at p = .001."""
    _, _, lisa = net_with_lisa(period=1)
    rounds = 2000
    seen = Counter(tuple(lisa._drawn(r)) for r in range(rounds))
    pairs = list(combinations(lisa.blocks, 2))
    assert set(seen) == set(pairs)  # every pair is of two different blocks
    expected = rounds / len(pairs)
    assert sum((seen[p] - expected) ** 2 / expected for p in pairs) < 27.9


def test_rounds_are_independent() -> None:
    """A block that trains is as likely as any other to train in the next round: 2/5 of 2,000, within 5 deviations."""
    _, _, lisa = net_with_lisa(period=1)
    drawn = [set(lisa._drawn(r)) for r in range(2001)]
    again = sum(len(a & b) for a, b in pairwise(drawn))
    assert abs(again - 2000 * 2 * 2 / 5) < 5 * math.sqrt(2000 * 2 * 2 / 5)


def test_draws_follow_from_the_seed_and_the_round_and_never_change() -> None:
    a, b, other = (net_with_lisa(seed=s)[2] for s in (7, 7, 8))
    rounds = range(40)
    assert [a._drawn(r) for r in rounds] == [b._drawn(r) for r in rounds] != [other._drawn(r) for r in rounds]
    first_rounds = [[int(n.split(".")[1]) for n in a._drawn(r)] for r in range(6)]
    assert first_rounds == KNOWN  # a change would draw other blocks after an old checkpoint


KNOWN = [[1, 4], [1, 3], [0, 4], [3, 4], [0, 4], [3, 4]]


def test_blocks_change_every_period_and_not_within() -> None:
    model, optimizer, lisa = net_with_lisa(period=3)
    seen = []
    for step in range(12):
        assert blocks_of(lisa.trainable) == set(lisa.active_blocks)
        assert lisa.round == step // 3
        seen.append(tuple(lisa.active_blocks))
        train(model, optimizer, lisa, step, step + 1)
    assert all(len(set(seen[i : i + 3])) == 1 for i in range(0, 12, 3))
    assert len(set(seen)) > 1


# --- frozen blocks cost nothing -------------------------------------------------------------------------------------


def test_embedding_norm_and_head_always_train() -> None:
    model, optimizer, lisa = net_with_lisa()
    assert set(lisa.always) == {"embed.weight", "final.weight", "final.bias", "head.weight"}
    for step in range(7):
        train(model, optimizer, lisa, step, step + 1)
        assert set(lisa.always) <= set(lisa.trainable)


def test_always_chooses_the_parameters_that_always_train() -> None:
    model, optimizer, lisa = net_with_lisa(always=r"^head|final")
    assert lisa.always == ["final.bias", "final.weight", "head.weight"]
    train(model, optimizer, lisa, 0, 7)
    assert not model.embed.weight.requires_grad
    model = net()
    lisa = LISA(model, torch.optim.SGD(model.parameters()), always=[model.head, model.final.bias, "layers.0.norm"])
    assert lisa.always == ["final.bias", "head.weight", "layers.0.norm.bias", "layers.0.norm.weight"]
    lisa.release()
    for module_or_parameter in (model.head, model.head.weight):
        lisa = LISA(model, torch.optim.SGD(model.parameters()), always=module_or_parameter)
        assert lisa.always == ["head.weight"]
        for p in model.parameters():
            p.requires_grad_(True)
    assert LISA(model, torch.optim.SGD(model.parameters()), always=()).always == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_frozen_blocks_is_freed(name: str) -> None:
    """The optimizer's state has the bytes of the trainable parameters, and the frozen ones' tensors are freed."""
    model, optimizer, lisa = net_with_lisa(name)
    size = OPTIMIZERS[name][1]
    train(model, optimizer, lisa, 0, 3)  # the last of these steps ends round 0
    ends = {n: model.get_parameter(n) for n in lisa.always}
    for step in range(3, 12):
        loss_of(model, step).backward()
        optimizer.step()
        training = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert state_bytes(optimizer) == sum(map(size, training.values()))
        gone = [
            weakref.ref(t)
            for n, p in training.items()
            if n not in ends
            for t in optimizer.state[p].values()
            if isinstance(t, Tensor) and t.numel() > 1
        ]
        before = set(lisa.active_blocks)
        lisa.step()
        optimizer.zero_grad()
        if not before & set(lisa.active_blocks):
            gc.collect()
            assert not any(ref() is not None for ref in gone)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert not any(p in optimizer.state for p in frozen)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_blocks_do_not_move_and_the_others_all_do(name: str) -> None:
    """Neither weight decay nor momentum moves frozen blocks; they stay in their parameter groups."""
    model, optimizer, lisa = net_with_lisa(name)
    for step in range(9):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        training = set(lisa.trainable)
        loss_of(model, step).backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == training
        optimizer.step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == training
        lisa.step()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.zero_grad()
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_gradients_of_frozen_blocks_are_not_computed() -> None:
    full = backward_flops(lambda: loss_of(net()))
    for active in range(1, LAYERS + 1):
        model, _, _ = net_with_lisa(active=active)
        assert backward_flops(lambda m=model: loss_of(m)) == full - (LAYERS - active) * BLOCK_DW


def test_a_block_that_trains_again_starts_as_a_new_optimizer_does() -> None:
    """A round equals plain AdamW on a model frozen by hand, with new state for the round's blocks."""
    model, optimizer, lisa = net_with_lisa(period=4)
    plain = net()
    reference = OPTIMIZERS["AdamW"][0](plain.parameters())
    for round_ in range(4):
        active = lisa._drawn(round_)
        for n, p in plain.named_parameters():
            p.requires_grad_(n in lisa.always or any(n.startswith(f"{b}.") for b in active))
            if not p.requires_grad:
                reference.state.pop(p, None)
        for step in range(4 * round_, 4 * round_ + 4):
            loss_of(plain, step).backward()
            reference.step()
            reference.zero_grad()
        train(model, optimizer, lisa, 4 * round_, 4 * round_ + 4)
        assert_same([p.detach() for p in model.parameters()], [p.detach() for p in plain.parameters()])


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["lisa first", "optimizer first", "lisa made last"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_to_the_same_bits_in_the_middle_of_a_round(name: str, order: str) -> None:
    for stop in (4, 5, 6):  # in round 1, before its last step, and between rounds
        model, optimizer, lisa = net_with_lisa(name, seed=3)
        train(model, optimizer, lisa, 0, stop)
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), lisa.state_dict()], file)
        train(model, optimizer, lisa, stop, 11)

        file.seek(0)
        weights, state, position = torch.load(file, weights_only=True)
        again = net(seed=9)
        again.load_state_dict(weights)
        resumed = OPTIMIZERS[name][0](again.parameters())
        if order == "lisa made last":
            resumed.load_state_dict(state)
        sampler = LISA(again, resumed, active=2, period=3, seed=3)
        if order == "optimizer first":
            resumed.load_state_dict(state)
        sampler.load_state_dict(position)
        if order == "lisa first":
            resumed.load_state_dict(state)
        train(again, resumed, sampler, stop, 11)
        assert sampler.state_dict() == lisa.state_dict()
        assert_same(snapshot(again, resumed), snapshot(model, optimizer))


def test_seek_goes_where_the_steps_lead() -> None:
    _, _, a = net_with_lisa()
    model, optimizer, b = net_with_lisa()
    for steps in (7, 3, 2, 100):
        a.seek(steps)
        b._steps, b._round = steps, steps // 3
        b._apply()
        assert (a.steps, a.round, a.trainable) == (b.steps, b.round, b.trainable)
    train(model, optimizer, b, 0, 1)


@pytest.mark.parametrize("other", [{"active": 1}, {"period": 4}, {"seed": 1}, {"always": "head"}])
def test_a_state_of_another_run_is_refused_and_changes_nothing(other: dict[str, Any]) -> None:
    _, _, lisa = net_with_lisa()
    model, optimizer, different = net_with_lisa(**other)
    train(model, optimizer, different, 0, 4)
    before, position = snapshot(model, optimizer), different.state_dict()
    with pytest.raises(ValueError, match=rf"LISA.load_state_dict: {next(iter(other))} must be the saved run's, "):
        different.load_state_dict(lisa.state_dict())
    with pytest.raises(ValueError, match="state_dict must be one of LISA, got one without 'period'"):
        different.load_state_dict({"steps": 3})
    with pytest.raises(ValueError, match="steps must be an integer >= 0, got -1"):
        different.load_state_dict({**position, "steps": -1})
    assert_same(snapshot(model, optimizer), before)
    assert different.state_dict() == position


# --- counting steps -------------------------------------------------------------------------------------------------


def test_a_hook_counts_the_same_steps_as_calls() -> None:
    model, optimizer, lisa = net_with_lisa()
    hooked, opt, counted = net_with_lisa()
    counted.attach()
    for step in range(8):
        train(model, optimizer, lisa, step, step + 1)
        loss_of(hooked, step).backward()
        opt.step()
        opt.zero_grad()
    assert_same(snapshot(hooked, opt), snapshot(model, optimizer))
    with pytest.raises(RuntimeError, match=r"LISA.step: attach\(\) counts the steps already"):
        counted.step()
    counted.release()
    assert all(p.requires_grad for p in hooked.parameters())
    opt.step()
    assert counted.steps == 8


def test_a_hook_removed_by_its_handle_counts_no_more_steps() -> None:
    model, optimizer, lisa = net_with_lisa()
    loss_of(model).backward()
    lisa.attach().remove()
    optimizer.step()
    assert lisa.steps == 0
    lisa.step()  # count by calls again
    assert lisa.steps == 1
    lisa.attach()
    optimizer.step()
    assert lisa.steps == 2


@pytest.mark.parametrize("attached", [True, False])
def test_copies_count_their_own_optimizers_steps(attached: bool) -> None:
    def train_on(model: Net, optimizer: torch.optim.Optimizer, lisa: LISA) -> list[Any]:
        for step in range(4, 9):
            loss_of(model, step).backward()
            optimizer.step()
            if not attached:
                lisa.step()
            optimizer.zero_grad()
        return [lisa.state_dict(), snapshot(model, optimizer)]

    model, optimizer, lisa = net_with_lisa()
    train(model, optimizer, lisa, 0, 4)
    if attached:
        lisa.attach()
    copies = [copy.deepcopy((model, optimizer, lisa)), pickle.loads(pickle.dumps((model, optimizer, lisa)))]
    expected = train_on(model, optimizer, lisa)
    assert lisa.steps == 9
    for copied in copies:
        assert_same(train_on(*copied), expected)


def test_nothing_is_frozen_after_release_until_a_position_is_given() -> None:
    model, optimizer, lisa = net_with_lisa(period=2)
    train(model, optimizer, lisa, 0, 3)
    position, trains = lisa.state_dict(), lisa.trainable
    lisa.release()
    train(model, optimizer, lisa, 3, 9)
    assert all(p.requires_grad for p in model.parameters())
    assert lisa.steps == 3
    model.embed.weight.requires_grad_(False)  # LISA has released the model and no longer changes it
    lisa.release()
    assert not model.embed.weight.requires_grad
    for resume in (lambda: lisa.seek(3), lambda: lisa.load_state_dict(position)):
        resume()
        assert lisa.trainable == trains
        lisa.release()


def test_an_optimizer_that_counts_steps_by_group_gets_a_warning_with_its_name() -> None:
    peers = pytest.importorskip("pytorch_optimizer", reason="pip install 'leanops[dev]'")
    model = net()
    optimizer = peers.AdamP(model.parameters(), lr=1e-3)
    lisa = LISA(model, optimizer, active=2, period=3)
    with pytest.warns(UserWarning, match=r"LISA: AdamP counts steps by parameter group, so a parameter that") as seen:
        train(model, optimizer, lisa, 0, 1)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(*net_with_lisa(), 0, 4)


def test_compiled_blocks_train_as_they_do_uncompiled() -> None:
    model, optimizer, lisa = net_with_lisa()
    compiled, opt, sampler = net_with_lisa()
    for layer in compiled.layers:
        layer.compile(backend="eager")
    train(model, optimizer, lisa, 0, 9)
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=4):  # 2 graphs for the code of a block
        train(compiled, opt, sampler, 0, 9)
    assert_same(snapshot(compiled, opt), snapshot(model, optimizer))
