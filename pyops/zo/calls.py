"""The calls of the zeroth-order operators: a class for each operator, with its arguments as fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class NoiseInPlace(NamedTuple):
    """``zo_noise_``: out ← z."""

    out: Tensor
    seed: Tensor  # int64 [1]
    tensor_id: int
    offset: int  # index of the first element in the whole tensor
    distribution: str  # gaussian or rademacher


class Noise(NamedTuple):
    """``zo_noise``: a new tensor of z."""

    shape: Sequence[int]
    seed: int
    tensor_id: int = 0
    offset: int = 0
    distribution: str = "gaussian"
    dtype: torch.dtype | None = None
    device: torch.device | None = None


class NoiseSum(NamedTuple):
    """The noise of an axpy, which computes (1 - decay) p + sum_k c_k z(s_k).

    ``tensor_ids``, ``offsets`` and ``columns`` have an entry for each tensor.
    """

    seeds: Tensor  # int64 [K]
    coeffs: Tensor  # float64 [K]
    decays: Tensor  # float64 [1], or [K] if sequential
    tensor_ids: Sequence[int]
    offsets: Sequence[int]  # index of a tensor's first element in its whole tensor
    distribution: str  # gaussian, rademacher or lowrank
    rounding: str  # nearest or stochastic
    sequential: bool  # round after every term
    right_seeds: Tensor | None = None  # of low-rank noise, int64 [K]
    columns: Sequence[int] | None = None  # of low-rank noise: elements of a row of the whole matrix; 0: a vector
    rank: int = 2  # of low-rank noise

    def widths(self) -> Sequence[int]:
        """``columns``, or zeros without low-rank noise."""
        return [0] * len(self.tensor_ids) if self.columns is None else self.columns


class AxpyInto(NamedTuple):
    """``zo_axpy_into_``: out ← round((1 - decay) tensors + the noise)."""

    out: Sequence[Tensor]
    tensors: Sequence[Tensor]
    noise: NoiseSum


class Axpy(NamedTuple):
    """``zo_axpy_``: tensors ← round((1 - decay) tensors + the noise)."""

    tensors: Sequence[Tensor]
    noise: NoiseSum

    def into(self) -> AxpyInto:
        """The same as an axpy from the tensors into themselves."""
        return AxpyInto(self.tensors, self.tensors, self.noise)


class Linear(NamedTuple):
    """``zo_linear``: x (W + scale z)^T + b and x_minus (W - scale z)^T + b."""

    x: Tensor  # [..., m]
    x_minus: Tensor | None  # [..., m]; None: x
    weight: Tensor  # [n, m]
    bias: Tensor | None  # [n]
    seed: Tensor  # int64 [1]
    scale: float
    tensor_id: int
    offset: int
    distribution: str  # gaussian or rademacher
