"""The step against independent implementations in float64: optax's SM3, and torch's Adagrad where the two coincide."""

from __future__ import annotations

import math

import pytest
import torch

import leanops as lo

STEPS = 20
EPS32 = 2.0**-24  # one rounding of fp32
SHAPES = [(7,), (1, 9), (33, 20), (4, 5, 6), (3, 2, 5, 4), (6, 1)]


def gradients(shape, seed=0):
    """fp32 numbers of many magnitudes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    g = (
        torch.randn(STEPS, *shape, generator=generator)
        * 10 ** torch.randint(-4, 2, (STEPS, 1), generator=generator)[(...,) + (None,) * (len(shape) - 1)].float()
    )
    return g * (torch.rand(g.shape, generator=generator) > 0.1)


@pytest.mark.parametrize("beta", [1.0, 0.9])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twenty_steps_agree_with_optax_in_float64(shape, momentum, beta):
    jax = pytest.importorskip("jax", reason="optax and jax are not installed (pip install leanops[dev])")
    optax = pytest.importorskip("optax", reason="optax is not installed (pip install leanops[dev])")
    lr = 0.125  # exact in fp32
    g = gradients(shape)
    w = torch.zeros(
        shape, dtype=torch.float64
    )  # float64, so that the sum of the fp32 steps adds no error worth counting
    cover = lo.sm3_cover(w)
    momenta, scales = ([x] for x in lo.sm3_momentum(w)) if momentum else ((), ())
    with jax.enable_x64(True):
        rule = optax.scale_by_sm3(b1=momentum, b2=beta, eps=1e-30)
        params = jax.numpy.zeros(shape, dtype=jax.numpy.float64)
        state, exact, travelled = rule.init(params), torch.zeros(shape, dtype=torch.float64), 0.0
        for step in range(STEPS):
            lo.sm3_step_(w, g[step].double(), cover, momenta, scales, lr=lr, momentum=momentum, beta=beta)
            update, state = rule.update(jax.numpy.asarray(g[step].double().numpy()), state)
            assert update.dtype == jax.numpy.float64
            update = torch.tensor(update.tolist(), dtype=torch.float64).view(shape)
            exact -= lr * update
            travelled = travelled + lr * update.abs()
        accumulators = [torch.tensor(axis.tolist(), dtype=torch.float64) for axis in state.mu]

    # a step rounds nu once for a sum, and at most five times for an average; a minimum and a maximum keep the
    # relative error. u takes half of it and three roundings more, m another three a step.
    nu_error = STEPS * (1 if beta == 1 else 5) * EPS32
    if len(shape) > 1:
        for mine, theirs in zip(lo.sm3_cover_axes(cover, shape), accumulators, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=nu_error, atol=0)
    u_error = nu_error / 2 + 3 * EPS32
    if not momentum:
        assert ((w - exact).abs() <= 1.001 * u_error * travelled).all()
    else:
        # u of both signs may cancel within m, so the bound is of the largest u, which is 1 / sqrt(1 - beta) or 1
        largest = 1.0 if beta == 1 else 1 / math.sqrt(1 - beta)
        assert ((w - exact).abs() <= lr * STEPS * largest * (u_error + 3 * STEPS * EPS32)).all()
    assert (
        w - exact
    ).abs().max() > 0  # the state is fp32: equal results would mean that a result was compared with itself


@pytest.mark.parametrize("shape", [(50,), (50, 1), (1, 50), (1, 50, 1), ()], ids=str)
def test_one_long_axis_is_adagrad(shape):
    w, reference = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    adagrad = torch.optim.Adagrad([reference], lr=0.125, eps=0.0)
    cover = lo.sm3_cover(w)
    travelled = torch.zeros(shape, dtype=torch.float64)
    for seed in range(STEPS):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        before = reference.detach().clone()
        reference.grad = g.double()
        adagrad.step()
        travelled += (reference.detach() - before).abs()
        lo.sm3_step_(w, g.double(), cover, lr=0.125, eps=0.0)
    assert ((w - reference.detach()).abs() <= (STEPS / 2 + 3) * EPS32 * travelled).all()


def test_a_vector_and_a_matrix_of_one_column_have_the_same_bits():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        vector = torch.randn(300, generator=torch.Generator().manual_seed(1)).to(dtype)
        column = vector.clone().view(300, 1)
        covers = lo.sm3_cover(vector), lo.sm3_cover(column)
        for seed in range(5):
            g = torch.randn(300, generator=torch.Generator().manual_seed(seed)).to(dtype)
            lo.sm3_step_(vector, g, covers[0], lr=0.1)
            lo.sm3_step_(column, g.view(300, 1), covers[1], lr=0.1)
        assert torch.equal(column[:, 0], vector)
        assert torch.equal(lo.sm3_cover_axes(covers[1], (300, 1))[0], covers[0])
