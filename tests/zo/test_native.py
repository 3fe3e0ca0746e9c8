"""The compiled zeroth-order kernels, without torch: every instruction set gives the bits of the definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from common.oracle import KNOWN_PHILOX, decode, encode, fma, philox, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zo import oracle

DTYPES = ["float32", "bfloat16", "float16", "float64"]
DISTRIBUTIONS = ["gaussian", "rademacher"]
STORAGE = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.uint16, "float64": np.float64}
# around a carry into the second counter word: gaussian at 2^34, rounding at 2^35, rademacher at 2^39
NEAR_CARRIES = [0, 3, 2**31 - 17, 2**34 - 50, 2**35 - 9, 2**39 - 300, 2**52 + 7]
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
indices = st.one_of(st.sampled_from(NEAR_CARRIES), st.integers(0, 2**60))
seeds64 = st.integers(0, 2**64 - 1)


def weights(n: int, dtype: str, seed: int, special: bool = False) -> np.ndarray:
    """Numbers of many magnitudes, among them fp16 and fp32 subnormals; with special also NaN, infinities and zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) * 10.0 ** rng.integers(-9, 4, n)
    if special and n:
        some = rng.integers(0, n, 1 + n // 4)
        x[some] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 65519.0, 65536.0, 3e38, 1e-40], len(some))
    with np.errstate(over="ignore"):
        return encode(x.astype(np.float64 if dtype == "float64" else np.float32), dtype)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_PHILOX)
def test_philox_gives_the_published_words_on_every_set_of_kernels(native, counter, key, words):
    want = [int(word, 16) for word in words.split()]
    block, seed = counter[0] | counter[1] << 32, key[0] | key[1] << 32
    for isa in native.kernel_sets():
        assert native.zo.words(isa, 1, block, counter[2], counter[3], seed).tolist() == want


@given(block=st.one_of(st.just(2**32 - 37), st.integers(0, 2**62)), count=st.integers(0, 200), seed=seeds64)
@fuzz
def test_consecutive_blocks_are_the_definition_on_every_set_of_kernels(native, block, count, seed):
    want = philox(block, count, 2**32 - 1, 2, seed).reshape(-1)
    for isa in native.kernel_sets():
        np.testing.assert_array_equal(native.zo.words(isa, count, block, 2**32 - 1, 2, seed), want)


def test_gaussian_is_close_to_box_muller_in_float64(native):
    n, seed = 1 << 20, 12345
    words = philox(0, n // 4, 9, 0, seed)
    u1 = ((words[:, 0::2] >> 8).astype(np.float64) + 1) * 2.0**-24
    u2 = (words[:, 1::2] >> 8).astype(np.float64) * 2.0**-24
    rho = np.sqrt(-2 * np.log(u1))
    want = np.stack([rho * np.cos(2 * np.pi * u2), rho * np.sin(2 * np.pi * u2)], -1).reshape(-1)
    z = np.empty(n, np.float32)
    native.zo.noise(native.isas()[-1], z, "float32", seed, 9, 0, "gaussian")
    assert np.abs(z - want).max() < 2.5e-6  # half of the bound in the definition, 5e-6
    # five standard errors of each sample moment
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert abs(z.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((z.astype(np.float64) ** 4).mean() - 3) < 5 * np.sqrt(96 / n)


def test_extreme_words_of_box_muller():
    """The largest u1 gives zero, never a NaN; the smallest gives the largest magnitude there is."""
    one = np.full(4, 0xFFFFFFFF, np.uint32)
    quarters = np.array([0, 0x40000000, 0x80000000, 0xC0000000], np.uint32)
    for z in oracle.box_muller(one, quarters):
        np.testing.assert_array_equal(z, np.zeros(4))
    even, odd = oracle.box_muller(np.zeros(4, np.uint32), quarters)
    largest = np.sqrt(48 * np.log(2))
    np.testing.assert_allclose(even, [largest, 0, -largest, 0], atol=5e-6)
    np.testing.assert_allclose(odd, [0, largest, 0, -largest], atol=5e-6)


@given(
    n=st.integers(0, 600),
    index=indices,
    seed=seeds64,
    tensor_id=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@fuzz
def test_noise_is_the_definition_on_every_set_of_kernels(native, distribution, n, index, seed, tensor_id, dtype):
    want = encode(oracle.noise(seed, tensor_id, index, n, distribution), dtype)
    for isa in native.kernel_sets():
        room = np.full(n + 64, 77, STORAGE[dtype])
        native.zo.noise(isa, room[32 : 32 + n], dtype, seed, tensor_id, index, distribution)
        np.testing.assert_array_equal(room[32 : 32 + n], want)
        assert np.all(room[:32] == 77)
        assert np.all(room[32 + n :] == 77)


@given(
    n=st.one_of(st.integers(0, 300), st.sampled_from([4096, 9001])),
    index=indices,
    seeds=st.lists(seeds64, max_size=4),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    distribution=st.sampled_from(DISTRIBUTIONS),
    stochastic=st.booleans(),
    sequential=st.booleans(),
)
@fuzz
def test_axpy_is_the_definition_on_every_set_of_kernels(
    native, n, index, seeds, data, dtype, distribution, stochastic, sequential
):
    sizes = st.sampled_from([1e-3, -0.5, 3.0, 1e-7, 0.0, 1e-41, -1e5])
    coeffs = [data.draw(sizes) for _ in seeds]
    many = sequential and len(seeds) > 1 and data.draw(st.booleans())
    decays = [data.draw(st.sampled_from([0.0, 0.1, 1e-3])) for _ in (seeds if many else [0])]
    p = weights(n, dtype, len(seeds) + n, special=True)
    rest = (dtype, seeds, coeffs, decays, 5, index, distribution, stochastic, sequential)
    want = oracle.axpy(p, *rest)
    for isa in native.kernel_sets():
        room = np.concatenate([np.full(32, 77, STORAGE[dtype]), p, np.full(32, 77, STORAGE[dtype])])
        inside = room[32 : 32 + n]
        native.zo.axpy(isa, inside, inside, *rest)
        assert same(inside, want, dtype)
        assert np.all(room[:32] == 77)
        assert np.all(room[32 + n :] == 77)
        out, source = np.empty_like(p), p.copy()
        native.zo.axpy(isa, out, source, *rest)
        assert same(out, want, dtype)
        assert same(source, p, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_parts_equal_the_whole(native, dtype, distribution):
    n, index, cuts = 10_000, 2**34 - 4321, [0, 1, 3, 4000, 4001, 8190, 10_000]
    p = weights(n, dtype, 1)
    for isa in native.kernel_sets():
        rest = ([3, 4, 5], [0.1, -0.2, 0.3], [0.0], 1)
        whole, parts = p.copy(), p.copy()
        native.zo.axpy(isa, whole, whole, dtype, *rest, index, distribution, True, False)
        for start, stop in itertools.pairwise(cuts):
            part = parts[start:stop]
            native.zo.axpy(isa, part, part, dtype, *rest, index + start, distribution, True, False)
        assert same(parts, whole, dtype)
        assert not same(parts, p, dtype)


# columns: none (a vector), fewer than a vector register holds, several rows in a tile, more than a panel of V
@given(
    n=st.one_of(st.integers(0, 300), st.sampled_from([4096, 9001])),
    index=st.one_of(st.integers(0, 300), st.sampled_from([2**34 - 50, 2**56])),
    seeds=st.lists(seeds64, min_size=1, max_size=4),
    right_seeds=st.lists(st.sampled_from([7, 8]), min_size=4, max_size=4),
    columns=st.sampled_from([0, 1, 3, 17, 64, 300, 5000, 20_000]),
    rank=st.sampled_from([1, 2, 3, 64]),
    dtype=st.sampled_from(DTYPES),
    stochastic=st.booleans(),
    sequential=st.booleans(),
)
@fuzz
def test_low_rank_axpy_is_the_definition_on_every_set_of_kernels(
    native, n, index, seeds, right_seeds, columns, rank, dtype, stochastic, sequential
):
    coeffs, right_seeds = [0.5, -1e-3, 3.0, 1e-7][: len(seeds)], right_seeds[: len(seeds)]
    p = weights(n, dtype, n, special=True)
    rest = (seeds, coeffs, [1e-2], 5, index, "lowrank", stochastic, sequential, right_seeds, columns, rank)
    want = oracle.axpy(p, dtype, *rest)
    for isa in native.kernel_sets():
        room = np.concatenate([np.full(32, 77, STORAGE[dtype]), p, np.full(32, 77, STORAGE[dtype])])
        native.zo.axpy(isa, room[32 : 32 + n], p, dtype, *rest)
        assert same(room[32 : 32 + n], want, dtype)
        assert np.all(room[:32] == 77)
        assert np.all(room[32 + n :] == 77)


def test_low_rank_panels_are_seamless(native):
    """Columns of several panels, rows of several blocks: parts give the bits of the whole."""
    columns, rows, index = 20_000, 70, 12_345
    p = weights(rows * columns, "bfloat16", 1)
    for isa in native.kernel_sets()[-2:]:  # this machine's best, and AVX-512 emulated
        whole, parts = p.copy(), p.copy()
        rest = ([3], [0.1], [0.0], 1)
        more = ("lowrank", True, False, [9], columns, 2)
        native.zo.axpy(isa, whole, whole, "bfloat16", *rest, index, *more)
        for start, stop in itertools.pairwise([0, 5, 19_999, 300_000, 300_001, rows * columns]):
            part = parts[start:stop]
            native.zo.axpy(isa, part, part, "bfloat16", *rest, index + start, *more)
        assert same(parts, whole, "bfloat16")
        for start in (0, 7655 - 50, 8170 * 3, 64 * columns - 70):
            want = oracle.axpy(p[start : start + 100], "bfloat16", *rest, index + start, *more)
            assert same(whole[start : start + 100], want, "bfloat16")


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_sequential_equals_successive_calls(native, dtype, distribution, stochastic):
    p = weights(5000, dtype, 2, special=True)
    seeds, coeffs, decays = [8, 9, 2**63], [1e-3, -1e-2, 2e-3], [1e-2, 0.0, 1e-4]
    for isa in native.kernel_sets():
        once, thrice = p.copy(), p.copy()
        native.zo.axpy(isa, once, once, dtype, seeds, coeffs, decays, 0, 11, distribution, stochastic, True)
        for seed, coeff, decay in zip(seeds, coeffs, decays, strict=True):
            native.zo.axpy(isa, thrice, thrice, dtype, [seed], [coeff], [decay], 0, 11, distribution, stochastic, False)
        assert same(once, thrice, dtype)


@given(n=st.integers(0, 300), index=indices, dtype=st.sampled_from(DTYPES), distribution=st.sampled_from(DISTRIBUTIONS))
@fuzz
def test_both_signs_in_one_call_equal_two_calls(native, n, index, dtype, distribution):
    p = weights(n, dtype, n, special=True)
    for isa in native.kernel_sets():
        plus, minus = np.empty_like(p), np.empty_like(p)
        native.zo.both(isa, plus, minus, p, dtype, 21, 0.125, 3, index, distribution)
        for got, coeff in [(plus, 0.125), (minus, -0.125)]:
            want = oracle.axpy(p, dtype, [21], [coeff], [0.0], 3, index, distribution, False, False)
            assert same(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_spread_adds_and_subtracts(native, dtype):
    for n in [0, 1, 31, 32, 1000]:
        a, b = weights(n, dtype, 3, special=True), weights(n, dtype, 4)
        work = np.float64 if dtype == "float64" else np.float32
        x, y = decode(a, dtype).astype(work), decode(b, dtype).astype(work)
        for isa in native.kernel_sets():
            plus, minus = a.copy(), np.empty_like(a)
            native.zo.spread(isa, plus, minus, b, dtype, 0.3)
            for got, c in [(plus, 0.3), (minus, -0.3)]:
                with np.errstate(all="ignore"):
                    exact = x + c * y if dtype == "float64" else fma(np.float32(c), y, x)
                assert same(got, encode(exact, dtype), dtype)


@pytest.mark.parametrize(
    ("dtype", "start", "step", "unit"),
    [
        ("bfloat16", 1.0, 2.0**-12, 2.0**-7),
        ("bfloat16", 64.0, 0.25, 0.5),
        ("float16", 1.0, 2.0**-13, 2.0**-10),
        ("float16", 0.0, 3 * 2.0**-26, 2.0**-24),  # subnormal
    ],
)
def test_stochastic_rounding_is_unbiased(native, dtype, start, step, unit):
    n = 1 << 18
    up = oracle.noise(1, 0, 0, n, "rademacher") > 0
    share = step / unit
    for isa in native.kernel_sets():
        p = np.repeat(encode(np.array([start], np.float32), dtype), n)
        native.zo.axpy(isa, p, p, dtype, [1], [step], [0.0], 0, 0, "rademacher", True, False)
        got = decode(p, dtype)[up]
        assert set(np.unique(got)) == {start, start + unit}
        assert abs((got > start).mean() - share) < 5 * np.sqrt(share * (1 - share) / len(got))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decay_applies_without_a_term(native, dtype):
    p = weights(33, dtype, 3)
    want = oracle.axpy(p, dtype, [], [], [0.25], 0, 0, "gaussian", False, False)
    assert not same(p, want, dtype)
    for isa in native.kernel_sets():
        held = p.copy()
        native.zo.axpy(isa, held, held, dtype, [], [], [0.25], 0, 0, "gaussian", False, False)
        assert same(held, want, dtype)


@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, "lowrank"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_avx512_emulated_is_avx512(native, dtype, distribution):
    if "avx512" not in native.isas():
        pytest.skip("this processor has no AVX-512 to compare the emulation with")
    p = weights(70_001, dtype, 1, special=True)
    want, got = p.copy(), p.copy()
    rest = ([3, 2**63], [0.1, -1e-3], [1e-2], 5, 2**34 - 30_001, distribution, True, True, [7, 8], 6000, 3)
    native.zo.axpy("avx512", want, want, dtype, *rest)
    native.zo.axpy("avx512_emulated", got, got, dtype, *rest)
    assert same(got, want, dtype)
