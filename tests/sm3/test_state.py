"""The operator's state: momentum in 8 and 16 bits, stochastic rounding, decay, values that are not finite, helpers."""

from __future__ import annotations

import math

import pytest
import torch

import leanops as lo
from leanops.sm3 import reference

MOMENTA = [None, torch.float32, torch.bfloat16, torch.int8]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks(m):
    """A matrix [R, C] as [R, blocks, 256], padded with zeros."""
    return torch.nn.functional.pad(m, (0, -m.shape[1] % 256)).view(m.shape[0], -1, 256)


# --- int8 -------------------------------------------------------------------------------------------------------------


def momentum_after(dtype, g):
    """The momentum after one step from accumulators of 1, so that u = g / sqrt(1 + g^2)."""
    w = torch.zeros(g.shape)
    m, scales = lo.sm3_momentum(w, dtype)
    lo.sm3_step_(w, g, lo.sm3_cover(w) + 1, m, scales, lr=0.1, momentum=0.9)
    return m, scales


def test_int8_rounds_to_half_a_code_of_its_block():
    g = randn(37, 1000) * 10 ** torch.linspace(-6, 0, 37)[:, None]
    codes, scales = momentum_after(torch.int8, g)
    exact, _ = momentum_after(torch.float32, g)
    assert scales.shape == (37, 4)
    top = blocks(exact).abs().amax(2)
    torch.testing.assert_close(scales, top / 127, rtol=2.0**-23, atol=0)
    error = (blocks(reference.decode(codes, scales)) - blocks(exact)).abs().amax(2)
    assert (error <= top / 254 * (1 + 2.0**-14)).all()  # top / 254 is half a code; the codes are computed in fp32
    assert (error > top / 300).any()
    assert codes.abs().max() == 127
    assert (blocks(codes.float()).abs().amax(2) == 127).all()


def test_an_int8_block_is_256_elements_of_a_row_of_axis_0():
    shape = (2, 3, 131)  # a row holds 393 elements
    g = torch.ones(shape).view(2, 393)
    g[0, 256:] = 0.0
    codes, scales = momentum_after(torch.int8, g.view(shape))
    assert scales.shape == (2, 2)
    assert (scales > 0).tolist() == [[True, False], [True, True]]
    assert codes.view(2, 393)[0].tolist() == [127] * 256 + [0] * 137


def test_int8_error_stays_within_the_sum_of_its_steps():
    shape, beta, steps = (16, 512), 0.9, 30
    w = torch.zeros(shape)
    cover, (m, scales) = lo.sm3_cover(w), lo.sm3_momentum(w, torch.int8)
    other, (exact, empty) = lo.sm3_cover(w), lo.sm3_momentum(w, torch.float32)
    bound = torch.zeros(16, 2)
    for seed in range(steps):
        g = randn(*shape, seed=seed)
        for c, state, s in ((cover, m, scales), (other, exact, empty)):
            lo.sm3_step_(w, g, c, state, s, lr=0.0, momentum=beta)
        bound = beta * bound + scales / 2  # the old error decays, and half a code of rounding is added
        error = (blocks(reference.decode(m, scales)) - blocks(exact)).abs().amax(2)
        assert (error <= bound * (1 + 1e-4)).all()  # the momenta and the bound are computed in fp32
    assert torch.equal(cover, other)


def test_a_block_too_small_for_a_scale_is_stored_as_zeros():
    for magnitude, kept in ((2.0**-119, True), (2.0**-121, False), (0.0, False)):
        codes, scales = reference.encode(torch.full((1, 300), magnitude))
        assert (codes == (127 if kept else 0)).all()
        assert (scales > 0).all() == kept


def test_ties_go_to_the_even_code():
    m = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    codes, scales = reference.encode(m)
    assert scales.item() == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -126]]


def test_bf16_momentum_is_the_rounded_fp32_one():
    g = randn(9, 40)
    assert torch.equal(momentum_after(torch.bfloat16, g)[0], momentum_after(torch.float32, g)[0].bfloat16())


# --- stochastic rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_takes_the_bits_of_zo(dtype):
    shape, seed, tensor_id, offset = (33, 70), -77, 5, 2**33 + 3
    lr = 0.1 * 2.0**-10
    z = lo.zo_noise(shape, seed, tensor_id=tensor_id, offset=offset, distribution="rademacher", dtype=dtype)
    w = randn(*shape).to(dtype)
    moved = w.clone()
    place = {"tensor_ids": [tensor_id], "offsets": [offset]}
    # with gradients of one magnitude u is their sign, so both add lr times the noise
    lo.zo_axpy_(moved, seed, lr, distribution="rademacher", rounding="stochastic", **place)
    lo.sm3_step_(w, -z, lo.sm3_cover(w), lr=lr, eps=0.0, stochastic_rounding=True, seed=seed, **place)
    assert torch.equal(w, moved)


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)], ids=str)
def test_stochastic_rounding_is_unbiased_and_between_neighbours(dtype, ulp):
    n, share = 1 << 18, 0.3  # of the spacing above 1
    w = torch.ones(n, dtype=dtype)
    lo.sm3_step_(w, -torch.ones(n, dtype=dtype), lo.sm3_cover(w), lr=share * ulp, stochastic_rounding=True, seed=3)
    assert set(w.unique().tolist()) == {1.0, 1.0 + ulp}
    rounded_up = float((w > 1).double().mean())
    assert abs(rounded_up - share) < 5 * math.sqrt(share * (1 - share) / n)  # five standard errors
    nearest = torch.ones(n, dtype=dtype)
    lo.sm3_step_(nearest, -torch.ones(n, dtype=dtype), lo.sm3_cover(w), lr=share * ulp)
    assert (nearest == 1).all()  # rounding to nearest loses the step


# --- decay and averages -----------------------------------------------------------------------------------------------


def test_an_average_forgets():
    """In another port the new maximum includes the old value, so its average never falls."""
    w = torch.zeros(6, 8)
    cover = lo.sm3_cover(w)
    lo.sm3_step_(w, torch.full((6, 8), 100.0), cover, lr=0.0, beta=0.9)
    start = cover[0].item()
    for step in range(1, 100):
        expected = cover * torch.tensor(0.9)
        lo.sm3_step_(w, torch.zeros(6, 8), cover, lr=0.0, beta=0.9)
        assert torch.equal(cover, expected)
        assert cover[0].item() == pytest.approx(start * 0.9**step, rel=1e-5)
    for _ in range(200):
        lo.sm3_step_(w, torch.full((6, 8), 0.5), cover, lr=0.0, beta=0.9)
    torch.testing.assert_close(cover, torch.full((14,), 0.25), rtol=1e-6, atol=0)


def test_decoupled_decay_shrinks_and_coupled_decay_adds_to_the_gradient():
    w, g = randn(5, 7), randn(5, 7, seed=1)
    decoupled, coupled, plain = w.clone(), w.clone(), 0.99 * w
    lo.sm3_step_(plain, g, lo.sm3_cover(w), lr=0.1)
    lo.sm3_step_(decoupled, g, lo.sm3_cover(w), lr=0.1, weight_decay=0.1)
    torch.testing.assert_close(decoupled, plain, rtol=1e-6, atol=1e-8)
    added = w.clone()
    lo.sm3_step_(added, g + 0.1 * w, lo.sm3_cover(w), lr=0.1)
    lo.sm3_step_(coupled, g, lo.sm3_cover(w), lr=0.1, weight_decay=0.1, decoupled=False)
    torch.testing.assert_close(coupled, added, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(coupled, decoupled)


def test_a_learning_rate_in_a_tensor_is_the_same_number():
    results = []
    for lr in (0.1, torch.tensor(0.1), torch.tensor([0.1]), torch.tensor(0.1, dtype=torch.float64)):
        results.append(randn(5, 7))
        lo.sm3_step_(results[-1], randn(5, 7, seed=1), lo.sm3_cover(results[-1]), lr=lr)
    assert all(torch.equal(r, results[0]) for r in results)


# --- values that are not finite, and zeros ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("beta", [1.0, 0.9])
@pytest.mark.parametrize("momentum_dtype", MOMENTA, ids=str)
def test_a_gradient_that_is_not_finite_is_never_lost(momentum_dtype, beta, bad):
    shape, (i, j) = (4, 600), (2, 300)
    momentum = 0.0 if momentum_dtype is None else 0.9
    w = randn(*shape)
    cover, (m, scales) = lo.sm3_cover(w), lo.sm3_momentum(w, momentum_dtype) if momentum else ((), ())
    g = randn(*shape, seed=1)
    g[i, j] = bad
    lo.sm3_step_(w, g, cover, m, scales, lr=0.1, momentum=momentum, beta=beta)
    assert w[i, j].isnan()
    assert w.isnan().sum() == 1
    rows, columns = lo.sm3_cover_axes(cover, shape)
    for axis, place in ((rows, i), (columns, j)):
        assert axis[place].isnan() if math.isnan(bad) else axis[place] == math.inf
        assert axis.isfinite().sum() == len(axis) - 1
    if momentum_dtype == torch.int8:
        assert scales.isnan().sum() == 1
        value = reference.decode(m, scales)
        assert value[i, 256:512].isnan().all()  # the whole block reads as NaN
        assert value.isnan().sum() == 256
    elif momentum:
        assert m[i, j].isnan()
        assert m.isnan().sum() == 1
    lo.sm3_step_(w, randn(*shape, seed=2), cover, m, scales, lr=0.1, momentum=momentum, beta=beta)
    assert w[i, j].isnan()
    if momentum:
        assert (reference.decode(m, scales) if momentum_dtype == torch.int8 else m)[i, j].isnan()
    if math.isnan(bad):
        assert w[i].isnan().all()  # the accumulators of its row and its column are NaN
        assert w[:, j].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-30])
def test_zero_gradients_move_nothing(dtype, eps):
    """Another port adds 1e-30 in fp16, which is 0, and divides zero by zero."""
    w = randn(4, 9).to(dtype)
    before, cover = w.clone(), lo.sm3_cover(w)
    m, scales = lo.sm3_momentum(w, torch.int8)
    for beta in (1.0, 0.9):
        lo.sm3_step_(w, torch.zeros_like(w), cover, m, scales, lr=0.1, momentum=0.9, beta=beta, eps=eps)
    assert torch.equal(w, before)
    assert not cover.any()
    assert not m.any()
    assert not scales.any()


def test_a_gradient_whose_square_underflows_gives_no_nan():
    w, cover = torch.zeros(3, 3), lo.sm3_cover(torch.zeros(3, 3))
    lo.sm3_step_(w, torch.full((3, 3), 1e-30), cover, lr=0.1, eps=0.0)
    assert torch.equal(w, torch.zeros(3, 3))


# --- defects that other ports have ------------------------------------------------------------------------------------


def test_accumulators_of_bf16_weights_pass_256():
    """bf16 accumulators stop at 256, where adding 1 rounds away."""
    w = torch.zeros(3, 5, dtype=torch.bfloat16)
    cover = lo.sm3_cover(w)
    assert cover.dtype == torch.float32
    for _ in range(300):
        lo.sm3_step_(w, torch.ones_like(w), cover, lr=0.0)
    assert (cover == 300).all()


def test_no_momentum_takes_no_memory():
    w = torch.zeros(1000, 1000)
    assert lo.sm3_cover(w).nbytes == 4 * 2000  # 0.008 bytes a parameter
    with pytest.raises(ValueError, match="momenta must have no entry"):
        lo.sm3_step_(w, w.clone(), lo.sm3_cover(w), *lo.sm3_momentum(w), lr=0.1)
    for dtype, bytes_each in ((torch.float32, 4.0), (torch.bfloat16, 2.0), (torch.int8, 1.0 + 16 / 1000)):
        assert sum(t.nbytes for t in lo.sm3_momentum(w, dtype)) == bytes_each * w.numel()


def test_maximize_ascends_and_leaves_the_gradient_as_it_is():
    w, g = randn(4, 6), randn(4, 6, seed=1)
    up, down, before = w.clone(), w.clone(), g.clone()
    lo.sm3_step_(up, g, lo.sm3_cover(w), lr=0.1, maximize=True)
    assert torch.equal(g, before)
    lo.sm3_step_(down, -g, lo.sm3_cover(w), lr=0.1)
    assert torch.equal(up, down)
    assert ((up - w) * g >= 0).all()


def test_sparse_gradients_and_unknown_keywords_are_refused():
    w = torch.ones(4, 6)
    before, cover = w.clone(), lo.sm3_cover(w)
    with pytest.raises(ValueError, match=r"grads\[0\] must be a dense tensor, got layout torch.sparse_coo"):
        lo.sm3_step_(w, torch.ones(4, 6).to_sparse(), cover, lr=0.1)
    with pytest.raises(TypeError, match="foreach"):
        lo.sm3_step_(w, torch.ones(4, 6), cover, lr=0.1, foreach=True)
    assert torch.equal(w, before)
    assert not cover.any()


# --- the state's helpers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "scales"),
    [((), (1, 1)), ((600,), (1, 3)), ((5, 600), (5, 3)), ((4, 3, 100), (4, 2)), ((0, 3), (0, 1)), ((3, 0), (3, 0))],
    ids=str,
)
def test_state_fits_its_parameter(shape, scales):
    p = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    cover = lo.sm3_cover(p)
    assert not cover.requires_grad
    axes = lo.sm3_cover_axes(cover, shape)
    assert [len(a) for a in axes] == (list(shape) or [1])
    for k, axis in enumerate(axes):
        axis += k + 1
    assert cover.tolist() == [k + 1 for k, n in enumerate(shape or (1,)) for _ in range(n)]
    m, s = lo.sm3_momentum(p, torch.int8)
    assert m.shape == shape
    assert s.shape == scales
    assert (m.dtype, s.dtype) == (torch.int8, torch.float32)


def test_state_helpers_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"sm3_cover_axes: cover must have shape \[7\] for \[3, 4\], got \[6\]"):
        lo.sm3_cover_axes(torch.zeros(6), (3, 4))
    with pytest.raises(ValueError, match=r"sm3_momentum: dtype must be one of .*int8, got torch\.float16"):
        lo.sm3_momentum(torch.zeros(3), torch.float16)
    with pytest.raises(ValueError, match=r"sm3_step_: seed must be an integer .*got 1\.5"):
        lo.sm3_step_(torch.zeros(3), torch.zeros(3), torch.zeros(3), lr=0.1, seed=[1.5])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": None}, TypeError, "params must be a tensor or a sequence of tensors, got None"),
        ({"grads": 3.0}, TypeError, "grads must be a tensor or a sequence of tensors, got 3.0"),
        ({"covers": [None]}, TypeError, r"covers\[0\] must be a tensor, got NoneType"),
        ({"momenta": [torch.zeros(3).numpy()]}, TypeError, r"momenta\[0\] must be a tensor, got ndarray"),
        ({"scales": 1}, TypeError, "scales must be a tensor or a sequence of tensors, got 1"),
        ({"seed": 1.5}, ValueError, r"seed must be an integer in .*, got 1\.5"),
        ({"tensor_ids": 5}, ValueError, "tensor_ids must be a sequence of integers, got 5"),
        ({"offsets": [0.5]}, ValueError, r"offsets\[0\] must be an integer, got 0.5"),
        ({"lr": None}, TypeError, "lr must be a number or a one-element tensor, got None"),
        ({"lr": "high"}, TypeError, "lr must be a number or a one-element tensor, got 'high'"),
        ({"lr": torch.nan}, ValueError, "lr must be finite and at least 0, got nan"),
        ({"lr": torch.inf}, ValueError, "lr must be finite and at least 0, got inf"),
        ({"lr": -0.1}, ValueError, "lr must be finite and at least 0, got -0.1"),
    ],
    ids=str,
)
def test_an_error_of_a_step_names_the_argument(change, error, message):
    w = torch.zeros(3)
    arguments = {"params": w, "grads": torch.ones(3), "covers": torch.zeros(3), "lr": 0.1} | change
    with pytest.raises(error, match=f"sm3_step_: {message}"):
        lo.sm3_step_(**arguments)
    assert not w.any()


def test_a_step_without_an_error_prints_no_tensor(monkeypatch):
    def rendered(self, *args, **kwargs):
        raise AssertionError("a tensor was made into text")

    w = torch.zeros(3)
    monkeypatch.setattr(torch.Tensor, "__repr__", rendered)
    lo.sm3_step_([w], [torch.ones(3)], [torch.zeros(3)], lr=0.1)
    assert w.any()
