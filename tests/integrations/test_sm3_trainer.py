"""SM3 given to transformers.Trainer, with nothing made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sm3_parameters import equal

from leanops.optim import SM3, fuse_into_backward

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'leanops[dev]'")
pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'leanops[dev]'")


def make_model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).to(dtype)


def make_data() -> list[dict[str, torch.Tensor]]:
    """The label is whether the first token lies in the upper half."""
    tokens = torch.randint(64, (96, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": (row[0] >= 32).long()} for row in tokens]


class WithoutNorm(transformers.Trainer):  # type: ignore[misc, name-defined]
    """Does not measure the norm of gradients that are gone."""

    def _get_grad_norm(self, *_: Any, **__: Any) -> None:
        return None


def make_trainer(
    folder: Path, model: Any, opt: Any, steps: int, cls: Any = transformers.Trainer, **options: Any
) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=5,
        per_device_train_batch_size=16,
        **{"save_strategy": "no", **options},
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step / 50))
    cls = cls or transformers.Trainer
    return cls(model, arguments, train_dataset=make_data(), eval_dataset=make_data(), optimizers=(opt, schedule))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_under_clipping_and_accumulation(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    opt = SM3(model.parameters(), lr=0.03, momentum_dtype=torch.int8, stochastic_rounding=True)
    trainer = make_trainer(tmp_path, model, opt, 40, max_grad_norm=1.0, gradient_accumulation_steps=2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    assert float(opt.state[model.classifier.weight]["step"]) == 40
    assert opt.param_groups[0]["lr"] == pytest.approx(0.03 / (1 + 40 / 50))


def test_resuming_from_a_checkpoint_gives_the_bits_of_an_uninterrupted_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": 0.02, "momentum_dtype": torch.int8, "stochastic_rounding": True}

    def start() -> tuple[Any, SM3]:
        model = make_model(torch.bfloat16)
        return model, SM3(model.parameters(), **options)

    whole, a = start()
    make_trainer(tmp_path / "whole", whole, a, 8).train()
    interrupted, b = start()
    make_trainer(tmp_path / "parts", interrupted, b, 8, save_strategy="steps", save_steps=4).train()
    resumed, c = start()
    trainer = make_trainer(tmp_path / "parts", resumed, c, 8)
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert equal(a.state_dict()["state"], c.state_dict()["state"])


def test_trainers_own_groups_and_schedule_take_it_by_class(tmp_path: Path) -> None:
    """optimizer_cls_and_kwargs: Trainer makes the groups with and without decay, and the schedule."""
    model = make_model()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=10, report_to="none", use_cpu=True, disable_tqdm=True, weight_decay=0.1
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=make_data(), optimizer_cls_and_kwargs=(SM3, {"lr": 0.03})
    )
    trainer.train()
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(inner, SM3)
    assert [g["weight_decay"] for g in inner.param_groups] == [0.1, 0.0]
    assert inner.param_groups[0]["lr"] == 0.0  # the end of the linear schedule


def test_fused_into_the_backward_pass_it_gives_the_same_weights_and_refuses_trainers_clipping(tmp_path: Path) -> None:
    plain, fused = make_model(), make_model()
    make_trainer(tmp_path / "a", plain, SM3(plain.parameters(), lr=0.02), 6, max_grad_norm=0).train()
    opt = fuse_into_backward(SM3, fused.parameters(), lr=0.02)
    make_trainer(tmp_path / "b", fused, opt, 6, WithoutNorm, max_grad_norm=0).train()
    assert all(map(torch.equal, plain.parameters(), fused.parameters()))
    with pytest.raises(RuntimeError, match=r"gradient of .* max_grad_norm=0"):
        make_trainer(tmp_path / "c", fused, opt, 1, WithoutNorm).train()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"one backward pass a step"):
        make_trainer(tmp_path / "d", fused, opt, 1, WithoutNorm, max_grad_norm=0, gradient_accumulation_steps=2).train()
