"""Runs whose halves and ends are fixtures of a release, the same bits on every machine and with every torch.

A loss is a sum of integers, which no order of additions changes; weights and gradients are noise of ``zo/1``. So a run
that is resumed from a fixture measures what the release measured, and whatever differs at its end is a change of
leanops. What stands here is never changed, for fixtures of earlier releases are read with it: new runs get functions of
their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanops import zo_noise
from leanops.optim import LISA, SM3, HalfFineTuning, MeZO, SeedPool, TensorSelector, fuse_into_backward

Weights = dict[str, Tensor]

# --- MeZO -----------------------------------------------------------------------------------------------------------


def whole(t: Tensor) -> Tensor:
    """The nearest multiples of 1/1024, times 1024: integers that fp64 adds and multiplies exactly."""
    return (t.double() * 1024).round()


def scaled_down(t: Tensor, bits: int) -> Tensor:
    return (t / 2**bits).floor()


class Tiny(nn.Module):
    """A language model of integers with one parameter of every kind; ``head.weight`` is ``embed.weight``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": dtype, "device": "cpu"}
        self.gain = nn.Parameter(torch.ones(9, **kind))
        self.temperature = nn.Parameter(torch.ones((), **kind))
        self.embed = nn.Embedding(29, 8, **kind)
        self.conv = nn.Conv1d(8, 9, 3, **kind)
        self.proj = nn.Linear(9, 8, **kind)
        self.head = nn.Linear(8, 29, bias=False, **kind)
        self.adapter = nn.Linear(8, 5, bias=False, **kind)
        self.head.weight = self.embed.weight

    def forward(self) -> Tensor:
        ids = torch.arange(12, device=self.gain.device)
        h = whole(self.embed.weight)[ids * 7 % 29]  # [12, 8]
        h = h.unfold(0, 3, 1).flatten(1) @ whole(self.conv.weight).flatten(1).T  # [10, 9]
        h = scaled_down(h + 1024 * whole(self.conv.bias), 12).clamp(min=0)
        h = scaled_down(h * whole(self.gain), 10)
        h = scaled_down(h @ whole(self.proj.weight).T + 1024 * whole(self.proj.bias), 12)  # [10, 8]
        logits = scaled_down(h @ whole(self.head.weight).T, 10) * whole(self.temperature).abs()  # [10, 29]
        target = 2**18 * ((ids[:10, None] * 5 + ids.new_tensor(range(29)) * 3) % 7)
        loss: Tensor = (logits - target).abs().sum() + (h @ whole(self.adapter.weight).T).abs().sum()
        return loss / 2**27


def parameters(model: nn.Module) -> Weights:
    """The parameters by the names that the plain model has for them."""
    return {plain_name(n): p for n, p in model.named_parameters()}


def plain_name(name: str) -> str:
    """Without the parts that wrappers put in."""
    wrappers = {"_orig_mod", "module", "_checkpoint_wrapped_module"}
    return ".".join(part for part in name.split(".") if part not in wrappers)


def tiny(weights: Mapping[str, Tensor]) -> Tiny:
    """The model with these weights, on their device."""
    first = next(iter(weights.values()))
    model = Tiny(first.dtype).to(first.device)
    with torch.no_grad():
        for name, p in parameters(model).items():
            p.copy_(weights[name])
    return model


def start(dtype: torch.dtype) -> Weights:
    """Where the runs begin."""
    model = Tiny(dtype)
    sizes = {"temperature": 1.0, "gain": 1.0}
    return {
        n: zo_noise(p.shape, 20240229, tensor_id=i, dtype=dtype) * 0.25 + sizes.get(n, 0.0)
        for i, (n, p) in enumerate(parameters(model).items())
    }


def mezo(model: nn.Module, run: Mapping[str, Any], joined: bool = False, **more: Any) -> MeZO:
    """The optimizer of a run: a group of matrices that decay and one of all others; the adapter's joins later."""
    pairs = run["names"] == "pairs"
    old = [(n, p) for n, p in model.named_parameters() if "adapter" not in n]
    groups = [
        {"params": [(n, p) if pairs else p for n, p in old if (p.dim() > 1) == matrices], "weight_decay": decay}
        for matrices, decay in ((True, 0.1), (False, 0.0))
    ]
    named = {"model": model} if run["names"] == "model" else {}
    opt = MeZO(groups, on_nonfinite="skip", **named, **run["options"], **more)
    if joined:
        join(opt, model)
    return opt


def join(opt: MeZO, model: nn.Module) -> None:
    name, p = next((n, p) for n, p in model.named_parameters() if "adapter" in n)
    named = "param_names" in opt.param_groups[0]
    opt.add_param_group({"params": [(name, p) if named else p], "weight_decay": 0.02})


LOG_ORDER = ["embed.weight", "conv.weight", "proj.weight", "gain", "temperature", "conv.bias", "proj.bias"]
LOG_ORDER += ["adapter.weight"]  # of the parameters in a run's log
STEPS, JOINED = 13, 5


def take(opt: MeZO, model: nn.Module, steps: range) -> None:
    """These steps of a run: a schedule, changes of decay, momentum and eps, a parameter frozen for a while, a skipped
    step, a step of length 0 and a group that joins."""
    bias = parameters(model)["conv.bias"]
    lr, momentum = opt.defaults["lr"], opt.defaults["momentum"]
    for step in steps:
        if step == JOINED:
            join(opt, model)
        for i, group in enumerate(opt.param_groups):
            group["lr"] = 0.0 if step == 6 else lr / (1 + step // 3 + i)
            group["momentum"] = momentum if step < 11 else 0.75 * momentum
        if step == 9:
            opt.param_groups[0]["weight_decay"] = 0.05
        if step == 4:
            opt.eps /= 2
        bias.requires_grad_(step not in (3, 4))
        lost = math.nan if step == 2 else 1.0
        opt.step(lambda lost=lost: model() * lost)


# --- SM3 ------------------------------------------------------------------------------------------------------------

SM3_SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (29, 8),
    "conv": (9, 8, 3),
    "wide": (2, 300),  # two blocks of int8 a row
    "vector": (37,),
    "column": (7, 1),
    "scalar": (),
}
SM3_STEPS = 8


def sm3_start(run: Mapping[str, Any]) -> Weights:
    """Parameters before a run, each of the dtype of its group."""
    dtypes = {n: getattr(torch, group["dtype"]) for group in run["groups"] for n in group["names"]}
    return {
        n: zo_noise(SM3_SHAPES[n], 7, tensor_id=i, dtype=dtypes[n]) * 0.25
        for i, n in enumerate(SM3_SHAPES)
        if n in dtypes
    }


def sm3(weights: Mapping[str, Tensor], run: Mapping[str, Any]) -> tuple[dict[str, nn.Parameter], Any]:
    """Parameters with these values, and their optimizer."""
    params = {n: nn.Parameter(w.clone()) for n, w in weights.items()}
    groups = []
    for group in run["groups"]:
        options = dict(group["options"])
        if options.get("momentum_dtype"):
            options["momentum_dtype"] = getattr(torch, options["momentum_dtype"])
        if options.pop("tensor_lr", False):
            options["lr"] = torch.tensor(options["lr"])
        groups.append({"params": [(n, params[n]) for n in group["names"]], **options})
    return params, fuse_into_backward(SM3, groups) if run["fused"] else SM3(groups)


def gradient(name: str, step: int, dtype: torch.dtype) -> Tensor | None:
    """Noise, with rows of zeros for the embedding, a zero at first for the scalar, and one that is missing."""
    if name == "vector" and step == 2:
        return None
    place = list(SM3_SHAPES).index(name)
    g = zo_noise(SM3_SHAPES[name], 1000 + step, tensor_id=place, dtype=dtype) * 2.0**-6
    if name == "embed":
        g[step % 5 :: 5] = 0.0
    return torch.zeros_like(g) if name == "scalar" and step == 0 else g


def sm3_take(params: Mapping[str, Tensor], opt: Any, steps: range) -> None:
    for step in steps:
        for group in opt.param_groups:
            lr = 0.1 / (1 + step // 2)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        grads = {n: gradient(n, step, p.dtype) for n, p in params.items()}
        if isinstance(opt, SM3):
            for n, p in params.items():
                p.grad = None if grads[n] is None else grads[n].to(p.device)
        else:  # a backward pass that has these gradients
            losses = [(p * grads[n].to(p.device)).sum().double() for n, p in params.items() if grads[n] is not None]
            torch.stack(losses).sum().backward()
        opt.step()
        opt.zero_grad()


def long_start() -> Tensor:
    return zo_noise(5, 22, dtype=torch.bfloat16, device="cpu")


def long_loss(p: Tensor) -> Tensor:
    return whole(p).square().sum() / 2**20


# --- FedKSeed -------------------------------------------------------------------------------------------------------

CANDIDATES, POOL_LR = (3, 60, 3, 17), 3e-3


def fill(pool: SeedPool, n: int, seed: int) -> None:
    """n scalars along candidates all over the pool."""
    values = zo_noise(n, seed, device="cpu").tolist()
    for i, g in enumerate(values):
        pool.add((i * 7919 + seed) % pool.size, 4.0 * g)


def history(pool: SeedPool) -> list[Tensor]:
    return [torch.from_numpy(a.astype("float64")) for a in (pool.sums, pool.amplitudes, pool.counts)]


def pool_steps(pool: SeedPool, model: nn.Module, candidates: Sequence[int]) -> None:
    """A client's steps."""
    for k in candidates:
        pool.step_(model, lambda: model(), k, lr=0.02, eps=0.01)


# --- what trains ----------------------------------------------------------------------------------------------------

SELECTION_STEPS = 14


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            setattr(self, name, nn.Linear(2, 2, bias=name == "q_proj", device="cpu"))
        self.input_norm, self.output_norm = nn.RMSNorm(2, device="cpu"), nn.RMSNorm(2, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        h = self.q_proj(x) + self.k_proj(x) * self.v_proj(x)
        x = x + self.o_proj(self.input_norm(h))
        return x + self.down_proj(self.up_proj(x) * self.gate_proj(self.output_norm(x)))


class Blocks(nn.Module):
    """Four blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 2, device="cpu")
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(2, 5, bias=False, device="cpu")
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(zo_noise(p.shape, 3, tensor_id=i))

    def forward(self) -> Tensor:
        h = self.embed(torch.arange(5, device="cpu"))
        for layer in self.layers:
            h = layer(h)
        return self.head(h).square().mean()


SELECTIONS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "lisa": (LISA, {"active": 2, "period": 3, "seed": 2**63 + 5}),
    "lisa_always": (LISA, {"active": 1, "period": 2, "blocks": "layers", "always": "norm|head", "seed": -1}),
    "half": (HalfFineTuning, {"period": 4, "seed": 11}),
    "half_rounds": (HalfFineTuning, {"always": "head", "categories": {"qk": "[qk]_proj"}, "seed": 12}),
    "tensors": (TensorSelector, {"rho": 0.6}),
}


def selection(name: str) -> tuple[Blocks, Any]:
    """A model, and a selection over it."""
    model = Blocks()
    kind, options = SELECTIONS[name]
    return model, kind(model, torch.optim.SGD(model.parameters(), lr=0.5), **options)


def draws(selection: Any, steps: range) -> dict[str, list[str]]:
    """What trains from a step on, for the first of these steps and where it changes."""
    found: dict[str, list[str]] = {}
    for step in steps:
        names = sorted(selection.trainable)
        if not found or names != list(found.values())[-1]:
            found[str(step)] = names
        if selection.period is None and step % 4 == 3:
            selection.next_round()
        else:
            selection.step()
    return found


def importances(selector: TensorSelector) -> list[dict[str, float]]:
    """Two rankings of the tensors, from noise."""
    tensors = selector.state_dict()["tensors"]
    return [dict(zip(tensors, zo_noise(len(tensors), seed, device="cpu").tolist(), strict=True)) for seed in (1, 2)]
