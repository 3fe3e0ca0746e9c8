"""SM3 on tensors whose memory does not hold their values: negated views, pending collectives, zero and fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sm3.parameters import equal, parameters, set_grads, snapshot
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leanops.optim import SM3

I8 = torch.int8


def test_a_negated_gradient_keeps_its_sign() -> None:
    """autograd gives the imaginary part of a conjugate as a view with the negative bit. Its memory, which a kernel
    reads, has the values without that sign."""
    p, q = [[nn.Parameter(torch.full((), x)) for x in (0.3, -0.2)] for _ in range(2)]
    opt, ref = SM3(p), SM3(q)
    for _ in range(3):
        for o, (a, b) in ((opt, p), (ref, q)):
            o.zero_grad()
            (torch.complex(a, b).conj() - (1 + 2j)).abs().backward()
        assert p[1].grad.is_neg()
        q[1].grad = q[1].grad.resolve_neg().clone()
        opt.step()
        ref.step()
        assert [a.item() for a in p] == [a.item() for a in q]

    params, others = parameters(), parameters()
    opt, ref = SM3(params), SM3(others)
    for step in range(3):
        set_grads(params, step)
        for a, b in zip(params, others, strict=True):
            a.grad = torch._neg_view(a.grad)
            b.grad = a.grad.resolve_neg()
        opt.step()
        ref.step()
        assert all(map(torch.equal, params, others)), step


@pytest.mark.parametrize("size", [3, 300])
def test_gradients_that_are_pending_or_zero_without_memory(size: int) -> None:
    functional = pytest.importorskip("torch.distributed._functional_collectives")
    makers = {"pending": functional.AsyncCollectiveTensor, "zero": lambda g: torch._efficientzerotensor(g.shape)}
    for name, make in makers.items():
        p, q = nn.Parameter(torch.ones(size, size)), nn.Parameter(torch.ones(size, size))
        opt, ref = SM3([p]), SM3([q])
        for step in range(4):
            g = torch.full_like(p, step + 1.0)
            p.grad = make(g) if step else g
            q.grad = torch.zeros_like(g) if step and name == "zero" else g
            opt.step()
            ref.step()
            assert torch.equal(p, q), (name, step)


def test_fake_parameters_take_steps() -> None:
    """torch.distributed._tools.MemTracker simulates training with such parameters."""
    with FakeTensorMode():
        model = nn.Linear(3, 4)
        opt = SM3(model.parameters(), momentum_dtype=I8)
        for _ in range(3):
            model(torch.zeros(2, 3)).sum().backward()
            opt.step()
        assert [tuple(s["momentum_buffer"].shape) for s in opt.state.values()] == [(4, 3), (4,)]


def test_a_negated_weight_is_refused() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch._neg_view(torch.ones(3)))
    opt = SM3([{"params": [p]}, {"params": [q]}])
    p.grad = q.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"SM3: parameter 1 must not be a negated view; use its resolve_neg\(\)"):
        opt.step()
    assert p.tolist() == [1.0] * 3
    assert not opt.state


class Pair(torch.Tensor):
    """A wrapper subclass without memory, which no kernel can read."""

    @staticmethod
    def __new__(cls, like: torch.Tensor) -> Pair:
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        return Pair(args[0])


def test_gradients_of_an_unknown_wrapper_subclass_are_refused() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = SM3([{"params": [p]}, {"params": [q]}])
    for step in range(3):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        if step != 1:
            q.grad = Pair(q)
            before = p.tolist()
            with pytest.raises(ValueError, match="SM3: a gradient must be a plain tensor or a DTensor, got Pair"):
                opt.step()
            assert p.tolist() == before
        else:
            opt.step()


@pytest.mark.parametrize(
    "change", [lambda g: g.resize_(2, 6), lambda g: g.resize_(2, 3), Tensor.t_], ids=["rows", "fewer", "transposed"]
)
def test_a_gradient_that_is_resized_is_refused_before_an_earlier_group_moves(change: Any) -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 4))
    opt = SM3([{"params": [a]}, {"params": [b]}])
    for _ in range(2):
        a.grad, b.grad = torch.ones(3), torch.ones(3, 4)
        opt.step()
    change(b.grad)
    before = a.tolist(), b.tolist(), snapshot(opt)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"gradient of parameter 1 must be torch.float32 \[3, 4\] on cpu"):
            opt.step()
        assert equal((a.tolist(), b.tolist()), before[:2])
        assert equal(snapshot(opt), before[2])


def test_a_kernel_refuses_in_the_words_of_the_operator() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = SM3([p])
    for _ in range(2):
        p.grad = torch.ones(3)
        opt.step()
    before = p.tolist()
    p.grad.resize_(2)
    message = r"^sm3_step_: grads\[0\] must have the shape of params\[0\], \[3\], got \[2\]$"
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert p.tolist() == before
