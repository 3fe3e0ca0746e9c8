"""Arguments that are not tensors: numbers of Python and NumPy. An error about anything else names the argument."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import leanops as lo


def axpy(seeds=1, coeffs=0.1, shape=(4,), **kwargs):
    p = torch.zeros(shape)
    lo.zo_axpy_(p, seeds, coeffs, **kwargs)
    return p


def into(seeds=1, coeffs=0.1, **kwargs):
    p = torch.zeros(4)
    lo.zo_axpy_into_(p, torch.zeros(4), seeds, coeffs, **kwargs)
    return p


def low_rank(**kwargs):
    return axpy(shape=(4, 4), distribution="lowrank", **{"right_seeds": 2, **kwargs})


def noise(seed=1, **kwargs):
    return lo.zo_noise(4, seed, **kwargs)


def linear(seed=1, scale=0.5, **kwargs):
    x, weight = torch.arange(8.0).view(2, 4), torch.ones(3, 4)
    return lo.zo_linear(x, weight, seed=seed, scale=scale, **kwargs)[0]


def refused(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("seed", [1.5, None, "a", True, 2**64, -(2**63) - 1])
def test_a_seed_is_an_integer_of_64_bits(seed):
    wanted = f"must be an integer in [-2^63, 2^64), got {seed!r}"
    for seeds in (seed, [1, seed]):
        with refused(f"zo_axpy_: each of seeds {wanted}"):
            axpy(seeds, [0.1, 0.2])
        with refused(f"zo_axpy_into_: each of seeds {wanted}"):
            into(seeds, [0.1, 0.2])
    with refused(f"zo_noise: seed {wanted}"):
        noise(seed)
    with refused(f"zo_linear: seed {wanted}"):
        linear(seed)
    if seed is not None:
        with refused(f"zo_axpy_: each of right_seeds {wanted}"):
            low_rank(right_seeds=seed)


@pytest.mark.parametrize("value", [None, "1", 1j])
def test_a_coefficient_is_a_real_number(value):
    wanted = f"must be a real number or a sequence of them, got {value!r}"
    for values in (value, [value]):
        with refused(f"zo_axpy_: coeffs {wanted}"):
            axpy(1, values)
        with refused(f"zo_axpy_: decay {wanted}"):
            axpy(decay=values)
        with refused(f"zo_axpy_into_: coeffs {wanted}"):
            into(1, values)
    with refused(f"zo_linear: scale must be a real number, got {value!r}"):
        linear(scale=value)


def test_coefficients_are_one_real_vector():
    with refused("zo_axpy_: coeffs must be real, got torch.complex64"):
        axpy(1, torch.tensor([1 + 5j]))
    with pytest.raises(ValueError, match=r"^zo_axpy_: coeffs must be a real number .* got"):
        axpy(1, 10**400)
    with pytest.raises(ValueError, match=r"^zo_linear: scale must be a real number, got"):
        linear(scale=10**400)
    with refused("zo_linear: scale must be a real number, got tensor([1., 1.])"):
        linear(scale=torch.ones(2))
    for square in (torch.ones(1, 2), np.ones((1, 2)), [[1.0, 1.0]]):
        with refused("zo_axpy_: coeffs must be one-dimensional, got shape [1, 2]"):
            axpy([1, 2], square)


def test_seeds_are_one_vector():
    with refused("zo_axpy_: seeds must be one-dimensional, got shape [1, 2]"):
        axpy(torch.tensor([[1, 2]]), [0.1, 0.2])
    for square in (np.array([[1, 2]]), [[1, 2]]):
        with refused("zo_axpy_: each of seeds must be an integer in [-2^63, 2^64), got [1, 2]"):
            axpy(square, [0.1, 0.2])


@pytest.mark.parametrize(("name", "high"), [("tensor_id", 2**32), ("offset", 2**63)])
def test_ids_and_offsets_are_integers_in_their_range(name, high):
    for value in (2**64, -(2**64), high, -1):
        message = f"must be in [0, {high}), got {value}"
        with refused(f"zo_axpy_: {name}s[0] {message}"):
            axpy(**{f"{name}s": [value]})
        with refused(f"zo_axpy_into_: {name}s[0] {message}"):
            into(**{f"{name}s": [value]})
        with refused(f"zo_noise: {name} {message}"):
            noise(**{name: value})
        with refused(f"zo_linear: {name} {message}"):
            linear(**{name: value})
    for value in (1.5, None, "a"):
        with refused(f"zo_axpy_: {name}s[0] must be an integer, got {value!r}"):
            axpy(**{f"{name}s": [value]})
        with refused(f"zo_noise: {name} must be an integer, got {value!r}"):
            noise(**{name: value})
        with refused(f"zo_linear: {name} must be an integer, got {value!r}"):
            linear(**{name: value})
    with refused(f"zo_axpy_: {name}s must be a sequence of integers, got 3"):
        axpy(**{f"{name}s": 3})


def test_sizes_are_integers():
    with refused("zo_noise: shape must be an integer, got 2.5"):
        lo.zo_noise(2.5, 1)
    with refused("zo_axpy_: columns must be a sequence of integers, got 4"):
        low_rank(columns=4)


def test_an_offset_whose_noise_ends_past_the_last_index_is_refused():
    with refused(f"zo_noise: offset must be in [0, {2**63 - 4}), got {2**63 - 2}"):
        noise(offset=2**63 - 2)


def test_numpy_numbers_give_the_results_of_python_numbers():
    seeds, coeffs = np.array([5, -6]), np.array([0.1, 0.2])
    want = axpy([5, -6], [0.1, 0.2], tensor_ids=[7], offsets=[9], decay=0.5)
    assert torch.equal(axpy(seeds, coeffs, tensor_ids=np.array([7]), offsets=[np.int64(9)], decay=np.array(0.5)), want)
    assert torch.equal(axpy(list(seeds), list(coeffs), tensor_ids=[np.uint32(7)], offsets=[9], decay=0.5), want)
    assert torch.equal(axpy(seeds.astype(np.uint64), coeffs, tensor_ids=[7], offsets=[9], decay=0.5), want)
    assert torch.equal(axpy(np.int64(5), np.float32(0.5)), axpy(5, 0.5))
    assert torch.equal(into(seeds, coeffs), into([5, -6], [0.1, 0.2]))
    assert torch.equal(
        lo.zo_noise(np.int64(4), np.uint64(2**64 - 1), tensor_id=np.int64(7), offset=np.int32(9)),
        lo.zo_noise(4, -1, tensor_id=7, offset=9),
    )
    got = linear(np.int64(3), np.float64(0.25), tensor_id=np.int32(7), offset=np.int64(9))
    assert torch.equal(got, linear(3, 0.25, tensor_id=7, offset=9))


def test_the_default_device_says_where_noise_is_made_and_nothing_else():
    x, weight, p, q = torch.ones(2, 4), torch.ones(3, 4), torch.zeros(4), torch.zeros(4, 4)
    want = axpy(), low_rank(), lo.zo_linear(x, weight, seed=1, scale=0.5)
    with torch.device("meta"):
        lo.zo_axpy_(p, 1, 0.1)
        lo.zo_axpy_(q, 1, 0.1, distribution="lowrank", right_seeds=2)
        y = lo.zo_linear(x, weight, seed=1, scale=0.5)
        assert lo.zo_noise(4, 1).is_meta
        assert lo.zo_noise(4, 1, device="cpu").device.type == "cpu"
    for got, exact in zip((p, q, *y), (*want[:2], *want[2]), strict=True):
        assert torch.equal(got, exact)


def test_a_compiled_call_takes_any_seed_and_offset():
    def call(p, seed, offset):
        lo.zo_axpy_(p, [seed, 2], np.ones(2), offsets=[offset])
        return p + lo.zo_noise(4, seed, offset=offset)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, offset in ((5, 7), (6, 8), (11, 40)):
        assert torch.equal(compiled(torch.zeros(4), seed, offset), call(torch.zeros(4), seed, offset))


def test_one_graph_serves_any_seed_and_any_offset_of_noise():
    def call(p, seed, offset):
        lo.zo_axpy_(p, [seed, 2], np.ones(2), offsets=[7])
        return p + lo.zo_noise(4, seed, offset=offset)

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    compiled(torch.zeros(4), 5, 7)
    graphs = counter.frame_count
    for seed, offset in ((6, 8), (11, 40)):
        assert torch.equal(compiled(torch.zeros(4), seed, offset), call(torch.zeros(4), seed, offset))
    assert counter.frame_count == graphs


def test_an_argument_that_is_no_tensor_is_refused():
    for value, seen in ((None, "NoneType"), (3, "int")):
        for call, name in (
            (lambda v=value: lo.zo_axpy_(v, 1, 0.1), "zo_axpy_: tensors"),
            (lambda v=value: lo.zo_axpy_into_(v, torch.ones(2), 1, 0.1), "zo_axpy_into_: out"),
            (lambda v=value: lo.zo_axpy_into_(torch.ones(2), v, 1, 0.1), "zo_axpy_into_: tensors"),
        ):
            with refused(f"{name} must be a tensor or a sequence of them, got {seen}"):
                call()
    with refused("zo_linear: x must be a tensor, got None"):
        lo.zo_linear(None, torch.ones(2, 2), seed=1, scale=0.1)
    with refused("zo_linear: weight must be a tensor, got None"):
        lo.zo_linear(torch.ones(2, 2), None, seed=1, scale=0.1)
