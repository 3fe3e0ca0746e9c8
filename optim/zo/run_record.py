"""The log of an optimizer's run, and what follows from the log: the momentum window and the next step's options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
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

_SAME = (  # settings that a resumed run cannot change; the seed and eps are taken from the saved run
    "zo",
    "seed_rule",
    "variant",
    "directions",
    "rounding",
    "momentum_mode",
    "smoothing",
    "distribution",
    "rank",
    "period",
)


class Record:
    """The log of a run that goes on. It notes what changes between steps, and holds the momentum window."""

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
        """Whether changes are records of the log. Before, they change its header."""
        return len(self.log) > 0 or self.log.attached

    def step_seeds(self, step: int) -> list[Seed]:
        return self.strategy.seeds(self.settings["seed"], step)

    def join(self, new: list[dict[str, Any]]) -> None:
        """Add the entries of a further group of parameters."""
        self.entries += new
        if self.begun:
            self.log.change(params=new)
            self.window.restart()

    def begin(self, params: Iterable[Tensor], groups: int) -> None:
        """Start a log without steps. The parameters may have been cast since the optimizer was made."""
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
        """Note in the entries which earlier parameter has the same memory."""
        for entry in self.entries:
            entry.pop("tied", None)
            if entry["id"] in ties:
                entry["tied"] = ties[entry["id"]]

    @property
    def ties(self) -> dict[int, int]:
        """id -> the id of the earlier parameter that has the same memory."""
        return {e["id"]: e["tied"] for e in self.entries if "tied" in e}

    def note_buffers(self, changed: Sequence[str]) -> None:
        """Put the names of the buffers that the first evaluation changed into the header. No log holds their values."""
        if changed and not self.begun:
            self.log.header["buffers"] = list(changed)

    def note(self, groups: Sequence[dict[str, Any]], slots: Sequence[Sequence[Slot]]) -> None:
        """Record what has changed since the last step: options of groups, and which parameters move."""
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

    def check_same_run(self, op: str, log: ZoLog, params: Sequence[Tensor]) -> None:
        """ValueError where ``log`` is of a run with other settings or parameters than this one."""
        for key in _SAME:
            saved, own = log.header.get(key), self.settings.get(key)
            if saved != own:
                raise ValueError(f"{op}: {key} must be the saved run's, {saved!r}, got {own!r}")
        saved_params = [(e["id"], e["shape"], e["dtype"]) for e in log.params()]
        own_params = [(i, list(p.shape), dtype_name(p.dtype)) for i, p in enumerate(params)]
        for saved, own in zip_longest(saved_params, own_params):
            if saved != own:
                raise ValueError(f"{op}: parameter (id, shape, dtype) must be {saved} as saved, got {own}")
        for saved_entry, entry in zip(log.params(), self.entries, strict=True):
            saved, own = saved_entry.get("fixed_rows", []), entry.get("fixed_rows", [])
            if saved != own:
                raise ValueError(f"{op}: exclude must have the saved run's rows of {entry['name']}, {saved}, got {own}")

    def restore(self, log: ZoLog) -> None:
        """Continue another log."""
        self.log.close()
        self.log = log
        self.entries = log.params()
        self._recorded, self._frozen = {}, []
        self.window.restart()
        for step, _ in self.window.follow(log.states(), self.step_seeds):
            self._recorded = {(g, f): v for g, values in enumerate(step.groups) for f, v in values.items()}
            self._frozen = sorted(step.frozen)
