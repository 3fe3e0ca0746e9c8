"""The log of a run: a header and one fp32 scalar a step (and direction), from which the run's weights follow.

A step of HiZOO has two scalars a direction: first the estimates of all directions, then their measured curvatures.

File layout, little-endian, in 4-byte words::

    "ZOLOG\\0\\1\\n"  bytes of the header, crc32 of the header, header (JSON, padded with spaces)
    scalar scalar scalar ...                 `words` a step; NaN: the step was skipped
    ESCAPE kind|words<<8  payload ...        between steps: a change, or a checksum

ESCAPE is a signalling NaN, which is never a scalar. A changed hyperparameter takes 5 words, a step only its scalars. A
checksum of all bytes before it follows every 4,096 steps, and ends the log. A run that appends to its file and dies
leaves a log that loads up to the last whole step, with a warning.
"""

from __future__ import annotations

import json
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from leanops.optim.zo.step import FIELDS, Step
from leanops.optim.zo.variants import scalars_per_direction
from leanops.optim.zo.whole_files import replacing

MAGIC = b"ZOLOG\x00\x01\n"
FORMAT = "zolog/1"

_ESCAPE = 0x7FA10C5E
_SET, _JSON, _CHECK, _END = 1, 2, 3, 4
_LAYOUT = {_SET: "<HHd", _CHECK: "<II", _END: "<II"}  # (group, field, value), (crc32, steps) of all bytes before
_CHECK_EVERY = 4096
_SKIPPED = struct.pack("<I", 0x7FC00000)
_ENTRY = {"name", "id", "shape", "dtype", "group"}  # what the log says of each parameter
_OPTIONAL = {"fixed_rows", "tied"}  # rows that do not move; the id of the earlier parameter with the same memory


class LogError(ValueError):
    """A log or a checkpoint that cannot be read, or a log that does not fit the parameters of a replay."""


def _padded(data: bytes) -> bytes:
    return data + b" " * (-len(data) % 4)


class ZoLog:
    """Seeds and scalars of a run of :class:`leanops.optim.MeZO`; see the module's text for the format.

    ``header`` holds the definition's version, names, ids, shapes and dtypes of the parameters, their groups, the
    distribution, rounding, eps, variant, number of directions, base seed and seed rule. ``len(log)`` is the number of
    steps, skipped ones included.
    """

    def __init__(self, header: Mapping[str, Any]) -> None:
        self._file: BinaryIO | None = None
        self._path: Path | None = None
        self.begin(header)

    def begin(self, header: Mapping[str, Any]) -> None:
        """Take a header, and drop all steps."""
        self.header: dict[str, Any] = {"format": FORMAT, **deepcopy(dict(header))}
        self._body = bytearray()
        self._crc = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return (
            f"ZoLog({self._count} steps, {len(self.header['params'])} parameters, {len(self._body)} bytes of records)"
        )

    @property
    def directions(self) -> int:
        return int(self.header["directions"])

    @property
    def words(self) -> int:
        """The number of scalars of a step; each is a word."""
        return self.directions * scalars_per_direction(self.header)

    # --- writing ------------------------------------------------------------------------------------------------------

    def append(self, scalars: Sequence[float] | None) -> None:
        """Add a step: its scalars, or None for a skipped step."""
        n = self.words
        if scalars is None:
            self._write(_SKIPPED * n, steps=1)
        else:
            if len(scalars) != n or not all(map(math.isfinite, scalars)):
                raise ValueError(f"ZoLog.append: a step has {n} finite scalars, got {list(scalars)}")
            self._write(struct.pack(f"<{n}f", *scalars), steps=1)
        if self._count % _CHECK_EVERY == 0:
            self._write(self._checksum(_CHECK))

    def set(self, group: int, field: str, value: float) -> None:
        """Record that a parameter group's lr, weight decay or momentum has another value from the next step on."""
        if field not in FIELDS or not _in_range(field, value):
            raise ValueError(
                f"ZoLog.set: field must be one of {', '.join(FIELDS)}, its value finite and >= 0, momentum below 1, "
                f"got {field!r} and {value}"
            )
        self._event(_SET, struct.pack(_LAYOUT[_SET], group, FIELDS.index(field), value))

    def change(self, **values: Any) -> None:
        """Record what holds from the next step on: ``frozen`` (ids), ``eps``, or entries of further ``params``."""
        self._event(_JSON, _padded(json.dumps(values, separators=(",", ":")).encode()))

    def _event(self, kind: int, payload: bytes) -> None:
        self._write(struct.pack("<II", _ESCAPE, kind | len(payload) // 4 << 8) + payload)

    def _checksum(self, kind: int) -> bytes:
        return struct.pack("<IIII", _ESCAPE, kind | 2 << 8, self._crc, self._count & 0xFFFFFFFF)

    def _write(self, data: bytes, steps: int = 0) -> None:
        self._body += data
        self._crc = zlib.crc32(data, self._crc)
        self._count += steps
        if self._file is not None:
            # last: if the disk is full, the log in memory is whole, and the file buffers the rest
            self._file.write(data)
            self._file.flush()

    def _preamble(self, steps: int | None) -> bytes:
        header = _padded(json.dumps({**self.header, "steps": steps}, separators=(",", ":")).encode())
        return MAGIC + struct.pack("<II", len(header), zlib.crc32(header)) + header

    def to_bytes(self) -> bytes:
        """The log as :meth:`save` writes it."""
        return self._preamble(self._count) + bytes(self._body) + self._checksum(_END)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the log; the file appears whole or not at all. Onto the attached file it is :meth:`close`."""
        if self._path and self.attached and os.path.exists(path) and os.path.samefile(path, self._path):
            self.close()
            return
        with replacing(path) as file:
            file.write(self.to_bytes())

    @property
    def attached(self) -> bool:
        return self._file is not None

    def attach(self, path: str | os.PathLike[str], *, new: bool = False) -> None:
        """Write the log to ``path`` and append every later step to it as it happens. :meth:`close` completes the file.

        An existing file is overwritten only if it is a log of this run, up to an earlier or a later step, and not with
        ``new``; FileExistsError otherwise.
        """
        self.check_path(path, new=new)
        self.close()
        self._path = Path(path)
        with replacing(self._path) as file:
            file.write(self._preamble(None) + bytes(self._body))
        self._file = open(self._path, "ab")  # noqa: SIM115

    def check_path(self, path: str | os.PathLike[str], *, new: bool = False) -> None:
        """Raise what :meth:`attach` would raise for this path, and write nothing."""
        file = Path(path)
        if not file.parent.is_dir():
            raise FileNotFoundError(f"{path}: the log's folder {file.parent} does not exist")
        if new and file.exists():
            raise FileExistsError(
                f"{path}: the file exists already; give another name, or resume its run from a state_dict"
            )
        if file.exists() and not self._same_run(file):
            raise FileExistsError(f"{path}: the file exists and is not this run's log; give another name")

    def close(self) -> None:
        """Complete and close the attached file, if there is one."""
        if self._file is not None:
            file, self._file = self._file, None  # closed also if the write fails
            with file:
                file.write(self._checksum(_END))

    def _same_run(self, path: Path) -> bool:
        """Whether the file's log begins with this one, or this one with the file's."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warning of a run that did not close its log
            try:
                other = ZoLog.load(path)
            except LogError:
                return False
        long, short = sorted((self._body, other._body), key=len, reverse=True)
        return other.header == self.header and long.startswith(short)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_path": None}  # a copy does not append to the original's file

    # --- reading ------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ZoLog:
        """Read a log. Raises :class:`LogError` on another version and on damage; warns on an unfinished run."""
        return cls.from_bytes(Path(path).read_bytes(), name=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "log") -> ZoLog:
        header, start = _read_header(data, name)
        steps = header.pop("steps")
        log = cls(header)
        end, complete = log._scan(data[start:], name)
        log._body = bytearray(data[start : start + end])
        log._crc = zlib.crc32(log._body)
        if steps is not None and steps != log._count:
            raise LogError(f"{name}: truncated: the header announces {steps} steps, {log._count} are there")
        if steps is not None and not complete:
            raise LogError(f"{name}: truncated: all {steps} steps are there, the checksum after them is not")
        if not complete:
            warnings.warn(f"{name}: the run did not close its log; {log._count} steps were recovered", stacklevel=2)
        return log

    def _scan(self, body: bytes, name: str) -> tuple[int, bool]:
        """Count the steps and verify the checksums. Returns where the last whole record ends, and whether the log is
        complete."""
        position = checked = crc = 0
        groups = self.header["groups"]
        for kind, start, end, content in _records(body, self.words, name):
            position = end
            if kind == 0:
                finite, skipped = np.isfinite(content), np.isnan(content).all(1)
                if not (finite.all(1) | skipped).all():
                    raise LogError(f"{name}: damaged: a scalar that is not finite after step {self._count}")
                self._count += len(content)
            elif kind == _SET:
                group, field, value = content
                if group >= groups or field >= len(FIELDS) or not _in_range(FIELDS[field], value):
                    raise LogError(f"{name}: damaged: at byte {start} group {group} sets field {field} to {value}")
            elif kind == _JSON:
                if not _is_change(content, groups):
                    raise LogError(f"{name}: damaged: no run writes the change at byte {start}")
                groups += "params" in content
            else:
                crc = zlib.crc32(body[checked:start], crc)
                checked = start
                if content != (crc, self._count & 0xFFFFFFFF):
                    raise LogError(f"{name}: damaged: a checksum before step {self._count} does not fit")
                if kind == _END:
                    if end != len(body):
                        raise LogError(f"{name}: damaged: {len(body) - end} bytes after the end")
                    return start, True
        return position, False

    def scalars(self) -> NDArray[np.float32]:
        """[steps, words]; the row of a skipped step is NaN."""
        rows = [content for kind, _, _, content in _records(bytes(self._body), self.words) if kind == 0]
        return np.concatenate(rows) if rows else np.empty((0, self.words), np.float32)

    def params(self) -> list[dict[str, Any]]:
        """Every parameter's ``name``, ``id``, ``shape``, ``dtype`` and ``group``, also of those that joined later."""
        entries = list(self.header["params"])
        for kind, _, _, content in _records(bytes(self._body), self.words):
            if kind == _JSON:
                entries += content.get("params", [])
        return entries

    def ties(self) -> dict[int, int]:
        """id -> the id of the earlier parameter with the same memory."""
        return {e["id"]: e["tied"] for e in self.params() if "tied" in e}

    def steps(self, start: int = 0, stop: int | None = None) -> Iterator[Step]:
        """The steps of the run in their order."""
        for step in self.states():
            if step.index >= (len(self) if stop is None else stop):
                return
            if step.index >= start:
                yield step

    def states(self) -> Iterator[Step]:
        """:meth:`steps`, and then one more, without scalars: the options of the next step."""
        groups: list[dict[str, float]] = [dict.fromkeys(FIELDS, 0.0) for _ in range(self.header["groups"])]
        state, frozen, restart, index = tuple(groups), frozenset[int](), False, 0
        for kind, _, _, content in _records(bytes(self._body), self.words):
            if kind == 0:
                for row in content.tolist():
                    yield Step(index, None if row[0] != row[0] else tuple(row), state, frozen, restart)
                    restart = False
                    index += 1
            elif kind == _SET:
                group, field, value = content
                groups[group] = {**groups[group], FIELDS[field]: value}
                state = tuple(groups)
            elif kind == _JSON:
                frozen = frozenset(content.get("frozen", frozen))
                restart |= "frozen" in content or "params" in content
                groups += [dict.fromkeys(FIELDS, 0.0) for _ in range("params" in content)]
                state = tuple(groups)
        yield Step(index, None, state, frozen, restart)


def _read_header(data: bytes, name: str) -> tuple[dict[str, Any], int]:
    if data[:5] != MAGIC[:5]:
        raise LogError(f"{name}: not a log: it starts with {data[:8]!r}, not with {MAGIC!r}")
    if data[:8] != MAGIC:
        raise LogError(f"{name}: format version must be 01, got {data[6:7].hex() or 'none'}")
    if len(data) < 16:
        raise LogError(f"{name}: truncated within the header")
    size, crc = struct.unpack_from("<II", data, 8)
    if len(data) < 16 + size:
        raise LogError(f"{name}: truncated within the header")
    if zlib.crc32(data[16 : 16 + size]) != crc:
        raise LogError(f"{name}: damaged: the header's checksum does not fit")
    header: dict[str, Any] = json.loads(data[16 : 16 + size])
    if header.get("format") != FORMAT:
        raise LogError(f"{name}: format must be {FORMAT}, got {header.get('format')}")
    return header, 16 + size


def _records(body: bytes, width: int, name: str = "log") -> Iterator[tuple[int, int, int, Any]]:
    """(kind, first byte, last byte + 1, content): kind 0 is a run of steps, [count, width]. Omits an incomplete last
    record. LogError where a record does not read."""
    words = np.frombuffer(body, "<u4", len(body) // 4)
    escapes = np.flatnonzero(words == _ESCAPE).tolist()
    start = 0
    for escape in [*escapes, None]:
        if escape is not None and escape < start:
            continue  # a payload's word that has the value of ESCAPE
        stop = len(words) if escape is None else escape
        count = (stop - start) // width
        if count:
            end = start + count * width
            yield 0, 4 * start, 4 * end, words[start:end].view("<f4").reshape(count, width)
        if escape is None or escape + 1 >= len(words):
            return
        tag = int(words[escape + 1])
        start = escape + 2 + (tag >> 8)
        if start > len(words):
            return
        kind, data = tag & 0xFF, body[4 * (escape + 2) : 4 * start]
        try:
            content = json.loads(data) if kind == _JSON else struct.unpack(_LAYOUT[kind], data)
        except (KeyError, ValueError, struct.error) as error:
            text = f"a record of kind {kind} and {len(data)} bytes at byte {4 * escape} does not read"
            raise LogError(f"{name}: damaged: {text}") from error
        yield kind, 4 * escape, 4 * start, content


def _in_range(field: str, value: float) -> bool:
    return 0.0 <= value < (1.0 if field == "momentum" else math.inf)


def _is_change(values: Any, groups: int) -> bool:
    """Whether a run with ``groups`` parameter groups can have recorded these values, see :meth:`ZoLog.change`."""
    if not isinstance(values, dict) or not values.keys() <= {"frozen", "eps", "params"}:
        return False
    frozen, joined = values.get("frozen", []), values.get("params", [])
    if not isinstance(frozen, list) or not isinstance(joined, list):
        return False
    return all(type(i) is int for i in frozen) and all(
        isinstance(e, dict) and e.keys() - _OPTIONAL == _ENTRY and type(e["id"]) is int and e["group"] == groups
        for e in joined
    )
