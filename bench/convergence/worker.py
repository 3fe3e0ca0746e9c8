"""One method of the convergence benchmark, in a process of its own: memory, learning rate, training.

    python -m leanops.bench.convergence.worker FOLDER METHOD CHECKPOINT_SECONDS

Each line on standard output is one unit of progress. Finished work is in FOLDER/METHOD, each file whole or absent.
"""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanops.bench import memory
from leanops.bench.convergence import corpus
from leanops.bench.convergence.experiment import write_atomically
from leanops.bench.convergence.methods import METHODS, Method, state_bytes
from leanops.bench.convergence.settings import Settings

Stop = Callable[[], bool]
EVALUATION_BATCH = 8


class Stopped(Exception):
    """The process was asked to end before the work was done."""


def make_model(settings: Settings) -> nn.Module:
    """Hugging Face's Llama over bytes, fp32, weights drawn from the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config: Any = LlamaConfig(
        vocab_size=256,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=False,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    model: Any = LlamaForCausalLM(config)
    return model.to(settings.device, torch.float32)  # type: ignore[no-any-return]


def bits(model: nn.Module, windows: Tensor, reduction: str = "mean") -> Tensor:
    """Bits a byte: cross-entropy of each window's bytes given those before them. windows: [B, context + 1] int64."""
    logits = model(input_ids=windows[:, :-1]).logits
    nats = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction=reduction)
    return nats / math.log(2)


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, device: str) -> list[float]:
    """Bits a byte of each window."""
    model.eval()
    found: list[float] = []
    for part in windows.split(EVALUATION_BATCH):
        each = bits(model, part.long().to(device), "none").view(len(part), -1)
        found += each.double().mean(1).tolist()
    model.train()
    return found


class Training:
    """A run of ``steps`` steps of one method: model, optimizer and selection, and the losses and times so far."""

    def __init__(self, settings: Settings, method: Method, text: corpus.Text, lr: float, steps: int) -> None:
        self.settings, self.lr, self.steps = settings, lr, steps
        self.model = make_model(settings)
        self.parameters = list(self.model.parameters())
        self.optimizer = method.make(self.parameters, lr)
        period = max(1, steps // settings.draws)
        self.selection = method.select and method.select(self.model, self.optimizer, period, settings.seed)
        self.batches = corpus.Batches(text.train, settings.context, settings.batch, settings.seed)
        self.validation, self.test = text.validation, text.test
        self.step, self.state_bytes, self.resumed = 0, 0, 0
        self.losses: list[float] = []
        self.seconds: list[list[float]] = []
        self.curve: list[list[float]] = []

    @property
    def done(self) -> bool:
        return self.step == self.steps or self.diverged

    @property
    def diverged(self) -> bool:
        return bool(self.losses) and not math.isfinite(self.losses[-1])

    def rate(self) -> float:
        """Linear warm-up, then a cosine to ``floor`` of the peak."""
        s = self.settings
        warm = max(1, round(s.warmup * self.steps))
        if self.step < warm:
            return self.lr * (self.step + 1) / warm
        share = (self.step - warm) / max(1, self.steps - warm)
        return self.lr * (s.floor + (1 - s.floor) * 0.5 * (1 + math.cos(math.pi * share)))

    def _clock(self) -> float:
        if self.settings.device != "cpu":
            torch.cuda.synchronize(self.settings.device)
        return time.perf_counter()

    def advance(self) -> None:
        """One step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        batch = self.batches(self.step).to(self.settings.device)
        start = self._clock()
        loss = bits(self.model, batch)
        # the gradient of the loss in nats, the usual unit, so that clipping and rates mean what they usually do
        (loss * math.log(2)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], self.settings.clip)
        between = self._clock()
        self.optimizer.step()
        if self.selection is not None:
            self.selection.step()
        end = self._clock()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append([end - start, end - between])
        self.state_bytes = max(self.state_bytes, state_bytes(self.optimizer))
        self.step += 1

    def validation_loss(self, count: int) -> float:
        """Bits a byte of the validation text, over ``count`` windows."""
        windows = corpus.spread(self.validation, self.settings.context, count)
        each = evaluate(self.model, windows, self.settings.device)
        return sum(each) / len(each)

    def test_losses(self) -> list[float]:
        """Bits a byte of each window of the held-out text."""
        windows = corpus.spread(self.test, self.settings.context, self.settings.test_windows)
        return evaluate(self.model, windows, self.settings.device)

    def save(self, path: Path) -> None:
        whole = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "selection": None if self.selection is None else self.selection.state_dict(),
            "generator": torch.get_rng_state(),
            "seen": {
                name: getattr(self, name)
                for name in ("step", "lr", "steps", "losses", "seconds", "curve", "state_bytes", "resumed")
            },
        }
        buffer = io.BytesIO()
        torch.save(whole, buffer)
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        whole = torch.load(path, map_location=self.settings.device, weights_only=True)
        seen = whole["seen"]
        if (seen["lr"], seen["steps"]) != (self.lr, self.steps):
            raise ValueError(f"leanops convergence: {path} is of another run: {seen['lr']}, {seen['steps']} steps")
        self.model.load_state_dict(whole["model"])
        self.optimizer.load_state_dict(whole["optimizer"])
        if self.selection is not None:
            self.selection.load_state_dict(whole["selection"])
        torch.set_rng_state(whole["generator"].cpu())
        for name, value in seen.items():
            setattr(self, name, value)
        self.resumed += 1


# --- the three parts of the work --------------------------------------------------------------------------------------


class Worker:
    def __init__(
        self, folder: Path, method: Method, checkpoint_s: float, say: Callable[[str], None], stop: Stop
    ) -> None:
        self.settings, self.method, self.own = Settings.load(folder), method, folder / method.key
        self.checkpoint_s, self.say, self.stop = checkpoint_s, say, stop
        self.text = corpus.load()
        self.own.mkdir(exist_ok=True)

    def run(self) -> None:
        self.memory()
        self.train(self.tune())

    def training(self, lr: float, steps: int, settings: Settings | None = None) -> Training:
        return Training(settings or self.settings, self.method, self.text, lr, steps)

    def memory(self) -> None:
        """Measure the peak of a few steps with all that they hold, while the process is fresh."""
        path, s = self.own / "memory.json", self.settings
        if path.exists():
            self.say("memory: kept")
            return
        lr = min(self.method.rates)

        def steps(settings: Settings) -> None:
            training = self.training(lr, settings.memory_steps, settings)
            for _ in range(settings.memory_steps):
                self._not_stopped()
                training.advance()

        # a small run first: what torch and transformers allocate at first use does not belong to the method
        steps(replace(s, hidden=32, intermediate=64, layers=4, heads=2, memory_steps=2))
        peak = memory.peak_bytes(lambda: steps(s), torch.device(s.device))
        self._write(path, {"peak_bytes": peak, "steps": s.memory_steps})
        self.say("memory: " + ("not known here" if peak is None else f"peak {peak / 2**20:.0f} MiB"))

    def tune(self) -> float:
        """Rounds of trials, each over the first batches of the run with a whole schedule. Returns the best rate."""
        rates = self.method.rates
        for number, (part, count) in enumerate(self.settings.rounds):
            rates = rates[:count]
            found = [self._trial(number, lr, self.settings.steps // part) for lr in rates]
            rates = tuple(
                lr for _, lr in sorted((math.inf if f is None else f, lr) for f, lr in zip(found, rates, strict=True))
            )
        return rates[0]

    def _trial(self, number: int, lr: float, steps: int) -> float | None:
        path = self.own / f"tune-{number}-{lr:g}.json"
        kept = path.exists()
        if not kept:
            training = self.training(lr, steps)
            while not training.done:
                self._not_stopped()
                training.advance()
            found = None if training.diverged else training.validation_loss(self.settings.tuning_windows)
            if found is not None and not math.isfinite(found):
                found = None
            self._write(path, {"round": number, "lr": lr, "steps": steps, "validation_bits": found})
        value: float | None = json.loads(path.read_text())["validation_bits"]
        text = "diverged" if value is None else f"{value:.3f} bits a byte"
        self.say(f"rate {lr:g} for {steps} steps: {text}" + (" (kept)" if kept else ""))
        return value

    def train(self, lr: float) -> None:
        """The run itself, continued from its checkpoint where there is one."""
        s = self.settings
        path = self.own / "checkpoint.pt"
        training = self.training(lr, s.steps)
        if path.exists():
            training.load(path)
        for step, value in training.curve:
            self.say(f"{step} of {s.steps} steps, {value:.3f} bits a byte (kept)")
        points, saved = set(s.points_of(s.steps)), time.monotonic()
        while not training.done:
            training.advance()
            if training.step in points and not training.diverged:
                training.curve.append([training.step, training.validation_loss(s.curve_windows)])
                self.say(f"{training.step} of {s.steps} steps, {training.curve[-1][1]:.3f} bits a byte")
            stopped = self.stop()
            if stopped or time.monotonic() - saved >= self.checkpoint_s:
                training.save(path)
                saved = time.monotonic()
            if stopped:
                raise Stopped
        seen = {name: getattr(training, name) for name in ("lr", "seconds", "curve", "state_bytes", "resumed")}
        result = {
            **seen,
            "diverged": training.step if training.diverged else None,
            "losses": [x if math.isfinite(x) else None for x in training.losses],
            "test_windows": None if training.diverged else training.test_losses(),
            "parameters": sum(p.numel() for p in training.parameters),
            "tokens_per_step": s.batch * s.context,
        }
        self._write(self.own / "train.json", result)
        path.unlink(missing_ok=True)

    def _not_stopped(self) -> None:
        if self.stop():
            raise Stopped

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        write_atomically(path, json.dumps(content).encode())


def prepare(settings: Settings) -> None:
    """Let two processes give the same bits."""
    torch.set_num_threads(settings.threads)
    if settings.device != "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def main(folder: str, key: str, checkpoint_s: str) -> int:
    parent, signals = os.getppid(), []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: signals.append(1))
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes into the log
    method = {m.key: m for m in METHODS}[key]

    def stop() -> bool:
        return bool(signals) or os.getppid() != parent  # the parent process was killed

    def say(text: str) -> None:
        try:
            print(text, file=lines)
        except BrokenPipeError:
            signals.append(1)

    prepare(Settings.load(Path(folder)))
    worker = Worker(Path(folder), method, float(checkpoint_s), say, stop)
    print(json.dumps(asdict(worker.settings)), file=sys.stderr)
    try:
        worker.run()
    except Stopped:
        print("stopped before the end", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
