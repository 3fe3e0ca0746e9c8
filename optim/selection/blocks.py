"""Find the blocks and the parameters of a model that a user names, or the model's only stack of blocks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

Blocks = str | nn.Module | Sequence[nn.Module | str] | None


def find_blocks(op: str, model: nn.Module, blocks: Blocks) -> dict[str, nn.Module]:
    """Name and module of each block.

    - None: the entries of the only ``nn.ModuleList`` that has two or more trainable entries. Lists within another
      list's modules, such as experts, do not count.
    - A module's name: the children of that module.
    - Another string: a regular expression that must match a block's whole name.
    - A module: its children.
    - A list: modules or their names.
    """
    names = {id(m): n for n, m in model.named_modules()}
    modules = dict(model.named_modules())
    if blocks is None:
        found = _stack(op, model)
    elif isinstance(blocks, str):
        if blocks in modules:
            found = {n: m for n, m in modules.items() if n and n.rpartition(".")[0] == blocks}
        else:
            pattern = _pattern(op, "blocks", blocks)
            found = {n: m for n, m in modules.items() if n and pattern.fullmatch(n)}
    else:
        found = {}
        for item in blocks.children() if isinstance(blocks, nn.Module) else _items(op, "blocks", blocks):
            name = item if isinstance(item, str) else names.get(id(item))
            if name is None or name not in modules:
                what = repr(item) if isinstance(item, str) else f"a {type(item).__name__} that is not in the model"
                raise ValueError(f"{op}: blocks must be modules of the model or their names, got {what}")
            found[name] = modules[name]
    if not found:
        lists = ", ".join(map(repr, _lists(model))) or "none"
        raise ValueError(
            f"{op}: blocks must name modules of the model, got {blocks!r}, which matches none; its lists of modules: "
            f"{lists}"
        )
    for name in found:
        outer = next((o for o in found if o != name and name.startswith(f"{o}.")), None)
        if outer is not None:
            raise ValueError(f"{op}: blocks must not lie within one another, got {outer} and {name}")
    return found


def _lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The model's lists of modules that lie in no other list."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    return {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") or not o for o in lists if o != n)}


def _stack(op: str, model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of the model's only stack."""
    outer = _lists(model)
    if not outer:
        raise ValueError(f"{op}: blocks must be given for a model without a torch.nn.ModuleList, got None")
    training = {n: sum(any(p.requires_grad for p in m.parameters()) for m in entries) for n, entries in outer.items()}
    most = max(training.values())
    # a list with one trainable entry is a stack only if no list has two
    stacks = [n for n, count in training.items() if count >= min(most, 2)]
    if len(stacks) > 1:
        found = ", ".join(f"{n!r} ({training[n]})" for n in stacks)
        raise ValueError(
            f"{op}: blocks must be given for a model with several stacks, got None; pass the name of one of them "
            f"(and its number of blocks that train): {found}"
        )
    (name,) = stacks
    return {f"{name}.{n}" if name else n: m for n, m in outer[name].named_children()}


def _pattern(op: str, name: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{op}: {name} must be a name or a regular expression, got {text!r} ({error})") from error


def _items(op: str, name: str, given: object) -> Iterable[Any]:
    if not isinstance(given, Iterable):
        raise ValueError(f"{op}: {name} must be a regular expression, a module or a list, got {given!r}")
    return given


Named = str | nn.Module | Tensor | Sequence[nn.Module | Tensor | str]


def find_params(op: str, argument: str, model: nn.Module, names: Collection[str], which: Named) -> set[str]:
    """Names of the parameters that ``which`` names: a regular expression to search in names, modules, or parameters."""
    if isinstance(which, str):
        pattern = _pattern(op, argument, which)
        found = {n for n in names if pattern.search(n)}
        if not found:
            raise ValueError(f"{op}: {argument} must match a trainable parameter's name, got {which!r}")
        return found
    by_id = {id(p): n for n, p in model.named_parameters() if n in names}
    found = set()
    for item in [which] if isinstance(which, nn.Module | Tensor) else _items(op, argument, which):
        if isinstance(item, str):
            found |= find_params(op, argument, model, names, item)
            continue
        inside = {
            by_id[id(p)] for p in (item.parameters() if isinstance(item, nn.Module) else [item]) if id(p) in by_id
        }
        if not inside:
            raise ValueError(
                f"{op}: {argument} must hold modules or trainable parameters of the model, got a {type(item).__name__}"
            )
        found |= inside
    return found
