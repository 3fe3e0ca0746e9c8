"""TensorSelector in transformers.Trainer: when it selects, what it leaves alone, and runs that resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from selection.runs import assert_same, net
from torch import Tensor, nn

from leanops.optim import TensorSelector, trainer_callback

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'leanops[dev]'")
pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'leanops[dev]'")


class Model(nn.Module):
    def __init__(self, returns_loss: bool = True) -> None:
        super().__init__()
        self.net = net()
        self.returns_loss = returns_loss
        self.trained: list[list[str]] = []

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits} if self.returns_loss else {"logits": logits}


def rows(n: int = 18) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [
        {"ids": torch.randint(11, (4,), generator=g), "labels": torch.randint(11, (4,), generator=g)} for _ in range(n)
    ]


class Watch(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Notes what trains in each step, and may stop the run."""

    def __init__(self, stop: int | None = None) -> None:
        self.trained: list[list[str]] = []
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trained.append([n for n, p in kwargs["model"].named_parameters() if p.requires_grad])
        control.should_training_stop = state.global_step == self.stop


def make_trainer(folder: Path, callbacks: list[Any], model: nn.Module | None = None, **options: Any) -> Any:
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"max_steps": 9, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 6, **options},
    )
    return transformers.Trainer(model or Model(), args, train_dataset=rows(), callbacks=callbacks)


def test_it_selects_every_period_within_the_budget_and_releases_at_the_end(tmp_path: Path) -> None:
    watch, callback = Watch(), trainer_callback(TensorSelector, rho=0.6, period=4)
    trainer = make_trainer(tmp_path, [callback, watch])
    trainer.train()
    assert watch.trained[0] == watch.trained[3]
    assert all(0 < len(names) < 5 * 6 for names in watch.trained)
    assert isinstance(callback.selection, TensorSelector)
    assert callback.selection.selection.rho <= 0.6
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_it_draws_no_batch_and_no_number_of_the_trainer(tmp_path: Path) -> None:
    """With rho = 1 everything trains, so the run is the run without the callback."""
    plain = make_trainer(tmp_path / "a", [])
    chosen = make_trainer(tmp_path / "b", [trainer_callback(TensorSelector, rho=1.0, period=2)])
    for trainer in (plain, chosen):
        trainer.train()
    assert_same([p.detach() for p in chosen.model.parameters()], [p.detach() for p in plain.model.parameters()])


def test_a_run_resumes_between_two_selections(tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None, resume: bool) -> tuple[Any, Watch]:
        watch = Watch(stop)
        trainer = make_trainer(folder, [trainer_callback(TensorSelector, rho=0.6, period=4), watch])
        trainer.train(resume_from_checkpoint=resume)
        return trainer, watch

    whole, watch = run(tmp_path / "whole", None, False)
    run(tmp_path / "parts", 6, False)
    resumed, after = run(tmp_path / "parts", None, True)
    assert after.trained == watch.trained[6:]
    assert_same([p.detach() for p in resumed.model.parameters()], [p.detach() for p in whole.model.parameters()])


def test_in_a_warm_up_it_waits_for_a_rate_above_zero(tmp_path: Path) -> None:
    watch = Watch()
    callback = trainer_callback(TensorSelector, rho=0.6, period=100)
    trainer = make_trainer(tmp_path, [callback, watch], warmup_steps=3)
    trainer.train()
    sizes = list(map(len, watch.trained))
    assert sizes[0] == len(list(trainer.model.parameters()))
    assert set(sizes[1:]) == {len(callback.selection.selection.names)} != {sizes[0]}


def test_a_loss_may_be_given_and_is_needed_where_the_model_returns_none(tmp_path: Path) -> None:
    def loss_of(model: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(**batch)["logits"].flatten(0, 1), batch["labels"].flatten())

    class Own(transformers.Trainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            return loss_of(model, inputs)

    def run(**options: Any) -> None:
        trainer = make_trainer(tmp_path, [], Model(returns_loss=False), max_steps=2)
        own = Own(trainer.model, trainer.args, train_dataset=rows())
        own.add_callback(trainer_callback(TensorSelector, rho=0.6, period=1, **options))
        own.train()

    run(loss=loss_of)
    with pytest.raises(ValueError, match=r"trainer_callback: the model must return a loss .* got outputs logits; pass"):
        run()


def test_what_it_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainer_callback: period must be given"):
        trainer_callback(TensorSelector, rho=0.5)
    with pytest.raises(ValueError, match="trainer_callback: period must be an integer >= 1, got 0"):
        trainer_callback(TensorSelector, period=0)

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(rows())

    trainer = make_trainer(tmp_path, [trainer_callback(TensorSelector, period=3)])
    trainer.train_dataset = Stream()
    with pytest.raises(TypeError, match=r"train_dataset must have a length and rows by index .* got Stream"):
        trainer.train()
