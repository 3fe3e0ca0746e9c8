"""Real text that is on any machine with Python: which part of Python does a passage of its documentation describe?

Passages are the docstrings of standard-library modules, and paragraphs of the language reference (``pydoc_data.topics``).
A third of them, chosen by a checksum of their text, is held out.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

LANGUAGE = "the Python language"
LABELS = (
    *("asyncio", "decimal", "doctest", "email", "http", "importlib", "inspect", "ipaddress", "logging", "mailbox"),
    *("multiprocessing", "pathlib", "tarfile", "threading", "typing", "unittest", "urllib", "xml"),
    LANGUAGE,
)
PER_LABEL = 150  # at most, so that no label dominates
MIN_WORDS = 8


class Passages(NamedTuple):
    texts: list[str]
    labels: list[int]


def _docstrings(module: str) -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    single = library / ("_pydecimal.py" if module == "decimal" else f"{module}.py")
    found = []
    for file in [single] if single.exists() else sorted((library / module).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.append(ast.get_docstring(node) or "")
    return found


def _reference() -> list[str]:
    from pydoc_data.topics import topics

    paragraphs = [p for text in topics.values() for p in text.split("\n\n")]
    random.Random(0).shuffle(paragraphs)
    return paragraphs


def load() -> tuple[Passages, Passages]:
    """Training and held-out passages, no text in both."""
    train, held_out = Passages([], []), Passages([], [])
    seen: set[str] = set()
    for label, name in enumerate(LABELS):
        count = 0
        for text in _reference() if name == LANGUAGE else _docstrings(name):
            passage = " ".join(text.split())
            if len(passage.split()) < MIN_WORDS or passage in seen or count == PER_LABEL:
                continue
            seen.add(passage)
            count += 1
            part = held_out if zlib.crc32(passage.encode()) % 3 == 0 else train
            part.texts.append(passage)
            part.labels.append(label)
    return train, held_out
