"""Tests in several processes that talk over gloo."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

WORLD = 2
distributed = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed; another has")


def _process(rank: int, port: int, job: Callable[..., None], world: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        job(rank, *arguments)
    finally:
        dist.destroy_process_group()


def spawn(job: Callable[..., None], *arguments: Any, world: int = WORLD) -> None:
    """job(rank, *arguments) in every process; an error in one of them is raised here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        _process, (port, job, world, arguments), nprocs=world, join=False, start_method="fork"
    )
    while not context.join(timeout=60):
        pass


class Counted:
    """Records the number of elements of each all-reduce."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._original = dist.all_reduce

    def __enter__(self) -> list[int]:
        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(tensor.numel())
            return self._original(tensor, *args, **kwargs)

        dist.all_reduce = all_reduce
        return self.sizes

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._original
