"""Identities of SM3's maths, to the bit where the arithmetic allows it."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import pytest
import torch

import leanops as lo

SHAPES = [(12,), (9, 14), (4, 5, 6), (3, 2, 4, 5)]
MOMENTA = [None, torch.float32, torch.bfloat16, torch.int8]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def least(cover, shape):
    """min_k mu_k[i_k] for every element."""
    axes = lo.sm3_cover_axes(cover, shape)
    views = [a.view([-1 if j == k else 1 for j in range(len(shape))]) for k, a in enumerate(axes)]
    return reduce(torch.minimum, views).expand(shape)


def largest(nu):
    """The maximum over every slice of every axis."""
    return [nu.movedim(k, 0).reshape(nu.shape[k], -1).amax(1) for k in range(nu.dim())]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nu_lies_between_the_sum_of_squares_and_that_of_sm3_i(shape):
    w, total = torch.zeros(shape), torch.zeros(shape)
    cover, first = lo.sm3_cover(w), lo.sm3_cover(w)  # the accumulators of SM3-II and of SM3-I
    strict = False
    for seed in range(12):
        g = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()  # no sum below rounds
        nu = least(cover, shape) + g * g
        for axis, worst in zip(lo.sm3_cover_axes(first, shape), largest(g * g), strict=True):
            axis += worst
        total += g * g
        before = cover.clone()
        lo.sm3_step_(w, g, cover, lr=0.1)
        assert torch.equal(torch.cat(lo.sm3_cover_axes(cover, shape)), torch.cat(largest(nu)))
        assert (total <= nu).all()
        assert (nu <= least(first, shape)).all()
        assert (cover >= before).all()
        assert (cover <= first).all()
        strict |= bool((nu < least(first, shape)).any())
    assert strict == (len(shape) > 1)  # SM3-II is the tighter one, and both are Adagrad for a vector


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_covers_never_decrease(shape, dtype):
    w = randn(*shape).to(dtype)
    cover = lo.sm3_cover(w)
    for seed in range(20):
        before = cover.clone()
        lo.sm3_step_(w, (10.0 ** (seed % 5 - 3) * randn(*shape, seed=seed)).to(dtype), cover, lr=0.1)
        assert (cover >= before).all()


@pytest.mark.parametrize("beta", [1.0, 0.95])
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_permuting_an_axis_permutes_the_result(shape, momentum_dtype, beta):
    orders = [torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in shape]

    def permuted(t):
        for k, order in enumerate(orders):
            t = t.index_select(k, order)
        return t

    w = randn(*shape)
    p = permuted(w)
    momentum = 0.0 if momentum_dtype is None else 0.9
    states = []
    for t in (w, p):
        m, s = lo.sm3_momentum(t, momentum_dtype) if momentum else ((), ())
        states.append((lo.sm3_cover(t), m, s))
    for seed in range(4):
        g = randn(*shape, seed=seed)
        for t, gradient, (cover, m, s) in zip((w, p), (g, permuted(g)), states, strict=True):
            lo.sm3_step_(t, gradient, cover, m, s, lr=0.1, momentum=momentum, beta=beta)
    assert torch.equal(p, permuted(w))
    if momentum:
        assert torch.equal(states[1][1], permuted(states[0][1]))
    axes, permuted_axes = (lo.sm3_cover_axes(cover, shape) for cover, *_ in states)
    for axis, order, permuted_axis in zip(axes, orders, permuted_axes, strict=True):
        assert torch.equal(permuted_axis, axis[order])


@pytest.mark.parametrize("power", [-12, -1, 1, 9])
@pytest.mark.parametrize("momentum_dtype", MOMENTA, ids=str)
def test_a_power_of_two_on_the_gradients_changes_no_bit_of_the_update(momentum_dtype, power):
    w = randn(20, 300)
    scaled = w.clone()
    momentum = 0.0 if momentum_dtype is None else 0.9
    plain, other = ((lo.sm3_cover(w), *(lo.sm3_momentum(w, momentum_dtype) if momentum else ((), ()))) for _ in "ab")
    for seed in range(4):
        g = randn(20, 300, seed=seed)
        lo.sm3_step_(w, g, *plain, lr=0.1, momentum=momentum, eps=0.0)
        lo.sm3_step_(scaled, 2.0**power * g, *other, lr=0.1, momentum=momentum, eps=0.0)
    assert torch.equal(w, scaled)
    assert torch.equal(other[0], 4.0**power * plain[0])
    if momentum:
        assert torch.equal(plain[1], other[1])


def test_grad_scale_undoes_the_scale_of_the_loss():
    w, g = randn(6, 40), randn(6, 40, seed=1)
    scaled, covers = w.clone(), (lo.sm3_cover(w), lo.sm3_cover(w))
    lo.sm3_step_(w, g, covers[0], lr=0.1)
    lo.sm3_step_(scaled, 2.0**16 * g, covers[1], lr=0.1, grad_scale=torch.tensor(2.0**16), found_inf=torch.zeros(1))
    assert torch.equal(w, scaled)
    assert torch.equal(*covers)


@pytest.mark.parametrize("momentum_dtype", MOMENTA, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(37, 300), (40, 3, 91), (1024,)], ids=str)
def test_shards_of_axis_0_equal_the_whole(shape, dtype, momentum_dtype):
    cuts = [0, 256, 1024] if len(shape) == 1 else [0, 1, 14, 14, shape[0]]  # int8 blocks of a vector are 256 long
    momentum = 0.0 if momentum_dtype is None else 0.9
    row = randn(*shape)[0].numel()
    options = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.1, "stochastic_rounding": True, "tensor_ids": [7]}

    whole = randn(*shape).to(dtype)
    state = lo.sm3_cover(whole), *(lo.sm3_momentum(whole, momentum_dtype) if momentum else ((), ()))
    parts = [whole[a:b].clone() for a, b in pairwise(cuts)]
    states = [(lo.sm3_cover(p), *(lo.sm3_momentum(p, momentum_dtype) if momentum else ((), ()))) for p in parts]
    for seed in range(3):
        g = randn(*shape, seed=seed).to(dtype)
        lo.sm3_step_(whole, g, *state, seed=seed, **options)
        for start, part, part_state in zip(cuts, parts, states, strict=False):
            gradient = g[start : start + len(part)]
            lo.sm3_step_(part, gradient, *part_state, seed=seed, offsets=[start * row], **options)
        # processes exchange the maximum over all axes but the first; an empty shard has zeros there
        shared = [c[len(p) :] for p, (c, *_) in zip(parts, states, strict=True)]
        merged = torch.stack(shared).amax(0)
        for axes in shared:
            axes.copy_(merged)
    assert torch.equal(torch.cat(parts), whole)
    rows = torch.cat([c[: len(p)] for p, (c, *_) in zip(parts, states, strict=True)])
    assert torch.equal(torch.cat([rows, merged]), state[0])
    if momentum:
        assert torch.equal(torch.cat([m for _, m, _ in states]), state[1])
        if momentum_dtype == torch.int8:
            assert torch.equal(torch.cat([s for *_, s in states], dim=1 if len(shape) == 1 else 0), state[2])


def test_one_call_on_many_tensors_equals_many_calls():
    shapes = [(33, 7), (), (0, 3), (5,), (2, 3, 4)]
    one = [randn(*s, seed=i) for i, s in enumerate(shapes)]
    many = [t.clone() for t in one]
    covers, others = ([lo.sm3_cover(t) for t in one] for _ in "ab")
    g = [randn(*s, seed=9) for s in shapes]
    lo.sm3_step_(one, g, covers, lr=0.1)
    for w, gradient, cover in zip(many, g, others, strict=True):
        lo.sm3_step_(w, gradient, cover, lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(one + covers, many + others, strict=True))
