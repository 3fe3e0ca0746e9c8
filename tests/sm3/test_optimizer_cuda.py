"""SM3 on a GPU: the bits of the CPU, no wait for the device, and replay by CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sm3.parameters import equal, parameters, set_grads
from torch import nn

from leanops.optim import SM3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; on a machine with one: make gpu"),
]

OPTIONS: list[dict[str, Any]] = [
    {"capturable": True, "momentum_dtype": torch.int8, "stochastic_rounding": True},
    {"capturable": True, "momentum": 0.0, "beta": 0.9, "weight_decay": 0.1},
    {"capturable": True, "momentum_dtype": torch.int8, "momentum_on": "gradient_unpublished"},
]


def on_gpu(dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().cuda()) for p in parameters(dtype)]


def put_grads(params: list[nn.Parameter], seed: int) -> None:
    """Write new gradients into the memory of the old ones."""
    drawn = parameters(params[0].dtype)
    set_grads(drawn, seed)
    for p, d in zip(params, drawn, strict=True):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        p.grad.copy_(d.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_bits_are_those_of_the_cpu(dtype: torch.dtype, options: dict[str, Any]) -> None:
    gpu_params, cpu_params = on_gpu(dtype), parameters(dtype)
    on_device, on_cpu = SM3(gpu_params, **options), SM3(cpu_params, **options)
    for step in range(4):
        put_grads(gpu_params, step)
        put_grads(cpu_params, step)
        on_device.step()
        on_cpu.step()
    assert all(torch.equal(p.cpu(), q) for p, q in zip(gpu_params, cpu_params, strict=True))
    gpu_state = {i: {k: v.cpu() for k, v in s.items()} for i, s in enumerate(on_device.state.values())}
    assert equal(gpu_state, {i: dict(s) for i, s in enumerate(on_cpu.state.values())})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_capturable_step_does_not_wait_for_the_device(options: dict[str, Any]) -> None:
    params = on_gpu(torch.bfloat16)
    opt = SM3(params, lr=torch.tensor(0.1, device="cuda"), **options)
    opt.grad_scale, opt.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    put_grads(params, 0)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {float(s["step"]) for s in opt.state.values()} == {4.0}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_captured_step_replays_with_new_gradients_and_rates(options: dict[str, Any]) -> None:
    params, others = on_gpu(torch.bfloat16), on_gpu(torch.bfloat16)
    lr = torch.tensor(0.1, device="cuda")
    graphed, plain = SM3(params, lr=lr, **options), SM3(others, lr=lr.clone(), **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        put_grads(params, 0)
        graphed.step()  # makes the state
    torch.cuda.current_stream().wait_stream(stream)
    put_grads(others, 0)
    plain.step()
    before = copy.deepcopy([p.detach() for p in params])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    assert all(map(torch.equal, before, params))  # captured, not run
    for step in range(1, 4):
        for o, ps in ((graphed, params), (plain, others)):
            o.param_groups[0]["lr"].fill_(0.1 / step)
            put_grads(ps, step)
        graph.replay()
        plain.step()
        assert all(map(torch.equal, params, others)), step
    assert {float(s["step"]) for s in graphed.state.values()} == {4.0}


def test_capture_without_capturable_is_refused_as_by_torch() -> None:
    params = on_gpu(torch.float32)
    opt = SM3(params)
    put_grads(params, 0)
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable is False"), torch.cuda.graph(graph):
        opt.step()


def test_a_capture_within_the_warm_up_of_the_covers_is_refused_and_one_after_it_replays() -> None:
    params, others = on_gpu(torch.bfloat16), on_gpu(torch.bfloat16)
    graphed, plain = (SM3(ps, capturable=True, cover_warmup=2) for ps in (params, others))
    graph = torch.cuda.CUDAGraph()
    for step in range(3):
        for ps, o in ((params, graphed), (others, plain)):
            put_grads(ps, step)
            o.step()
        if step == 0:
            early, refusal = torch.cuda.CUDAGraph(), "SM3: a CUDA graph can be captured only after the warm-up"
            with pytest.raises(RuntimeError, match=refusal), torch.cuda.graph(early):
                graphed.step()
            torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        graphed.step()
    for step in range(3, 6):
        for ps in (params, others):
            put_grads(ps, step)
        graph.replay()
        plain.step()
        assert all(map(torch.equal, params, others)), step


def test_parameters_on_two_kinds_of_device_step_together() -> None:
    mixed, cpu_params = [*on_gpu(torch.float32)[:3], *parameters()[3:]], parameters()
    on_both, on_cpu = SM3(mixed), SM3(cpu_params)
    for step in range(2):
        put_grads(mixed, step)
        put_grads(cpu_params, step)
        on_both.step()
        on_cpu.step()
    assert all(torch.equal(p.cpu(), q) for p, q in zip(mixed, cpu_params, strict=True))
