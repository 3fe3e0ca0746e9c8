"""Files, paths, make targets, commands and options that the documentation names exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
FOLDERS = ("csrc", "pyops", "optim", "autotune", "bench", "tests", "docs", ".ci")
over_pages = pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])


@over_pages
def test_linked_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"https?://", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@over_pages
def test_paths_in_code_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for path in re.findall(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*)`", text):
        assert list(ROOT.glob(path.rstrip("/"))), f"{page.name} names {path}"


def shell_lines(page: Path) -> list[str]:
    fences = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    joined = "\n".join(fences).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in joined.splitlines() if line.split("#")[0].strip()]


@cache
def help_of(*command: str) -> str:
    done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@over_pages
def test_make_targets_commands_and_options_in_shell_blocks_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in shell_lines(page):
        words = [w for w in shlex.split(line) if not re.match(r"[A-Z_]+=", w)]  # without environment assignments
        if words and words[0] == "make":
            assert set(words[1:]) <= targets, f"{page.name}: {line}"
        elif words and words[0] == "leanops":
            command = [word for word in words[1:2] if not word.startswith("-")]
            _has_options(page, line, words, help_of("-m", "leanops.bench.cli", *command))
        elif words and words[0] == "python" and words[1:2] and words[1].startswith("docs/"):
            assert (ROOT / words[1]).exists(), f"{page.name}: {line}"
            _has_options(page, line, words, help_of(words[1]))


def _has_options(page: Path, line: str, words: list[str], text: str) -> None:
    for option in (w.split("=")[0] for w in words if w.startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"{page.name}: {line}: no option {option}"


def test_every_public_name_is_in_the_api_reference() -> None:
    import leanops
    from leanops import optim

    modules = [leanops, optim]
    modules += [pytest.importorskip(f"leanops.integrations.{name}") for name in ("lightning", "transformers")]
    text = (ROOT / "docs" / "api.md").read_text()
    for module in modules:
        for name in set(module.__all__) - ({"trainer_callback"} if module not in modules[:2] else set()):
            if not name.startswith("__"):
                assert f"::: {module.__name__}.{name}\n" in text, f"docs/api.md lacks {module.__name__}.{name}"
