"""The optimizers take the steps that the published formulas take, and the command says so."""

from __future__ import annotations

import io

import pytest
import torch

from leanops.bench import agreement, cli, published
from leanops.bench.progress import Lines

PAIRS = agreement._pairs()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.peer}-{pair.compared}".replace(" ", "-"))
def test_the_optimizer_takes_the_published_steps(pair):
    row = agreement.compare(pair)
    assert 0 < row.difference <= agreement.BOUND


def test_a_formula_that_differs_is_seen():
    mezo = PAIRS[0]
    without_decay = agreement._Pair(
        mezo.peer, mezo.source, mezo.compared, ours=lambda: agreement._mezo(), theirs=mezo.theirs
    )
    row = agreement.compare(without_decay)
    assert row.difference > 1e-3
    assert not row.agrees


def test_weights_come_back_to_the_bit_where_the_published_loop_drifts():
    found = agreement.drift(torch.bfloat16, 20)
    assert found.leanops == 0.0
    assert found.loop > 1e-3


def test_perturb_and_restore_is_three_additions():
    weight, z = torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([3.0, -1.0], dtype=torch.bfloat16)
    expected = weight.clone()
    for scale in (1e-3, -2e-3, 1e-3):
        expected = expected + scale * z
    published.perturb_and_restore([weight], lambda seed: [z], [0], 1e-3)
    assert weight.equal(expected)


def test_the_command_fails_and_names_what_differs(monkeypatch, capsys, tmp_path):
    wrong = agreement.Comparison("MeZO", "a paper", "two sides", 3, 2 * agreement.BOUND)
    right = agreement.Comparison("zo2", "a paper", "late", 3, agreement.BOUND / 2)
    done = agreement.run(Lines(io.StringIO()), cycles=1)
    done.rows = [wrong, right]
    monkeypatch.setattr(agreement, "run", lambda *_: done)
    assert cli.main(["agreement", "--markdown", str(tmp_path / "a.md")]) == 1
    assert capsys.readouterr().err.strip() == "leanops agreement: differs by more than rounding: MeZO, two sides"
    assert "| MeZO | two sides | 3 | 2.0e-06 | a paper |" in (tmp_path / "a.md").read_text(encoding="utf-8")
