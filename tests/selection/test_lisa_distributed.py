"""LISA in several processes, data-parallel and sharded: all train the same blocks."""

from __future__ import annotations

import torch
from gloo import distributed, spawn
from selection.runs import LAYERS, OPTIMIZERS, loss_of, net, net_with_lisa
from torch import Tensor, nn

from leanops.optim import LISA


def reference_of_two() -> list[Tensor]:
    model, optimizer, lisa = net_with_lisa("SGD")
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
