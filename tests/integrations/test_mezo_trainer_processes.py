"""MeZOTrainer in two processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gloo import distributed

pytest.importorskip("transformers", reason="needs transformers: pip install 'leanops[dev]'")
pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'leanops[dev]'")

# rows have 1 to 8 labels, so that the mean of the processes' means would be another loss
RUN = """
import json, os, sys, torch, transformers
from leanops.integrations.transformers import MeZOTrainer

torch.manual_seed(0)
sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
rows = torch.randint(64, (96, 8), generator=torch.Generator().manual_seed(1))
data = [{"input_ids": r, "labels": torch.where(torch.arange(8) <= i % 8, r, -100)} for i, r in enumerate(rows)]
folder, world = sys.argv[1], int(os.environ.get("WORLD_SIZE", 1))
options = {"max_steps": 4, "per_device_train_batch_size": 16 // world, "learning_rate": 1e-2, "save_strategy": "no"}
args = transformers.TrainingArguments(folder, use_cpu=True, disable_tqdm=True, report_to="none", **options)
trainer = MeZOTrainer(model, args, train_dataset=data)
trainer.train()
weights = [p.double().sum().item() for p in model.parameters()]
with open(f"{folder}/{world}-{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump([trainer.mezo.log.scalars().flatten().tolist(), weights], file)
"""


@pytest.mark.ci
@distributed
def test_two_processes_take_the_steps_of_one_with_all_data(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([], both):
        done = subprocess.run(
            [sys.executable, *command, script, tmp_path], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second
    assert first[0] == pytest.approx(one[0], rel=1e-2, abs=1e-3)
