"""LISA in transformers: the blocks of known models, and runs of the Trainer that resume in the middle of a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from selection.runs import Net, assert_same, net
from torch import Tensor, nn

from leanops.optim import LISA, trainer_callback

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'leanops[dev]'")
pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'leanops[dev]'")


def test_blocks_of_known_models_are_found() -> None:
    small = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_key_value_heads=2))
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**small))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=9))
    for model, prefix in ((llama, "model.layers"), (bert, "bert.encoder.layer"), (gpt2, "transformer.h")):
        lisa = LISA(model, torch.optim.SGD(model.parameters()))
        assert lisa.blocks == [f"{prefix}.{i}" for i in range(3)]


def make_trainer(folder: Path, drawn: list[list[str]], max_steps: int, more: list[Any]) -> tuple[Any, Any]:
    """A trainer with LISA's callback, which notes what trains in each step."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            drawn.append([n for n, p in self.named_parameters() if p.requires_grad])
            logits = self.net(ids)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    g = torch.Generator().manual_seed(0)
    rows = [
        {"ids": torch.randint(11, (4,), generator=g), "labels": torch.randint(11, (4,), generator=g)} for _ in range(18)
    ]
    callback = trainer_callback(LISA, active=2, period=4, seed=7)
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        save_steps=6,
        save_strategy="steps",
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    return transformers.Trainer(Model(), args, train_dataset=rows, callbacks=[callback, *more]), callback


def trained(folder: Path, stop: int | None, resume: bool) -> tuple[Net, list[list[str]]]:
    class Stop(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= stop

    drawn: list[list[str]] = []
    trainer, _ = make_trainer(folder, drawn, max_steps=9, more=[] if stop is None else [Stop()])
    trainer.train(resume_from_checkpoint=resume)
    assert all(p.requires_grad for p in trainer.model.parameters())  # released at the end
    return trainer.model.net, drawn


def test_the_trainer_resumes_in_the_middle_of_a_round(tmp_path: Path) -> None:
    whole, drawn = trained(tmp_path / "whole", None, False)
    assert len({tuple(d) for d in drawn}) == 3  # 9 steps, 4 a round
    trained(tmp_path / "parts", 6, False)
    resumed, after = trained(tmp_path / "parts", None, True)
    assert after == drawn[6:]
    assert_same([p.detach() for p in resumed.parameters()], [p.detach() for p in whole.parameters()])


def test_a_run_after_an_interrupted_one_draws_from_all_blocks(tmp_path: Path) -> None:
    class Interrupted(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        pending = True

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.pending and state.global_step == 2:
                self.pending = False
                raise KeyboardInterrupt

    trainer, callback = make_trainer(tmp_path, [], max_steps=3, more=[Interrupted()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not all(p.requires_grad for p in trainer.model.parameters())
    trainer.train()
    assert len(callback.selection.blocks) == 5
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_the_callback_refuses_what_it_cannot_run() -> None:
    with pytest.raises(
        TypeError, match="trainer_callback: kind must be LISA, HalfFineTuning or TensorSelector, got <class 'list'>"
    ):
        trainer_callback(list)  # type: ignore[type-var]
