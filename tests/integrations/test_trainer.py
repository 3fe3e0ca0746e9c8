"""MeZO under transformers.Trainer, by the documented subclass."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from leanops.optim import ZoLog, replay_

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'leanops[dev]'")
pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'leanops[dev]'")

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "trainer.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("leanops_trainer_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_model(dropout: float = 0.1) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config)


def make_data() -> list[dict[str, torch.Tensor]]:
    """The label is whether the first token lies in the upper half."""
    tokens = torch.randint(64, (96, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": (row[0] >= 32).long()} for row in tokens]


def make_trainer(example: ModuleType, folder: Path, model: Any, steps: int, mezo: Any = None, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "logging_steps": 5,
            **options,
        },
    )
    options = {"distribution": "rademacher", **(mezo or {})}
    return example.MeZOTrainer(model, arguments, train_dataset=make_data(), eval_dataset=make_data(), mezo=options)


def test_training_learns_logs_and_replays(example: ModuleType, tmp_path: Path) -> None:
    model = make_model(dropout=0.0)
    trainer = make_trainer(example, tmp_path, model, 150, per_device_train_batch_size=32, learning_rate=1e-2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.01
    assert trainer.state.global_step == trainer.mezo.steps == 150
    assert all(p.grad is None for p in model.parameters())

    trainer.mezo.log.save(tmp_path / "run.zolog")
    start = make_model()
    replay_(start, tmp_path / "run.zolog")
    for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_schedule_and_the_groups_of_trainer_reach_the_optimizer(example: ModuleType, tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(example, tmp_path, model, 4, weight_decay=0.1, learning_rate=1e-3)
    trainer.train()
    seen = [[group["lr"] for group in step.groups] for step in trainer.mezo.log.steps()]
    assert seen == [[pytest.approx(1e-3 * (1 - i / 4))] * 2 for i in range(4)]
    assert [group["weight_decay"] for group in trainer.mezo.param_groups] == [0.1, 0.0]
    norms = {id(p) for n, p in model.named_parameters() if "LayerNorm" in n or n.endswith("bias")}
    assert {id(p) for p in trainer.mezo.param_groups[1]["params"]} == norms


def test_resuming_from_a_checkpoint_gives_the_bits_of_an_uninterrupted_run(example: ModuleType, tmp_path: Path) -> None:
    whole, interrupted = make_model(), make_model()
    make_trainer(example, tmp_path / "whole", whole, 8).train()
    first = make_trainer(example, tmp_path / "parts", interrupted, 8, save_strategy="steps", save_steps=4)
    first.train()
    resumed = make_model()
    trainer = make_trainer(example, tmp_path / "parts", resumed, 8)
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert trainer.mezo.steps == 8
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_gradient_accumulation_is_refused(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps must be 1 .* got 2"):
        make_trainer(example, tmp_path, make_model(), 1, gradient_accumulation_steps=2)


def test_the_log_names_the_models_parameters(example: ModuleType, tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(example, tmp_path, model, 2)
    trainer.train()
    log = ZoLog.from_bytes(trainer.mezo.log.to_bytes())
    assert {e["name"] for e in log.params()} == {n for n, _ in model.named_parameters()}
