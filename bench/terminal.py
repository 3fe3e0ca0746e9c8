"""Output for a terminal of any width and any encoding: columns by width, lines broken between words only."""

from __future__ import annotations

import codecs
import os
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from typing import TextIO

from leanops.bench.progress import has_rich

_PLAIN = {"µ": "u", "±": "+-", "×": "x", "·": ".", "…": "...", "²": "2", "≤": "<=", "≥": ">=", "−": "-"}
_INDENT = "    "
_LEAST = 4  # columns that a table shows at least, if need be with the first on a line of its own


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error("leanops-plain", _plain)


def make_printable(stream: TextIO | None) -> None:
    """Let the stream write something plain for each character that its encoding lacks, instead of raising."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="leanops-plain")


@dataclass(frozen=True)
class Line:
    text: str
    style: str = ""  # as rich names it


@dataclass(frozen=True)
class Entry:
    """A row of a table, with notes that stand below it."""

    cells: Sequence[str]
    notes: Sequence[str] = ()
    style: str = ""


@dataclass(frozen=True)
class Table:
    """``importance`` has all titles; those at its end are the first to go where the width does not hold all."""

    titles: Sequence[str]
    importance: Sequence[str]
    entries: Sequence[Entry] = field(default_factory=list)

    def shown(self, width: int | None) -> tuple[list[int], bool]:
        """The columns that fit, and whether the first stands on a line of its own."""
        everything = list(range(len(self.titles)))
        if width is None:
            return everything, False
        beside = self._fitting(everything, width)
        if len(beside) >= min(_LEAST, len(everything)):
            return beside, False
        return self._fitting(everything[1:], width - len(_INDENT)), True

    def _fitting(self, columns: Sequence[int], width: int) -> list[int]:
        ranked = sorted(columns, key=lambda i: self.importance.index(self.titles[i]))
        chosen: list[int] = []
        for i in ranked:
            if sum(self._width(c) + 2 for c in (*chosen, i)) - 2 > width:
                break
            chosen.append(i)
        return sorted(chosen)

    def _width(self, column: int) -> int:
        return max(len(self.titles[column]), *(len(entry.cells[column]) for entry in self.entries), 0)

    def lines(self, width: int | None) -> list[Line]:
        columns, stacked = self.shown(width)
        lines = self._row(self.titles, columns, stacked, width, "bold")
        for entry in self.entries:
            lines += self._row(entry.cells, columns, stacked, width, entry.style)
            for note in entry.notes:
                lines += [Line(line, entry.style or "dim") for line in wrapped(note, width, _INDENT)]
        return lines

    def _row(
        self, cells: Sequence[str], columns: Sequence[int], stacked: bool, width: int | None, style: str
    ) -> list[Line]:
        text = "  ".join(cells[i].ljust(self._width(i)) for i in columns).rstrip()
        if not stacked:
            return [Line(text, style)]
        first = textwrap.wrap(cells[0], width or len(cells[0]), subsequent_indent=_INDENT, break_long_words=False)
        return [*(Line(line, style) for line in first), Line(_INDENT + text, style)]

    def left_out(self, width: int | None) -> list[str]:
        """Titles of the columns that the width does not hold."""
        columns, stacked = self.shown(width)
        return [title for i, title in enumerate(self.titles) if i not in columns and not (stacked and i == 0)]


def table_lines(table: Table, width: int | None) -> list[Line]:
    """The table, and below it the titles of the columns that the width does not hold."""
    return [*table.lines(width), *paragraphs(left_out_note(table.titles, table.left_out(width)), width)]


def left_out_note(titles: Iterable[str], left_out: Collection[str]) -> list[str]:
    """The sentence about columns that are left out, in the order of ``titles``; none where all are shown."""
    names = ", ".join(title for title in titles if title in left_out)
    return [f"columns that need a wider terminal: {names}"] if names else []


def wrapped(text: str, width: int | None, indent: str = "") -> list[str]:
    """The text in lines of at most ``width``, unless a single word is longer."""
    if width is None:
        return [indent + text]
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def paragraphs(texts: Iterable[str], width: int | None, style: str = "") -> list[Line]:
    return [Line(line, style) for text in texts for line in wrapped(text, width)]


def width_of(stream: TextIO | None) -> int | None:
    """Columns of a terminal; None where the stream is a file, a pipe or closed, and lines may have any length."""
    if stream is None or not stream.isatty():
        return None
    wish = os.environ.get("COLUMNS", "")
    if wish.isdecimal() and int(wish) > 0:
        return int(wish)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def show(lines: Iterable[Line], stream: TextIO | None) -> None:
    """Print the lines, with their styles on a terminal; Python's stream is None where it was closed."""
    if stream is None or not (stream.isatty() and has_rich()):
        for line in lines:
            print(line.text, file=stream)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream)
    for line in lines:
        console.print(Text(line.text, line.style), soft_wrap=True)


def hanging(texts: Iterable[str], width: int | None) -> list[Line]:
    """Lines such as ``  name    value``, wrapped under the value; a line without a name under its own beginning."""
    lines = []
    for text in texts:
        name = re.match(r" *(?:\S+ {2,})?", text)
        indent = " " * (name.end() if name else 0)
        if width is None or len(text) <= width:
            lines.append(Line(text))
        else:
            wrapped_lines = textwrap.wrap(
                text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
            lines += map(Line, wrapped_lines)
    return lines
