"""The standard library's source text as bytes: what the convergence benchmark trains on.

It is on every machine with Python and needs no download. Files fall into three parts by a checksum of their path, so
that the parts do not depend on the order of a folder's listing: one in twenty is the test text, one in twenty the
validation text by which learning rates are chosen, and the rest is trained on.
"""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# not in every installation, or tables that a program wrote
_LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "distutils", "tkinter", "turtledemo",
    "ensurepip", "encodings", "pydoc_data",
}  # fmt: skip
_PARTS = 20
END = b"\0"  # after each file; no source file holds a zero byte


@dataclass(frozen=True)
class Size:
    files: int
    bytes: int


@dataclass(frozen=True)
class Facts:
    """The description of the text in the results."""

    what: str
    sha256: str
    train: Size
    validation: Size
    test: Size


@dataclass(frozen=True)
class Text:
    """Three uint8 tensors of whole files, each file followed by a zero byte."""

    train: Tensor
    validation: Tensor
    test: Tensor
    files: dict[str, int]
    sha256: str  # over names and contents of all files, in order

    def facts(self) -> Facts:
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        sizes = {name: Size(self.files[name], part.numel()) for name, part in parts.items()}
        return Facts("the standard library's .py files", self.sha256, **sizes)


def part_of(path: str) -> str:
    """The part of a file: train, validation or test. ``path`` is relative to the library, with forward slashes."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(path.encode()) % _PARTS, "train")


def files(library: Path) -> list[Path]:
    """The files of the text, relative to the library and sorted."""
    found = []
    for file in library.rglob("*.py"):
        inside = file.relative_to(library)
        if _LEFT_OUT & set(inside.parts) or inside.parts[0].startswith("config-"):
            continue
        if not inside.name.startswith("_sysconfigdata"):  # of the machine that built Python
            found.append(inside)
    return sorted(found, key=lambda inside: inside.as_posix())


def load(library: Path | None = None) -> Text:
    """The text of this interpreter's standard library (or of a folder)."""
    library = Path(sysconfig.get_path("stdlib")) if library is None else library
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    digest = hashlib.sha256()
    for inside in files(library):
        content = (library / inside).read_bytes() + END
        digest.update(inside.as_posix().encode() + END + content)
        parts[part_of(inside.as_posix())].append(content)
    if empty := [name for name, contents in parts.items() if not contents]:
        raise ValueError(
            f"leanops convergence: no {empty[0]} text among the standard library's source files in {library}"
        )
    tensors = {
        name: torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8) for name, contents in parts.items()
    }
    return Text(**tensors, files={name: len(c) for name, c in parts.items()}, sha256=digest.hexdigest())


def windows(text: Tensor, context: int) -> Tensor:
    """[n, context + 1]: consecutive windows, each of which starts with the last byte of the one before."""
    if text.numel() <= context:
        raise ValueError(f"leanops convergence needs more than {context} bytes of text, got {text.numel()}")
    return text.unfold(0, context + 1, context)


def spread(text: Tensor, context: int, count: int) -> Tensor:
    """At most ``count`` windows, evenly spaced over the text."""
    every = windows(text, context)
    if len(every) <= count:
        return every
    return every[torch.arange(count) * len(every) // count]


class Batches:
    """Batch ``step`` of a run: a function of seed and step alone, so every method sees the same, resumed or not.

    An epoch takes every window once, in an order drawn from the seed and the epoch's number.
    """

    def __init__(self, text: Tensor, context: int, batch: int, seed: int) -> None:
        self.windows, self.batch, self.seed = windows(text, context), batch, seed
        self.per_epoch = len(self.windows) // batch
        if not self.per_epoch:
            raise ValueError(f"leanops convergence needs {batch} windows of text for a batch, got {len(self.windows)}")
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int) -> Tensor:
        """[batch, context + 1] int64."""
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.windows), generator=generator)
        return self.windows[self._order[batch * self.batch : (batch + 1) * self.batch]].long()
