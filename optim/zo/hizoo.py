r"""HiZOO's directions: noise divided by the root of each element's curvature.

With h, one number an element, 1 at the start (HiZOO's diagonal of the inverse of Sigma):

    q_k = z_k / sqrt(h),    c_k = |L(theta + eps q_k) + L(theta - eps q_k) - 2 L(theta)| / (2 eps^2)
    h <- h ((1 - alpha) + (alpha / n) sum_k c_k z_k^2)

The dtype is h's: fp32, or fp64 for fp64 weights. The operations are additions, products, quotients and roots, each
rounded by itself, so that a log replays to the same bits on every machine. Temporary tensors are as large as a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanops.common import exact
from leanops.optim.zo.directions import Noise, Seed, left_seeds
from leanops.optim.zo.momentum_window import MomentumWindow
from leanops.optim.zo.rounding import write_
from leanops.optim.zo.slots import Slot, by_device, fixed_kept, keep_fixed_
from leanops.optim.zo.strategy import THETA, Point, Spsa, Write
from leanops.optim.zo.update import State, Update, descend_, momentum_of, state_tensor
from leanops.zo import zo_axpy_

_SLICE = 1 << 17  # elements; three slices stay in a cache


@dataclass(frozen=True)
class Hizoo(Spsa):
    """SPSA along z / sqrt(h). An evaluation at theta gives a second scalar a direction, c_k, from which h learns."""

    variant = "hizoo"
    scalars_per_direction = 2
    not_fused_because = "whose steps depend on the curvature before them"

    smoothing: float = 1e-8

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Hizoo:
        keys = ("directions", "rounding", "momentum_mode", "smoothing")
        return cls(Noise.of(settings), **{key: settings[key] for key in keys})

    def check(self) -> None:
        name = self.noise.distribution
        if name != "gaussian":  # z^2 of random signs is 1 everywhere and shows no curvature
            raise ValueError(f"MeZO: hizoo needs distribution='gaussian', got {name!r}")

    def check_momentum(self, beta: float) -> None:
        if beta and self.momentum_mode != "store":
            raise ValueError(
                "MeZO: momentum of hizoo needs momentum_mode='store': the log does not hold old curvatures"
            )

    @property
    def own_settings(self) -> dict[str, Any]:
        return {"smoothing": self.smoothing}

    # --- the estimate -------------------------------------------------------------------------------------------------

    def points(self, directions: Sequence[int], is_first: bool) -> list[Point]:
        return [*super().points(directions, is_first), THETA]

    def measured(self, losses: Mapping[Point, float], eps: float) -> list[float]:
        def curvature(k: int) -> float:
            return (losses[k, 1] + losses[k, -1] - 2.0 * losses[THETA]) / eps / (2.0 * eps)

        return [*super().measured(losses, eps), *self._by_direction(losses, curvature)]

    def scalars(self, measured: list[float]) -> list[float]:
        return measured[: self.directions] + [abs(c) for c in measured[self.directions :]]

    # --- weights ------------------------------------------------------------------------------------------------------

    def with_state(self, slot: Slot, state: State) -> Slot:
        """The curvature is state of the optimizer: 1 everywhere before the first step."""
        return slot._replace(state=(state_tensor(slot, state, "curvature", 1.0),))

    def perturb_(self, slots: Sequence[Slot], seed: Seed, scale: float) -> None:
        with fixed_kept(slots):
            self.perturb_into_([s.local for s in slots], slots, seed, scale)

    def perturb_into_(self, outs: Sequence[Tensor], slots: Sequence[Slot], seed: Seed, scale: float) -> None:
        """out <- round(p + scale z / sqrt(h)); ``outs`` may be the slots' own memory."""
        if scale == 0.0:
            for out, slot in zip(outs, slots, strict=True):
                out.copy_(slot.local)
            return
        for piece, step in _scaled(outs, slots, [seed], [scale]):
            piece.out.copy_(step.add_(piece.slot.local))
        keep_fixed_(outs, slots)

    def prepared(self, seed: Seed, scale: float) -> Write:
        return partial(self.perturb_into_, seed=seed, scale=scale)

    @property
    def has_state(self) -> bool:
        return True

    # --- the update ---------------------------------------------------------------------------------------------------

    def update(
        self, window: MomentumWindow, seeds: Sequence[Seed], scalars: Sequence[float], group: Mapping[str, Any]
    ) -> Update:
        """Never None: the curvature learns from every step."""
        lr, beta = float(group["lr"]), float(group["momentum"])
        return Update(seeds, scalars, None, lr, beta, lr * float(group["weight_decay"]))

    def apply_(self, slots: Sequence[Slot], update: Update, state: State) -> None:
        """The curvature learns from this step, then the weights move: theta <- (1 - decay) theta - lr m.

        The scalars are the estimates g_k and then the c_k; m is (1/n) sum_k g_k q_k without momentum.
        """
        n, seeds, lr = self.directions, update.seeds, update.lr
        estimates = update.scalars[:n]
        _learn_(slots, seeds, update.scalars[n:], self.smoothing)
        if update.beta:
            momenta = [momentum_of(s, state) for s in slots]
            _accumulate_(slots, momenta, seeds, estimates, update.beta)
            if lr:
                descend_(slots, momenta, lr, update.decay, self.rounding, seeds[0].left)
        elif lr:
            _move_(slots, seeds, [-(lr / n) * g for g in estimates], update.decay, self.rounding)


def _move_(slots: Sequence[Slot], seeds: Sequence[Seed], coeffs: Sequence[float], decay: float, rounding: str) -> None:
    """p <- round((1 - decay) p + sum_k c_k z_k / sqrt(h))."""
    for part in by_device(slots):
        for piece, step in _scaled([s.local for s in part], part, seeds, coeffs):
            kept = piece.out.to(step.dtype, copy=True).mul_(1.0 - decay)
            write_(piece.slot, step.add_(kept), rounding, seeds[0].left)


def _accumulate_(
    slots: Sequence[Slot], momenta: Sequence[Tensor], seeds: Sequence[Seed], estimates: Sequence[float], beta: float
) -> None:
    """m <- beta m + (1/n) sum_k g_k z_k / sqrt(h)."""
    moved = [s._replace(local=m) for s, m in zip(slots, momenta, strict=True)]
    _move_(moved, seeds, [g / len(estimates) for g in estimates], 1.0 - beta, "nearest")


def _learn_(slots: Sequence[Slot], seeds: Sequence[Seed], curvatures: Sequence[float], smoothing: float) -> None:
    """h <- h ((1 - alpha) + (alpha / n) sum_k c_k z_k^2)."""
    for part in by_device(slots):
        for pieces in _batches([s.local for s in part], part):
            factors = [torch.full_like(piece.h, 1.0 - smoothing) for piece in pieces]
            for seed, c in zip(seeds, curvatures, strict=True):
                for factor, z in zip(factors, _sums(pieces, [seed], [1.0]), strict=True):
                    factor.add_(z.square_().mul_(smoothing * c / len(seeds)))
            for piece, factor in zip(pieces, factors, strict=True):
                piece.h.mul_(factor)


class _Piece(NamedTuple):
    """A slice of a slot."""

    out: Tensor  # that is written
    slot: Slot
    h: Tensor  # curvature


def _scaled(
    outs: Sequence[Tensor], slots: Sequence[Slot], seeds: Sequence[Seed], coeffs: Sequence[float]
) -> Iterator[tuple[_Piece, Tensor]]:
    """Slices of the tensors of one device, and sum_k c_k z_k / sqrt(h) of each."""
    for pieces in _batches(outs, slots):
        for piece, total in zip(pieces, _sums(pieces, seeds, coeffs), strict=True):
            yield piece, total.div_(exact.sqrt(piece.h))


def _sums(pieces: Sequence[_Piece], seeds: Sequence[Seed], coeffs: Sequence[float]) -> list[Tensor]:
    """sum_k c_k z_k."""
    sums = [torch.zeros_like(piece.h) for piece in pieces]
    ids, offsets = [p.slot.tensor_id for p in pieces], [p.slot.offset for p in pieces]
    zo_axpy_(sums, left_seeds(seeds), list(coeffs), tensor_ids=ids, offsets=offsets)
    return sums


def _batches(outs: Sequence[Tensor], slots: Sequence[Slot]) -> Iterator[list[_Piece]]:
    """Small tensors together, large ones in slices: about _SLICE elements at a time."""
    batch: list[_Piece] = []
    size = 0
    for out, slot in zip(outs, slots, strict=True):
        for piece in _slices(out, slot):
            batch.append(piece)
            size += piece.out.numel()
            if size >= _SLICE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _slices(out: Tensor, slot: Slot) -> Iterator[_Piece]:
    (h,) = slot.state
    if not (out.is_contiguous() and slot.local.is_contiguous() and h.is_contiguous()):
        yield _Piece(out, slot, h)
        return
    out, local, h = out.view(-1), slot.local.view(-1), h.view(-1)
    for start in range(0, out.numel(), _SLICE):
        part = slice(start, start + _SLICE)
        yield _Piece(out[part], slot._replace(local=local[part], offset=slot.offset + start), h[part])
