"""Zeroth-order operators: noise that is a function of a seed, and operators that add it to weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from leanops.common.checks import IDS, INDICES, as_list, integer, integers, require
from leanops.common.seeds import as_vector, seed_tensor, wrapped

_ops = torch.ops.leanops


def _scalars(op: str, name: str, values: float | Iterable[float] | Tensor) -> Tensor:
    """Numbers as a float64 tensor [K], as the operators take them."""
    if isinstance(values, Tensor):
        require(not values.is_complex(), f"{op}: {name} must be real, got {values.dtype}")
        return as_vector(values).to(torch.float64)
    # a compiled graph has no tolist() of floats
    items = list(values) if isinstance(values, np.ndarray) and values.ndim == 1 else as_list(values)
    try:
        return torch.tensor(items, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        bad = next((v for v in items if not isinstance(v, (Real, Tensor))), items)
        raise ValueError(f"{op}: {name} must be a real number or a sequence of them, got {bad!r}") from None


def _scale(op: str, scale: float) -> float:
    try:
        return float(scale + 0.0)  # float() alone would accept text
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{op}: scale must be a real number, got {scale!r}") from None


def _tensors(op: str, name: str, tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """A tensor or a sequence of tensors, as a list."""
    if isinstance(tensors, Tensor):
        return [tensors]
    if not isinstance(tensors, Iterable):
        raise ValueError(f"{op}: {name} must be a tensor or a sequence of them, got {type(tensors).__name__}")
    return list(tensors)


def _no_tangents(op: str, **tensors: Tensor | None) -> None:
    """Refuse forward-mode differentiation. torch drops the tangents of an operator that has only a backward, so the
    derivative would be zero."""
    for name, t in tensors.items():
        if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(f"{op}: {name} must have no tangent, because only the backward is known")


def columns_of(shape: Sequence[int]) -> int:
    """Columns of a tensor that low-rank noise takes as a matrix; 0 for a tensor that it takes as a vector."""
    return math.prod(shape[1:]) if len(shape) >= 2 else 0


def _low_rank(
    op: str,
    tensors: Sequence[Tensor],
    distribution: str,
    right_seeds: int | Sequence[int] | Tensor | None,
    columns: Sequence[int] | None,
    rank: int,
) -> tuple[Tensor | None, list[int] | None, int]:
    """The last arguments of an axpy operator: right_seeds, columns and rank."""
    if columns is None and distribution == "lowrank":
        columns = [columns_of(t.shape) for t in tensors]
    right = None if right_seeds is None else seed_tensor(right_seeds, op, "each of right_seeds")
    return right, None if columns is None else integers(op, "columns", columns, INDICES), rank


def zo_noise(
    shape: Sequence[int] | int,
    seed: int,
    *,
    tensor_id: int = 0,
    offset: int = 0,
    distribution: str = "gaussian",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Noise :math:`z_i = z(\text{seed}, \text{tensor\_id}, \text{offset} + i)`, the same bits on every device.

    ``z`` follows definition ``zo/1``: Philox4x32-10 with the seed as key, and either standard normal values (Box-Muller
    in fixed fp32 polynomials, within 5e-6 of the exact transform) or random signs. It does not depend on the shape of
    the call, the number of threads, the grid or the sharding: ``zo_noise(n, s)[a:b]`` equals
    ``zo_noise(b - a, s, offset=a)``.

    Args:
        shape: shape of the result; indices run in row-major order.
        seed: integer in [-2^63, 2^64); negative numbers stand for their two's complement.
        tensor_id: number of the tensor in its model, in [0, 2^32).
        offset: index of the first element in the whole logical tensor, >= 0.
        distribution: ``"gaussian"`` or ``"rademacher"`` (+1 and -1 with equal chance).
        dtype: float32, bfloat16, float16 (``z`` rounded to nearest even) or float64 (the float32 value).
        device: device of the result; None: the default device.

    Raises:
        ValueError: an argument outside of its range, or another dtype.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11.
    """
    op = "zo_noise"
    sizes = [integer(op, "shape", size, INDICES) for size in as_list(shape)]
    place = integer(op, "tensor_id", tensor_id, IDS), integer(op, "offset", offset, INDICES)
    target = torch.empty(0).device if device is None else torch.device(device)  # get_default_device breaks a graph
    return _ops.zo_noise(sizes, wrapped(op, "seed", seed), *place, distribution, dtype, target)


def zo_axpy_(
    tensors: Tensor | Sequence[Tensor],
    seeds: int | Sequence[int] | Tensor,
    coeffs: float | Sequence[float] | Tensor,
    *,
    tensor_ids: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    decay: float | Sequence[float] | Tensor = 0.0,
    distribution: str = "gaussian",
    rounding: str = "nearest",
    sequential: bool = False,
    right_seeds: int | Sequence[int] | Tensor | None = None,
    columns: Sequence[int] | None = None,
    rank: int = 2,
) -> None:
    r"""Add seeded noise to many tensors in place, in one pass.

    .. math:: p_i \leftarrow \text{round}\Big((1 - \text{decay})\, p_i
        + \sum_k c_k\, z(s_k, \text{tensor\_id}, \text{offset} + i)\Big)

    The sum is accumulated in fp32 with one fma for a term (in fp64, without fma, for fp64 tensors), in the order of
    ``k``, and rounded once. Weights are read and written once for any number of seeds. The call serves to perturb and
    restore weights, for the update of MeZO, for an update from many directions, and to replay thousands of seeds.

    Low-rank noise takes a tensor of two or more dimensions as a matrix of n = ``size(0)`` rows and m columns:

    .. math:: Z = U V^\top, \qquad Z_{ij} = \sum_p U_{ip} V_{jp}

    with U [n, r] Gaussian from the seed and V [m, r] Gaussian from the right seed, summed in fp32 by fma in the order
    of p. A tensor of fewer dimensions gets plain Gaussian z. U and V are computed tile by tile.

    Args:
        tensors: tensors of float32, bfloat16, float16 or float64, of any shape and strides, not overlapping.
        seeds, coeffs: ``K`` seeds and ``K`` coefficients: numbers, sequences, numpy arrays, or tensors (int64, float64)
            on the CPU or on the tensors' device. Coefficients are rounded to fp32 (kept for fp64 tensors).
        tensor_ids: an id for each tensor, by default its position in the list.
        offsets: index of each tensor's first element in its whole logical tensor (for shards), by default 0.
        decay: weight decay of the call; with ``sequential``, one number or ``K``.
        distribution: ``"gaussian"``, ``"rademacher"`` or ``"lowrank"``.
        rounding: ``"nearest"`` (ties to even), or ``"stochastic"`` for bf16 and fp16: 16 random bits, from the first
            seed of the call (of each term with ``sequential``), are added below the last bit that stays. fp32
            and fp64 tensors are not affected.
        sequential: round after every term, so that the result is bit-equal to ``K`` calls of one seed each.
        right_seeds: for ``"lowrank"``, ``K`` seeds of V. For equal neighbours V is computed once.
        columns: for ``"lowrank"``, m of each whole tensor (0: plain Gaussian), by default from the tensor's shape. With
            ``columns`` and ``offsets``, any contiguous part of a matrix gets its part of Z.
        rank: for ``"lowrank"``, r in [1, 64].

    Raises:
        ValueError: lengths that differ, an unknown name, an id or offset out of range, overlapping memory.
        RuntimeError: a tensor that requires grad while grad is enabled.
        Nothing is written when an error is raised.

    Sources: MeZO (2305.17333), FedKSeed (2312.06353); LOZO (2410.07698) for Z = U V^T.
    """
    op = "zo_axpy_"
    written = _tensors(op, "tensors", tensors)
    _ops.zo_axpy_(
        written,
        seed_tensor(seeds, op, "each of seeds"),
        _scalars(op, "coeffs", coeffs),
        _scalars(op, "decay", decay),
        list(range(len(written))) if tensor_ids is None else integers(op, "tensor_ids", tensor_ids, IDS),
        [0] * len(written) if offsets is None else integers(op, "offsets", offsets, INDICES),
        distribution,
        rounding,
        sequential,
        *_low_rank(op, written, distribution, right_seeds, columns, rank),
    )


def zo_axpy_into_(
    out: Tensor | Sequence[Tensor],
    tensors: Tensor | Sequence[Tensor],
    seeds: int | Sequence[int] | Tensor,
    coeffs: float | Sequence[float] | Tensor,
    *,
    tensor_ids: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    decay: float | Sequence[float] | Tensor = 0.0,
    distribution: str = "gaussian",
    rounding: str = "nearest",
    sequential: bool = False,
    right_seeds: int | Sequence[int] | Tensor | None = None,
    columns: Sequence[int] | None = None,
    rank: int = 2,
) -> None:
    r"""As :func:`zo_axpy_`, but it reads ``tensors`` and writes the result to ``out``.

    .. math:: o_i \leftarrow \text{round}\Big((1 - \text{decay})\, p_i
        + \sum_k c_k\, z(s_k, \text{tensor\_id}, \text{offset} + i)\Big)

    It perturbs weights without writing to them: ``out`` is scratch memory.

    Args:
        out: one tensor for each of ``tensors``, of the same shape, dtype and device, overlapping none of them.
        tensors: the tensors to read.

    The other arguments and the errors are those of :func:`zo_axpy_`.
    """
    op = "zo_axpy_into_"
    written, read = _tensors(op, "out", out), _tensors(op, "tensors", tensors)
    _ops.zo_axpy_into_(
        written,
        read,
        seed_tensor(seeds, op, "each of seeds"),
        _scalars(op, "coeffs", coeffs),
        _scalars(op, "decay", decay),
        list(range(len(read))) if tensor_ids is None else integers(op, "tensor_ids", tensor_ids, IDS),
        [0] * len(read) if offsets is None else integers(op, "offsets", offsets, INDICES),
        distribution,
        rounding,
        sequential,
        *_low_rank(op, read, distribution, right_seeds, columns, rank),
    )


def zo_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seed: int | Tensor,
    scale: float,
    tensor_id: int = 0,
    offset: int = 0,
    distribution: str = "rademacher",
    x_minus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A linear layer at two perturbed weights at once.

    .. math:: y_\pm = x_\pm\, (W \pm c\, z)^\top + b

    ``W`` is read and never written. At most a panel of ``z`` is in memory at a time. The result is that of a
    materialised ``W ± c z``, up to the rounding of the matrix product.

    Args:
        x: ``[..., m]``, the input of both branches, or of the plus branch alone when ``x_minus`` is given.
        weight: ``[n, m]``, of x's dtype. bias: ``[n]`` or None.
        seed, tensor_id, offset, distribution: as in :func:`zo_noise`; element ``W[r, j]`` has index
            ``offset + r m + j``, so the noise is that of :func:`zo_axpy_` on the same weight.
        scale: ``c``.
        x_minus: input of the minus branch, of x's shape, if it is not x (in every layer after the first).

    Returns:
        ``(y_plus, y_minus)``, each ``[..., n]``. With one x, an infinity in it may give NaN where ``W ± c z`` in memory
        gives an infinity.

    Differentiable in x, x_minus, weight and bias; saved for backward: x, x_minus, weight and the seed. It computes in
    the dtype of its inputs; autocast does not change that.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown distribution, an id out of range.
        NotImplementedError: forward-mode differentiation.
    """
    op = "zo_linear"
    place = integer(op, "tensor_id", tensor_id, IDS), integer(op, "offset", offset, INDICES)
    seeds = seed_tensor(seed, op, "seed")
    if forward_ad._current_level >= 0:
        _no_tangents(op, x=x, x_minus=x_minus, weight=weight, bias=bias)
    return _ops.zo_linear(x, x_minus, weight, bias, seeds, _scale(op, scale), *place, distribution)
