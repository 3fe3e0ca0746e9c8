"""Every Python block of the README, CONTRIBUTING and the site runs as it stands, in one namespace a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ops import test_fuzz, test_numerics

from leanops import _registry
from leanops.bench import roofline
from leanops.bench.measurement import Measurement
from leanops.bench.plan import Settings, plan

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```python(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """(line of the first statement, the fence's info, code) of each block."""
    text = page.read_text()
    return [(text[: m.start()].count("\n") + 2, m["info"].strip(), m["code"]) for m in _FENCE.finditer(text)]


CASES = [(page, i) for page in PAGES for i in range(len(blocks(page)))]


class Page:
    """A page's namespace, and how many of its blocks have run."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder, self.done = path, folder, 0
        self.namespace: dict[str, Any] = {"__name__": "page"}

    def run_to(self, last: int) -> None:
        for line, info, code in blocks(self.path)[self.done : last + 1]:
            self.done += 1
            if not info:
                # the compiled lines get the page's own numbers, so that a traceback points into the page
                exec(compile("\n" * (line - 1) + code, str(self.path), "exec", dont_inherit=True), self.namespace)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Page]]:
    known = dict(_registry._specs)  # CONTRIBUTING registers an operator, which other tests must not see
    yield {p: Page(p, tmp_path_factory.mktemp(p.stem)) for p in PAGES}
    _registry._specs.clear()
    _registry._specs.update(known)


@pytest.mark.parametrize(("path", "index"), CASES, ids=[f"{p.relative_to(ROOT)}-{i}" for p, i in CASES])
def test_block_runs(path: Path, index: int, pages: dict[Path, Page], monkeypatch: pytest.MonkeyPatch) -> None:
    info = blocks(path)[index][1]
    if info:
        reason = re.fullmatch(r'title="not run here: (.+)"', info)
        assert reason, f'{path.name}: the fence says {info!r}; to skip, write title="not run here: why"'
        pytest.skip(reason[1])
    page = pages[path]
    monkeypatch.chdir(page.folder)
    torch.manual_seed(0)
    page.run_to(index)


def test_the_operator_that_contributing_adds_is_in_the_benchmark(pages: dict[Path, Page]) -> None:
    page = pages[ROOT / "CONTRIBUTING.md"]
    page.run_to(len(blocks(page.path)))
    jobs = [job for job in plan(Settings(threads=(1,))) if job.spec.name == "silu_gate"]
    assert [(job.name, job.dtype) for job in jobs] == [("2048x8192", torch.float32), ("2048x8192", torch.bfloat16)]
    small = replace(jobs[0], case=jobs[0].spec.cases[0])
    measurement = Measurement(small, Settings(quick=True), torch.device("cpu"), {})
    measurement.take()
    patterns = (roofline.FILL, roofline.IN_PLACE, roofline.COPY, roofline.READ, roofline.TRIAD)
    measurement.place(roofline.Roofline("cpu", 1, dict.fromkeys(patterns, 1e9), {"float32": 1e9}, 1e-6))
    assert measurement.row.status == "ok", measurement.row.reason
    assert measurement.row.gate is not None
    assert measurement.row.gate.error is not None
    assert measurement.row.gate.error < 1e-6
    assert measurement.row.percent_of_roofline is not None


@pytest.mark.parametrize("shape", [(33, 5), (7,), ()])
def test_the_generic_suites_take_gradients_of_the_operator_that_contributing_adds(
    shape: tuple[int, ...], pages: dict[Path, Page]
) -> None:
    page = pages[ROOT / "CONTRIBUTING.md"]
    page.run_to(len(blocks(page.path)))
    spec = page.namespace["SILU_GATE"]
    inputs = replace(spec.inputs(), cases=(page.namespace["gate_case"]("small", shape),))
    spec = replace(
        spec,
        inputs=lambda: inputs,
        plain=lambda call: call.x * torch.nn.functional.silu(call.gate),
    )
    cpu = torch.device("cpu")
    test_fuzz.test_gradients_accept_expanded_and_strided_cotangents(spec, cpu)
    test_numerics.test_gradients_are_as_exact_as_those_of_plain_torch(spec, spec.cases[0], torch.bfloat16, cpu)


def test_the_pages_that_promise_examples_have_them() -> None:
    assert len(blocks(ROOT / "README.md")) >= 7
    assert len(blocks(ROOT / "CONTRIBUTING.md")) >= 3
