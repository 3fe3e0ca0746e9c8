"""Real text that is on any machine with Python: does a passage come from the language reference or from a docstring?

The language reference is in ``pydoc_data.topics``, which ``help()`` reads; the docstrings are the standard
library's. A third of the passages, chosen by a checksum of their text, is held out.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LABELS = ("a docstring", "the Python language reference")
PER_LABEL = 1200
MIN_WORDS = 8
_LEFT_OUT = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "distutils",
    "tkinter",
    "turtledemo",
}  # not everywhere


class Passages(NamedTuple):
    texts: list[str]
    labels: list[int]


def _docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if _LEFT_OUT & set(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:
            continue  # a template
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield ast.get_docstring(node) or ""


def _reference() -> Iterator[str]:
    from pydoc_data.topics import topics

    for text in topics.values():
        yield from text.split("\n\n")


def load() -> tuple[Passages, Passages]:
    """Training and held-out passages, equally many of each label, no text in both."""
    train, held_out = Passages([], []), Passages([], [])
    seen: set[str] = set()
    for label, source in enumerate((_docstrings(), _reference())):
        passages = sorted({" ".join(text.split()) for text in source} - seen)
        passages = [p for p in passages if len(p.split()) >= MIN_WORDS]
        random.Random(0).shuffle(passages)
        seen.update(passages)
        for passage in passages[:PER_LABEL]:
            part = held_out if zlib.crc32(passage.encode()) % 3 == 0 else train
            part.texts.append(passage)
            part.labels.append(label)
    return train, held_out
