"""Counts the instructions that one element costs in a kernel's main loop, from cuobjdump's listing.

The main loop is the innermost loop with 16-byte stores. Of the ways through it the one counted has the most 16-byte
accesses and no narrower global access: the way that all but the edges of a tensor take. Loops inside count once.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
_TARGET = re.compile(r"(?:BRA|BSSY|BSYNC|WARPSYNC)\S*.*?\b0x([0-9a-f]+)")


@dataclass
class Block:
    start: int
    text: list[str] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """One way through a loop: instructions, 16-byte loads and stores on it, by kind of instruction."""

    instructions: int
    wide_loads: int
    wide_stores: int
    kinds: dict[str, int]


def find_cuobjdump() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one in Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


def cuobjdump(binary: Path, *options: str) -> str:
    tool = find_cuobjdump()
    assert tool is not None, "cuobjdump: neither in PATH nor in Triton's wheel"
    return subprocess.run([tool, *options, str(binary)], check=True, capture_output=True, text=True).stdout


def listing(binary: Path, arch: int, names: list[str]) -> dict[str, list[tuple[int, str]]]:
    """Mangled kernel name -> [(address, instruction)]."""
    text = cuobjdump(binary, "-sass", "-arch", f"sm_{arch}", "-fun", ",".join(names))
    functions: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] = []
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            current = functions.setdefault(match[1], [])
        elif match := _LINE.match(line):
            current.append((int(match[1], 16), match[2].strip()))
    return functions


def _opcode(instruction: str) -> str:
    words = instruction.split()
    return words[1] if words[0].startswith("@") else words[0]


def _blocks(code: list[tuple[int, str]]) -> dict[int, Block]:
    starts = {code[0][0]}
    for i, (_, text) in enumerate(code):
        name = _opcode(text)
        if name.startswith(("BRA", "EXIT", "BREAK", "RET", "CALL", "JMP")):
            if (target := _TARGET.search(text)) and name.startswith("BRA"):
                starts.add(int(target[1], 16))
            if i + 1 < len(code):
                starts.add(code[i + 1][0])
        if name.startswith("BSYNC") and i + 1 < len(code):
            starts.add(code[i + 1][0])
        if name.startswith("BSSY") and (target := _TARGET.search(text)):
            starts.add(int(target[1], 16))
    blocks: dict[int, Block] = {}
    block = Block(code[0][0])
    for i, (address, text) in enumerate(code):
        if address in starts:
            block = blocks[address] = Block(address)
        block.text.append(text)
        name, follows = _opcode(text), code[i + 1][0] if i + 1 < len(code) else None
        if follows is not None and follows not in starts:
            continue
        conditional = text.startswith("@") or (" P" in text.split("0x")[0] and name.startswith("BRA")) or ", P" in text
        if name.startswith("BRA") and (target := _TARGET.search(text)):
            block.successors.append(int(target[1], 16))
            if (conditional or ".DIV" in name or ".U" in name) and follows is not None:
                block.successors.append(follows)
        elif name.startswith(("EXIT", "RET")):
            if text.startswith("@") and follows is not None:
                block.successors.append(follows)
        elif follows is not None:
            block.successors.append(follows)
    return blocks


def _dominators(blocks: dict[int, Block], predecessors: dict[int, list[int]]) -> dict[int, set[int]]:
    entry = next(iter(blocks))
    order: list[int] = []
    stack, seen = [entry], {entry}
    while stack:
        node = stack.pop()
        order.append(node)
        for s in blocks[node].successors:
            if s not in seen:
                seen.add(s)
                stack.append(s)
    dominators = {b: set(order) for b in order}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new = set.intersection(*(dominators[p] for p in predecessors[b] if p in seen)) | {b}
            if new != dominators[b]:
                dominators[b], changed = new, True
    return dominators


def _natural_loops(blocks: dict[int, Block]) -> list[tuple[int, set[int]]]:
    predecessors: dict[int, list[int]] = {b: [] for b in blocks}
    for b, block in blocks.items():
        for s in block.successors:
            predecessors[s].append(b)
    dominators = _dominators(blocks, predecessors)
    loops: dict[int, set[int]] = {}
    for b, block in blocks.items():
        for header in block.successors:
            if b not in dominators or header not in dominators[b]:
                continue
            body, stack = {header, b}, [b]
            while stack:
                node = stack.pop()
                if node == header:
                    continue
                for p in predecessors[node]:
                    if p not in body:
                        body.add(p)
                        stack.append(p)
            loops.setdefault(header, set()).update(body)
    return sorted(loops.items(), key=lambda item: len(item[1]))


def _path(blocks: dict[int, Block], header: int, body: set[int]) -> list[str]:
    """The best way from the header back to it, by (16-byte accesses, no narrow ones, fewest instructions)."""
    best: dict[int, tuple[tuple[int, int], list[int]]] = {}
    order: list[int] = []
    seen: set[int] = set()

    def visit(root: int) -> None:  # postorder, without recursion
        stack = [(root, iter(blocks[root].successors))]
        seen.add(root)
        while stack:
            node, successors = stack[-1]
            for s in successors:
                if s in body and s != header and s not in seen:
                    seen.add(s)
                    stack.append((s, iter(blocks[s].successors)))
                    break
            else:
                order.append(node)
                stack.pop()

    visit(header)
    position = {b: i for i, b in enumerate(order)}
    for b in order:
        text = blocks[b].text
        wide = sum(bool(re.search(r"(LDG|STG|LD|ST)\.E\S*\.128", t)) for t in text)
        narrow = sum(bool(re.search(r"\b(LDG|STG)\.E", t)) and ".128" not in t for t in text)
        score = (wide - 100 * narrow, -len(text))
        choices = [
            best[s] for s in blocks[b].successors if s in body and position.get(s, 1 << 30) < position[b] and s in best
        ]
        if header in blocks[b].successors:
            choices.append(((0, 0), []))
        if choices:
            (a, c), way = max(choices, key=lambda choice: choice[0])
            best[b] = ((score[0] + a, score[1] + c), [b, *way])
    return [t for b in best[header][1] for t in blocks[b].text]


def main_loop(code: list[tuple[int, str]]) -> Loop | None:
    """The innermost loop with 16-byte stores, or None."""
    blocks = _blocks(code)
    for header, body in _natural_loops(blocks):
        if any(re.search(r"\bSTG\.E\S*\.128", t) for b in body for t in blocks[b].text):
            return _summary(_path(blocks, header, body))
    return None


def loop_around(code: list[tuple[int, str]], inner: Loop) -> Loop | None:
    """The next larger loop that holds the main loop: what a unit of work costs beside its elements."""
    blocks = _blocks(code)
    wide = [
        (header, body)
        for header, body in _natural_loops(blocks)
        if any(re.search(r"\bSTG\.E\S*\.128", t) for b in body for t in blocks[b].text)
    ]
    return _summary(_path(blocks, *wide[1])) if len(wide) > 1 and inner else None


def _summary(way: list[str]) -> Loop:
    kinds: dict[str, int] = {}
    for text in way:
        name = _opcode(text).split(".")[0]
        kinds[name] = kinds.get(name, 0) + 1
    kinds.pop("NOP", None)
    return Loop(
        sum(kinds.values()),
        sum("128" in t and "LD" in _opcode(t) for t in way),
        sum("128" in t and "STG" in _opcode(t) for t in way),
        dict(sorted(kinds.items(), key=lambda item: -item[1])),
    )
