"""MeZO in Lightning: automatic optimization by MeZOCallback, and manual optimization."""

from __future__ import annotations

import logging
import traceback
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from leanops.optim import MeZO, ZoLog, replay_

lightning = pytest.importorskip("lightning", reason="needs lightning: pip install 'leanops[dev]'")
from leanops.integrations.lightning import MeZOCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The '.*dataloader' does not have many")


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Its training step destroys the batch, which is a dict with a list in it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 4))
        self.net = torch.nn.Sequential(*layers)
        self.options = {"lr": 2e-2, "distribution": "rademacher", **options}
        self.seen: list[torch.Tensor] = []
        self.grad_was_enabled: set[bool] = set()

    def training_step(self, batch: Any, index: int) -> Any:
        labels = batch.pop("labels")
        (x,) = batch["inputs"]
        self.seen.append(x.clone())
        self.grad_was_enabled.add(torch.is_grad_enabled())
        loss = cross_entropy(self.net(x), labels)
        self.log("loss", loss)
        x.zero_()
        labels.zero_()
        batch["inputs"].clear()
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", cross_entropy(self.net(batch["inputs"][0]), batch["labels"]))

    def configure_optimizers(self) -> Any:
        opt = MeZO(self.parameters(), model=self, **self.options)
        return [opt], [{"scheduler": torch.optim.lr_scheduler.StepLR(opt, 30, 0.5), "interval": "step"}]


def collate(rows: list[Any]) -> dict[str, Any]:
    return {"inputs": [torch.stack([x for x, _ in rows])], "labels": torch.stack([y for _, y in rows])}


def make_data() -> DataLoader[Any]:
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32, collate_fn=collate)


def make_trainer(folder: Path, epochs: int, callback: bool = True, **options: Any) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[MeZOCallback()] if callback else [],
        **options,
    )


def test_it_learns_without_a_gradient_and_replays(tmp_path: Path) -> None:
    model = Classifier()
    trainer = make_trainer(tmp_path, 30)
    before = trainer.validate(model, make_data(), verbose=False)[0]["val_loss"]
    trainer.fit(model, make_data())
    assert trainer.validate(model, make_data(), verbose=False)[0]["val_loss"] < before - 0.05
    assert trainer.global_step == trainer.optimizers[0].steps == 120
    assert trainer.optimizers[0].param_groups[0]["lr"] == 2e-2 / 16
    assert model.grad_was_enabled == {False}
    assert all(p.grad is None for p in model.parameters())
    start = Classifier()
    replay_(start, trainer.optimizers[0].log)
    assert all(map(torch.equal, start.parameters(), model.parameters()))


@pytest.mark.filterwarnings("error:.*did not close its log")
def test_the_end_of_a_run_completes_its_log_file(tmp_path: Path) -> None:
    path = tmp_path / "run.zolog"
    make_trainer(tmp_path, 2).fit(Classifier(log_file=path), make_data())
    assert len(ZoLog.load(path)) == 8


def test_every_evaluation_gets_the_same_batch(tmp_path: Path) -> None:
    model = Classifier()
    make_trainer(tmp_path, 1).fit(model, make_data())
    steps = [model.seen[:3], model.seen[3:5], model.seen[5:7], model.seen[7:]]  # the first step evaluates once more
    for step, batch in zip(steps, make_data(), strict=True):
        assert len(step) in (2, 3)
        assert all(torch.equal(x, batch["inputs"][0]) for x in step)


def test_after_the_run_the_module_is_what_it_was(tmp_path: Path) -> None:
    model = Classifier()
    make_trainer(tmp_path, 1).fit(model, make_data())
    assert not {"training_step", "backward"} & vars(model).keys()
    broken = Classifier()
    broken.net[0].register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, 1).fit(broken, make_data())
    assert not {"training_step", "backward"} & vars(broken).keys()


def test_a_training_step_of_the_instance_comes_back(tmp_path: Path) -> None:
    model = Classifier()
    own = types.MethodType(Classifier.training_step, model)
    model.training_step = own
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(model, make_data())
    assert trainer.optimizers[0].steps == 4
    assert model.training_step is own
    assert "backward" not in vars(model)


def test_a_checkpoint_resumes_to_the_bits_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, parts, resumed = Classifier(momentum=0.9), Classifier(momentum=0.9), Classifier(momentum=0.9)
    for m in (whole, parts, resumed):
        m.net[2].p = 0.0  # Lightning saves no generators, from which dropout draws
    a = make_trainer(tmp_path, 4)
    a.fit(whole, make_data())
    b = make_trainer(tmp_path, 2)
    b.fit(parts, make_data())
    b.save_checkpoint(tmp_path / "half.ckpt")
    c = make_trainer(tmp_path, 4)
    c.fit(resumed, make_data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert a.optimizers[0].log.to_bytes() == c.optimizers[0].log.to_bytes()


@pytest.mark.filterwarnings("ignore:MeZO.step. the closure returns its loss in")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_precisions_without_a_gradscaler_work(tmp_path: Path, precision: str) -> None:
    model = Classifier(lr=1e-3)
    trainer = make_trainer(tmp_path, 1, precision=precision)
    trainer.fit(model, make_data())
    assert trainer.optimizers[0].steps == 4


@pytest.mark.parametrize("perturb", ["copy", "scratch"])
def test_without_the_callback_the_error_names_the_closure_and_the_remedy(tmp_path: Path, perturb: str) -> None:
    class Plain(Classifier):
        def training_step(self, batch: Any, index: int) -> Any:
            return cross_entropy(self.net(batch["inputs"][0]), batch["labels"])

    model = Plain(perturb=perturb)
    with pytest.raises(RuntimeError) as caught:
        make_trainer(tmp_path, 1, callback=False).fit(model, make_data())
    told = "".join(traceback.format_exception(caught.value))
    assert "MeZO.step: the closure calls backward()" in told
    assert "leanops.integrations.lightning.MeZOCallback()" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches must be 1, .*got 2"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val must be None, .*got 1.0"),
    ],
)
def test_what_needs_gradients_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = Classifier()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"MeZOCallback: {message}"):
        make_trainer(tmp_path, 1, **options).fit(model, make_data())
    assert all(map(torch.equal, before, model.parameters()))


def test_a_gradscaler_is_refused(tmp_path: Path) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    with pytest.raises(ValueError, match="MeZOCallback: precision must not be '16-mixed'"):
        make_trainer(tmp_path, 1, plugins=plugins).fit(Classifier(), make_data())


def test_a_second_callback_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1)
    trainer.callbacks.append(MeZOCallback())
    model = Classifier()
    with pytest.raises(ValueError, match="MeZOCallback: callbacks must hold one MeZOCallback, got 2"):
        trainer.fit(model, make_data())
    assert not {"training_step", "backward"} & vars(model).keys()


def test_a_step_that_draws_its_own_batches_is_refused(tmp_path: Path) -> None:
    class Drawing(Classifier):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, index, _ = next(dataloader_iter)
            return super().training_step(batch, index)

    with pytest.raises(ValueError, match=r"MeZOCallback: training_step must take a batch, .*got dataloader_iter"):
        make_trainer(tmp_path, 1).fit(Drawing(), make_data())


def test_other_optimizers_and_manual_optimization_are_refused(tmp_path: Path) -> None:
    class Descending(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="MeZOCallback: configure_optimizers must return one MeZO, got SGD"):
        make_trainer(tmp_path, 1).fit(Descending(), make_data())
    manual = Classifier()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="MeZOCallback: automatic_optimization must be True"):
        make_trainer(tmp_path, 1).fit(manual, make_data())


def test_manual_optimization_needs_no_callback(tmp_path: Path) -> None:
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            self.optimizers().step(lambda: cross_entropy(self.net(batch["inputs"][0]), batch["labels"]))

    model = Manual()
    trainer = make_trainer(tmp_path, 2, callback=False)
    trainer.fit(model, make_data())
    assert trainer.global_step == trainer.optimizers[0].steps == 8
