"""``leanops mezo-step``: a MeZO step beside its two forward passes, on a transformer of 100M parameters or fewer.

Interleaved: two forward passes; a step of :class:`leanops.optim.MeZO`, for each way to perturb, with all its defaults
(Gaussian noise in every dtype), and of its HiZOO, which needs a third forward pass; and the published eager loops of
both (re-expressed: torch.normal per parameter, then add; three perturbations and the update; HiZOO's divide by the root
of the curvature, which it updates).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanops.autotune import fingerprint
from leanops.autotune.measure import interleave, median, paired_ratio
from leanops.bench.peers import check_wanted, wanted
from leanops.bench.plan import Settings, device_of
from leanops.bench.progress import Progress
from leanops.bench.results import StepCase, StepResults, StepRow, header
from leanops.bench.text import counted
from leanops.common.dtypes import dtype_name
from leanops.optim import MeZO

DISTRIBUTION = {
    torch.float32: "gaussian",
    torch.bfloat16: "rademacher",
    torch.float16: "rademacher",
    torch.float64: "gaussian",
}
SIZES: dict[str, tuple[dict[str, int], int]] = {  # the transformer's options, and the tokens of a batch
    "5.5K": ({"vocabulary": 64, "width": 8, "layers": 1, "heads": 1}, 32),
    "37K": ({"vocabulary": 128, "width": 24, "layers": 3, "heads": 2}, 64),
    "1.2M": ({"vocabulary": 1000, "width": 128, "layers": 5, "heads": 4}, 128),
    "8.3M": ({"vocabulary": 4000, "width": 288, "layers": 7, "heads": 6}, 128),
    "29.6M": ({"vocabulary": 8000, "width": 512, "layers": 8, "heads": 8}, 256),
    "101M": ({}, 2048),
}
PEERS = ("MeZO eager (re-expressed)", "HiZOO eager (re-expressed)")


class Block(nn.Module):
    """A pre-norm decoder block: causal attention and an MLP four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A language model with tied embeddings; 100.9M parameters at the default size."""

    def __init__(self, vocabulary: int = 20000, width: int = 768, layers: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(512, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


def eager_step(parameters: Sequence[Tensor], closure: Callable[[], Tensor], eps: float, lr: float) -> None:
    """MeZO as published: three passes of noise in place, and a fourth for the update."""

    def perturb(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for p in parameters:
            p.add_(scale * torch.normal(0.0, 1.0, size=p.shape, dtype=p.dtype, device=p.device))

    with torch.no_grad():
        perturb(1, eps)
        plus = closure()
        perturb(1, -2 * eps)
        minus = closure()
        perturb(1, eps)
        perturb(1, -lr * float(plus - minus) / (2 * eps))


def eager_hizoo_step(
    parameters: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    closure: Callable[[], Tensor],
    eps: float,
    lr: float,
    smoothing: float,
) -> None:
    """HiZOO as published: :func:`eager_step` along z / sqrt(h), after a pass at the weights themselves."""

    def move(scale: float, curvature: float | None = None) -> None:
        torch.manual_seed(1)
        for p, h in zip(parameters, curvatures, strict=True):
            z = torch.normal(0.0, 1.0, size=p.shape, dtype=p.dtype, device=p.device)
            if curvature is not None:
                h.copy_((1 - smoothing) * h + smoothing * curvature * h * z * z)
            p.add_(scale * z / h.sqrt())

    with torch.no_grad():
        base = closure()
        move(eps)
        plus = closure()
        move(-2 * eps)
        minus = closure()
        move(eps)
        move(-lr * float(plus - minus) / (2 * eps), float((plus + minus - 2 * base).abs()) / (2 * eps * eps))


def measure(
    dtype: torch.dtype,
    threads: int,
    *,
    device: str = "cpu",
    tokens: int = 2048,
    rounds: int = 7,
    budget_s: float = 0.5,
    peers: Sequence[str] | None = None,
    model: nn.Module | None = None,
) -> StepCase:
    """Times of one dtype and thread count, and the ratio of each step to the two forward passes.

    There are at least ``rounds`` rounds, and as many more (100 in all) as ``budget_s`` seconds allow. ``peers`` are
    parts of the eager loops' names; none where empty, all where None.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = (model or Transformer()).to(device, dtype).eval()
    length = min(256, tokens)
    data = torch.randint(0, model.embed.num_embeddings, (tokens // length, length), device=device)  # type: ignore[arg-type,union-attr]

    def closure() -> Tensor:
        logits = model(data)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), data[:, 1:].flatten())

    def forwards() -> None:
        with torch.no_grad():
            closure()
            closure()

    parameters = list(model.parameters())
    calls: dict[str, Callable[[], object]] = {"two forward passes": forwards}
    for perturb in ("scratch", "copy", "inplace"):
        opt = MeZO(parameters, lr=1e-7, distribution=DISTRIBUTION[dtype], perturb=perturb)
        opt.step(closure)  # a first step looks for hidden uses of parameters
        calls[f"leanops MeZO, {perturb}"] = lambda opt=opt: opt.step(closure)  # type: ignore[misc]
    defaults = MeZO(parameters, lr=1e-7)
    defaults.step(closure)
    calls["leanops MeZO, defaults"] = lambda: defaults.step(closure)
    mezo_eager, hizoo_eager = PEERS
    if wanted(mezo_eager, peers):
        calls[mezo_eager] = lambda: eager_step(parameters, closure, 1e-3, 1e-7)
    hizoo = MeZO(parameters, lr=1e-7, variant="hizoo", perturb="scratch")
    hizoo.step(closure)
    calls["leanops HiZOO, scratch"] = lambda: hizoo.step(closure)
    if wanted(hizoo_eager, peers):
        curvatures = [torch.ones_like(p) for p in parameters]
        calls[hizoo_eager] = lambda: eager_hizoo_step(parameters, curvatures, closure, 1e-3, 1e-7, 1e-8)
    taken = interleave(calls, device=device, budget_s=budget_s, rounds=(rounds, 100))
    base = taken.seconds["two forward passes"]
    rows = []
    for name, samples in taken.seconds.items():
        ratio = paired_ratio(samples, base)
        rows.append(StepRow(name, median(samples).value, samples, ratio.value, ratio.low, ratio.high))
    return StepCase(
        dtype=dtype_name(dtype),
        distribution=DISTRIBUTION[dtype],
        threads=threads,
        parameters=sum(p.numel() for p in parameters),
        tokens=tokens,
        noise=abs(taken.noise_floor().value - 1),
        rows=rows,
    )


def plan(settings: Settings) -> list[tuple[str, int]]:
    """Every dtype and thread count that the settings ask for."""
    device_of(settings.device)
    check_wanted(settings.peers, PEERS)
    return [(dtype, count) for dtype in settings.dtypes for count in settings.threads or (fingerprint.cores(),)]


def run(
    pairs: Sequence[tuple[str, int]], settings: Settings, progress: Progress, command: Sequence[str] = ()
) -> StepResults:
    """Measure each dtype and thread count of ``pairs``, which :func:`plan` makes from the settings."""
    before = torch.get_num_threads()
    rounds, budget_s = (3, 0.5) if settings.quick else (7, 15.0)
    options, tokens = SIZES[settings.size]
    progress.start(len(pairs))
    cases = []
    try:
        for dtype, count in pairs:
            progress.step(f"mezo-step, {dtype}, {counted(count, 'thread')}")
            cases.append(
                measure(
                    getattr(torch, dtype),
                    count,
                    device=settings.device,
                    tokens=tokens,
                    rounds=rounds,
                    budget_s=budget_s,
                    peers=settings.peers,
                    model=Transformer(**options),
                )
            )
    finally:
        torch.set_num_threads(before)
    return StepResults(**header(torch.device(settings.device), command), settings=asdict(settings), cases=cases)
