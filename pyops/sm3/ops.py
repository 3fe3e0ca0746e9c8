"""SM3: one step of the optimizer on many tensors, and its state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from leanops.common.checks import IDS, INDICES, integers, one_of, rate_is_one_number, require
from leanops.common.seeds import seed_tensor
from leanops.sm3.calls import MOMENTUM_ON
from leanops.sm3.reference import axes_of, scale_shape

_ops = torch.ops.leanops


def _list(name: str, tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A tensor or a sequence of tensors, as a list. torch's own error for other values omits the argument's name."""
    if isinstance(tensors, Tensor):
        return [tensors]
    if not isinstance(tensors, Iterable):  # require() would format the values at every call
        raise TypeError(f"sm3_step_: {name} must be a tensor or a sequence of tensors, got {tensors!r}")
    items = list(tensors)
    for i, t in enumerate(items):
        if not isinstance(t, Tensor):
            raise TypeError(f"sm3_step_: {name}[{i}] must be a tensor, got {type(t).__name__}")
    return items


def _rate(lr: float | Tensor) -> Tensor:
    rate_is_one_number("sm3_step_", lr)
    if isinstance(lr, Tensor):
        return lr
    require(0 <= lr < float("inf"), f"sm3_step_: lr must be finite and at least 0, got {lr}")
    return torch.tensor(lr, dtype=torch.float64, device="cpu")


def sm3_step_(
    params: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    covers: Tensor | Sequence[Tensor],
    momenta: Tensor | Sequence[Tensor] = (),
    scales: Tensor | Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    beta: float = 1.0,
    eps: float = 1e-30,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    stochastic_rounding: bool = False,
    seed: int | Tensor = 0,
    tensor_ids: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    momentum_on: str = "update",
    lr_factors: Tensor | None = None,
) -> None:
    r"""One step of SM3 on many tensors in place, in one pass.

    .. math::
        \nu &= \beta \min_k \mu_k[i_k] + (1 - \beta)\, g^2 \quad (\beta < 1), \qquad
        \nu = \min_k \mu_k[i_k] + g^2 \quad (\beta = 1) \\
        u &= g / \sqrt{\nu + \epsilon} \ \text{ and } 0 \text{ where } \nu = 0, \qquad
        \mu_k[j] \leftarrow \max_{i_k = j} \nu \\
        m &\leftarrow \beta_m\, m + (1 - \beta_m)\, u, \qquad
        w \leftarrow w\,(1 - \eta \lambda) - \eta\, m

    A parameter of shape ``[n_0, n_1, ...]`` keeps one accumulator :math:`\mu_k` of length ``n_k`` for every axis, and
    no second moment. Coupled decay adds :math:`\lambda w` to ``g`` first and leaves out the factor of ``w``; without
    momentum ``u`` takes the place of ``m``. Definition ``sm3/1`` (docs/sm3.md) fixes every rounding: the results are
    the same bits on every device, for any number of threads.

    With ``momentum_on="gradient_unpublished"``, which is in no paper, the gradient is averaged before the division:

    .. math::
        m \leftarrow \beta_m\, m + (1 - \beta_m)\, g, \qquad u = m / \sqrt{\nu + \epsilon}, \qquad
        w \leftarrow w\,(1 - \eta \lambda) - \eta f\, u

    A bias correction is a rate factor :math:`f = 1 / (1 - \beta_m^t)`, where t counts the averaged gradients.

    Args:
        params: tensors of float32, bfloat16, float16 or float64, of any rank and strides, not overlapping.
        grads: one for each parameter, of its shape, dtype and device; any strides, only read.
        covers: one for each parameter, as :func:`sm3_cover` makes it: float32 ``[sum of n_k]``, contiguous.
        momenta: none without momentum; else one for each parameter, of its shape, contiguous, in float32, bfloat16 or
            int8, as :func:`sm3_momentum` makes it.
        scales: none where no momentum is int8; else one for each momentum, float32: for int8 the scales of its blocks,
            for others ``[0]``.
        lr: learning rate :math:`\eta`, a number :math:`\ge 0` or a one-element tensor of float32 or float64.
        momentum: :math:`\beta_m` in [0, 1). beta: :math:`\beta` in (0, 1]; 1 sums, less than 1 averages.
        eps: :math:`\epsilon \ge 0`. weight_decay: :math:`\lambda \ge 0`. decoupled: how the decay is applied.
        maximize: step against the gradient's sign reversed; ``grads`` stay as they are.
        stochastic_rounding: round bf16 and fp16 parameters stochastically, as :func:`zo_axpy_` does, with ``seed`` (a
            number in [-2^63, 2^64) or a one-element int64 tensor), ``tensor_ids`` (by default the positions in the
            list) and ``offsets`` (index of each tensor's first element in its whole tensor, for shards; by default 0).
        grad_scale: one-element float32 tensor; gradients are multiplied by its reciprocal.
        found_inf: one-element float32 tensor; where it is not 0, nothing is written.
        momentum_on: ``"update"`` (SM3-II as published) or ``"gradient_unpublished"``.
        lr_factors: float32 ``[parameters]``, contiguous: the rate of each parameter is multiplied by its factor
            :math:`f`, in either mode. The factor of the decoupled decay stays :math:`1 - \eta \lambda`.

    ``lr``, ``seed``, ``grad_scale``, ``found_inf`` and ``lr_factors`` may be on the CPU or on the parameters' device.
    A NaN or an infinity in a gradient reaches the weight, the covers and the momentum (an int8 block that holds one
    reads NaN).

    Raises:
        ValueError: lengths, shapes, dtypes, devices or layouts that do not fit, a number out of its range, overlapping
            memory.
        RuntimeError: a tensor that requires grad while grad is enabled. TypeError: what is no tensor, or no number.
        Nothing is written when an error is raised.

    Source: Anil et al., "Memory-Efficient Adaptive Optimization" (1901.11150), SM3-II.
    """
    one_of("sm3_step_", "momentum_on", momentum_on, MOMENTUM_ON)
    written = _list("params", params)
    _ops.sm3_step_(
        written,
        _list("grads", grads),
        _list("covers", covers),
        _list("momenta", momenta),
        _list("scales", scales),
        _rate(lr),
        seed_tensor(seed, "sm3_step_", "seed"),
        grad_scale,
        found_inf,
        list(range(len(written))) if tensor_ids is None else integers("sm3_step_", "tensor_ids", tensor_ids, IDS),
        [0] * len(written) if offsets is None else integers("sm3_step_", "offsets", offsets, INDICES),
        momentum,
        beta,
        eps,
        weight_decay,
        decoupled,
        maximize,
        stochastic_rounding,
        momentum_on == "gradient_unpublished",
        lr_factors,
    )


def sm3_cover(param: Tensor) -> Tensor:
    r"""The accumulators :math:`\mu = 0` of a parameter before its first step, float32 ``[sum of n_k]``.

    They lie one after another in the order of the axes; :func:`sm3_cover_axes` takes them apart. A 0-d parameter counts
    as shape ``(1,)``.
    """
    return param.new_zeros(sum(axes_of(param.shape)), dtype=torch.float32)


def sm3_cover_axes(cover: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Views of the accumulators :math:`\\mu_k` of a parameter of this shape, ``[n_k]`` each, in the order of the axes.

    Raises:
        ValueError: a cover that does not have as many elements as the shape asks for.
    """
    sizes = axes_of(shape)
    if cover.shape != (sum(sizes),):
        seen = list(cover.shape)
        raise ValueError(f"sm3_cover_axes: cover must have shape [{sum(sizes)}] for {list(shape)}, got {seen}")
    return cover.split(list(sizes))


def sm3_momentum(param: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    r"""The momentum :math:`m = 0` of a parameter, contiguous and of its shape, and its scales, float32.

    Args:
        param: any parameter.
        dtype: float32, bfloat16, or int8: codes in [-127, 127], with one scale for each block of up to 256 elements in
            a row of axis 0 (of the whole tensor at rank 0 and 1), so that ``m = code * scale``. The scales then are
            ``[n_0, ceil(C / 256)]`` where ``C`` is a row's length; for the other dtypes they are empty, ``[0]``.

    Raises:
        ValueError: another dtype.
    """
    one_of("sm3_momentum", "dtype", dtype, (torch.float32, torch.bfloat16, torch.int8))
    scales = scale_shape(param.shape) if dtype == torch.int8 else (0,)
    return (
        param.new_zeros(param.shape, dtype=dtype),
        param.new_zeros(scales, dtype=torch.float32),
    )
