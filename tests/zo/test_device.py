"""Every CUDA backend on a real device: the reference's bits, on any stream, in a graph, beyond 32-bit indices."""

from __future__ import annotations

import pytest
import torch
from zo import agreement
from zo.agreement import AXPY_DISTRIBUTIONS, CALLS, DISTRIBUTIONS, DTYPES, OFFSETS, f64, i64
from zo.runs import VARIANTS, run, same

from leanops.optim import replay_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; on a machine with one: make gpu"),
]


@pytest.fixture
def backend(backend):
    return agreement.unpacked(backend)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
def test_noise_has_the_bits_of_the_reference(backend, dtype, distribution, offset):
    agreement.noise(backend, "cuda", dtype, distribution, offset)


@pytest.mark.parametrize("distribution", AXPY_DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("terms_device", ["cpu", "cuda"])
def test_axpy_has_the_bits_of_the_reference(backend, dtype, distribution, rounding, call, terms_device):
    agreement.axpy(backend, "cuda", dtype, distribution, rounding, call, terms_device)


@pytest.mark.parametrize("distribution", AXPY_DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_axpy_writes_nothing_beyond_its_tensor(backend, dtype, distribution):
    agreement.writes_nothing_else(backend, "cuda", dtype, distribution)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_axpy_into_leaves_its_source_alone_and_serves_strided_results(backend, dtype):
    agreement.axpy_into(backend, "cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_of_special_values(backend, dtype):
    agreement.special_values(backend, "cuda", dtype)


SIZES = [((12, 33, 65), 129), ((69, 70, 256), 128), ((12, 33, 68), 4), ((1536, 2048, 4096), 0)]


@pytest.mark.parametrize(("sizes", "offset"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("pair", "with_bias"), [(False, False), (False, True), (True, False), (True, True)], ids=str)
def test_linear_is_as_close_as_plain_torch(backend, dtype, distribution, pair, with_bias, sizes, offset):
    agreement.linear(backend, "cuda", dtype, distribution, pair, with_bias, sizes, offset)


def test_empty_input(backend):
    agreement.empty(backend, "cuda")


def test_thousands_of_tensors_and_terms(backend):
    agreement.axpy(backend, "cuda", torch.bfloat16, "rademacher", "nearest", (700, False, 9))
    agreement.axpy(backend, "cuda", torch.float32, "gaussian", "nearest", (1, False, 1500))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_side_stream_is_used(backend, distribution):
    """The kernel must run after earlier work on the side stream and before later work there."""
    expected = torch.zeros(1 << 20)
    agreement.reference.zo_axpy_([expected], i64(3), f64(0.5), f64(0.0), [1], [0], distribution, "nearest", False)
    side = torch.cuda.Stream()
    p = torch.ones(1 << 20, device="cuda")
    backend.zo_axpy_([p], i64(3), f64(0.5), f64(0.0), [1], [0], distribution, "nearest", False)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        p.zero_()
        backend.zo_axpy_([p], i64(3), f64(0.5), f64(0.0), [1], [0], distribution, "nearest", False)
        result = p.clone()
    side.synchronize()
    agreement.assert_same(result, expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("terms", [1, 12])
def test_a_graph_replays_with_new_seeds(backend, distribution, terms):
    p = torch.zeros(5000, dtype=torch.bfloat16, device="cuda")
    seeds = torch.arange(terms, device="cuda")
    coeffs, decays = torch.full((terms,), 0.25, dtype=torch.float64, device="cuda"), f64(0.0).cuda()
    rest = ([1], [0], distribution, "nearest", False)
    backend.zo_axpy_([p], seeds, coeffs, decays, *rest)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.zo_axpy_([p], seeds, coeffs, decays, *rest)
    p.zero_()
    expected = torch.zeros(5000, dtype=torch.bfloat16)
    for start in (100, 2**40):
        seeds.copy_(torch.arange(start, start + terms))
        graph.replay()
        values = (torch.arange(start, start + terms), coeffs.cpu(), decays.cpu())
        agreement.reference.zo_axpy_([expected], *values, *rest)
        torch.cuda.synchronize()
        agreement.assert_same(p, expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_more_than_2_31_elements(backend, distribution):
    n = 2**31 + 4099
    p = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    backend.zo_axpy_([p], i64(3), f64(1.0), f64(0.0), [1], [0], distribution, "nearest", False)
    for start in (0, 2**31 - 5000, n - 5000):
        expected = torch.empty(5000, dtype=torch.bfloat16)
        agreement.reference.zo_noise_(expected, i64(3), 1, start, distribution)
        agreement.assert_same(p[start : start + 5000], expected)


def test_runs_are_bitwise_equal(backend):
    def once() -> torch.Tensor:
        p = torch.linspace(-1, 1, 1 << 22, device="cuda").bfloat16()
        rest = (i64(*range(9)), torch.full((9,), 1e-3, dtype=torch.float64), f64(0.0), [1], [0])
        backend.zo_axpy_([p], *rest, "gaussian", "stochastic", True)
        return p

    assert torch.equal(once(), once())


def test_second_device(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device; needs two")
    agreement.axpy(backend, "cuda:1", torch.float32, "gaussian", "nearest", (1, False, 5))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_run_on_the_cpu_is_replayed_to_its_bits(dtype, options, rounding):
    start, end, opt = run(dtype, rounding=rounding, **options)
    replay_(start.cuda(), opt.log)
    assert same(start.cpu(), end)
