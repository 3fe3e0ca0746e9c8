"""Which tensor a parameter of the log is, where both sides have names that differ in known ways.

A name is tried as it is, then without the wrappers of torch.compile, DDP and the like, then without an adapter's name.
PEFT calls an adapter's weight ``base_model.model.….lora_A.default.weight`` in the model, where ``default`` is the
adapter's name, and ``base_model.model.….lora_A.weight`` in the file that it saves. A way that leads to several tensors
is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any

from leanops.optim.common.parameters import without_wrappers
from leanops.optim.zo.log import LogError, ZoLog

_SHOWN = 8


def names_of(
    where: object, log: ZoLog, moved: Collection[int], names: Mapping[str, str] | None, tensors: Iterable[str]
) -> tuple[dict[int, str], set[str]]:
    """id -> the tensor's name, of each parameter that moves, and all tensors that the log knows.

    ``names`` are the caller's: the log's name -> the tensor's. A name without a tensor is returned as it is, and left
    out where an earlier parameter has the same memory.
    """
    names = {} if names is None else names
    if not isinstance(names, Mapping):
        raise TypeError(f"{where}: names must be a mapping from the log's names, got {names!r}")
    entries = log.params()
    known = {plain(e["name"]): e["name"] for e in entries} | {e["name"]: e["name"] for e in entries}
    given = {known.get(n, known.get(plain(str(n)))): tensor for n, tensor in names.items()}
    if None in given:
        unknown = [str(n) for n in names if n not in known and plain(str(n)) not in known]
        raise ValueError(f"{where}: names must be of parameters of the log, got {', '.join(unknown[:_SHOWN])}")
    wanted: dict[int, Any] = {e["id"]: given.get(e["name"], e["name"]) for e in entries}
    ties = log.ties()
    needed = [name for i, name in wanted.items() if i in moved and i not in ties]
    if twice := [str(name) for name, count in Counter(needed).items() if count > 1]:
        text = f"parameters of the log must have a name each, got {', '.join(twice[:_SHOWN])} for several"
        raise LogError(f"{where}: {text}")
    found = match(where, [n for n in wanted.values() if isinstance(n, str)], set(needed), tensors)
    used = {i: name for i, name in wanted.items() if i in moved and (i not in ties or name in found)}
    return {i: found.get(name, name) for i, name in used.items()}, set(found.values())


def match(where: object, names: Collection[str], needed: Collection[str], tensors: Iterable[str]) -> dict[str, str]:
    """The tensor's name of each of ``names`` that has one. LogError where several tensors could be one that is
    ``needed``, and where two names lead to one tensor."""
    tensors = list(tensors)
    table = frozenset(tensors)
    found = {name: name for name in names if name in table}

    def rest() -> tuple[list[str], list[str]]:
        taken = set(found.values())
        return [name for name in names if name not in found], [t for t in tensors if t not in taken]

    left, free = rest()
    index = _index(free, plain) if left else {}
    hits = {name: index.get(plain(name), ()) for name in left}
    found |= _unique(where, {name: t for name, t in hits.items() if name in needed or len(t) == 1})
    left, free = rest()
    found |= _unique(where, _adapters([name for name in left if name in needed], free))
    names_of: dict[str, str] = {}
    for name, tensor in found.items():
        if (other := names_of.setdefault(tensor, name)) != name:
            raise LogError(f"{where}: parameters {other} and {name} of the log both fit {tensor}; say which by names")
    return found


def plain(name: str) -> str:
    """A name without wrappers. A leading ``module`` goes too, because older logs of DDP models have it."""
    parts = without_wrappers(name).split(".")
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def without_adapter(name: str, adapter: str | None) -> str:
    """A name as PEFT saves it: without the adapter's name, which follows one of PEFT's own attributes."""
    kept: list[str] = []
    for part in plain(name).removeprefix("base_model.model.").split("."):
        if part != adapter or not kept or "_" not in kept[-1]:
            kept.append(part)
        elif kept[-1] == "modules_to_save":
            kept.pop()
    bare = ".".join(kept)
    if bare == "prompt_encoder.embedding.weight":
        return "prompt_embeddings"
    return bare.removesuffix(".weight") if bare.endswith(".lora_magnitude_vector.weight") else bare


def _adapters(names: Collection[str], free: Collection[str]) -> dict[str, list[str]]:
    """The tensors that could be an adapter's weights: all names lose one adapter's name, and all tensors lose one."""
    merged: dict[str, dict[str, None]] = {name: {} for name in names}
    if any(map(_of_peft, names)) or any(map(_of_peft, free)):
        for mine, theirs in product(_adapter_names(names), _adapter_names(free)):
            index = _index(free, partial(without_adapter, adapter=theirs))
            hits = {
                name: [t for t in index.get(without_adapter(name, mine), ()) if _of_peft(name) or _of_peft(t)]
                for name in names
            }
            if all(hits.values()):
                for name, tensors in hits.items():
                    merged[name] |= dict.fromkeys(tensors)
    return {name: list(tensors) for name, tensors in merged.items()}


def _of_peft(name: str) -> bool:
    return plain(name).startswith(("base_model.", "prompt_encoder.")) or ".lora_" in name


def _adapter_names(names: Collection[str]) -> list[str | None]:
    """What could be an adapter's name: a part after one that has an underscore, as PEFT's attributes have. None: the
    names hold none."""
    found: dict[str | None, None] = {None: None}
    for name in names:
        parts = plain(name).split(".")
        found |= {b: None for a, b in pairwise(parts) if "_" in a and not b.isdecimal()}
    return list(found)


def _index(tensors: Iterable[str], form: Callable[[str], str]) -> dict[str, list[str]]:
    index: dict[str, list[str]] = {}
    for tensor in tensors:
        index.setdefault(form(tensor), []).append(tensor)
    return index


def _unique(where: object, hits: Mapping[str, Sequence[str]]) -> dict[str, str]:
    for name, tensors in hits.items():
        if len(tensors) > 1:
            text = f"parameter {name} of the log could be {', '.join(sorted(tensors)[:_SHOWN])}"
            raise LogError(f"{where}: {text}; say which by names")
    return {name: tensors[0] for name, tensors in hits.items() if tensors}
