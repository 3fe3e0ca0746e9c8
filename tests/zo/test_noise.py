"""The noise zo/1: published vectors, distribution, accuracy, no dependence on anything but its key; and the operators
that add it."""

from __future__ import annotations

import math

import pytest
import torch
from common.oracle import KNOWN_PHILOX

import leanops as lo
from leanops import _registry
from leanops.common import streams
from leanops.common.philox import philox
from leanops.common.rounding import rounding_bits
from leanops.zo import reference

LOW_32 = 0xFFFFFFFF
N = 1 << 20


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_PHILOX)
def test_philox_gives_the_published_words(counter, key, words):
    assert [int(w) for w in philox(counter, key)] == [int(word, 16) for word in words.split()]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_the_cost_of_noise_is_the_bytes_of_its_dtype(dtype):
    spec = _registry.spec("zo_noise")
    call = spec.bind((3, 5), 7, dtype=dtype)
    assert spec.cost(call).written == spec.op(*call).nbytes


def test_the_signs_are_the_bits_of_philox():
    seed, tensor_id = (0x299F31D0 << 32) | 0xA4093822, 0x13198A2E
    block = 5
    words = philox((block, 0, tensor_id, streams.RADEMACHER), (seed & LOW_32, seed >> 32))
    z = lo.zo_noise(128, seed, tensor_id=tensor_id, offset=128 * block, distribution="rademacher")
    bits = torch.tensor([int(w) >> j & 1 for w in words for j in range(32)])
    assert torch.equal(z, 1.0 - 2.0 * bits)


def test_gaussian_is_within_5e_6_of_the_exact_transform():
    seed, tensor_id = 77, 3
    z = lo.zo_noise(N, seed, tensor_id=tensor_id).double().view(-1, 2, 2)
    block = torch.arange(N // 4)
    x = philox((block, block * 0, torch.tensor(tensor_id), torch.tensor(streams.GAUSSIAN)), (seed, 0))
    for pair in (0, 1):
        u1 = ((x[2 * pair] >> 8) + 1).double() * 2.0**-24
        u2 = (x[2 * pair + 1] >> 8).double() * 2.0**-24
        rho = torch.sqrt(-2 * torch.log(u1))
        exact = torch.stack([rho * torch.cos(2 * math.pi * u2), rho * torch.sin(2 * math.pi * u2)], 1)
        assert float((z[:, pair] - exact).abs().max()) <= 5e-6


def test_every_pair_of_uniforms_at_the_ends_of_their_ranges_is_accurate_and_finite():
    ends = torch.cat([torch.arange(1 << 12), (1 << 32) - 1 - torch.arange(1 << 12), torch.arange(32) << 27])
    a, b = torch.meshgrid(ends[::7], ends[::5], indexing="ij")
    even, odd = reference.box_muller(a.reshape(-1), b.reshape(-1))
    u1 = ((a.reshape(-1) >> 8) + 1).double() * 2.0**-24
    u2 = (b.reshape(-1) >> 8).double() * 2.0**-24
    rho = torch.sqrt(-2 * torch.log(u1))
    assert float((even - rho * torch.cos(2 * math.pi * u2)).abs().max()) <= 5e-6
    assert float((odd - rho * torch.sin(2 * math.pi * u2)).abs().max()) <= 5e-6


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1])
def test_gaussian_moments(seed):
    z = lo.zo_noise(N, seed).double()
    # five standard errors of each sample moment of a normal distribution
    assert abs(float(z.mean())) < 5 / math.sqrt(N)
    assert abs(float((z**2).mean()) - 1) < 5 * math.sqrt(2 / N)
    assert abs(float((z**3).mean())) < 5 * math.sqrt(15 / N)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / N)


def test_gaussian_passes_kolmogorov_smirnov():
    z = lo.zo_noise(N, 5).double().sort().values
    cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    steps = torch.arange(N + 1, dtype=torch.float64) / N
    distance = max(float((cdf - steps[:-1]).abs().max()), float((steps[1:] - cdf).abs().max()))
    assert distance < 1.95 / math.sqrt(N)  # exceeded once in a thousand


def test_rademacher_is_balanced_in_every_bit_position():
    z = lo.zo_noise(N, 6, distribution="rademacher").view(-1, 128)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert float(z.mean(0).abs().max()) < 5 / math.sqrt(z.shape[0])


def correlation(a, b):
    return float((a.double() * b.double()).mean()) * math.sqrt(N)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_ids_seeds_and_lags_are_uncorrelated(distribution):
    def z(seed=9, tensor_id=0, offset=0):
        return lo.zo_noise(N, seed, tensor_id=tensor_id, offset=offset, distribution=distribution)

    base = z()
    others = [z(tensor_id=1), z(tensor_id=2**32 - 1), z(seed=10), z(seed=9 + 2**32), z(offset=2**32)]
    others += [base.roll(lag) for lag in (1, 2, 3, 4, 128)]
    for other in others:
        assert abs(correlation(base, other)) < 5


def test_streams_are_uncorrelated():
    gaussian = lo.zo_noise(N, 9)
    sign = lo.zo_noise(N, 9, distribution="rademacher")
    uniform = rounding_bits(torch.arange(N), 9, 0).double() / 2**16 - 0.5
    for a, b in ((gaussian, sign), (gaussian, uniform * math.sqrt(12)), (sign, uniform * math.sqrt(12))):
        assert abs(correlation(a, b)) < 5


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("offset", [1, 3, 127, 130, 2**31 - 3, 2**32 - 2, 2**40 + 1])
def test_a_slice_equals_the_slice_of_the_whole(distribution, offset):
    def z(n, first):
        return lo.zo_noise(n, 4, tensor_id=2, offset=first, distribution=distribution)

    whole = z(1000, offset)
    for start, stop in ((0, 1), (1, 700), (333, 1000), (999, 1000)):
        assert torch.equal(z(stop - start, offset + start), whole[start:stop])


def test_seeds_are_64_bit_patterns():
    assert torch.equal(lo.zo_noise(64, -1), lo.zo_noise(64, 2**64 - 1))
    assert not torch.equal(lo.zo_noise(64, 1), lo.zo_noise(64, 1 + 2**32))


def test_stochastic_rounding_is_unbiased_and_between_neighbours():
    for dtype, ulp in ((torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)):
        p = torch.ones(N, dtype=dtype)
        share = 0.3  # of the spacing above 1: what the noise of signs adds
        lo.zo_axpy_(p, 8, share * ulp, distribution="rademacher", rounding="stochastic")
        sign = lo.zo_noise(N, 8, distribution="rademacher")
        up = p[sign > 0].double()
        assert set(up.unique().tolist()) == {1.0, 1.0 + ulp}
        rounded_up = float((up > 1).double().mean())
        assert abs(rounded_up - share) < 5 * math.sqrt(share * (1 - share) / up.numel())  # five standard errors


def test_sequential_equals_successive_calls():
    seeds, coeffs, decays = [3, 1, 4, 1], [1e-3, -2e-3, 5e-4, 1e-3], [0.0, 1e-2, 0.0, 1e-3]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for rounding in ("nearest", "stochastic"):
            one = torch.linspace(-1, 1, 1001).to(dtype)
            many = one.clone()
            lo.zo_axpy_(one, seeds, coeffs, decay=decays, rounding=rounding, sequential=True)
            for s, c, d in zip(seeds, coeffs, decays, strict=True):
                lo.zo_axpy_(many, s, c, decay=d, rounding=rounding)
            assert torch.equal(one, many)


def test_non_finite_weights_propagate():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for rounding in ("nearest", "stochastic"):
            p = torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=dtype)
            lo.zo_axpy_(p, 1, 1e-3, rounding=rounding)
            assert p[0].isnan()
            assert p[1] == math.inf
            assert p[2] == -math.inf
            assert p[3].isfinite()
            q = torch.ones(8, dtype=dtype)
            lo.zo_axpy_(q, 1, math.nan)
            assert q.isnan().all()


def test_zo_linear_equals_materialised_weights():
    x, weight, bias = torch.randn(7, 48).double(), torch.randn(20, 48).double(), torch.randn(20).double()
    for distribution in ("gaussian", "rademacher"):
        z = lo.zo_noise(weight.shape, 5, tensor_id=3, distribution=distribution, dtype=torch.float64)
        plus, minus = lo.zo_linear(x, weight, bias, seed=5, scale=0.1, tensor_id=3, distribution=distribution)
        torch.testing.assert_close(plus, torch.nn.functional.linear(x, weight + 0.1 * z, bias))
        torch.testing.assert_close(minus, torch.nn.functional.linear(x, weight - 0.1 * z, bias))
        perturbed = weight.clone()
        lo.zo_axpy_(perturbed, 5, 0.1, tensor_ids=[3], distribution=distribution)
        torch.testing.assert_close(plus, torch.nn.functional.linear(x, perturbed, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("pair", [False, True])
def test_zo_linear_under_autocast_computes_in_the_dtype_of_its_inputs(dtype, distribution, pair):
    """autocast must not give the kernel a product in a dtype that the kernel does not expect."""
    shapes = [(64, 33), (20, 33), (20,)]

    def run(enabled):
        torch.manual_seed(0)
        x, weight, bias = (torch.randn(s, dtype=dtype).requires_grad_() for s in shapes)
        other = torch.randn(64, 33, dtype=dtype) if pair else None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            plus, minus = lo.zo_linear(x, weight, bias, seed=5, scale=0.1, distribution=distribution, x_minus=other)
            (plus.double().square().sum() + minus.double().sum()).backward()
        return [plus, minus, x.grad, weight.grad, bias.grad]

    for inside, outside in zip(run(True), run(False), strict=True):
        assert inside.dtype == dtype
        assert torch.equal(inside, outside)


def test_zo_linear_refuses_a_forward_mode_derivative():
    """torch ignores tangents where an operator has a backward only: without an error the derivative would be zero."""
    x, weight = torch.randn(4, 3), torch.randn(2, 3)
    for name, t, call in (
        ("x", x, lambda x: lo.zo_linear(x, weight, seed=1, scale=0.1)[0]),
        ("weight", weight, lambda weight: lo.zo_linear(x, weight, seed=1, scale=0.1)[0]),
    ):
        with pytest.raises(NotImplementedError, match=f"zo_linear: {name} must have no tangent"):
            torch.func.jvp(call, (t,), (t,))


def test_many_seeds_equal_the_sum_over_seeds():
    seeds = torch.randint(-(2**63), 2**63 - 1, (300,))
    coeffs = torch.randn(300, dtype=torch.float64) * 1e-3
    p = torch.zeros(5000, dtype=torch.float64)
    lo.zo_axpy_(p, seeds, coeffs)
    want = sum(float(c) * lo.zo_noise(5000, int(s), dtype=torch.float64) for s, c in zip(seeds, coeffs, strict=True))
    torch.testing.assert_close(p, want, rtol=1e-12, atol=1e-12)  # float64 sums of 300 terms, in two orders of rounding
