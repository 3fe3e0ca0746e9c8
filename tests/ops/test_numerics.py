"""Every operator: backends agree with the reference, outputs are written whole, equal inputs give equal bits."""

from __future__ import annotations

import pytest
import torch
from opsuite import (
    assert_agrees,
    assert_same_bits,
    backends,
    clone,
    make,
    outputs,
    over_cases,
    over_specs,
    run,
)


@over_cases(every_dtype="ci")
def test_backends_agree_with_the_reference(spec, case, dtype, device):
    args = make(case, device, dtype)
    for name, function in backends(spec, device):
        assert_agrees(spec, args, run(spec, args, function), dtype, name)


@over_cases(every_dtype="ci")
def test_every_output_element_is_written(spec, case, dtype, device):
    torch.use_deterministic_algorithms(True)  # then torch.empty fills with NaN, inside the operator too
    try:
        assert torch.empty(3, device=device, dtype=dtype).isnan().all()
        args = make(case, device, dtype)
        for name, function in backends(spec, device):
            for out in run(spec, args, function):
                assert not out.isnan().any(), f"{name} left elements unwritten"
    finally:
        torch.use_deterministic_algorithms(False)


@over_cases(every_dtype="ci")
def test_two_runs_and_any_thread_count_give_the_same_bits(spec, case, dtype, device, threads):
    args = make(case, device, dtype)
    for name, function in backends(spec, device):
        first = run(spec, args, function)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_bits(run(spec, args, function), first, f"{name}, {count} threads")


@over_cases(where=lambda spec: spec.mutates)
def test_only_what_the_schema_says_is_written(spec, case, dtype, device):
    args = make(case, device, dtype)
    before = clone(args)
    spec.op(*args)
    written = {id(t) for t in spec.mutated(args)}
    for now, then in zip(torch.utils._pytree.tree_leaves(args), torch.utils._pytree.tree_leaves(before), strict=True):
        if isinstance(now, torch.Tensor) and id(now) not in written:
            assert_same_bits([now], [then])


@pytest.mark.exhaustive
@over_specs(where=lambda spec: spec.large is not None)
def test_more_than_two_to_the_31_elements(spec, device):
    args, tail = spec.large(device)
    spec.op(*args)
    whole = outputs(spec, args, None)[0].flatten()
    assert whole.numel() > 2**31
    spec.kernel("reference")(*tail)
    want = outputs(spec, tail, None)[0].flatten()
    assert_same_bits([whole[-want.numel() :].clone()], [want])


@over_specs(where=lambda spec: spec.autograd is not None)
def test_gradcheck_and_gradgradcheck_in_float64(spec, device):
    for case in (c for c in spec.cases if not c.bench):
        args = make(case, device, torch.float64)
        leaves, tree = torch.utils._pytree.tree_flatten(args)
        if sum(t.numel() for t in leaves if isinstance(t, torch.Tensor)) > 10_000:
            continue
        places = [i for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.is_floating_point()]

        def call(*values, leaves=leaves, places=places, tree=tree):
            filled = list(leaves)
            for i, value in zip(places, values, strict=True):
                filled[i] = value
            return spec.op(*torch.utils._pytree.tree_unflatten(filled, tree))

        values = [leaves[i].clone().requires_grad_() for i in places]
        assert torch.autograd.gradcheck(call, values, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, values, fast_mode=True)


@over_cases(where=lambda spec: spec.autograd is not None and spec.plain is not None, every_dtype="ci")
def test_gradients_are_as_exact_as_those_of_plain_torch(spec, case, dtype, device):
    def gradients(function, wide):
        args = clone(make(case, device, dtype))
        leaves = [t for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()]
        inputs = [t.double().requires_grad_() if wide else t.requires_grad_() for t in leaves]
        values = iter(inputs)
        args = [next(values) if any(a is t for t in leaves) else a for a in args]
        results = outputs(spec, args, function(*args))
        seeds = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(y.shape, generator=seeds).to(device, dtype).to(y.dtype) for y in results]
        return torch.autograd.grad(results, inputs, cotangents)

    if dtype == torch.float64:
        return  # there is no wider reference; gradcheck tests float64
    exact, got = gradients(spec.kernel("reference"), True), gradients(spec.op, False)
    plain = gradients(spec.unpacked(spec.plain), False)
    for g, p, w in zip(got, plain, exact, strict=True):
        assert float((g.double() - w).norm()) <= 3 * float((p.double() - w).norm()) + 1e-300


@pytest.mark.gpu
@over_cases()
def test_a_side_stream_is_respected(spec, case, dtype, device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device: run with --leanops-device cuda")
    args = make(case, device, dtype)
    first = run(spec, args)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        second = run(spec, args)
    stream.synchronize()
    assert_same_bits(second, first)
