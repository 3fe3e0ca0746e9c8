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

import numpy as np
import pytest
import torch
from gloo import distributed, spawn
from selecting import (
    BLOCK_DW,
    LAYERS,
    OPTIMIZERS,
    Net,
    assert_same,
    backward_flops,
    loss_of,
    net,
    snapshot,
    state_bytes,
)
from torch import Tensor, nn

from leanops.optim import LISA, HalfFineTuning, MeZO, TensorSelector


def make(name: str = "AdamW", **options: Any) -> tuple[Net, torch.optim.Optimizer, LISA]:
    model = net()
    optimizer = OPTIMIZERS[name][0](model.parameters())
    return model, optimizer, LISA(model, optimizer, **{"active": 2, "period": 3, **options})


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
    _, _, lisa = make(period=1)
    rounds = 2000
    seen = Counter(tuple(lisa._drawn(r)) for r in range(rounds))
    pairs = list(combinations(lisa.blocks, 2))
    assert set(seen) == set(pairs)  # every pair is of two different blocks
    expected = rounds / len(pairs)
    assert sum((seen[p] - expected) ** 2 / expected for p in pairs) < 27.9


def test_rounds_are_independent() -> None:
    """A block that trains is as likely as any other to train in the next round: 2/5 of 2,000, within 5 deviations."""
    _, _, lisa = make(period=1)
    drawn = [set(lisa._drawn(r)) for r in range(2001)]
    again = sum(len(a & b) for a, b in pairwise(drawn))
    assert abs(again - 2000 * 2 * 2 / 5) < 5 * math.sqrt(2000 * 2 * 2 / 5)


def test_draws_follow_from_the_seed_and_the_round_and_never_change() -> None:
    a, b, other = (make(seed=s)[2] for s in (7, 7, 8))
    rounds = range(40)
    assert [a._drawn(r) for r in rounds] == [b._drawn(r) for r in rounds] != [other._drawn(r) for r in rounds]
    short = [[int(n.split(".")[1]) for n in a._drawn(r)] for r in range(6)]
    assert short == KNOWN  # old checkpoints keep their meaning


KNOWN = [[1, 4], [1, 3], [0, 4], [3, 4], [0, 4], [3, 4]]


def test_blocks_change_every_period_and_not_within() -> None:
    model, optimizer, lisa = make(period=3)
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
    model, optimizer, lisa = make()
    assert set(lisa.always) == {"embed.weight", "final.weight", "final.bias", "head.weight"}
    for step in range(7):
        train(model, optimizer, lisa, step, step + 1)
        assert set(lisa.always) <= set(lisa.trainable)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_frozen_blocks_is_freed(name: str) -> None:
    """The optimizer's state has the bytes of the trainable parameters, and the frozen ones' tensors are freed."""
    model, optimizer, lisa = make(name)
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
    model, optimizer, lisa = make(name)
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
        model, _, _ = make(active=active)
        assert backward_flops(lambda m=model: loss_of(m)) == full - (LAYERS - active) * BLOCK_DW


def test_a_block_that_trains_again_starts_as_a_new_optimizer_does() -> None:
    """A round equals plain AdamW on a model frozen by hand, with new state for the round's blocks."""
    model, optimizer, lisa = make(period=4)
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
        model, optimizer, lisa = make(name, seed=3)
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
    _, _, a = make()
    model, optimizer, b = make()
    for steps in (7, 3, 2, 100):
        a.seek(steps)
        b._steps, b._round = steps, steps // 3
        b._apply()
        assert (a.steps, a.round, a.trainable) == (b.steps, b.round, b.trainable)
    train(model, optimizer, b, 0, 1)


@pytest.mark.parametrize("other", [{"active": 1}, {"period": 4}, {"seed": 1}, {"always": "head"}])
def test_a_state_of_another_run_is_refused_and_changes_nothing(other: dict[str, Any]) -> None:
    _, _, lisa = make()
    model, optimizer, different = make(**other)
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


# --- blocks ---------------------------------------------------------------------------------------------------------


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
def test_blocks_by_name_by_pattern_and_given(blocks: Any) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    lisa = LISA(model, optimizer, blocks=blocks(model) if callable(blocks) else blocks)
    assert lisa.blocks == [f"layers.{i}" for i in range(LAYERS)]


def test_experts_within_blocks_are_no_blocks() -> None:
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


def test_always_chooses_the_parameters_that_always_train() -> None:
    model, optimizer, lisa = make(always=r"^head|final")
    assert lisa.always == ["final.bias", "final.weight", "head.weight"]
    train(model, optimizer, lisa, 0, 7)
    assert not model.embed.weight.requires_grad
    model = net()
    lisa = LISA(model, torch.optim.SGD(model.parameters()), always=[model.head, model.final.bias, "layers.0.norm"])
    assert lisa.always == ["final.bias", "head.weight", "layers.0.norm.bias", "layers.0.norm.weight"]
    lisa.release()
    for one in (model.head, model.head.weight):
        assert LISA(model, torch.optim.SGD(model.parameters()), always=one).always == ["head.weight"]
        for p in model.parameters():
            p.requires_grad_(True)
    assert LISA(model, torch.optim.SGD(model.parameters()), always=()).always == []


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


# --- counting steps -------------------------------------------------------------------------------------------------


def test_a_hook_counts_the_same_steps_as_calls() -> None:
    model, optimizer, lisa = make()
    hooked, opt, counted = make()
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


def test_a_hook_that_was_removed_by_its_handle_counts_no_more() -> None:
    model, optimizer, lisa = make()
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

    model, optimizer, lisa = make()
    train(model, optimizer, lisa, 0, 4)
    if attached:
        lisa.attach()
    copies = [copy.deepcopy((model, optimizer, lisa)), pickle.loads(pickle.dumps((model, optimizer, lisa)))]
    expected = train_on(model, optimizer, lisa)
    assert lisa.steps == 9
    for copied in copies:
        assert_same(train_on(*copied), expected)


def test_nothing_is_frozen_after_release_until_a_position_is_given() -> None:
    model, optimizer, lisa = make(period=2)
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


def test_an_optimizer_that_counts_steps_by_group_is_warned_of_by_name() -> None:
    peers = pytest.importorskip("pytorch_optimizer", reason="pip install 'leanops[dev]'")
    model = net()
    optimizer = peers.AdamP(model.parameters(), lr=1e-3)
    lisa = LISA(model, optimizer, active=2, period=3)
    with pytest.warns(UserWarning, match=r"LISA: AdamP counts steps by parameter group, so a parameter that") as seen:
        train(model, optimizer, lisa, 0, 1)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(*make(), 0, 4)


def test_compiled_blocks_train_as_they_do_uncompiled() -> None:
    model, optimizer, lisa = make()
    compiled, opt, sampler = make()
    for layer in compiled.layers:
        layer.compile(backend="eager")
    train(model, optimizer, lisa, 0, 9)
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=4):  # 2 graphs for the code of a block
        train(compiled, opt, sampler, 0, 9)
    assert_same(snapshot(compiled, opt), snapshot(model, optimizer))


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 6}, "LISA: active must be at most the number of blocks with trainable parameters, 5, got 6"),
        ({"active": 0}, "LISA: active must be an integer >= 1, got 0"),
        ({"active": 1.0}, "LISA: active must be an integer >= 1, got 1.0"),
        ({"period": 0}, "LISA: period must be an integer >= 1, got 0"),
        ({"period": True}, "LISA: period must be an integer >= 1, got True"),
        ({"seed": 2**64}, r"LISA: seed must be an integer in \[-2\^63, 2\^64\), got"),
        ({"blocks": "decoder"}, "LISA: blocks must name modules of the model, got 'decoder', which matches none"),
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


def test_a_model_that_another_has_frozen_is_refused() -> None:
    model, optimizer, lisa = make()
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
def test_a_frozen_stack_is_not_meant(selection: Any) -> None:
    model = VisionLanguage()
    model.tower.requires_grad_(False)
    assert selection(model, torch.optim.SGD(model.parameters())).blocks == [f"language.layers.{i}" for i in range(4)]


def test_numbers_of_numpy_are_integers() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    lisa = LISA(model, optimizer, active=np.int64(2), period=np.int32(3))
    assert (type(lisa.active), type(lisa.period), len(lisa.active_blocks)) == (int, int, 2)


# --- several processes ----------------------------------------------------------------------------------------------


def reference_of_two() -> list[Tensor]:
    model, optimizer, lisa = make("SGD")
    for step in range(7):
        ((loss_of(model, 2 * step) + loss_of(model, 2 * step + 1)) / 2).backward()
        optimizer.step()
        lisa.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@distributed
def test_data_parallel_processes_train_the_same_blocks() -> None:
    def job(rank: int) -> None:
        wanted = reference_of_two()
        model = net()
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = OPTIMIZERS["SGD"][0](wrapped.parameters())
        lisa = LISA(wrapped, optimizer, active=2, period=3)
        assert lisa.blocks == [f"layers.{i}" for i in range(LAYERS)]  # names without the wrapper's prefix
        for step in range(7):
            loss_of(wrapped, 2 * step + rank).backward()
            optimizer.step()
            lisa.step()
            optimizer.zero_grad()
        for p, w in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-6)

    spawn(job)


@distributed
def test_sharded_processes_train_the_same_blocks_and_free_their_shards() -> None:
    def job(rank: int) -> None:
        from torch.distributed.fsdp import fully_shard

        wanted = reference_of_two()
        model = net()
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = OPTIMIZERS["SGD"][0](model.parameters())
        lisa = LISA(model, optimizer, active=2, period=3)
        for step in range(7):
            loss_of(model, 2 * step + rank).backward()
            assert {n for n, p in model.named_parameters() if p.grad is not None} == set(lisa.trainable)
            optimizer.step()
            lisa.step()
            optimizer.zero_grad()
            assert all((p in optimizer.state) <= p.requires_grad for p in model.parameters())
        for p, w in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.detach().full_tensor(), w, rtol=1e-5, atol=1e-6)

    spawn(job)
