"""What the tests of selection share: a small network of blocks, optimizers, and helpers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from leanops.optim import LISA, SM3, fuse_into_backward

WIDTH, HIDDEN, VOCAB, LAYERS = 8, 12, 11, 5
TOKENS = 3 * 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up_proj = nn.Linear(WIDTH, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(nn.functional.gelu(self.up_proj(self.norm(x))))


class Net(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.final = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final(x))


# FLOPs of the weights' gradients of a block: two products
BLOCK_DW = 2 * (2 * TOKENS * WIDTH * HIDDEN)


def net(layers: int = LAYERS, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(layers)


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(VOCAB, (3, 4), generator=g)
    wanted = torch.randint(VOCAB, (3, 4), generator=g)
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), wanted.flatten())


# name -> (parameters -> optimizer, parameter -> bytes of its state)
OPTIMIZERS: dict[str, tuple[Callable[[Iterable[Any]], Optimizer], Callable[[Tensor], int]]] = {
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False), lambda p: 8 * p.numel() + 4),
    "AdamW-foreach": (lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True), lambda p: 8 * p.numel() + 4),
    "AdamW-fused": (lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True), lambda p: 8 * p.numel() + 4),
    "AdamW-amsgrad": (lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True), lambda p: 12 * p.numel() + 4),
    "SGD": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1), lambda p: 4 * p.numel()),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, lr=1e-2), lambda p: 4 * p.numel() + 4),
    "NAdam": (lambda p: torch.optim.NAdam(p, lr=1e-2), lambda p: 8 * p.numel() + 8),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9), lambda p: 8 * p.numel() + 4),
    "AdamW-in-backward": (lambda p: fuse_into_backward(torch.optim.AdamW, p, lr=1e-2), lambda p: 8 * p.numel() + 4),
    "SM3": (lambda p: SM3(p, lr=1e-2), lambda p: 4 * (p.numel() + sum(p.shape) + 1)),
}

# TensorSelector refuses optimizers that step inside the backward pass
MEASURABLE = [name for name in OPTIMIZERS if not name.endswith("in-backward")]


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(v.numel() * v.element_size() for v in held)


def backward_flops(closure: Callable[[], Tensor]) -> int:
    """FLOPs of the backward pass of ``closure()``, counted by torch."""
    loss = closure()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def snapshot(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """Copies of weights, ``requires_grad``, gradients and the optimizer's state."""
    params = list(model.named_parameters())
    entries = [copy.deepcopy(dict(optimizer.state[p])) if p in optimizer.state else None for _, p in params]
    return [
        [p.detach().clone() for _, p in params],
        [p.requires_grad for _, p in params],
        [None if p.grad is None else p.grad.clone() for _, p in params],
        entries,
    ]


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit, also inside nested dicts and lists."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def brute_force(importance: np.ndarray, dw: np.ndarray, dy: np.ndarray, budget: int) -> float:
    """The importance of the best of all 2^n choices."""
    n = len(importance)
    bits = (np.arange(1, 1 << n)[:, None] >> np.arange(n)) & 1
    deepest = n - 1 - bits[:, ::-1].argmax(1)
    cost = bits @ dw + np.cumsum(dy)[deepest]
    values = bits @ importance
    return float(max(0.0, values[cost <= budget].max(initial=0.0)))


def net_with_lisa(name: str = "AdamW", **options: Any) -> tuple[Net, torch.optim.Optimizer, LISA]:
    model = net()
    optimizer = OPTIMIZERS[name][0](model.parameters())
    return model, optimizer, LISA(model, optimizer, **{"active": 2, "period": 3, **options})
