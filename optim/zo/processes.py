"""The processes of a run: their group, and the one small all-reduce of a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanops.common.checks import one_of
from leanops.optim.common.parameters import is_sharded
from leanops.optim.zo.slots import Slot

PARALLEL = ("data", "direction", "none")


def _group_of_ddp(model: nn.Module | None) -> Any:
    """The process group of the model's DistributedDataParallel, wherever in the model it is; None without one."""
    if model is None or not torch.distributed.is_available():
        return None
    groups = [m.process_group for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if any(g is not groups[0] for g in groups):
        raise ValueError("MeZO: model has DistributedDataParallel modules of several groups; give process_group")
    return groups[0] if groups else None


def _world_size() -> int:
    """The number of processes in the world; 1 if torch.distributed is not initialised."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class Reduction:
    """One small all-reduce a step over a process group, or none.

    ``group`` is the caller's, else that of the model's DistributedDataParallel, else (from the first step on) that of
    the sharded parameters' mesh. In a world of several processes a run has to have one, unless ``parallel`` is "none".
    """

    def __init__(self, group: Any, parallel: str, directions: int, model: nn.Module | None = None) -> None:
        one_of("MeZO", "parallel", parallel, PARALLEL)
        if parallel == "none" and group is not None:
            raise ValueError(
                "MeZO: parallel='none' cannot be used with a process_group, over which g would be averaged"
            )
        self.group = _group_of_ddp(model) if group is None and parallel != "none" else group
        self._parallel = parallel
        self._device = torch.device("cpu")
        self._world, self._rank = 1, 0
        if self.group is not None:
            self._join(self.group)
        elif parallel == "direction":
            raise ValueError("MeZO: parallel='direction' needs a process_group")
        if parallel == "direction" and directions < self._world:
            raise ValueError(f"MeZO: parallel='direction' needs a direction a process, {self._world}, got {directions}")

    def _join(self, group: Any) -> None:
        self.group = group
        self._world, self._rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)

    def check(self, params: Iterable[Tensor]) -> None:
        """ValueError where the weights of several processes would drift apart, each moved by the g of its own data."""
        if self.group is not None or self._parallel == "none" or any(map(is_sharded, params)):
            return
        if (world := _world_size()) > 1:
            raise ValueError(
                f"MeZO: process_group must be given in a world of {world} processes, because without it their "
                "weights drift apart; give process_group=torch.distributed.group.WORLD, or a DistributedDataParallel "
                "as model=; parallel='none' makes every process a run of its own"
            )

    def use(self, slots: Sequence[Slot]) -> None:
        """Take the mesh's group for sharded parameters, and the device that the group's backend works on."""
        sharded: list[Any] = [s.param for s in slots if is_sharded(s.param)]
        if sharded and self._parallel != "data":
            raise ValueError(
                f"MeZO: parallel={self._parallel!r} cannot be used with sharded parameters: their ranks evaluate "
                "together"
            )
        self.check(s.param for s in slots)
        if self.group is None and sharded:
            mesh = sharded[0].device_mesh
            self._join(mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group())
        if self.group is not None and slots:
            backend = torch.distributed.get_backend(self.group)
            self._device = slots[0].local.device if backend == "nccl" else torch.device("cpu")

    def evaluates(self, direction: int) -> bool:
        """Whether this process evaluates a direction."""
        return self._parallel != "direction" or direction % self._world == self._rank

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of those that share the directions, or does not share them."""
        return self._parallel != "direction" or self._rank == 0

    @property
    def writes_log(self) -> bool:
        """Whether this process writes the log's file: the logs of a group's processes are equal."""
        return self._rank == 0

    def __call__(self, values: list[float]) -> list[float]:
        """With ``"data"``, the mean over the processes. With ``"direction"``, the sum: a process has 0 for a direction
        that another process evaluates."""
        if self.group is None:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(total, group=self.group)
        if self._parallel == "data":
            total /= self._world
        return [float(v) for v in total.tolist()]
