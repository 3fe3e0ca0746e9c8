"""The parameters of a run: how the log describes them, and which of them a step moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from leanops.common.dtypes import dtype_name
from leanops.optim.common import parameters
from leanops.optim.zo.exclude import Exclusions
from leanops.optim.zo.run_record import Record
from leanops.optim.zo.slots import Slot, slot_of
from leanops.optim.zo.update import State


class RunParameters:
    """Names and exclusions of an optimizer's parameters. The methods take all parameters: the position is the id."""

    def __init__(self, model: nn.Module | None, exclude: Any) -> None:
        self._model_names = {} if model is None else parameters.names_by_identity(model)
        self._exclusions = Exclusions(exclude)
        self._excluded: set[int] = set()  # ids of the parameters that are excluded as a whole

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model_names": {}}  # its keys are identities of this process's objects

    def check_exclusions_used(self) -> None:
        """ValueError for an entry of ``exclude`` that has matched no parameter."""
        self._exclusions.check_used()

    def join(
        self, params: Sequence[Tensor], group: Mapping[str, Any], index: int, entries: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The log's entries of a new group's parameters, the last ones of ``params``; ``entries`` are those before.

        ValueError, and nothing changes, for parameters that cannot move, that overlap or come twice.
        """
        if len({id(p) for p in group["params"]}) != len(group["params"]):
            raise ValueError("MeZO: a parameter group must not hold a parameter twice")
        ties = parameters.tied(params)
        self._check(params, ties)
        new, excluded = self._describe(group, index, len(entries))
        excluded |= self._excluded
        every = [*entries, *new]
        for i, first in ties.items():
            earlier, later = every[first], every[i]
            only_one = (i in excluded) != (first in excluded)
            if only_one or later.get("fixed_rows", []) != earlier.get("fixed_rows", []):
                pair = f"{earlier['name']} and {later['name']}"
                raise ValueError(f"MeZO: exclude must name both of {pair}, which have the same memory, or none")
            if i >= len(entries):
                later["tied"] = first
        self._excluded = excluded
        return new

    def _check(self, params: Sequence[Tensor], ties: Mapping[int, int]) -> None:
        moving = {ties.get(i, i) for i, p in enumerate(params) if p.requires_grad}
        named = [(self._name(params[i], None, i), params[i]) for i in sorted(moving)]
        for name, p in named:
            parameters.check("MeZO", name, p)
        parameters.check_apart("MeZO", ((name, parameters.local(p)) for name, p in named))

    def _describe(self, group: Mapping[str, Any], index: int, first_id: int) -> tuple[list[dict[str, Any]], set[int]]:
        """A group's entries, and the ids of those parameters that are excluded as a whole."""
        user_names = group.get("param_names", [None] * len(group["params"]))
        entries: list[dict[str, Any]] = []
        excluded: set[int] = set()
        for i, (p, user_name) in enumerate(zip(group["params"], user_names, strict=True), first_id):
            name = self._name(p, user_name, i)
            whole, rows = self._exclusions.rows_of(name, p)
            if whole:
                excluded.add(i)
            entry = {"name": name, "id": i, "shape": list(p.shape), "dtype": dtype_name(p.dtype), "group": index}
            entries.append({**entry, "fixed_rows": rows} if rows else entry)
        return entries, excluded

    def _name(self, p: Tensor, user_name: str | None, position: int) -> str:
        """A parameter's name in the log: the user's, else the model's, without wrappers' prefixes."""
        model_name, canonical = self._model_names.get(id(p), (None, str(position)))
        if user_name is None or user_name == model_name:
            return canonical
        return parameters.without_wrappers(user_name)

    def slots(self, params: Sequence[Tensor], record: Record, groups: int, state: State) -> list[list[Slot]]:
        """The slots of the parameters that move, by group.

        RuntimeError where dtypes, shapes or shared memory are not those of the record.
        """
        ties = parameters.tied(params)
        if ties != record.ties:
            raise RuntimeError(
                f"MeZO: parameters that share memory (id: earlier id) were {record.ties} when the run began, now "
                f"they are {ties}: its log would not replay"
            )
        twins: dict[int, list[Tensor]] = {}
        for i, first in ties.items():
            twins.setdefault(first, []).append(params[i])
        slots: list[list[Slot]] = [[] for _ in range(groups)]
        for p, entry in zip(params, record.entries, strict=True):
            if dtype_name(p.dtype) != entry["dtype"] or list(p.shape) != entry["shape"]:
                raise RuntimeError(
                    f"MeZO: parameter {entry['name']} was {entry['dtype']} {entry['shape']} when the run began, "
                    f"now it is {p.dtype} {list(p.shape)}: its log would not replay"
                )
            same_memory = twins.get(entry["id"], [])
            moves = any(q.requires_grad for q in (p, *same_memory)) and entry["id"] not in self._excluded
            if moves and entry["id"] not in ties:
                parameters.check("MeZO.step", entry["name"], p)
                slot = slot_of("MeZO", entry["name"], entry["id"], p, entry.get("fixed_rows", ()))
                slot = record.strategy.with_state(slot._replace(twins=tuple(same_memory)), state)
                slots[entry["group"]].append(slot)
        return slots
