"""What an optimizer keeps of its run beside the weights: the log, and what follows from the log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from leanops.common.dtypes import dtype_name
from leanops.optim.common.parameters import tied
from leanops.optim.zo.directions import Seed
from leanops.optim.zo.log import ZoLog
from leanops.optim.zo.momentum_window import MomentumWindow
from leanops.optim.zo.slots import Slot
from leanops.optim.zo.step import FIELDS
from leanops.optim.zo.variants import strategy_of


class Record:
    """The log of a run in the making: notes what changes between steps, and holds the window of momentum."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.strategy = strategy_of(settings)
        self.entries: list[dict[str, Any]] = []  # name, id, shape, dtype and group of every parameter
        self.window = MomentumWindow()
        self.log = ZoLog({**settings, "groups": 0, "params": []})
        self._recorded: dict[tuple[int, str], float] = {}
        self._frozen: list[int] = []

    @property
    def begun(self) -> bool:
        """Whether what happens from here on stands in the log; before, its header says how things are."""
        return len(self.log) > 0 or self.log.attached

    def step_seeds(self, step: int) -> list[Seed]:
        return self.strategy.seeds(self.settings["seed"], step)

    def join(self, new: list[dict[str, Any]]) -> None:
        """Further parameters, one group of them."""
        self.entries += new
        if self.begun:
            self.log.change(params=new)
            self.window.restart()

    def begin(self, params: Iterable[Tensor], groups: int) -> None:
        """The log without steps, of the parameters as they are now (they may have been cast since construction)."""
        params = list(params)
        self.entries = [
            {**entry, "shape": list(p.shape), "dtype": dtype_name(p.dtype)}
            for entry, p in zip(self.entries, params, strict=True)
        ]
        self.tie(tied(params))
        self.log.begin({**self.settings, "groups": groups, "params": self.entries})
        self._recorded, self._frozen = {}, []
        self.window.restart()

    def tie(self, ties: Mapping[int, int]) -> None:
        """Note for each parameter of the same memory as an earlier one which that is."""
        for entry in self.entries:
            entry.pop("tied", None)
            if entry["id"] in ties:
                entry["tied"] = ties[entry["id"]]

    @property
    def ties(self) -> dict[int, int]:
        """id -> the id of the earlier parameter that has the same memory."""
        return {e["id"]: e["tied"] for e in self.entries if "tied" in e}

    def note_buffers(self, changed: Sequence[str]) -> None:
        """Put the names of buffers that the first evaluation changed into the header; their values are in no log."""
        if changed and not self.begun:
            self.log.header["buffers"] = list(changed)

    def note(self, groups: Sequence[dict[str, Any]], slots: Sequence[Sequence[Slot]]) -> None:
        """Put into the log what has changed since the last step."""
        for g, group in enumerate(groups):
            for field in FIELDS:
                value = float(group[field])
                if self._recorded.get((g, field), 0.0) != value:
                    self.log.set(g, field, value)
                    self._recorded[g, field] = value
        moving = {s.tensor_id for s in chain.from_iterable(slots)}
        frozen = [e["id"] for e in self.entries if e["id"] not in moving]
        if frozen != self._frozen:
            self.log.change(frozen=frozen)
            self._frozen = frozen
            self.window.restart()

    def restore(self, log: ZoLog) -> None:
        """Continue another log: everything that is kept beside it follows from it."""
        self.log.close()
        self.log = log
        self.entries = log.params()
        self._recorded, self._frozen = {}, []
        self.window.restart()
        for step, _ in self.window.follow(log.states(), self.step_seeds):
            self._recorded = {(g, f): v for g, values in enumerate(step.groups) for f, v in values.items()}
            self._frozen = sorted(step.frozen)
