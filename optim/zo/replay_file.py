"""The replay of a log from one safetensors file to another, which never holds the whole model in memory."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from leanops.optim.zo.log import LogError, ZoLog, replacing
from leanops.optim.zo.names import names_of
from leanops.optim.zo.replay import check_fits, loaded, moved_by, programs, replayable, run_
from leanops.optim.zo.safetensors_header import copies, read_header
from leanops.optim.zo.slots import Slot
from leanops.optim.zo.strategy import Strategy
from leanops.optim.zo.update import Update
from leanops.zo import columns_of

_SLICE = 1 << 22  # elements of a tensor in memory at a time
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
Progress = Callable[[int, int], None]


def replay_file(
    base: str | os.PathLike[str],
    log: ZoLog | str | os.PathLike[str],
    out: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    fused: bool = False,
    names: Mapping[str, str] | None = None,
) -> None:
    """:func:`replay_` from one safetensors file to another, a few million elements in memory at a time.

    Tensors that the log does not move are copied; the header, metadata included, stays as it is. Names, shapes and
    dtypes are checked before anything is written, and the output appears whole or not at all. It may take the place of
    ``base``. ``progress(done, total)`` counts bytes.

    A weight that is used twice has one name in the log. A file may hold it again under another: a tensor that the log
    does not know and that begins as a copy of one it moves is copied with a warning.
    """
    if isinstance(log, (str, os.PathLike)) and os.path.exists(out) and os.path.samefile(out, log):
        raise ValueError(f"replay_file: out must be another file than the log, got {out}")
    log = loaded("replay_file", log)
    strategy = replayable(log.header, fused)
    moved = moved_by(log, programs(log, strategy))
    preamble, table = read_header(base)
    wanted, known = names_of("replay_file", log, moved, names, table)
    updates: dict[str, tuple[Mapping[str, Any], list[Update]]] = {}
    entries, ties = {e["id"]: e for e in log.params()}, log.ties()
    for entry in entries.values():
        if entry["id"] not in wanted:
            continue
        name = wanted[entry["id"]]
        if name not in table:
            raise LogError(f"{base}: the log moves parameter {name}, which is not in the file")
        dtype = next((k for k, v in _DTYPES.items() if v == table[name]["dtype"]), table[name]["dtype"])
        check_fits(base, entry, table[name]["shape"], dtype)
        updates[name] = (entries[ties.get(entry["id"], entry["id"])], moved[entry["id"]])
    for name, other in copies(base, len(preamble), table, updates, [n for n in table if n not in known]):
        warnings.warn(
            f"{base}: {other} is a copy of {name}, which the log moves, but is not in the log and stays as it is; "
            "where it is the same weight under a second name, remove it",
            stacklevel=2,
        )
    total = sum(t["data_offsets"][1] - t["data_offsets"][0] for t in table.values())
    with replacing(out) as writer, open(base, "rb") as reader:
        writer.write(preamble)
        reader.seek(len(preamble))
        done = 0
        for name, info in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
            for data in _replayed(reader, info, updates.get(name), strategy, fused):
                writer.write(data)
                done += len(data)
                if progress is not None:
                    progress(done, total)


def _replayed(
    reader: Any,
    info: Mapping[str, Any],
    update: tuple[Mapping[str, Any], list[Update]] | None,
    strategy: Strategy,
    fused: bool,
) -> Iterator[bytes | bytearray]:
    """A tensor's bytes after the replay, slice by slice."""
    size = info["data_offsets"][1] - info["data_offsets"][0]
    step = _SLICE * 8
    for start in range(0, size, step):
        data = bytearray(reader.read(min(step, size - start)))
        if update is not None:
            dtype = next(getattr(torch, k) for k, v in _DTYPES.items() if v == info["dtype"])
            part = torch.frombuffer(data, dtype=dtype)  # writes into `data`
            entry, shape = update[0], info["shape"]
            width = math.prod(shape[1:])
            fixed = tuple((first * width, end * width) for first, end in entry.get("fixed_rows", ()))
            offset = start // part.element_size()
            slot = Slot(part, part, entry["id"], offset, entry["name"], columns_of(shape), fixed=fixed)
            with torch.no_grad():
                run_([slot], update[1], strategy, fused)
        yield data
