"""SM3 given to transformers.Trainer, and fused into the backward pass by FusedTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sm3.parameters import equal

from leanops.optim import SM3, FusedBackward, fuse_into_backward

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'leanops[dev]'")
pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'leanops[dev]'")
from leanops.integrations.transformers import FusedTrainer  # noqa: E402


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


# --- fused into the backward pass -------------------------------------------------------------------------------------


def by_class(folder: Path, model: Any, chosen: Any, kind: Any = FusedTrainer, **options: Any) -> Any:
    """The trainer makes the optimizer and the schedule."""
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=6,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=2,
        weight_decay=0.1,
        **{"max_grad_norm": 0, "save_strategy": "no", **options},
    )
    return kind(model, arguments, train_dataset=make_data(), optimizer_cls_and_kwargs=chosen)


@pytest.mark.parametrize(
    ("chosen", "options"),
    [
        ((SM3, {"lr": 0.02, "momentum_dtype": torch.int8}), {}),
        (None, {"optim": "adamw_torch"}),
        (None, {"optim": "sgd"}),
    ],
    ids=["SM3", "adamw_torch", "sgd"],
)
def test_fused_training_is_one_line_and_gives_the_weights_of_trainer(tmp_path: Path, chosen: Any, options: Any) -> None:
    plain, fused = make_model(), make_model()
    a = by_class(tmp_path / "a", plain, chosen, transformers.Trainer, **options)
    b = by_class(tmp_path / "b", fused, chosen, **options)
    for trainer in (a, b):
        trainer.train()
    assert all(map(torch.equal, plain.parameters(), fused.parameters()))
    inner = b.optimizer.optimizer
    assert isinstance(inner, FusedBackward)
    assert [g["weight_decay"] for g in inner.param_groups] == [0.1, 0.0]
    assert equal(inner.state_dict()["state"], a.optimizer.optimizer.state_dict()["state"])
    assert inner.param_groups[0]["lr"] == 0.0  # the end of the linear schedule
    assert not any("grad_norm" in row for row in b.state.log_history)
    assert b.optimizer_cls_and_kwargs == chosen


def test_a_fused_run_resumes_to_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    chosen = (SM3, {"lr": 0.02})
    whole, parts, resumed = make_model(), make_model(), make_model()
    by_class(tmp_path / "whole", whole, chosen).train()
    by_class(tmp_path / "parts", parts, chosen, save_strategy="steps", save_steps=3).train()
    trainer = by_class(tmp_path / "parts", resumed, chosen)
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_a_fused_optimizer_may_be_given(tmp_path: Path) -> None:
    plain, fused = make_model(), make_model()
    make_trainer(tmp_path / "a", plain, SM3(plain.parameters(), lr=0.02), 6, max_grad_norm=0).train()
    opt = fuse_into_backward(SM3, fused.parameters(), lr=0.02)
    make_trainer(tmp_path / "b", fused, opt, 6, FusedTrainer, max_grad_norm=0).train()
    assert all(map(torch.equal, plain.parameters(), fused.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 1.0}, "args.max_grad_norm must be 0, got 1.0: clipping by norm needs all gradients at once"),
        ({"gradient_accumulation_steps": 2}, "args.gradient_accumulation_steps must be 1, got 2"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"FusedTrainer: {message}"):
        by_class(tmp_path, make_model(), (SM3, {}), **options)


def test_a_gradscaler_is_refused(tmp_path: Path) -> None:
    trainer = by_class(tmp_path, make_model(), (SM3, {}))
    trainer.args.fp16 = True  # on a GPU, an argument
    with pytest.raises(ValueError, match=r"FusedTrainer: args.fp16 must be False, got True: GradScaler needs all"):
        FusedTrainer(make_model(), trainer.args, train_dataset=make_data())


def test_other_optimizers_and_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="optimizers must hold an optimizer of fuse_into_backward, got SM3; or"):
        make_trainer(tmp_path, model, SM3(model.parameters()), 1, FusedTrainer, max_grad_norm=0)
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 2))
    with pytest.raises(ValueError, match="must be one process or use FSDP, got 2 processes"):
        by_class(tmp_path, model, (SM3, {}))


def test_the_errors_of_the_plain_trainer_name_the_fused_one(tmp_path: Path) -> None:
    model = make_model()
    trainer = by_class(tmp_path, model, (fuse_into_backward, {"lr": 0.1}), transformers.Trainer)
    with pytest.raises(TypeError, match=r"fuse_into_backward: optimizer_class and .* use leanops.*FusedTrainer"):
        trainer.train()
    opt = fuse_into_backward(SM3, model.parameters(), lr=0.02)
    for norm in (1.0, 0.0):
        opt.zero_grad()
        trainer = make_trainer(tmp_path, model, opt, 1, transformers.Trainer, max_grad_norm=norm)
        with pytest.raises(RuntimeError, match=r"gradient of .* was used and freed.*FusedTrainer, which does not"):
            trainer.train()
