"""Hugging Face's Trainer with the optimizers of leanops."""

from __future__ import annotations

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "leanops.integrations.transformers: transformers must be installed with accelerate, as in pip install "
        "transformers accelerate"
    ) from error

from leanops.integrations.fused_trainer import FusedTrainer
from leanops.integrations.mezo_trainer import MeZOTrainer
from leanops.optim.selection.trainer_callback import trainer_callback

__all__ = ["FusedTrainer", "MeZOTrainer", "trainer_callback"]
