"""How the file of a transformers model holds its parameters, by transformers' own rules for loading and saving.

transformers 5 saves a model under the names that its checkpoint on the hub has. It renames parameters, and it splits or
joins some: the experts of a mixture are one tensor [E, n, m] in the model and E tensors in the file. A model without
data shows how, and the names and shapes of the file confirm it.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanops.optim.zo.file_views import Group, Shape, ViewTrace
from leanops.optim.zo.log import LogError

Revert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # the model's state_dict -> the file's


class NoLayout(Exception):
    """Why the rules of transformers say nothing about a file."""


class Layout:
    """The groups of a model whose tensors are all in the file."""

    def __init__(self, groups: Iterable[Group], prefix: str) -> None:
        self._groups = {name: group for group in groups for name in group.parameters}
        # a base model's parameters have a prefix in the model for a task, and none by themselves
        self._aliases = {_toggle_prefix(name, prefix): name for name in self._groups} if prefix else {}

    @property
    def names(self) -> list[str]:
        """The names that parameters have in the model."""
        return list(dict.fromkeys([*self._groups, *self._aliases]))

    def __contains__(self, name: object) -> bool:
        return name in self._groups or name in self._aliases

    def __getitem__(self, name: str) -> tuple[str, Group]:
        """The parameter's name in its group, and the group."""
        name = name if name in self._groups else self._aliases[name]
        return name, self._groups[name]


def layout(folder: Path, shapes: Mapping[str, Shape]) -> Layout:
    """The layout of the model whose config.json lies in a folder, in a file with tensors of these names and shapes."""
    config = folder / "config.json"
    if not config.is_file():
        raise NoLayout("no config.json lies beside it")
    try:
        architectures = json.loads(config.read_text(encoding="utf-8"))["architectures"]
        architecture = str(architectures[0])
    except (ValueError, LookupError, TypeError):
        raise NoLayout("its config.json names no architecture of transformers") from None
    with _quiet():
        try:
            import transformers
        except ImportError as error:
            raise NoLayout(f"{architecture} may need transformers, which does not import: {_line(error)}") from error
        try:
            model = _empty_model(transformers, architecture, folder)
            revert = _revert(transformers, model, shapes)
            state = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in model.state_dict().items()}
            trace = ViewTrace(state)
            with trace:
                files = revert(state)
        except NoLayout:
            raise
        except Exception as error:  # a configuration that does not fit, or another version's rules, can raise anything
            version = transformers.__version__
            raise NoLayout(f"transformers {version} gives no layout of {architecture}: {_line(error)}") from error
    prefix = str(getattr(model, "base_model_prefix", ""))
    in_file = {n: n if n in shapes or _toggle_prefix(n, prefix) in files else _toggle_prefix(n, prefix) for n in files}
    converted = {in_file[n]: tuple(t.shape) for n, t in files.items()}
    groups = (
        _group(parameters, names, state, files, trace, revert, in_file) for parameters, names in _parts(files, trace)
    )
    found = [g for g in groups if all(shapes.get(n) == converted[n] for n in g.tensors)]
    known = {name for group in found for name in group.tensors}
    if other := [name for name in shapes if name in state and name not in known]:
        raise NoLayout(f"the rules of transformers for {architecture} do not lead to {other[0]}, which is in the file")
    return Layout(found, prefix)


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without the warnings of transformers and of its imports. A problem becomes an error of this module."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _empty_model(transformers: Any, architecture: str, folder: Path) -> Any:
    """The model on the meta device. No code from the folder is run."""
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise NoLayout(f"transformers {transformers.__version__} has no {architecture}")
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return kind(config)


def _revert(transformers: Any, model: Any, names: Iterable[str]) -> Revert:
    """The conversion of this model's state_dict into that of the file with these names."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
            revert_weight_conversion,
        )
    except ImportError:
        raise NoLayout(f"transformers {transformers.__version__} has no rules for names; transformers 5 has") from None
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    state = model.state_dict()
    for name in sorted(names, key=dot_natural_key):  # as loading does, which notes the rules that it uses
        rename_source_key(name, renamings, converters, model.base_model_prefix, state)
    model._weight_conversions = [r for r in rules if r.was_used()]  # saving reverts the rules that loading used

    def revert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
        return found

    return revert


def _toggle_prefix(name: str, prefix: str) -> str:
    """A name without the prefix if it has it, else with it."""
    return name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}"


def _parts(files: Mapping[str, Tensor], trace: ViewTrace) -> list[tuple[list[str], list[str]]]:
    """Parameters and tensors of the file that belong together: the names of each."""
    owner: dict[str, tuple[list[str], list[str]]] = {}  # parameter -> its part
    for file, t in files.items():
        sources = sorted(trace.sources(t))
        if not sources:
            continue
        together: tuple[list[str], list[str]] = ([], [file])
        for part in {id(owner[s]): owner[s] for s in sources if s in owner}.values():
            together[0].extend(part[0])
            together[1].extend(part[1])
        together[0].extend(s for s in sources if s not in owner)
        owner |= dict.fromkeys(together[0], together)
    return list({id(part): part for part in owner.values()}.values())


def _group(
    parameters: list[str],
    names: list[str],
    state: Mapping[str, Tensor],
    files: Mapping[str, Tensor],
    trace: ViewTrace,
    revert: Revert,
    in_file: Mapping[str, str],
) -> Group:
    shapes = {p: tuple(state[p].shape) for p in parameters}
    views = {n: trace.view(files[n]) if len(parameters) == 1 else None for n in names}
    size = sum(math.prod(s) for s in shapes.values())
    starts = {v.offset for v in views.values() if v is not None}
    if len(starts) != len(names) or sum(files[n].numel() for n in names) != size:
        views = dict.fromkeys(names)

    def indices() -> dict[str, Tensor]:
        kind = torch.int32 if size < 2**31 else torch.int64
        found: dict[str, Tensor] = {}
        places, first = {}, 0
        for name, shape in shapes.items():
            last = first + math.prod(shape)
            places[name] = torch.arange(first, last, dtype=kind, device="cpu").view(shape)
            first = last
        found = revert(places)
        seen = torch.zeros(size, dtype=torch.bool, device="cpu")
        for t in found.values():
            seen[t.flatten()] = True
        if set(found) != set(names) or sum(t.numel() for t in found.values()) != size or not seen.all():
            raise LogError(
                f"replay_file: {', '.join(parameters[:4])}: the tensors of the file must hold each element once, which "
                "the conversion of transformers does not give; call replay_ on the model in memory"
            )
        return {in_file[n]: t for n, t in found.items()}

    return Group(shapes, {in_file[n]: views[n] for n in names}, indices)
