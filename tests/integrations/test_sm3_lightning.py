"""SM3 in Lightning: automatic optimization, schedules, clipping and checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from sm3.parameters import equal
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from leanops.optim import SM3, fuse_into_backward

lightning = pytest.importorskip("lightning", reason="needs lightning: pip install 'leanops[dev]'")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum_dtype": torch.int8}


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
        self.losses: list[float] = []
        self.fused = fused

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        opt: Any = fuse_into_backward(SM3, self.net, **OPTIONS) if self.fused else SM3(self.parameters(), **OPTIONS)
        return [opt], [{"scheduler": torch.optim.lr_scheduler.StepLR(opt, 30), "interval": "step"}]


def make_trainer(folder: Path, epochs: int, **options: Any) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_checkpointing": False, **options},
    )


def make_data() -> DataLoader[tuple[torch.Tensor, ...]]:
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32)


def test_it_learns_with_clipping_and_a_schedule(tmp_path: Path) -> None:
    model = Classifier()
    trainer = make_trainer(tmp_path, 12, gradient_clip_val=1.0)
    trainer.fit(model, make_data())
    assert sum(model.losses[-4:]) < 0.5 * sum(model.losses[:4])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_is_refused_in_mixed_precision_only_where_adamw_refuses_it(tmp_path: Path, precision: str) -> None:
    class Chosen(Classifier):
        def __init__(self, kind: Any, fused: bool | None) -> None:
            super().__init__()
            self.kind, self.in_step = kind, fused

        def configure_optimizers(self) -> Any:
            return self.kind(self.parameters(), lr=0.01, fused=self.in_step)

    for kind in (SM3, torch.optim.AdamW):
        for fused in (None, False, True):
            trainer = make_trainer(tmp_path, 1, gradient_clip_val=1.0, precision=precision)
            if fused and precision == "bf16-mixed":
                with pytest.raises(RuntimeError, match=f"{kind.__name__}, does not allow for gradient clipping"):
                    trainer.fit(Chosen(kind, fused), make_data())
            else:
                trainer.fit(Chosen(kind, fused), make_data())
                assert trainer.global_step == 4


@pytest.mark.parametrize("fused", [None, True])
def test_a_gradscaler_of_lightning_leaves_out_a_step_with_an_infinity(tmp_path: Path, fused: bool | None) -> None:
    """16-mixed, whose loss scale 2^16 is raised until a gradient is infinite."""
    from lightning.pytorch.plugins import MixedPrecision

    class Half(Classifier):
        def configure_optimizers(self) -> Any:
            return SM3(self.parameters(), lr=0.01, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1000)
    model = Half()
    trainer = make_trainer(tmp_path, 1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    before = [p.detach().clone() for p in model.parameters()]
    trainer.fit(model, make_data())
    assert scaler.get_scale() == 2.0**122
    assert all(map(torch.equal, before, model.parameters()))
    assert all(float(s["step"]) == 0 for s in trainer.optimizers[0].state.values())


def test_a_checkpoint_resumes_to_the_bits_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, parts, resumed = Classifier(), Classifier(), Classifier()
    a = make_trainer(tmp_path, 4)
    a.fit(whole, make_data())
    b = make_trainer(tmp_path, 2)
    b.fit(parts, make_data())
    b.save_checkpoint(tmp_path / "half.ckpt")
    c = make_trainer(tmp_path, 4)
    c.fit(resumed, make_data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert equal(a.optimizers[0].state_dict()["state"], c.optimizers[0].state_dict()["state"])


def test_fused_into_the_backward_pass_it_gives_the_same_weights(tmp_path: Path) -> None:
    plain, fused = Classifier(), Classifier(fused=True)
    for model in (plain, fused):
        make_trainer(tmp_path, 2).fit(model, make_data())
    assert all(map(torch.equal, plain.parameters(), fused.parameters()))
    with pytest.raises(RuntimeError, match=r"fuse_into_backward: the gradient of .* was used and freed"):
        make_trainer(tmp_path, 1, gradient_clip_val=1.0).fit(Classifier(fused=True), make_data())
