"""Results are typed, and every file that was ever published still loads."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from leanops.bench import agreement, html, markdown, report
from leanops.bench.agreement import AgreementResults
from leanops.bench.convergence import plot, summary
from leanops.bench.convergence.results import TrainingResults
from leanops.bench.results import OperatorResults, StepResults, load
from leanops.bench.typed_json import from_json, to_json

PUBLISHED = Path(__file__).parents[2] / "docs" / "results"
KINDS = {kind.SCHEMA: kind for kind in (OperatorResults, StepResults, TrainingResults, AgreementResults)}
# what makes a page (if there is one), a section of Markdown and the lines for a terminal
SHOWN = {
    OperatorResults: (html.operators, markdown.operators, report.operator_lines),
    StepResults: (html.steps, markdown.steps, report.step_lines),
    TrainingResults: (plot.render, summary.markdown, summary.lines),
    AgreementResults: (None, agreement.markdown, agreement.lines),
}
OTHERS = {"kernels.json", "finetune_minilm.json"}  # of `make aot` and of an example
FILES = [path for path in sorted(PUBLISHED.rglob("*.json")) if path.name not in OTHERS]


def test_there_are_published_files_of_every_kind():
    schemas = {json.loads(path.read_text(encoding="utf-8"))["schema"] for path in FILES}
    assert schemas == set(KINDS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_published_file_loads_whole_and_is_shown(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    results = load(path, KINDS[found["schema"]])
    written = results.to_json()
    assert {name: written[name] for name in found} == found  # nothing is lost or changed
    page, section, lines = SHOWN[type(results)]
    rows = found.get("rows") or [row for case in found["cases"] for row in case["rows"]]
    shown = [row for row in rows if row.get("status", "ok") != "skipped"]
    texts = [section(results), "\n".join(line.text for line in lines(results, None))]
    for text in texts if page is None else [page(results), *texts]:
        for row in shown:
            assert (row.get("case") or row.get("label") or row["name"]) in text


@dataclass
class Inner:
    size: int
    name: str = "x"


@dataclass
class Outer:
    pairs: list[tuple[int, float]]
    inner: Inner | None = None
    by_name: dict[str, list[Inner]] = field(default_factory=dict)
    ratio: float = 1.0


def test_a_value_comes_back_as_it_was():
    value = Outer([(1, 2.5), (3, 4.0)], Inner(2), {"a": [Inner(1, "y")]})
    assert from_json(Outer, json.loads(json.dumps(to_json(value)))) == value
    assert from_json(Outer, {"pairs": [], "of a later version": 1}) == Outer([])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"the file must be an object, got \[\]"),
        ({}, "pairs must be a list, got null"),
        ({"pairs": [[1]]}, r"pairs\[0\] must be a list of 2, got \[1\]"),
        ({"pairs": [[1.5, 2]]}, r"pairs\[0\]\[0\] must be a whole number, got 1.5"),
        ({"pairs": [[1, True]]}, r"pairs\[0\]\[1\] must be a number, got true"),
        ({"pairs": [], "inner": {"size": "2"}}, 'inner.size must be a whole number, got "2"'),
        ({"pairs": [], "by_name": {"a": [{}]}}, r"by_name.a\[0\].size must be a whole number, got null"),
        ({"pairs": [], "by_name": 3}, "by_name must be an object, got 3"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        from_json(Outer, value)


def test_a_number_that_is_not_finite_is_null():
    assert to_json(Outer([(1, float("nan"))], ratio=float("inf"))) == {
        "pairs": [[1, None]], "inner": None, "by_name": {}, "ratio": None
    }  # fmt: skip
