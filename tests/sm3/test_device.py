"""Every CUDA backend of SM3 on a real device: the reference's bits, in one launch, on any stream, in a graph, without
waiting for the device, beyond 32-bit indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opsuite import assert_same_bits, clone
from sm3 import agreement
from sm3.agreement import DTYPES, MOMENTA, NAMED_OPTIONS, SPEC, Step, make, numbers_to

from leanops.sm3 import reference
from leanops.sm3.cases import Options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; on a machine with one: make gpu"),
]
SHAPES = [(700, 512), (300, 33), (5000,), (3, 4, 5, 6)]


@pytest.mark.parametrize("numbers", ["cpu", "cuda"])
@pytest.mark.parametrize("options", NAMED_OPTIONS)
@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_has_the_bits_of_the_reference(backend, dtype, momentum, options, numbers):
    agreement.step(backend, "cuda", dtype, momentum, options, numbers)


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_at_no_boundary_and_nothing_beyond_them(backend, dtype, momentum):
    agreement.unaligned(backend, "cuda", dtype, momentum)
    agreement.strided(backend, "cuda", dtype, momentum)


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(backend, dtype, momentum):
    agreement.special_values(backend, "cuda", dtype, momentum)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_every_magnitude(backend, dtype):
    agreement.codes(backend, "cuda", dtype)


def test_gradients_averaged_before_the_division(backend):
    agreement.averaged_gradients(backend, "cuda")


def test_numbers_and_skipped_steps(backend):
    agreement.skips(backend, "cuda")
    agreement.learning_rates(backend, "cuda")
    agreement.mixed(backend, "cuda")
    agreement.empty(backend, "cuda")


@pytest.mark.parametrize("count", [31, 1500])
def test_any_number_of_tensors(backend, count):
    agreement.many(backend, "cuda", count)


def test_many_steps_follow_the_reference(backend):
    """The next step starts from what a step leaves, scratch memory included."""
    args = make(SHAPES, torch.bfloat16, Options(torch.int8, stochastic_rounding=True), "cuda")
    expected = Step(*(clone([t.cpu() for t in part]) for part in args[:5]), *args[5:])
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for g, e in zip(args.grads, expected.grads, strict=True):
            e.copy_(1e-3 * torch.randn(e.shape, generator=generator))
            g.copy_(e)
        backend.sm3_step_(args)
        reference.sm3_step_(expected)
        assert_same_bits(SPEC.mutated(args), SPEC.mutated(expected))


def _kernels(backend: Any, args: Step) -> list[str]:
    backend.sm3_step_(args)  # compiles
    backend.sm3_step_(args)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        backend.sm3_step_(args)
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]


@pytest.mark.parametrize("count", [1, 20, 400])
def test_a_step_is_one_launch(backend, count):
    shapes = [SHAPES[i % len(SHAPES)] for i in range(count)]
    kernels = _kernels(backend, make(shapes, torch.bfloat16, Options(torch.bfloat16), "cuda"))
    assert len(kernels) == 1, kernels


@pytest.mark.parametrize("count", [4, 400])
def test_the_host_does_not_wait(backend, count):
    shapes = [SHAPES[i % len(SHAPES)] for i in range(count)]
    args = numbers_to(
        make(shapes, torch.float32, Options(torch.float32, grad_scale=2.0, found_inf=0.0), "cuda"), "cuda"
    )
    backend.sm3_step_(args)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(400_000_000)
        pending = torch.cuda.Event()
        backend.sm3_step_(args)
        pending.record()
        assert not pending.query(), "the step ended before work that was launched earlier"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.parametrize("count", [4, 60])
def test_a_graph_replays_with_new_numbers(backend, count):
    shapes = [SHAPES[i % len(SHAPES)] for i in range(count)]
    options = Options(torch.int8, stochastic_rounding=True, weight_decay=0.1, grad_scale=2.0, found_inf=0.0)
    args = numbers_to(make(shapes, torch.bfloat16, options, "cuda"), "cuda")
    backend.sm3_step_(args)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.sm3_step_(args)
    for lr, seed, scale, found in ((1e-2, 5, 2.0, 0.0), (1e-3, -7, 1.0, 1.0), (0.1, 2**40, 4.0, 0.0)):
        for number, value in zip(args[5:9], (lr, seed, scale, found), strict=True):
            number.fill_(value)
        for g in args.grads:
            g.mul_(-1.5)
        expected = Step(
            *(clone([t.cpu() for t in part]) for part in args[:5]), *(t.cpu() for t in args[5:9]), *args[9:]
        )
        graph.replay()
        reference.sm3_step_(expected)
        torch.cuda.synchronize()
        assert_same_bits(SPEC.mutated(args), SPEC.mutated(expected))


def test_a_step_is_captured_while_pinned_memory_is_in_use(backend):
    """When torch pins more memory it queries the events of pinned memory in use, and a capture forbids such queries."""
    shapes = [SHAPES[i % len(SHAPES)] for i in range(60)]  # their table does not fit into a kernel's parameters
    args = numbers_to(make(shapes, torch.bfloat16, Options(torch.bfloat16), "cuda"), "cuda")
    backend.sm3_step_(args)  # compiles
    torch.cuda.synchronize()
    expected = Step(*(clone([t.cpu() for t in part]) for part in args[:5]), *numbers_to(args, "cpu")[5:9], *args[9:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        torch.zeros(1).pin_memory().to("cuda", non_blocking=True)
        graph.capture_begin()
        backend.sm3_step_(args)
        graph.capture_end()
    graph.replay()
    reference.sm3_step_(expected)
    torch.cuda.synchronize()
    assert_same_bits(SPEC.mutated(args), SPEC.mutated(expected))


def test_a_side_stream_is_used(backend):
    """The kernel must run after earlier work on the side stream and before later work there."""
    args = make([(3000, 512)], torch.float32, Options(torch.float32), "cuda")
    backend.sm3_step_(args)  # compiles
    expected = Step(*(clone([t.cpu() for t in part]) for part in args[:5]), *args[5:])
    reference.sm3_step_(expected)
    gradient = args.grads[0].clone()
    args.grads[0].fill_(torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        args.grads[0].copy_(gradient)
        backend.sm3_step_(args)
        results = clone(SPEC.mutated(args))
    side.synchronize()
    assert_same_bits(results, SPEC.mutated(expected))


def test_runs_are_bitwise_equal(backend):
    def once() -> list[torch.Tensor]:
        args = make([(4096, 4096), (64, 3, 512, 7)], torch.float32, Options(torch.bfloat16), "cuda")
        for _ in range(3):
            backend.sm3_step_(args)
        return SPEC.mutated(args)

    first = once()
    for _ in range(4):
        assert_same_bits(once(), first)


def test_more_than_2_31_elements(backend):
    assert SPEC.large is not None
    args, tail = SPEC.large(torch.device("cuda"))
    backend.sm3_step_(SPEC.bind(*args))
    expected = clone([[t.cpu() for t in part] for part in tail[:5]])
    reference.sm3_step_(SPEC.bind(*expected, *tail[5:]))
    (p,), _, (cover,), (m,), (scale,) = args[:5]
    (p_end,), _, (cover_end,), (m_end,), (scale_end,) = expected
    n = p_end.shape[0]
    assert_same_bits([p[-n:], m[-n:], scale[-n:]], [p_end, m_end, scale_end])
    rows = p.shape[0]
    assert_same_bits([cover[rows - n : rows]], [cover_end[:n]])


def test_second_device(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device; needs two")
    agreement.step(backend, "cuda:1", torch.float32, torch.int8, "sum")
    assert torch.cuda.current_device() == 0
