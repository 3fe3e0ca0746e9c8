"""The settings of a training run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanops.autotune import fingerprint
from leanops.bench.plan import device_of
from leanops.bench.typed_json import from_json


@dataclass(frozen=True)
class Settings:
    """All that the numbers depend on, besides machine, software and text."""

    tokens: int = 460_800
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    hidden: int = 384
    intermediate: int = 1024
    layers: int = 6
    heads: int = 6
    context: int = 256
    batch: int = 4
    warmup: float = 0.1  # of the steps, linear
    floor: float = 0.1  # of the peak rate, where the cosine ends
    clip: float = 1.0  # global norm of the gradients
    rounds: tuple[tuple[int, int], ...] = (
        (8, 5),
        (4, 2),
    )  # of tuning: (run's steps over a trial's, number of rates)
    draws: int = 15  # of blocks or matrices in a run, for the methods that select
    points: int = 20  # of the validation curve
    curve_windows: int = 24
    tuning_windows: int = 64
    test_windows: int = 256
    memory_steps: int = 12

    @classmethod
    def quick(cls, **changes: Any) -> Settings:
        """The same path through the code with a small model and few steps. It proves nothing."""
        small = {
            "tokens": 8192, "hidden": 64, "intermediate": 160, "layers": 4, "heads": 4, "context": 64, "points": 8,
            "curve_windows": 8, "tuning_windows": 8, "test_windows": 32, "memory_steps": 3,
        }  # fmt: skip
        return cls(**(small | changes))

    @classmethod
    def small(cls, **changes: Any) -> Settings:
        """0.86M parameters and 400 steps, about a minute on one core."""
        small = {"tokens": 409_600, "hidden": 128, "intermediate": 344, "layers": 4, "heads": 4, "test_windows": 128}
        return cls(**(small | changes))

    @classmethod
    def load(cls, folder: Path) -> Settings:
        return from_json(cls, json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"], "settings")

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.context)

    @property
    def proves_nothing(self) -> bool:
        """Too small a model or too few steps for the order of the methods to mean anything."""
        return self.hidden < Settings.hidden or self.steps < 200

    def points_of(self, steps: int) -> list[int]:
        """The steps after which the validation loss is measured."""
        return sorted({-(-steps * (i + 1) // self.points) for i in range(self.points)})

    def check(self) -> None:
        least = max(part for part, _ in self.rounds) * self.batch * self.context
        if self.tokens < least:
            raise ValueError(f"leanops convergence: --tokens must be at least {least}, got {self.tokens}")
        if self.threads < 1:
            raise ValueError(f"leanops convergence: --threads must be 1 or more, got {self.threads}")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"leanops convergence: --seed must be in [0, 2^32), got {self.seed}")
        device_of(self.device)
        if fingerprint.package_version("transformers") is None:
            raise ValueError("leanops convergence: transformers is not installed (pip install transformers)")
