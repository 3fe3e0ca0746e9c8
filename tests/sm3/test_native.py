"""The compiled kernel of SM3, without torch: every instruction set gives the bits of the definition."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from common.oracle import encode, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sm3 import oracle
from sm3.oracle import MOMENTA, Options, Parameter

DTYPES = ["float32", "bfloat16", "float16", "float64"]
KINDS = list(MOMENTA)
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 3e38, -1e-30]
fuzz = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# sizes around groups of 16 and 32, blocks of 256, chunks of 1,024, tiles of 32,768 elements and of 8,192 columns
SHAPES = [
    *[(n,) for n in (1, 15, 16, 31, 33, 255, 257, 1025, 32768 + 300, 70001)],
    *[(5, n) for n in (1, 7, 15, 17, 31, 33, 64, 100, 255, 256, 257, 300, 8191, 8200)],
    *[(3000, 3), (4099, 8), (700, 33), (300, 31), (9, 20000), (33000, 2)],
    *[(1, 600), (600, 1), (1, 600, 1), (1, 1, 1), (2, 1, 300), (), (0,), (4, 0), (0, 7)],
    *[(3, 5, 130), (64, 3, 7, 7), (6, 300, 3), (2, 400, 90), (2, 3, 4, 5, 6), (3, 40, 1, 700), (2, 130, 128)],
]


def numbers(rng: np.random.Generator, n: int, size: float, special: float) -> np.ndarray:
    x = rng.standard_normal(n) * size * 10.0 ** rng.integers(-3, 1, n)
    some = rng.random(n) < special
    x[some] = rng.choice(SPECIAL, some.sum())
    return x


def parameter(
    shape: tuple[int, ...],
    dtype: str,
    kind: str,
    seed: int = 0,
    special: float = 0.0,
    size: float = 1e-2,
    tensor_id: int = 0,
    offset: int = 0,
    lr_factor: float = 1.0,
) -> Parameter:
    rng = np.random.default_rng(seed)
    n = math.prod(shape)
    rows, _, blocks = oracle.rows_of_blocks(shape)

    def encoded(values: np.ndarray, dtype: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            return encode(values.astype(np.float64 if dtype == "float64" else np.float32), dtype)

    cover = np.abs(numbers(rng, sum(oracle.axes(shape)), size, special)).astype(np.float32) ** 2
    if kind == "int8":
        momentum = rng.integers(-128, 128, n).astype(np.int8)
    elif kind == "none":
        momentum = np.zeros(0, np.uint8)
    else:
        momentum = encoded(numbers(rng, n, 0.3, special), kind)
    scales = np.abs(numbers(rng, rows * blocks if kind == "int8" else 0, 1e-2, special)).astype(np.float32)
    param, grad = encoded(numbers(rng, n, 0.1, special), dtype), encoded(numbers(rng, n, size, special), dtype)
    return Parameter(shape, dtype, kind, param, grad, cover, momentum, scales, tensor_id, offset, lr_factor)


def run(native, isa: str, parameters: list[Parameter], options: Options, threads: int = 1) -> list[Parameter]:
    """Copies after the kernel's step, which must write neither gradients nor the guards around each array."""
    guard, copies, rooms = 32, [], []
    for p in parameters:
        arrays = {}
        for name in ("param", "cover", "momentum", "scales"):
            array = getattr(p, name)
            room = np.full(len(array) + 2 * guard, 77, array.dtype)
            room[guard : guard + len(array)] = array
            rooms.append(room)
            arrays[name] = room[guard : guard + len(array)]
        copies.append(replace(p, **arrays))
    before = [p.grad.copy() for p in parameters]
    native.sm3.step(isa, [vars(p) for p in copies], asdict(options), threads)
    for room in rooms:
        assert np.all(room[:guard] == 77)
        assert np.all(room[len(room) - guard :] == 77)
    for p, grad in zip(parameters, before, strict=True):
        np.testing.assert_array_equal(p.grad.view(np.uint8), grad.view(np.uint8))
    return copies


def check(native, parameters: list[Parameter], options: Options, threads: int = 1) -> None:
    want = [oracle.step(p, options) for p in parameters]
    for isa in native.kernel_sets():
        for got, p, expected in zip(run(native, isa, parameters, options, threads), parameters, want, strict=True):
            assert not oracle.differences(got, expected), (isa, p.shape, p.dtype, p.kind, options)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    if draw(st.booleans()):
        return (draw(st.integers(1, 6)), draw(st.integers(1, 1100)))
    small = st.one_of(st.sampled_from([0, 1, 1, 8, 16]), st.integers(1, 70))
    return tuple(draw(small) for _ in range(draw(st.integers(0, 3))))


@st.composite
def all_options(draw: st.DrawFn) -> Options:
    return Options(
        lr=draw(st.sampled_from([0.1, 1e-3, 0.0, -1.0])),
        momentum=draw(st.sampled_from([0.9, 0.1, 0.5])),
        beta=draw(st.sampled_from([1.0, 0.9, 0.999])),
        eps=draw(st.sampled_from([1e-30, 0.0, 1e-8, 1e-41])),
        weight_decay=draw(st.sampled_from([0.0, 0.1, 1e-50])),
        decoupled=draw(st.booleans()),
        maximize=draw(st.booleans()),
        stochastic_rounding=draw(st.booleans()),
        average_gradient=draw(st.booleans()),
        grad_scale=draw(st.sampled_from([1.0, 3.0, 65536.0, 0.0, np.inf])),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@given(
    shape=shapes(),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    options=all_options(),
    seed=st.integers(0, 2**32),
    special=st.sampled_from([0.0, 0.0, 0.01, 0.3]),
    size=st.sampled_from([1e-2, 1e-22, 1e18]),
    tensor_id=st.integers(0, 2**32 - 1),
    offset=st.one_of(st.sampled_from([0, 3, 2**35 - 9, 2**35 - 700]), st.integers(0, 2**60)),
    lr_factor=st.sampled_from([1.0, 10.0, 0.3]),
)
@fuzz
def test_a_step_is_the_definition_on_every_set_of_kernels(
    native, shape, dtype, kind, options, seed, special, size, tensor_id, offset, lr_factor
):
    check(native, [parameter(shape, dtype, kind, seed, special, size, tensor_id, offset, lr_factor)], options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_at_every_edge_of_a_tile_are_the_definition(native, dtype, kind):
    parameters = [parameter(shape, dtype, kind, j, tensor_id=j) for j, shape in enumerate(SHAPES)]
    check(native, parameters, Options(weight_decay=0.1, stochastic_rounding=True, seed=7), threads=3)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_gradient_averaged_before_the_division_at_every_edge(native, kind):
    """Dtypes take turns; each parameter has a rate of its own."""
    parameters = [
        parameter(shape, DTYPES[j % 4], kind, j, tensor_id=j, lr_factor=1 + j / 8) for j, shape in enumerate(SHAPES)
    ]
    check(native, parameters, Options(weight_decay=0.1, average_gradient=True, stochastic_rounding=True), threads=3)


@pytest.mark.parametrize("beta", [1.0, 0.95])
@pytest.mark.parametrize("shape", [(40, 300), (300, 3), (7, 8, 9), (500,), (20, 1)])
def test_a_nan_in_an_accumulator_or_a_gradient_reaches_all_that_depends_on_it(native, shape, beta):
    clean = parameter(shape, "float32", "float32")
    first = (0,) * len(shape)
    for place in range(len(clean.cover)):
        p = clean.copy()
        p.cover[place] = np.nan if place % 2 else -np.float32(np.nan)
        check(native, [p], Options(beta=beta))
    p = replace(clean, grad=clean.grad.copy())
    p.grad[0] = np.nan
    for isa in native.kernel_sets():
        (got,) = run(native, isa, [p], Options(beta=beta))
        lost = np.isnan(got.param.reshape(shape))
        assert lost[first]
        assert lost.sum() == 1
        assert np.isnan(got.cover).sum() == len(shape)


@given(data=st.data(), threads=st.integers(1, 6), dtype=st.sampled_from(DTYPES), kind=st.sampled_from(KINDS))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_number_of_threads_gives_the_same_bits(native, data, threads, dtype, kind):
    drawn = data.draw(st.lists(st.sampled_from([s for s in SHAPES if s]), min_size=1, max_size=6))
    parameters = [parameter(shape, dtype, kind, j, special=1e-4) for j, shape in enumerate(drawn)]
    for isa in native.kernel_sets():
        alone = run(native, isa, parameters, Options(beta=0.9))
        shared = run(native, isa, parameters, Options(beta=0.9), threads)
        for a, b in zip(shared, alone, strict=True):
            assert not oracle.differences(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_several_types_go_in_one_call(native, dtype):
    parameters = [
        parameter(shape, d, kind, j, tensor_id=j)
        for j, (shape, d, kind) in enumerate(
            [((64, 64), dtype, "int8"), ((64,), "float32", "float32"), ((9, 300), "bfloat16", "bfloat16")]
        )
    ]
    check(native, parameters, Options(stochastic_rounding=True), threads=2)


@pytest.mark.parametrize("columns", [3, 16, 100, 256, 300])
@pytest.mark.parametrize(
    "largest",
    [0.0, 2.0**-120, np.nextafter(np.float32(2.0**-120), np.float32(0)), 1e-45, 1.0, 127.0, 3e38, np.inf, np.nan],
)
def test_the_largest_magnitude_of_an_int8_block(native, largest, columns):
    """The old scale and a zero gradient give the block its largest magnitude; a momentum of 0 is refused by callers."""
    p = parameter((4, columns), "float32", "int8")
    p.grad[:] = 0
    p.momentum[:] = np.linspace(-127, 127, 4 * columns).round().astype(np.int8)
    with np.errstate(all="ignore"):
        p.scales[:] = np.float32(largest) / np.float32(127)
    check(native, [p], Options(momentum=0.5))
    (got,) = run(native, native.isas()[-1], [p], Options(momentum=0.5))
    if not np.isfinite(largest):
        assert np.isnan(got.scales).all()
        assert np.all(got.momentum == 1)
    elif got.scales.any():
        assert np.abs(got.momentum).max() == 127


def test_a_zero_gradient_moves_nothing_where_nothing_was_seen(native):
    for dtype in DTYPES:
        p = parameter((50, 70), dtype, "none")
        p.grad[:] = 0
        p.cover[:] = 0
        for isa in native.kernel_sets():
            (got,) = run(native, isa, [p], Options())
            assert same(got.param, p.param, dtype)
            assert not got.cover.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_avx512_emulated_is_avx512(native, dtype, kind):
    if "avx512" not in native.isas():
        pytest.skip("this processor has no AVX-512 to compare the emulation with")
    options = Options(beta=0.95, weight_decay=0.1, stochastic_rounding=True, seed=3)
    parameters = [parameter(shape, dtype, kind, 1, special=1e-3) for shape in [(301, 1025), (9000, 7), (70_001,)]]
    want, got = (run(native, kernels, parameters, options, threads=2) for kernels in ("avx512", "avx512_emulated"))
    for w, g in zip(want, got, strict=True):
        assert not oracle.differences(g, w)
