"""The two usual parameter groups of a model: what decays, and what does not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from leanops.optim.common.parameters import canonical_names

_NORM_CLASS = re.compile(r"norm(\d+[dp]?|gated)?$", re.IGNORECASE)  # LlamaRMSNorm, T5LayerNorm, BatchNorm2d, ...
_BIAS = re.compile(r"(^|_)bias(es)?(_[a-z])?$")  # bias, in_proj_bias, gate_up_proj_bias, attention_biases, bias_k
_VECTOR = re.compile(r"(^|_)bias_|(^|_)(layer_?|rms_?)?norm(_|$)")  # bias_hh_l0, layer_norm_weight: of one dimension


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a normalization, of torch or of any other library, by the names of its classes."""
    return any(_NORM_CLASS.search(c.__name__) for c in type(module).__mro__)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: the parameters of norms and all biases do not decay, all others do.

    A module is a norm if its class, or a base of its class, has a name that ends in Norm (``LayerNorm``, ``RMSNorm``,
    ``GroupNorm``, ``BatchNorm2d``, ``LlamaRMSNorm``, ``RMSNormGated``). Its attribute's name does not count. A
    parameter is a bias if its module calls it ``bias``, ``…_bias`` or, where it has one dimension, ``bias_…``. A
    parameter of one dimension such as ``layer_norm_weight`` belongs to a norm although no module is one.

    Parameters that do not require grad are left out. Names are those of the plain model, without torch.compile's,
    DDP's or FSDP's prefixes.
    """
    decaying: list[tuple[str, nn.Parameter]] = []
    exempt: list[tuple[str, nn.Parameter]] = []
    exempt_ids = set(_exempt_ids(model))
    for name, (_, p) in zip(canonical_names(model), model.named_parameters(), strict=True):
        if p.requires_grad:
            (exempt if id(p) in exempt_ids else decaying).append((name, p))
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _exempt_ids(model: nn.Module) -> Iterator[int]:
    """``id(p)`` of the parameters that do not decay."""
    for module in model.modules():
        owned = list(module.named_parameters(recurse=False))
        for name, parametrization in getattr(module, "parametrizations", {}).items():
            owned += [(name, p) for p in parametrization.parameters(recurse=False)]
        for name, p in owned:
            vector = sum(n > 1 for n in p.shape) <= 1
            if is_norm(module) or _BIAS.search(name) or (vector and _VECTOR.search(name)):
                yield id(p)
