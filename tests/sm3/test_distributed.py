"""SM3 on sharded parameters: the bits of one process, one small all-reduce a step, a saved state without a mesh."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import WORLD, Counted, distributed, spawn
from sm3.parameters import equal
from torch import Tensor, nn

from leanops.optim import SM3, fuse_into_backward

BF16, F32, I8 = torch.bfloat16, torch.float32, torch.int8
pytestmark = distributed


def full(value: Any) -> Any:
    """Saved state with whole tensors for DTensors."""
    if isinstance(value, dict):
        return {k: full(v) for k, v in value.items()}
    return value.full_tensor() if hasattr(value, "full_tensor") else value


SHAPES = [(7, 5), (3,), (4, 3, 2), (1, 300), (9,), (2, 600), (0, 4), (5, 0)]
OPTIONS: list[dict[str, Any]] = [
    {"momentum_dtype": I8, "stochastic_rounding": True, "weight_decay": 0.1},
    {"beta": 0.9},
    {"momentum": 0.0, "maximize": True, "weight_decay": 0.1, "decoupled": False},
    {"momentum_dtype": I8, "momentum_on": "gradient_unpublished", "cover_warmup": 2},
]


def values(step: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(step)
    return [(torch.randn(s, generator=g) * 10.0 ** (1 - step)).to(dtype) for s in SHAPES]


def shards_are_the_whole(rank: int) -> None:
    """Uneven shards, ranks without rows, vectors and matrices. Gradients shrink, so that stale maxima would show."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    for dtype in (F32, BF16):
        for options in OPTIONS:
            whole = [nn.Parameter(v) for v in values(0, dtype)]
            parts = [
                nn.Parameter(distribute_tensor(v, mesh, [Replicate() if i == 4 else Shard(0)]))
                for i, v in enumerate(values(0, dtype))
            ]
            a, b = SM3(whole, lr=0.05, **options), SM3(parts, lr=0.05, **options)
            for step in range(1, 5):
                for p, q, g in zip(whole, parts, values(step, dtype), strict=True):
                    p.grad, q.grad = g, distribute_tensor(g, mesh, q.placements)
                if step == 3:
                    whole[0].grad = parts[0].grad = None
                a.step()
                with Counted() as sizes:
                    b.step()
                assert sizes == [sum(sum(s[1:]) for s in SHAPES if 0 not in s) - (5 if step == 3 else 0)]
                for p, q in zip(whole, parts, strict=True):
                    assert torch.equal(p, q.full_tensor()), (dtype, options, step)
            assert equal(a.state_dict()["state"], full(b.state_dict()["state"])), options
            for s, p in zip(b.state.values(), parts, strict=True):
                assert s["cover"].numel() == sum(p.to_local().shape)


def not_a_number_survives(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    for sign in (1.0, -1.0):
        whole = nn.Parameter(torch.zeros(4, 3))
        part = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)]))
        a, b = SM3([whole]), SM3([part])
        g = torch.ones(4, 3)
        g[3, 1] = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
        whole.grad, part.grad = g, distribute_tensor(g, mesh, [Shard(0)])
        a.step()
        b.step()
        for axis in ("0", "1"):
            one, other = a.state_dict()["state"][0]["cover"][axis], full(b.state_dict())["state"][0]["cover"][axis]
            assert torch.equal(one.isnan(), other.isnan())
            assert int(other.isnan().sum()) == 1
            torch.testing.assert_close(one, other, equal_nan=True, rtol=0, atol=0)


def model_of(dtype: torch.dtype = F32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3), nn.LayerNorm(3)).to(dtype)


def sharded(model: nn.Sequential) -> nn.Sequential:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Module, opt: Any, steps: int, start: int = 0) -> None:
    """Every process sees the same data, so that the mean of the gradients is exactly the gradient."""
    for step in range(start, start + steps):
        g = torch.Generator().manual_seed(50 + step)
        x = torch.randn(8, 6, generator=g).to(next(model.parameters()).dtype)
        (model(x).float() ** 2).mean().backward()
        opt.step()
        opt.zero_grad()


def fsdp2_is_one_process(rank: int) -> None:
    for dtype in (F32, BF16):
        for options in OPTIONS:
            single, model = model_of(dtype), sharded(model_of(dtype))
            a, b = SM3(single.parameters(), **options), SM3(model.parameters(), **options)
            train(single, a, 4)
            train(model, b, 4)
            for p, q in zip(single.parameters(), model.parameters(), strict=True):
                assert torch.equal(p, q.full_tensor()), (dtype, options)
            assert equal(a.state_dict()["state"], full(b.state_dict()["state"]))


def fsdp2_fused_into_backward_is_one_process(rank: int) -> None:
    single, model = model_of(), sharded(model_of())
    a, b = SM3(single.parameters(), momentum_dtype=I8), fuse_into_backward(SM3, model, momentum_dtype=I8)
    train(single, a, 3)
    train(model, b, 3)
    for p, q in zip(single.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q.full_tensor())


def parts_of_a_zero_redundancy_optimizer_are_saved_and_loaded(rank: int) -> None:
    """ZeroRedundancyOptimizer writes saved entries into the optimizer's state without calling the optimizer."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for options in OPTIONS:
        single, model = model_of(), model_of()
        a, b = SM3(single.parameters(), **options), ZeroRedundancyOptimizer(model.parameters(), SM3, **options)
        train(single, a, 2)
        train(model, b, 2)
        state: Any = None
        for to in range(WORLD):
            b.consolidate_state_dict(to)
            state = b.state_dict() if rank == to else state
        b = ZeroRedundancyOptimizer(model.parameters(), SM3, **options)
        b.load_state_dict(copy.deepcopy(state))
        train(single, a, 2, start=2)
        train(model, b, 2, start=2)
        assert all(map(torch.equal, single.parameters(), model.parameters())), options


def an_infinity_of_one_process_stops_all(rank: int) -> None:
    single, model = model_of(), sharded(model_of())
    a, b = SM3(single.parameters()), SM3(model.parameters())
    train(single, a, 1)
    train(model, b, 1)
    before = [p.full_tensor() for p in model.parameters()]
    state = full(b.state_dict()["state"])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if rank == 1:
        next(model.parameters()).grad.to_local().fill_(torch.inf)
    scaler.scale(torch.ones(()))
    scaler.step(b)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(x, p.full_tensor()) for x, p in zip(before, model.parameters(), strict=True))
    assert equal(state, full(b.state_dict()["state"]))


def states_go_between_one_process_and_shards(rank: int, folder: str) -> None:
    """By load_state_dict, and by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = OPTIONS[0]
    single, model = model_of(BF16), sharded(model_of(BF16))
    a, b = SM3(single.parameters(), **options), SM3(model.parameters(), **options)
    train(single, a, 3)
    train(model, b, 3)
    into_shards, into_one = SM3(model.parameters()), SM3(single.parameters())
    into_shards.load_state_dict(a.state_dict())
    into_one.load_state_dict(b.state_dict())
    assert equal(full(into_shards.state_dict()["state"]), a.state_dict()["state"])
    assert equal(into_one.state_dict()["state"], a.state_dict()["state"])

    for flatten in (False, True):
        layout = StateDictOptions(flatten_optimizer_state_dict=flatten)
        place = f"{folder}/{flatten}"
        dcp.save({"opt": get_optimizer_state_dict(model, b, options=layout)}, checkpoint_id=place)
        fresh = SM3(model.parameters(), **options)
        state = {"opt": get_optimizer_state_dict(model, fresh, options=layout)}
        dcp.load(state, checkpoint_id=place)
        set_optimizer_state_dict(model, fresh, state["opt"], options=layout)
        assert equal(full(fresh.state_dict()["state"]), a.state_dict()["state"]), flatten
    whole = StateDictOptions(full_state_dict=True)
    gathered = get_optimizer_state_dict(model, b, options=whole)
    if rank == 0:
        torch.save(gathered, f"{folder}/full.pt")
        by_position = [gathered["state"][n] for n, _ in single.named_parameters()]
        assert equal(dict(enumerate(by_position)), a.state_dict()["state"])
    fresh = SM3(model.parameters(), **options)
    set_optimizer_state_dict(model, fresh, full_state_by_name(single, a), options=whole)
    assert equal(full(fresh.state_dict()["state"]), a.state_dict()["state"])


def saved_states_can_be_kept(rank: int, folder: str) -> None:
    """Saved states can be written, copied and staged; DTensors with an offset into their storage could not be."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = sharded(model_of())
    opt = SM3(model.parameters(), momentum_dtype=I8)
    train(model, opt, 2)
    state = opt.state_dict()
    torch.save(state, f"{folder}/{rank}.pt")
    for kept in (torch.load(f"{folder}/{rank}.pt", weights_only=False), copy.deepcopy(state)):
        assert equal(full(kept["state"]), full(state["state"]))
    named = {"opt": get_optimizer_state_dict(model, opt)}
    dcp.async_save(named, checkpoint_id=f"{folder}/async").result()
    for entry in opt.state.values():
        entry["cover"].add_(1)
    assert all((axis.full_tensor() >= 1).all() for s in state["state"].values() for axis in s["cover"].values())
    dcp.load(named, checkpoint_id=f"{folder}/async")  # in place
    assert equal(full(opt.state_dict()["state"]), full(kept["state"]))


def full_state_by_name(model: nn.Module, opt: SM3) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    return get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True))


def load_on_another_mesh(rank: int, folder: str) -> None:
    """Three processes load what two processes wrote."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    single = model_of(BF16)
    a = SM3(single.parameters(), **OPTIONS[0])
    train(single, a, 3)
    model = sharded(model_of(BF16))
    opt = SM3(model.parameters(), **OPTIONS[0])
    state = {"opt": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=f"{folder}/False")
    set_optimizer_state_dict(model, opt, state["opt"])
    assert equal(full(opt.state_dict()["state"]), a.state_dict()["state"])


def other_placements_are_refused(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    opt = SM3([("columns", p)])
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"SM3: parameter columns must be sharded by rows, Shard\(0\)"):
        opt.step()
    assert torch.equal(p.full_tensor(), torch.ones(4, 4))


def replicas_of_shards_are_the_whole(rank: int) -> None:
    """A mesh of two axes, as in hybrid sharding: replicas along the first, shards of rows along the second."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    placements = [Replicate(), Shard(0)]
    whole = [nn.Parameter(v) for v in values(0, F32)]
    parts = [nn.Parameter(distribute_tensor(v, mesh, placements)) for v in values(0, F32)]
    a, b = SM3(whole, **OPTIONS[0]), SM3(parts, **OPTIONS[0])
    for step in range(1, 4):
        for p, q, g in zip(whole, parts, values(step, F32), strict=True):
            p.grad, q.grad = g, distribute_tensor(g, mesh, placements)
        a.step()
        b.step()
    assert all(torch.equal(p, q.full_tensor()) for p, q in zip(whole, parts, strict=True))
    assert equal(a.state_dict()["state"], full(b.state_dict()["state"]))


def test_four_processes_in_a_mesh_of_two_axes() -> None:
    spawn(replicas_of_shards_are_the_whole, world=4)


@pytest.mark.parametrize(
    "job",
    [
        shards_are_the_whole,
        not_a_number_survives,
        fsdp2_is_one_process,
        fsdp2_fused_into_backward_is_one_process,
        parts_of_a_zero_redundancy_optimizer_are_saved_and_loaded,
        an_infinity_of_one_process_stops_all,
        other_placements_are_refused,
    ],
    ids=lambda j: j.__name__,
)
def test_two_processes(job: Callable[[int], None]) -> None:
    spawn(job)


def test_saved_states_can_be_kept() -> None:
    with tempfile.TemporaryDirectory() as folder:
        spawn(saved_states_can_be_kept, folder)


def test_saved_state_does_not_depend_on_the_mesh() -> None:
    with tempfile.TemporaryDirectory() as folder:
        spawn(states_go_between_one_process_and_shards, folder)
        assert (Path(folder) / "full.pt").exists()
        spawn(load_on_another_mesh, folder, world=3)
