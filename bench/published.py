"""The published updates of zeroth-order optimizers and of SM3, written anew from their formulas.

Each takes the seeds and the noise of ``zo/1`` instead of torch's generator, so that its weights can be compared with
those of :mod:`leanops.optim` number by number. All work in place on a list of weights. z is made by ``noise(seed)``,
one tensor a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Weights = list[Tensor]
Loss = Callable[[Weights], Tensor]
Noise = Callable[[int], Weights]  # z of a seed, one tensor for each weight


def _add(weights: Weights, directions: Weights, scale: float) -> None:
    for w, z in zip(weights, directions, strict=True):
        w += scale * z


def _two_sided(weights: Weights, loss: Loss, z: Weights, eps: float) -> float:
    """g = (L(w + eps z) - L(w - eps z)) / (2 eps), with three perturbations in place."""
    _add(weights, z, eps)
    plus = loss(weights)
    _add(weights, z, -2 * eps)
    minus = loss(weights)
    _add(weights, z, eps)
    return float(plus - minus) / (2 * eps)


def _one_sided(weights: Weights, loss: Loss, z: Weights, eps: float) -> float:
    """(L(w + eps z) - L(w)) / eps."""
    base = loss(weights)
    _add(weights, z, eps)
    plus = loss(weights)
    _add(weights, z, -eps)
    return float(plus - base) / eps


def mezo(weights: Weights, loss: Loss, noise: Noise, seeds: Sequence[int], eps: float, lr: float, decay: float) -> None:
    """MeZO, algorithm 1, with the weight decay of its code: w <- w - lr (g z + decay w)."""
    for seed in seeds:
        z = noise(seed)
        g = _two_sided(weights, loss, z, eps)
        for w, direction in zip(weights, z, strict=True):
            w -= lr * (g * direction + decay * w)


def mezo_directions(
    weights: Weights, loss: Loss, noise: Noise, steps: Sequence[Sequence[int]], eps: float, lr: float
) -> None:
    """MeZO, algorithm 2 (n-SPSA): every step moves by the mean of its directions."""
    for seeds in steps:
        measured = [_two_sided(weights, loss, noise(seed), eps) for seed in seeds]
        for seed, g in zip(seeds, measured, strict=True):
            _add(weights, noise(seed), -lr * g / len(seeds))


def mezo_late(weights: Weights, loss: Loss, noise: Noise, seeds: Sequence[int], eps: float, lr: float) -> None:
    """zo2: the update of a step is held back until the next step touches the weights; the last one is flushed."""
    held: tuple[Weights, float] | None = None
    for seed in seeds:
        if held is not None:
            _add(weights, held[0], -lr * held[1])
        z = noise(seed)
        held = z, _two_sided(weights, loss, z, eps)
    if held is not None:
        _add(weights, held[0], -lr * held[1])


def sign_descent(weights: Weights, loss: Loss, noise: Noise, seeds: Sequence[int], eps: float, lr: float) -> None:
    """ZO-Bench's sign optimizer: w <- w - lr sign(g) z."""
    for seed in seeds:
        z = noise(seed)
        g = _two_sided(weights, loss, z, eps)
        _add(weights, z, -lr * float((g > 0) - (g < 0)))


def decomfl(
    weights: Weights, losses: Sequence[Loss], noise: Noise, rounds: Sequence[Sequence[int]], eps: float, lr: float
) -> None:
    """DeComFL: each client measures every seed of a round on one side; the server averages the scalars and the
    perturbations, and all clients take the same step."""
    for seeds in rounds:
        scalars = [sum(_one_sided(weights, loss, noise(seed), eps) for loss in losses) / len(losses) for seed in seeds]
        for seed, g in zip(seeds, scalars, strict=True):
            _add(weights, noise(seed), -lr * g / len(seeds))


def fzoo(weights: Weights, loss: Loss, noise: Noise, steps: Sequence[Sequence[int]], eps: float, lr: float) -> None:
    """FZOO: w <- w - lr sum_i (l_i - l_0) / (n sigma) u_i, sigma the deviation of the l_i with divisor n."""
    for seeds in steps:
        base, values = loss(weights), []
        for seed in seeds:
            z = noise(seed)
            _add(weights, z, eps)
            values.append(loss(weights))
            _add(weights, z, -eps)
        sigma = torch.stack(values).std(correction=0)
        for seed, value in zip(seeds, values, strict=True):
            _add(weights, noise(seed), -lr * float((value - base) / (len(seeds) * sigma)))


def hizoo(
    weights: Weights, loss: Loss, noise: Noise, seeds: Sequence[int], eps: float, lr: float, smoothing: float
) -> None:
    """HiZOO: directions z / sqrt(h); h <- (1 - a) h + a |L+ + L- - 2 L| / (2 eps^2) h z^2, before the weights move."""
    curvatures = [torch.ones_like(w) for w in weights]
    for seed in seeds:
        z = noise(seed)
        scaled = [d / h.sqrt() for d, h in zip(z, curvatures, strict=True)]
        base = loss(weights)
        _add(weights, scaled, eps)
        plus = loss(weights)
        _add(weights, scaled, -2 * eps)
        minus = loss(weights)
        _add(weights, scaled, eps)
        bend = float((plus + minus - 2 * base).abs()) / (2 * eps * eps)
        for h, d in zip(curvatures, z, strict=True):
            h.copy_((1 - smoothing) * h + smoothing * bend * h * d * d)
        g = float(plus - minus) / (2 * eps)
        _add(weights, [d / h.sqrt() for d, h in zip(z, curvatures, strict=True)], -lr * g)


def fedkseed(
    weights: Weights,
    losses: Sequence[Loss],
    shares: Sequence[float],
    noise: Noise,
    chosen: Sequence[Sequence[int]],
    eps: float,
    lr: float,
) -> None:
    """FedKSeed, one round: client c steps along the seeds ``chosen[c]`` from the server's weights; the server sums
    what each seed gathered, weighted by the clients' shares, and moves its weights seed by seed."""
    gathered: dict[int, float] = {}
    for loss, share, seeds in zip(losses, shares, chosen, strict=True):
        own = [w.clone() for w in weights]
        for seed in seeds:
            z = noise(seed)
            g = _two_sided(own, loss, z, eps)
            _add(own, z, -lr * g)
            gathered[seed] = gathered.get(seed, 0.0) + share * g
    for seed, total in gathered.items():
        _add(weights, noise(seed), -lr * total)


def sm3(weights: Weights, gradients: Sequence[Weights], lr: float, momentum: float, beta: float) -> None:
    """SM3-II as in Google's code (beta 1) or its README (beta < 1), for matrices and vectors: the minimum of the
    accumulators grows by g^2 or moves towards it; the momentum averages the quotients."""
    accumulators = [[torch.zeros(n, dtype=w.dtype) for n in w.shape] for w in weights]
    averages = [torch.zeros_like(w) for w in weights]
    for step in gradients:
        for w, g, axes, m in zip(weights, step, accumulators, averages, strict=True):
            spread = [a.view([-1 if k == d else 1 for d in range(w.dim())]) for k, a in enumerate(axes)]
            nu = spread[0].expand_as(w)
            for other in spread[1:]:
                nu = torch.minimum(nu, other)
            nu = nu + g * g if beta == 1 else beta * nu + (1 - beta) * g * g
            for k, a in enumerate(axes):
                a.copy_(nu.movedim(k, 0).reshape(len(a), -1).amax(1))
            update = torch.where(nu > 0, g * nu.rsqrt(), torch.zeros_like(g))
            m.copy_(momentum * m + (1 - momentum) * update)
            w -= lr * m


def perturb_and_restore(weights: Weights, noise: Noise, seeds: Sequence[int], eps: float) -> None:
    """The perturbations of MeZO's loop alone: + eps z, - 2 eps z, + eps z, each rounded to the weights' dtype."""
    for seed in seeds:
        z = noise(seed)
        for scale in (eps, -2 * eps, eps):
            _add(weights, z, scale)
