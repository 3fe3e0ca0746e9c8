"""Several processes: one scalar crosses a step, and their weights stay bitwise equal."""

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
from torch import Tensor, nn

from leanops.optim import MeZO, ZoLog, replay_

LOZO = {"distribution": "lowrank", "period": 2}
pytestmark = distributed


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def data(rank: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(50 + rank)
    return torch.randn(8, 6, generator=g), torch.randn(8, 3, generator=g)


def gathered(params: Any) -> list[Tensor]:
    flat = torch.cat([p.detach().flatten() for p in params])
    out = [torch.empty_like(flat) for _ in range(WORLD)]
    dist.all_gather(out, flat)
    return out


def data_parallel(rank: int) -> None:
    for options in ({}, {"variant": "sign"}, {"variant": "one_sided", "momentum": 0.5}):
        model, (x, y) = model_of(), data(rank)
        start = copy.deepcopy(model)
        opt = MeZO(model.parameters(), lr=1e-2, model=model, process_group=dist.group.WORLD, **options)
        with Counted() as sizes:
            for _ in range(5):
                opt.step(lambda model=model, x=x, y=y: nn.functional.mse_loss(model(x), y))
        assert sizes == [1] * 5
        a, b = gathered(model.parameters())
        assert torch.equal(a, b)
        replay_(start, opt.log)
        assert all(map(torch.equal, start.parameters(), model.parameters()))
        # one process on both halves of the data takes the same path, to the rounding of the loss
        if not options:
            single, halves = model_of(), [data(0), data(1)]
            ref = MeZO(single.parameters(), lr=1e-2, parallel="none")
            for _ in range(5):
                ref.step(lambda s=single, h=halves: sum(nn.functional.mse_loss(s(x), y) for x, y in h) / 2)
            for p, q in zip(single.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def direction_parallel(rank: int) -> None:
    x, y = data(0)
    for variant, directions, calls in (
        ("spsa", 2, 2),
        ("spsa", 5, 6 if rank == 0 else 4),
        ("fzoo", 4, 3 - rank),
        ("hizoo", 4, 5),
    ):
        model, single = model_of(), model_of()
        seen = 0

        def closure(model: nn.Module = model) -> Tensor:
            nonlocal seen
            seen += 1
            return nn.functional.mse_loss(model(x), y)

        options: dict[str, Any] = {"lr": 1e-2, "directions": directions, "variant": variant}
        opt = MeZO(model.parameters(), process_group=dist.group.WORLD, parallel="direction", **options)
        ref = MeZO(single.parameters(), parallel="none", **options)
        opt.step(closure)
        assert seen == calls + 1  # the first step repeats an evaluation
        opt.step(closure)
        for _ in range(2):
            ref.step(lambda s=single: nn.functional.mse_loss(s(x), y))
        assert torch.equal(torch.from_numpy(opt.log.scalars()), torch.from_numpy(ref.log.scalars()))
        assert all(map(torch.equal, single.parameters(), model.parameters()))
    with pytest.raises(ValueError, match="a direction a process, 2, got 1"):
        MeZO(model_of().parameters(), process_group=dist.group.WORLD, parallel="direction")
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(opt)


def skip_together(rank: int) -> None:
    model = model_of()
    opt = MeZO(model.parameters(), lr=1.0, process_group=dist.group.WORLD, on_nonfinite="skip")
    bad = float("nan") if rank == 1 else 1.0
    before = copy.deepcopy(model)
    opt.step(lambda: sum(p.sum() for p in model.parameters()) * bad)
    assert all(map(torch.equal, before.parameters(), model.parameters()))
    assert [s.scalars for s in opt.log.steps()] == [None]


def sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    x, y = data(0)
    for options in ({}, {"momentum": 0.5, "momentum_mode": "store", "weight_decay": 0.1}, {"directions": 2}, LOZO):
        single, model, start = model_of(), model_of(), model_of()
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        opt = MeZO(model.parameters(), lr=1e-2, model=model, **options)
        ref = MeZO(single.parameters(), lr=1e-2, parallel="none", **options)
        shards = [p.to_local().clone() for p in model.parameters()]
        opt.step(lambda m=model: nn.functional.mse_loss(m(x), y) * 0)
        ref.step(lambda s=single: nn.functional.mse_loss(s(x), y) * 0)
        if "weight_decay" not in options:
            assert all(torch.equal(a, p.to_local()) for a, p in zip(shards, model.parameters(), strict=True))
        for _ in range(4):
            a = opt.step(lambda m=model: nn.functional.mse_loss(m(x), y))
            b = ref.step(lambda s=single: nn.functional.mse_loss(s(x), y))
            assert float(a) == float(b)
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            assert torch.equal(p.full_tensor(), q)
        replay_(start, ZoLog.from_bytes(opt.log.to_bytes()))
        assert all(map(torch.equal, start.parameters(), single.parameters()))
        with pytest.raises(ValueError, match="need model="):
            MeZO(model.parameters()).step(lambda m=model: nn.functional.mse_loss(m(x), y))
        with torch.no_grad():
            torch.testing.assert_close(model(x), single(x))  # no stale gathered copy after a step


def sharded_replay_and_refusals(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    plain = nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    start = plain.detach().clone()
    for options in ({}, LOZO):
        plain.data.copy_(start)
        opt = MeZO([plain], lr=1e-2, parallel="none", **options)
        for _ in range(4):
            opt.step(lambda: (plain**2).sum())
        for placement in (Shard(0), Replicate()):
            d = distribute_tensor(start.clone(), mesh, [placement])
            replay_([d], opt.log)
            assert torch.equal(d.full_tensor(), plain)
    columns = nn.Parameter(distribute_tensor(start, mesh, [Shard(1)]))
    rows = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"Shard\(0\)"):
        MeZO([columns])
    with pytest.raises(ValueError, match="scratch"):
        MeZO([rows], perturb="scratch").step(lambda: rows.to_local().sum())


def replicas(rank: int) -> None:
    """A wrapped model brings its process group. Without a group, two processes get an error before they drift apart."""
    from torch.nn.parallel import DistributedDataParallel

    x, y = data(rank)
    for wrap in (
        DistributedDataParallel,
        lambda m: torch.compile(DistributedDataParallel(m), backend="eager"),
        lambda m: nn.Sequential(DistributedDataParallel(m)),
    ):
        for options in ({}, {"parallel": "direction", "directions": 2}):
            model, start = model_of(), model_of()
            wrapped = wrap(model)
            opt = MeZO(wrapped.parameters(), lr=1e-2, model=wrapped, **options)
            with Counted() as sizes:
                for _ in range(5):
                    opt.step(lambda f=wrapped: nn.functional.mse_loss(f(x), y))
            assert sizes == [options.get("directions", 1)] * 5
            a, b = gathered(model.parameters())
            assert torch.equal(a, b)
            replay_(list(start.parameters()), opt.log)
            assert all(map(torch.equal, start.parameters(), model.parameters()))
    model = model_of()
    text = "process_group must be given in a world of 2 processes"
    with pytest.raises(ValueError, match=text):
        MeZO(model.parameters(), model=model)
    with pytest.raises(ValueError, match=text):
        MeZO(model.parameters())
    with pytest.raises(ValueError, match="parallel='none' cannot be used with a process_group"):
        MeZO(model.parameters(), parallel="none", process_group=dist.group.WORLD)
    apart = MeZO(model.parameters(), lr=1e-2, parallel="none", model=DistributedDataParallel(model))
    with Counted() as sizes:
        for _ in range(5):
            apart.step(lambda: nn.functional.mse_loss(model(x), y))
    assert not sizes
    a, b = gathered(model.parameters())
    assert not torch.equal(a, b)
    before = model_of()
    early = MeZO(before.parameters(), lr=1e-2, parallel="none")
    early._reduction._parallel = "data"  # as if made before the process group was initialised
    with pytest.raises(ValueError, match=text):
        early.step(lambda: nn.functional.mse_loss(before(x), y))
    assert all(map(torch.equal, before.parameters(), model_of().parameters()))


def one_log_file(rank: int) -> None:
    shared: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    path = Path(shared[0], "run.zolog")
    for parallel in ("data", "direction"):
        model, (x, y) = model_of(), data(rank)
        options: dict[str, Any] = {"process_group": dist.group.WORLD, "parallel": parallel, "directions": 2}
        opt = MeZO(model.parameters(), lr=1e-2, model=model, log_file=path, **options)
        for _ in range(3):
            opt.step(lambda model=model, x=x, y=y: nn.functional.mse_loss(model(x), y))
        assert opt.log.attached == (rank == 0)
        opt.log.close()
        dist.barrier()
        assert ZoLog.load(path).to_bytes() == opt.log.to_bytes()
        dist.barrier()
        if rank == 0:
            path.unlink()
        dist.barrier()


@pytest.mark.parametrize(
    "job",
    [replicas, data_parallel, direction_parallel, skip_together, one_log_file, sharded, sharded_replay_and_refusals],
    ids=lambda j: j.__name__,
)
def test_two_processes(job: Callable[[int], None]) -> None:
    spawn(job)
