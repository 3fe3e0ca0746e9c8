"""The replay of a log from one checkpoint to another, which never holds the whole model in memory."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanops.common.dtypes import dtype_name
from leanops.optim.zo.checkpoint import Checkpoint, Transfer
from leanops.optim.zo.file_views import Group, Shape, alone
from leanops.optim.zo.log import LogError, ZoLog
from leanops.optim.zo.names import names_of
from leanops.optim.zo.replay import check_fits, loaded, moved_by, programs, replayable, run_
from leanops.optim.zo.safetensors_header import Stored, copies
from leanops.optim.zo.slots import Slot
from leanops.optim.zo.strategy import Strategy
from leanops.optim.zo.transformers_layout import NoLayout, layout
from leanops.optim.zo.update import Update
from leanops.optim.zo.whole_files import check_new_folder
from leanops.zo import columns_of

_SLICE = 1 << 22  # elements of 8 bytes in memory at a time
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}  # of safetensors
Progress = Callable[[int, int], None]


def replay_file(
    base: str | os.PathLike[str],
    log: ZoLog | str | os.PathLike[str],
    out: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    fused: bool = False,
    names: Mapping[str, str] | None = None,
    stop: int | None = None,
) -> None:
    """:func:`replay_` from one checkpoint to another, a few million elements in memory at a time.

    A checkpoint is a safetensors file, or a folder or ``model.safetensors.index.json`` of ``save_pretrained``. A folder
    gives a new folder with the same shards, index and small files (configuration, tokenizer); subfolders and other
    files of weights or training state are not copied. Tensors that the log does not move are copied; headers, metadata
    included, stay as they are. Names, shapes and dtypes are checked before anything is written.

    Where a ``config.json`` lies beside the weights and transformers 5 is installed, its own rules lead from the model's
    names to the file's, and to the tensors into which it splits a parameter on saving. A parameter that such a
    conversion transposes or joins with others is in memory as a whole.

    A weight that is used twice has one name in the log. A file may hold it again under another: a tensor that the log
    does not know and that begins as a copy of one it moves is copied with a warning.

    Args:
        base: the start weights.
        log: the log, or its file.
        out: the end weights, which appear whole or not at all. A file may take the place of ``base``; a folder must not
            exist.
        progress: called as ``progress(done, total)``, which count bytes.
        fused: see :func:`replay_`.
        names: the log's name of a parameter -> its name in the file, where the replay cannot tell.
        stop: only steps before this one.

    Raises:
        LogError: a damaged log or checkpoint; parameters that are missing or differ in shape or dtype.
        FileExistsError: ``out`` must be a new folder and exists.
        ValueError: ``stop`` outside the run; ``names`` of no parameter of the log; ``out`` that is the log.
    """
    if isinstance(log, (str, os.PathLike)) and os.path.exists(out) and os.path.samefile(out, log):
        raise ValueError(f"replay_file: out must be another file than the log, got {out}")
    log = loaded("replay_file", log)
    strategy = replayable(log.header, fused)
    moved = moved_by(log, programs(log, strategy, stop=stop))
    checkpoint = Checkpoint(base)
    if checkpoint.is_folder:
        check_new_folder(out)
    parts, known = _parts(log, moved, names, checkpoint)
    for name, other in copies(checkpoint.tensors, parts, [n for n in checkpoint.tensors if n not in known]):
        warnings.warn(
            f"{base}: {other} is a copy of {name}, which the log moves, but is not in the log and stays as it is; "
            "where it is the same weight under a second name, remove it",
            stacklevel=2,
        )
    with checkpoint.rewritten(out) as transfer:
        _Replay(checkpoint, transfer, strategy, fused, progress).run(parts)


@dataclass(frozen=True)
class _Move:
    """How a parameter moves. ``entry`` is its entry in the log, or that of the parameter that it is tied to."""

    shape: Shape
    entry: Mapping[str, Any]
    updates: list[Update]

    def slot(self, flat: Tensor, offset: int) -> Slot:
        """Elements of the parameter from ``offset`` on."""
        width = math.prod(self.shape[1:])
        fixed = tuple((first * width, end * width) for first, end in self.entry.get("fixed_rows", ()))
        return Slot(flat, flat, self.entry["id"], offset, self.entry["name"], columns_of(self.shape), fixed=fixed)


@dataclass(frozen=True)
class _Part:
    """Parameters that lie in the same tensors of the file, and those of them that move."""

    group: Group
    moves: dict[str, _Move]


def _parts(
    log: ZoLog, moved: Mapping[int, list[Update]], names: Mapping[str, str] | None, checkpoint: Checkpoint
) -> tuple[dict[str, _Part], set[str]]:
    """The part of each tensor that moves, and all tensors that the log knows."""
    groups, known = _groups(log, moved, names, checkpoint)
    entries, ties = {e["id"]: e for e in log.params()}, log.ties()
    parts: dict[int, _Part] = {}
    for i, (name, group) in groups.items():
        shape = group.parameters[name]
        for file in group.tensors:
            stored = checkpoint.tensors[file].dtype
            dtype = dtype_name(_DTYPES[stored]) if stored in _DTYPES else stored
            check_fits(checkpoint.name, entries[i], list(shape), dtype)
        part = parts.setdefault(id(group), _Part(group, {}))
        part.moves[name] = _Move(shape, entries[ties.get(i, i)], moved[i])
    return {file: part for part in parts.values() for file in part.group.tensors}, known


def _groups(
    log: ZoLog, moved: Mapping[int, Any], names: Mapping[str, str] | None, checkpoint: Checkpoint
) -> tuple[dict[int, tuple[str, Group]], set[str]]:
    """id -> the parameter's name in its group, and the group, of each parameter that moves; and all tensors that the
    log knows. The rules of transformers come first, since a name may mean another tensor in the file."""
    tensors = checkpoint.tensors
    given = {n for n in names.values() if isinstance(n, str)} if isinstance(names, Mapping) else set()

    def of_file(name: str) -> tuple[str, Group]:
        return name, alone(name, tensors[name].shape)

    missing: list[str] = []
    try:
        rules = layout(checkpoint.folder, {name: t.shape for name, t in tensors.items()})
    except NoLayout as reason:
        why = str(reason)
    else:
        wanted, known = names_of("replay_file", log, moved, names, dict.fromkeys([*rules.names, *given]))
        missing = [n for n in wanted.values() if n not in (tensors if n in given else rules)]
        if not missing:
            groups = {i: of_file(name) if name in given else rules[name] for i, name in wanted.items()}
            found = (rules[name][1].tensors if name in rules else (name,) for name in known)
            return groups, {file for files in found for file in files}
        why = "the rules of transformers for its config.json lead to no tensor of the file"
    wanted, known = names_of("replay_file", log, moved, names, tensors)
    if absent := [name for name in wanted.values() if name not in tensors]:
        missing = min(missing or absent, absent, key=len)  # from the attempt that found more of the parameters
        if missing[0] in given and isinstance(names, Mapping):
            own = next(name for name, file_name in names.items() if file_name == missing[0])
            raise LogError(f"{checkpoint.name}: names gives {missing[0]} for {own}, which is not in the file")
        why += f"; {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        raise LogError(
            f"{checkpoint.name}: the log moves parameter {missing[0]}, which is not in the file ({why}). Give the "
            "file's names by names= (--name LOG=BASE, --names FILE.json), or call replay_ on the model in memory"
        )
    return {i: of_file(name) for i, name in wanted.items()}, known


class _Replay:
    """Writes the tensors of a checkpoint after the replay."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        transfer: Transfer,
        strategy: Strategy,
        fused: bool,
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.transfer, self.strategy = checkpoint, transfer, strategy
        self.fused, self.progress = fused, progress
        self.done, self.total = 0, checkpoint.nbytes

    @torch.no_grad()
    def run(self, parts: Mapping[str, _Part]) -> None:
        written: set[int] = set()
        for name in self.checkpoint.tensors:
            part = parts.get(name)
            if part is None:
                self._stream(name, None, 0)
            elif part.group.in_runs:
                view, (move,) = part.group.tensors[name], part.moves.values()
                assert view is not None
                self._stream(name, move, view.offset)
            elif id(part) not in written:
                written.add(id(part))
                self._assemble(part)

    def _stream(self, name: str, move: _Move | None, offset: int) -> None:
        """Write a tensor slice by slice. Its elements follow one another in the parameter, from ``offset`` on."""
        tensor = self.checkpoint.tensors[name]
        step = _SLICE * 8
        for start in range(0, tensor.nbytes, step):
            data = self.transfer.read(tensor, start, min(step, tensor.nbytes - start))
            if move is not None:
                flat = torch.frombuffer(data, dtype=_DTYPES[tensor.dtype])  # writes into `data`
                self._move(move, flat, offset + start // flat.element_size())
            self._write(tensor, data, start)

    def _assemble(self, part: _Part) -> None:
        """Move parameters that their conversion mixes or transposes, as wholes, and convert them again."""
        group = part.group
        stored = {name: self.checkpoint.tensors[name] for name in group.tensors}
        dtype = _DTYPES[next(iter(stored.values())).dtype]
        whole = torch.empty(sum(map(math.prod, group.parameters.values())), dtype=dtype, device="cpu")
        indices = group.indices() if None in group.tensors.values() else {}
        for name, tensor in stored.items():
            if tensor.nbytes:
                values = torch.frombuffer(self.transfer.read(tensor), dtype=dtype).view(tensor.shape)
                view = group.tensors[name]
                if view is None:
                    whole[indices[name]] = values
                else:
                    whole.as_strided(*view).copy_(values)
        first = 0
        for name, shape in group.parameters.items():
            flat = whole[first : (first := first + math.prod(shape))]
            if name in part.moves:
                self._move(part.moves[name], flat, 0)
        for name, tensor in stored.items():
            view = group.tensors[name]
            values = whole[indices[name]] if view is None else whole.as_strided(*view)
            self._write(tensor, values.flatten().view(torch.uint8).numpy().data, 0)

    def _move(self, move: _Move, flat: Tensor, offset: int) -> None:
        run_([move.slot(flat, offset)], move.updates, self.strategy, self.fused)

    def _write(self, tensor: Stored, data: bytearray | memoryview, first: int) -> None:
        self.transfer.write(tensor, data, first)
        self.done += len(data)
        if self.progress is not None:
            self.progress(self.done, self.total)
