"""MeZOTrainer: a run of transformers.Trainer with MeZO, its log and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leanops.optim import MeZO, ZoLog, replay_

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'leanops[dev]'")
pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'leanops[dev]'")
from leanops.integrations.transformers import MeZOTrainer  # noqa: E402


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


def make_trainer(
    folder: Path, model: Any, steps: int, mezo: Any = None, kind: Any = MeZOTrainer, trainer: Any = None, **options: Any
) -> Any:
    """``trainer`` has arguments of the trainer; the other options are TrainingArguments."""
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
    given = {"train_dataset": make_data(), "eval_dataset": make_data(), **(trainer or {})}
    return kind(model, arguments, mezo={"distribution": "rademacher", **(mezo or {})}, **given)


def test_training_learns_logs_and_replays(tmp_path: Path) -> None:
    model = make_model(dropout=0.0)
    trainer = make_trainer(tmp_path, model, 150, per_device_train_batch_size=32, learning_rate=1e-2)
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


@pytest.mark.filterwarnings("error:.*did not close its log")
def test_the_end_of_a_run_completes_its_log_file_and_another_run_continues_it(tmp_path: Path) -> None:
    path = tmp_path / "run.zolog"
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, make_model(), 4, {"log_file": path}, **options).train()
    assert len(ZoLog.load(path)) == 4
    trainer = make_trainer(tmp_path, make_model(), 6, {"log_file": path}, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(ZoLog.load(path)) == 6


def test_the_schedule_and_the_groups_of_trainer_reach_the_optimizer(tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(tmp_path, model, 4, weight_decay=0.1, learning_rate=1e-3)
    trainer.train()
    seen = [[group["lr"] for group in step.groups] for step in trainer.mezo.log.steps()]
    assert seen == [[pytest.approx(1e-3 * (1 - i / 4))] * 2 for i in range(4)]
    assert [group["weight_decay"] for group in trainer.mezo.param_groups] == [0.1, 0.0]
    norms = {id(p) for n, p in model.named_parameters() if "LayerNorm" in n or n.endswith("bias")}
    assert {id(p) for p in trainer.mezo.param_groups[1]["params"]} == norms


def test_resuming_from_a_checkpoint_gives_the_bits_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, interrupted = make_model(), make_model()
    make_trainer(tmp_path / "whole", whole, 8).train()
    first = make_trainer(tmp_path / "parts", interrupted, 8, save_strategy="steps", save_steps=4)
    first.train()
    resumed = make_model()
    trainer = make_trainer(tmp_path / "parts", resumed, 8)
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert trainer.mezo.steps == 8
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_log_names_the_models_parameters(tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(tmp_path, model, 2)
    trainer.train()
    log = ZoLog.from_bytes(trainer.mezo.log.to_bytes())
    assert {e["name"] for e in log.params()} == {n for n, _ in model.named_parameters()}


# --- every evaluation of a step gets the same inputs ------------------------------------------------------------------


class Recording(MeZOTrainer):  # type: ignore[misc, valid-type]
    """Notes what each evaluation gets, and destroys it afterwards."""

    destroys = True

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("seen", []).append({k: v.clone() for k, v in inputs.items()})
        tensors = list(inputs.values())
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.destroys:
            inputs.clear()
            for t in tensors:
                t.zero_()
        return loss


def smoothed_by_hand(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=0.1)


@pytest.mark.parametrize("way", ["plain", "label_smoothing_factor", "compute_loss_func"])
def test_what_trainer_and_model_do_to_a_batch_reaches_no_other_evaluation(tmp_path: Path, way: str) -> None:
    def run(destroys: bool) -> Any:
        trainer = make_trainer(
            tmp_path,
            make_model(),
            3,
            kind=Recording,
            trainer={"compute_loss_func": smoothed_by_hand} if way == "compute_loss_func" else {},
            **({"label_smoothing_factor": 0.1} if way == "label_smoothing_factor" else {}),
        )
        trainer.destroys = destroys
        trainer.train()
        return trainer

    trainer, gentle = run(True), run(False)
    batches = [trainer.seen[:3], trainer.seen[3:5], trainer.seen[5:]]  # the first step evaluates once more
    assert [len(b) for b in batches] == [3, 2, 2]
    for first, *others in batches:
        assert set(first) == {"input_ids", "labels"}
        assert first["input_ids"].any()
        assert all(torch.equal(first[k], other[k]) for other in others for k in first)
    assert all(map(torch.equal, trainer.model.parameters(), gentle.model.parameters()))


def test_smoothed_labels_are_those_of_the_loss_by_hand(tmp_path: Path) -> None:
    """Every row has one label, so both losses are the same mean."""
    a = make_trainer(tmp_path, make_model(dropout=0.0), 3, label_smoothing_factor=0.1)
    b = make_trainer(tmp_path, make_model(dropout=0.0), 3, trainer={"compute_loss_func": smoothed_by_hand})
    for trainer in (a, b):
        trainer.train()
    torch.testing.assert_close(a.mezo.log.scalars(), b.mezo.log.scalars(), rtol=1e-2, atol=1e-3)


def test_evaluation_and_prediction_are_trainers_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_model(), 2, prediction_loss_only=True, eval_strategy="steps", eval_steps=1)
    trainer.train()
    plain = transformers.Trainer(trainer.model, trainer.args, eval_dataset=make_data())
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert trainer.predict(make_data()).predictions is None
    assert [set(row) & {"loss", "eval_loss", "grad_norm"} for row in trainer.state.log_history[:2]] == [
        {"eval_loss"}
    ] * 2


# --- gradient accumulation --------------------------------------------------------------------------------------------


class MeanLoss(torch.nn.Module):
    """A model that knows nothing of the number of items in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = make_model(dropout=0.0)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.cross_entropy(self.bert(input_ids).logits, labels)}


def language_model() -> Any:
    """It divides by the number of items of all batches of a step."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))


def text() -> list[dict[str, torch.Tensor]]:
    """Rows with 1 to 8 labels."""
    rows = []
    for i, row in enumerate(make_data()):
        labels = torch.where(torch.arange(8) <= i % 8, row["input_ids"], -100)
        rows.append({"input_ids": row["input_ids"], "labels": labels})
    return rows


@pytest.mark.parametrize(("make", "data"), [(language_model, text), (MeanLoss, make_data)], ids=["sum", "mean"])
def test_accumulated_batches_are_one_large_batch(tmp_path: Path, make: Any, data: Any) -> None:
    given = {"train_dataset": data()}
    whole = make_trainer(tmp_path, make(), 6, trainer=given, per_device_train_batch_size=32)
    parts = make_trainer(
        tmp_path, make(), 6, trainer=given, per_device_train_batch_size=8, gradient_accumulation_steps=4
    )
    for trainer in (whole, parts):
        trainer.train()
        assert trainer.mezo.steps == trainer.state.global_step == 6
    torch.testing.assert_close(parts.mezo.log.scalars(), whole.mezo.log.scalars(), rtol=1e-2, atol=1e-3)
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_step_at_the_end_of_an_epoch_takes_the_batches_that_are_left(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_model(), 2, kind=Recording, gradient_accumulation_steps=4)
    trainer.train()
    assert len(trainer.seen) == 3 * 4 + 2 * 2  # 6 batches an epoch; the first step evaluates three times


def test_an_interrupted_step_leaves_no_batch_to_the_next_run(tmp_path: Path) -> None:
    class Interrupt(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, make_model(), 1, kind=Recording, gradient_accumulation_steps=2)
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.train()
    assert len(trainer.seen) == 3 * 2


# --- options, and what is refused -------------------------------------------------------------------------------------


def test_variants_and_groups_are_options(tmp_path: Path) -> None:
    model = make_model()
    groups = [{"params": model.classifier.parameters(), "lr": 1e-2}, {"params": model.bert.parameters(), "lr": 1e-4}]
    trainer = make_trainer(tmp_path, model, 2, mezo={"variant": "fzoo", "directions": 3, "params": groups, "seed": 5})
    trainer.train()
    assert trainer.mezo.log.scalars().shape == (2, 3)
    assert trainer.mezo.log.header["seed"] == 5
    assert [group["initial_lr"] for group in trainer.mezo.param_groups] == [1e-2, 1e-4]


def test_a_second_run_goes_on_with_the_same_optimizer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_model(), 2)
    with pytest.raises(RuntimeError, match=r"MeZOTrainer.mezo: .* call train\(\)"):
        trainer.mezo  # noqa: B018
    trainer.train()
    trainer.train()
    assert trainer.mezo.steps == 4


def test_it_combines_with_another_subclass_of_trainer(tmp_path: Path) -> None:
    class Both(MeZOTrainer, transformers.Seq2SeqTrainer):  # type: ignore[misc, name-defined, valid-type]
        pass

    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    trainer = Both(make_model(), arguments, train_dataset=make_data(), mezo={"eps": 1e-2})
    trainer.train()
    assert trainer.mezo.steps == 2
    assert trainer.mezo.eps == 1e-2


def test_a_gradscaler_of_accelerate_is_passed_by(tmp_path: Path) -> None:
    """fp16=True on a GPU makes one, which raises where no gradient was scaled."""

    class Scaled(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["optimizer"].scaler = torch.amp.GradScaler("cpu")

    trainer = make_trainer(tmp_path, make_model(), 2)
    trainer.add_callback(Scaled())
    trainer.train()
    assert trainer.mezo.steps == 2
    assert trainer.lr_scheduler.last_epoch == 2


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = make_model()
    chosen: list[dict[str, Any]] = [
        {"optimizers": (torch.optim.SGD(model.parameters()), None)},
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {})},
    ]
    for options in chosen:
        with pytest.raises(ValueError, match=r"MeZOTrainer: optimizers .* must not choose an optimizer.*mezo=.*SGD"):
            make_trainer(tmp_path, model, 1, trainer=options)


def test_an_optimizer_in_place_of_its_options_is_refused(tmp_path: Path) -> None:
    model = make_model()
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(TypeError, match="MeZOTrainer: mezo must be a mapping of options of MeZO, got MeZO"):
        MeZOTrainer(model, args, mezo=MeZO(model.parameters(), model=model))
