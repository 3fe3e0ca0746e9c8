"""The gate before the clock: no speed is shown for a result that is not right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from leanops._registry import OpSpec
from leanops.bench.peers import Args, Peer, Probe, Subject, results
from leanops.bench.results import Gate
from leanops.common.call import flat

PEER_FACTOR = 2.0  # an operator's error may be this many times that of plain PyTorch in the same dtype


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def expected(spec: OpSpec, probes: Sequence[Probe]) -> list[list[Tensor]]:
    """The reference's results at the probes: in the operator's dtype where it is exact, otherwise in float64."""
    values = []
    for probe in probes:
        call = probe.reference_call if spec.exact else tree_map_only(Tensor, _double, probe.reference_call)
        returned = spec.reference(call)
        values.append(probe.wanted(results(spec, flat(call), returned)))
    return values


def error(actual: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """max |actual - wanted| / max |wanted|; infinite where only one of the two has a NaN or an infinity."""
    worst, scale = 0.0, 0.0
    for a, w in zip(actual, wanted, strict=True):
        if a.shape != w.shape:
            return math.inf
        if not a.numel():
            continue
        a, w = a.double().cpu(), w.double().cpu()
        same = (a == w) | (a.isnan() & w.isnan())
        difference = torch.where(same, 0.0, (a - w).abs())
        if difference.isnan().any():
            return math.inf
        worst = max(worst, float(difference.max()))
        scale = max(scale, float(w[w.isfinite()].abs().max()) if w.isfinite().any() else 0.0)
    return worst / scale if scale else worst


def check(
    spec: OpSpec, subject: Subject, args: Args, dtype: torch.dtype, peers: Sequence[Peer]
) -> tuple[Gate, dict[str, float]]:
    """Run the operator once and compare it with the reference; also the errors of the peers with the same result."""
    call = spec.bind(*args)
    probes = subject.probes(call)
    wanted = expected(spec, probes)
    returned = spec.op(*args)
    actual = [probe.actual(returned) for probe in probes]
    pairs = list(zip(actual, wanted, strict=True))
    seen = max((error(a, w) for a, w in pairs), default=0.0)
    if spec.exact:
        # bit for bit: -0 is not 0, but any NaN equals any other
        equal = all(torch.equal(_bits(a), _bits(w)) for x, y in pairs for a, w in zip(x, y, strict=True))
        reason = "" if equal else f"differs from the reference: relative error {seen:.2g}"
        return Gate(equal, seen, 0.0, "reference, bit for bit", reason), {}
    errors = {}
    for peer in peers:
        if peer.same_result:
            result = peer.make(call)()
            errors[peer.name] = max(
                (error(p.actual(result), w) for p, w in zip(probes, wanted, strict=True)), default=0.0
            )
    eps = torch.finfo(dtype).eps
    bound = spec.tolerance * eps * math.sqrt(spec.depth(call))
    if errors:
        bound = min(bound, max(PEER_FACTOR * min(errors.values()), eps))
    passed = seen <= bound
    reason = "" if passed else f"relative error {seen:.2g} is over the bound {bound:.2g}"
    return Gate(passed, seen, bound, "float64 reference", reason), errors


def _bits(t: Tensor) -> Tensor:
    """The bits of each element as an integer, on the CPU; one pattern for all NaNs."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    if not t.is_floating_point():
        return t.contiguous().view(integer).cpu()
    canonical = torch.where(t.isnan(), torch.full_like(t, torch.nan), t)
    return canonical.contiguous().view(integer).cpu()
