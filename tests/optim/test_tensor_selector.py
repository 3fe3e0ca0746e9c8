"""GreenTrainer's selection: exact against brute force, FLOPs as torch counts them, the budget kept."""

from __future__ import annotations

import copy
import io
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from selecting import (
    BLOCK_DW,
    OPTIMIZERS,
    Net,
    assert_same,
    backward_flops,
    loss_of,
    net,
    snapshot,
    state_bytes,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leanops.optim import SM3, TensorSelection, TensorSelector, prefix_knapsack
from leanops.optim.backward_flops import measure

Case = tuple[np.ndarray, np.ndarray, np.ndarray, int]

MEASURABLE = [name for name in OPTIMIZERS if not name.endswith("in-backward")]  # see test_steps_inside_of_the_backward

# --- the knapsack ---------------------------------------------------------------------------------------------------


def brute_force(importance: np.ndarray, dw: np.ndarray, dy: np.ndarray, budget: int) -> float:
    """The best of all 2^n choices."""
    n = len(importance)
    bits = (np.arange(1, 1 << n)[:, None] >> np.arange(n)) & 1
    deepest = n - 1 - bits[:, ::-1].argmax(1)
    cost = bits @ dw + np.cumsum(dy)[deepest]
    values = bits @ importance
    return float(max(0.0, values[cost <= budget].max(initial=0.0)))


def cases(kind: str, count: int, rng: np.random.Generator) -> Iterator[Case]:
    for _ in range(count):
        n = int(rng.integers(1, 12))
        high = 10**9 if kind in ("large", "negative") else 20
        dw, dy = rng.integers(0, high, n), rng.integers(0, high // 2, n)
        importance = rng.normal(size=n) if kind == "negative" else rng.random(n)
        if kind == "equal ratios":  # every tensor is worth the same for its FLOPs: no bound tells them apart
            importance = dw * 0.7
        elif kind == "few prices":
            dw = rng.choice([0, 6, 15, 35], n)
        elif kind == "small numbers":
            importance = rng.integers(-2, 5, n).astype(float)
        elif kind == "no way":
            dy = np.zeros(n, np.int64)
        yield importance, dw, dy, int((dw.sum() + dy.sum()) * rng.random())


@pytest.mark.parametrize("kind", ["large", "negative", "equal ratios", "few prices", "small numbers", "no way"])
def test_the_selection_is_the_best_of_all(kind: str) -> None:
    """6 x 1,000 random cases of up to 11 tensors, against all 2^n choices."""
    rng = np.random.default_rng(0)
    for importance, dw, dy, budget in cases(kind, 1000, rng):
        found = prefix_knapsack(importance, dw, dy, budget)
        best = brute_force(importance, dw, dy, budget)
        assert found.exact
        assert found.importance == pytest.approx(best, rel=1e-11, abs=1e-11)
        picked = list(found.selected)
        assert found.importance == pytest.approx(importance[picked].sum())
        assert found.cost == (int(dw[picked].sum() + dy[: picked[-1] + 1].sum()) if picked else 0) <= budget
        assert found.bound >= found.importance
        assert (importance[picked] > 0).all()


def published(importance: np.ndarray, dw: np.ndarray, dy: np.ndarray, budget: int) -> float:
    """The dynamic program as published: for each depth k and budget t the best value alone, and a tensor may only join
    what was best for an earlier depth where that itself ended in a selected tensor."""
    n = len(importance)
    best = np.zeros((n + 1, budget + 1))
    ends = np.zeros((n + 1, budget + 1), bool)
    ends[0] = True
    top = 0.0
    for k in range(1, n + 1):
        for t in range(budget + 1):
            best[k, t] = best[k - 1, t]
            left = t - dw[k - 1]
            for before in range(k - 1, -1, -1):
                left -= dy[before]
                if left >= 0 and ends[before, left] and best[before, left] + importance[k - 1] > best[k, t]:
                    best[k, t] = best[before, left] + importance[k - 1]
                    ends[k, t] = True
            top = max(top, best[k, t])
    return float(top)


def test_the_published_dynamic_program_misses_the_best() -> None:
    """In about a quarter of cases such as these: 8 to 12 tensors, costs below 10, 60% of the full price."""
    rng = np.random.default_rng(1)
    missed, total = 0, 100
    for _ in range(total):
        n = int(rng.integers(8, 13))
        importance, dw, dy = rng.random(n), rng.integers(0, 10, n), rng.integers(0, 10, n)
        budget = int((dw.sum() + dy.sum()) * 0.6)
        best = prefix_knapsack(importance, dw, dy, budget).importance
        theirs = published(importance, dw, dy, budget)
        assert theirs <= best + 1e-12
        missed += theirs < best - 1e-12
    assert 15 < missed < 40


def test_importances_of_any_size_are_added_where_they_cost_nothing() -> None:
    """Beside 1, an importance of 1e-20 is less than a rounding error, but it is free."""
    found = prefix_knapsack([1e-20, 1.0, 1e-20, -1e-20], [0, 5, 0, 0], [1, 1, 1, 0], 7)
    assert found.selected == (0, 1)
    assert prefix_knapsack([1e-300], [1], [0], 1).selected == (0,)


def test_edges_of_the_knapsack() -> None:
    assert prefix_knapsack([], [], [], 5).selected == ()
    assert prefix_knapsack([1.0], [3], [2], 4).selected == ()
    assert prefix_knapsack([1.0], [3], [2], 5).selected == (0,)
    assert prefix_knapsack([1.0], [0], [0], -1).selected == ()
    assert prefix_knapsack([0.0, -1.0], [0, 0], [0, 0], 10).selected == ()
    big = 2**60
    assert prefix_knapsack([1.0, 1.5], [big, big + 1], [1, 0], 2 * big).selected == (1,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([1.0], [1, 2], [0], 1), r"dw must have the shape of importance, \(1,\), got \(2,\)"),
        (([1.0], [1], [0.5], 1), "dy must be whole numbers >= 0 with a sum below 2\\^62, got \\[0.5\\]"),
        (([1.0], [-1], [0], 1), "dw must be whole numbers >= 0"),
        (([1.0], [2**62], [0], 1), "dw must be whole numbers >= 0 with a sum below 2\\^62"),
        (([float("nan")], [1], [0], 1), "importance must be a list of finite numbers"),
        (([float("inf")], [1], [0], 1), "importance must be a list of finite numbers"),
    ],
)
def test_bad_numbers_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"prefix_knapsack: {message}"):
        prefix_knapsack(*given)


def decoder(layers: int, d: int, ff: int, tokens: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs by tensor of a decoder with biases and norms, from the head down."""
    dw, dy = [0, 0], [2 * tokens * d * 50272, 0]
    product, wide = 2 * tokens * d * d, 2 * tokens * d * ff
    for _ in range(layers):
        dw += [0, wide, 0, wide, 0, 0, 0, product, 0, product, 0, product, 0, product, 0, 0]
        dy += [0, 0, wide, 0, wide, 0, 0, 0, product + 4 * tokens**2 * d, 0, 0, 0, 0, 0, 3 * product, 0]
    return np.array(dw), np.array(dy)


@pytest.mark.parametrize("kind", ["decoder", "decoder with flat importances", "unrelated numbers"])
def test_500_tensors_take_less_than_5_ms(kind: str) -> None:
    """The best of several, in CPU time, so that what else the machine does says little."""
    rng = np.random.default_rng(2)
    for share in (0.15, 0.35, 0.6, 0.9):
        if kind == "unrelated numbers":
            dw, dy = rng.integers(1, 10**9, 500), rng.integers(0, 10**9, 500)
            importance = rng.random(500)
        else:
            dw, dy = decoder(31, 2560, 10240)
            spread = 0.01 if kind.endswith("flat importances") else 1.0
            importance = np.exp(spread * rng.normal(size=len(dw)))
        assert len(dw) >= 498
        budget = int(share * (dw.sum() + dy.sum()))
        took = []
        for _ in range(10):
            start = time.process_time()
            found = prefix_knapsack(importance, dw, dy, budget)
            took.append(time.process_time() - start)
        assert found.exact
        assert found.cost <= budget
        assert min(took) < 5e-3


# --- FLOPs ----------------------------------------------------------------------------------------------------------


def tied() -> Net:
    model = net()
    model.head.weight = model.embed.weight
    return model


def shared() -> Net:
    model = net()
    model.layers[3].up_proj.weight = model.layers[1].up_proj.weight
    return model


class Attention(nn.Module):
    """q, k and v meet in products of activations; k and v of one projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.q, self.kv, self.o = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        k, v = self.kv(x).chunk(2, -1)
        return self.o((self.q(x) @ k.mT).softmax(-1) @ v)


class Adapter(nn.Module):
    """LoRA on a frozen product, with a merge of its two factors in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8).requires_grad_(False)
        self.base = nn.Linear(8, 11).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(11, 3))
        self.before = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.before(self.embed(ids)), self.base.weight + self.b @ self.a, self.base.bias)


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 9)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 11, 3, stride=3), nn.Flatten()
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.net(x.reshape(-1, 1, 3, 3)).reshape(*ids.shape, 11)


def hugging(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        t = pytest.importorskip("transformers", reason="pip install transformers")
        torch.manual_seed(0)
        small = {"vocab_size": 11, "attn_implementation": "eager"}
        if kind == "llama":
            config = t.LlamaConfig(
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                **small,
            )
            model: Any = t.LlamaForCausalLM(config)
        else:
            model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=8, n_layer=2, n_head=2, **small))

        class Logits(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, ids: Tensor) -> Tensor:
                return self.model(input_ids=ids).logits

        return Logits()

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    "blocks": net,
    "tied head": tied,
    "shared weight": shared,
    "attention": Attention,
    "adapter": Adapter,
    "convolutions": Image,
    "gpt2": hugging("gpt2"),
    "llama": hugging("llama"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_cost_of_any_set_of_tensors_is_what_torch_counts(name: str) -> None:
    """Measured once with all tensors, then for random sets: equal to the FLOP, and the knapsack's cost is a bound."""
    model = MODELS[name]().eval()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    flops = measure("test", lambda: loss_of(model), params)
    assert set(flops.names) == set(params)
    assert flops.backward == flops.cost(params) == sum(flops.dw) + sum(flops.dy)
    assert flops.backward == backward_flops(lambda: loss_of(model))
    with FlopCounterMode(display=False) as counter:
        loss_of(model)
    assert flops.forward == counter.get_total_flops()
    rng = random.Random(0)
    for i in range(16):
        few = i % 2 or len(params) < 4
        chosen = rng.sample(sorted(params), rng.randint(1, min(3, len(params)) if few else len(params)))
        for n, p in params.items():
            p.requires_grad_(n in chosen)
        assert flops.cost(chosen) == backward_flops(lambda: loss_of(model))
        deepest = max(flops.names.index(n) for n in chosen)
        dw = sum(w for n, w in zip(flops.names, flops.dw, strict=True) if n in chosen)
        assert flops.cost(chosen) <= dw + sum(flops.dy[: deepest + 1])


def test_flops_of_a_chain_of_products_are_the_textbook_ones() -> None:
    """Per product, 2 T n m for the weight and as much for the way down; nothing below the deepest tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7))
    flops = measure("test", lambda: model(torch.randn(3, 4)).square().mean(), dict(model.named_parameters()))
    dw = dict(zip(flops.names, flops.dw, strict=True))
    assert dw == {
        "4.weight": 2 * 3 * 6 * 7,
        "2.weight": 2 * 3 * 5 * 6,
        "0.weight": 2 * 3 * 4 * 5,
        "4.bias": 0,
        "2.bias": 0,
        "0.bias": 0,
    }
    assert [int(n[0]) for n in flops.names] == [4, 4, 2, 2, 0, 0]  # from the output to the input
    assert [sum(flops.dy[i : i + 2]) for i in (0, 2, 4)] == [0, 2 * 3 * 6 * 7, 2 * 3 * 5 * 6]
    assert (flops.forward, flops.fixed) == (2 * 3 * (4 * 5 + 5 * 6 + 6 * 7), 0)


def test_a_node_that_cannot_be_split_counts_in_full() -> None:
    """A function that computes all its gradients whatever is asked for: the cost is a bound, never too little."""

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            x, w = ctx.saved_tensors
            return g @ w.T, x.T @ g

    first, w = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 5))
    params = {"w": w, "first.weight": first.weight, "first.bias": first.bias}
    flops = measure("test", lambda: Both.apply(first(torch.randn(2, 3)), w).sum(), params)
    assert flops.cost(["w"]) == 2 * (2 * 2 * 4 * 5)
    assert flops.cost(params) == flops.backward == 2 * (2 * 2 * 4 * 5) + 2 * 2 * 3 * 4


def test_gradients_that_something_else_needs_are_always_paid_for() -> None:
    """The input requires grad as well: the way down to it is in every budget."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6))
    x = torch.randn(3, 4, requires_grad=True)
    flops = measure("test", lambda: model(x).square().mean(), dict(model.named_parameters()))
    assert flops.fixed == 2 * 3 * (4 * 5 + 5 * 6)
    assert flops.cost([]) == flops.fixed
    assert flops.cost(["0.weight"]) == flops.fixed + 2 * 3 * 4 * 5


def test_reentrant_checkpointing_hides_the_graph_and_is_refused() -> None:
    model = net()

    def closure() -> Tensor:
        x = torch.ones(2, 8, requires_grad=True)
        return torch.utils.checkpoint.checkpoint(model.layers[0], x, use_reentrant=True).sum()

    selector = TensorSelector(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(
        RuntimeError, match=r"TensorSelector.profile: the gradient of layers\.0.* reentrant checkpointing"
    ):
        selector.profile(closure)


# --- importance -----------------------------------------------------------------------------------------------------


def test_importance_of_plain_descent_is_the_squared_gradient() -> None:
    r"""Δw = -η g, so I = η Σ g²."""
    model = net()
    selector = TensorSelector(model, torch.optim.SGD(model.parameters(), lr=0.3))
    found = selector.importance(lambda: loss_of(model))
    loss_of(model).backward()
    for name, p in model.named_parameters():
        assert found[name] == pytest.approx(0.3 * float((p.grad**2).sum()), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("name", MEASURABLE)
def test_importance_is_the_gradient_times_the_next_step(name: str) -> None:
    """With the optimizer's state, learning rate and decay: -Σ g Δw, where Δw is what its next step then does."""
    model = net().double()
    optimizer = OPTIMIZERS[name][0](model.parameters())
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = TensorSelector(model, optimizer).importance(lambda: loss_of(model, 3))
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 3).backward()
    optimizer.step()
    for (n, p), w in zip(model.named_parameters(), before, strict=True):
        assert found[n] == pytest.approx(-float((p.grad * (p.detach() - w)).sum()), rel=1e-6, abs=1e-15)


def test_importance_follows_options_that_are_loaded_or_scheduled() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    selector = TensorSelector(model, optimizer)
    first = selector.importance(lambda: loss_of(model))
    other = torch.optim.SGD(model.parameters(), lr=0.3)
    optimizer.load_state_dict(other.state_dict())  # which replaces the groups
    assert all(
        i == pytest.approx(3 * first[n], rel=1e-3) for n, i in selector.importance(lambda: loss_of(model)).items()
    )


def test_importance_is_how_far_the_loss_falls_by_the_tensor_alone() -> None:
    """To first order: for a small step, the measured fall agrees within a percent."""
    model = net().double()
    selector = TensorSelector(model, torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0))
    found = selector.importance(lambda: loss_of(model))
    before = loss_of(model).item()
    for name, p in model.named_parameters():
        loss_of(model).backward()
        assert p.grad is not None
        with torch.no_grad():
            old = p.clone()
            p -= 1e-6 * torch.sign(p.grad) * (p.grad.abs() > 1e-6)  # Adam's first step, but for its eps
            fall = before - loss_of(model).item()
            p.copy_(old)
        model.zero_grad()
        assert fall == pytest.approx(found[name], rel=1e-2, abs=1e-11)


@pytest.mark.parametrize("name", MEASURABLE)
def test_measuring_changes_nothing(name: str) -> None:
    """Weights, gradients, state, buffers, random generators, hooks, the scheduler: as if it had not been."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    optimizer = OPTIMIZERS[name][0](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    x = torch.randn(8, 4)
    model(x).square().mean().backward()
    optimizer.step()
    scheduler.step()
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    before, buffers = snapshot(model, optimizer), copy.deepcopy(dict(model.named_buffers()))
    rng, options = torch.get_rng_state(), copy.deepcopy(optimizer.state_dict()["param_groups"])
    grads = [p.grad for p in model.parameters()]
    selector = TensorSelector(model, optimizer)
    selector.profile(lambda: model(x).square().mean())
    selector.importance(lambda: model(x).square().mean())
    selector.measure(lambda: model(x).square().mean())
    assert_same(snapshot(model, optimizer), before)
    assert_same(dict(model.named_buffers()), buffers)
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same(optimizer.state_dict()["param_groups"], options)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert not called
    optimizer.step()
    assert called == [1]


# --- the selection --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.4, 0.5, 0.67, 0.8, 1.0])
@pytest.mark.parametrize("name", ["blocks", "tied head", "gpt2"])
def test_the_budget_is_kept_and_reported(name: str, rho: float) -> None:
    """A whole step, both passes counted by torch, costs at most the share rho of a step that trains everything."""
    model = MODELS[name]().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = TensorSelector(model, optimizer, rho=rho)
    report = selector.select(lambda: loss_of(model))
    assert selector.trainable == [n for n, p in model.named_parameters() if p.requires_grad]
    assert set(selector.trainable) == set(report.names)
    with FlopCounterMode(display=False) as forward:
        loss = loss_of(model)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    spent = forward.get_total_flops() + backward.get_total_flops()
    assert (report.forward, report.backward) == (forward.get_total_flops(), backward.get_total_flops())
    assert report.backward <= report.cost <= report.budget
    assert spent <= rho * (report.forward + report.full_backward)
    assert report.rho == pytest.approx(spent / (report.forward + report.full_backward))
    assert report.exact
    assert selector.measure(lambda: loss_of(model)) == (report.forward, report.backward)
    assert f"{report.rho:.1%} of full training" in str(report)
    if rho == 1.0:
        assert set(report.names) == {n for n, i in selector.importance(lambda: loss_of(model)).items() if i > 0}


def test_the_backward_budget_is_the_published_one() -> None:
    """ρ_bp T_bp with ρ_bp = ρ (1 + T_fp / T_bp) - T_fp / T_bp."""
    model = net()
    selector = TensorSelector(model, torch.optim.SGD(model.parameters()), rho=0.6)
    r = selector.select(lambda: loss_of(model))
    t_fp, t_bp = r.forward, r.full_backward
    assert r.budget == int((0.6 * (1 + t_fp / t_bp) - t_fp / t_bp) * t_bp)


def test_the_selection_is_the_best_of_all_sets_of_tensors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(7, 4)
    selector = TensorSelector(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.65)
    report = selector.select(lambda: model(x).square().mean())
    importance = selector.importance(lambda: model(x).square().mean())
    flops = selector.flops
    assert flops is not None
    best = brute_force(
        np.array([importance[n] for n in flops.names]), np.array(flops.dw), np.array(flops.dy), report.budget
    )
    assert report.importance == pytest.approx(best, rel=1e-9)


def test_what_is_not_selected_costs_nothing() -> None:
    """No gradient, no gradient computation (below the deepest tensor none at all), no state."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    full = backward_flops(lambda: loss_of(model))
    model.zero_grad()
    importance = {n: 1.0 if n == "layers.4.up_proj.weight" else 0.0 for n, _ in model.named_parameters()}
    selector = TensorSelector(model, optimizer, rho=0.9)
    selector.profile(lambda: loss_of(model))
    report = selector.select(importance=importance)
    assert report.names == ("layers.4.up_proj.weight",)
    p = model.layers[4].up_proj.weight
    assert state_bytes(optimizer) == 8 * p.numel() + 4
    head, way = 2 * 12 * 8 * 11, BLOCK_DW // 2
    assert backward_flops(lambda: loss_of(model)) == head + way + BLOCK_DW // 2 < full
    assert [q.grad is not None for q in model.parameters()] == [q is p for q in model.parameters()]
    selector.release()
    assert all(q.requires_grad for q in model.parameters())


@pytest.mark.parametrize("name", MEASURABLE)
def test_a_run_resumes_to_the_same_bits_between_selections(name: str) -> None:
    def train(model: Net, optimizer: torch.optim.Optimizer, selector: TensorSelector, first: int, last: int) -> None:
        for step in range(first, last):
            if step % 4 == 0:
                selector.select(lambda step=step: loss_of(model, step))
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()

    def make(seed: int) -> tuple[Net, torch.optim.Optimizer, TensorSelector]:
        model = net(seed=seed)
        optimizer = OPTIMIZERS[name][0](model.parameters())
        return model, optimizer, TensorSelector(model, optimizer, rho=0.7)

    model, optimizer, selector = make(0)
    train(model, optimizer, selector, 0, 6)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), selector.state_dict()], file)
    train(model, optimizer, selector, 6, 13)
    for first in ("optimizer", "selector"):
        file.seek(0)
        weights, state, chosen = torch.load(file, weights_only=True)
        again, resumed, other = make(1)
        again.load_state_dict(weights)
        for what in (first, "selector" if first == "optimizer" else "optimizer"):
            if what == "optimizer":
                resumed.load_state_dict(state)
            else:
                other.load_state_dict(chosen)
        assert isinstance(other.selection, TensorSelection)
        train(again, resumed, other, 6, 13)
        assert_same(snapshot(again, resumed), snapshot(model, optimizer))
        assert other.state_dict() == selector.state_dict()


def test_tensors_without_a_gradient_are_not_selected() -> None:
    model = net()
    selector = TensorSelector(model, torch.optim.AdamW(model.parameters()), rho=1.0)

    def closure() -> Tensor:
        return model.head(model.final(model.layers[0](torch.ones(2, 8)))).square().mean()

    report = selector.select(closure)
    assert not any(n.startswith(("embed", "layers.1", "layers.2")) for n in report.names)
    assert not model.embed.weight.requires_grad


def test_adapters_on_a_frozen_model_are_selected_among() -> None:
    model = Adapter()
    trainable = [p for p in model.parameters() if p.requires_grad]
    selector = TensorSelector(model, SM3(trainable, lr=0.1), rho=0.75)
    report = selector.select(lambda: loss_of(model))
    assert set(report.names) < {"a", "b", "before.weight", "before.bias"}
    assert not model.base.weight.requires_grad


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0, -0.1, 1.5, True, "half", float("nan")])
def test_a_bad_rho_is_refused(rho: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"TensorSelector: rho must be in \(0, 1\], got"):
        TensorSelector(model, torch.optim.SGD(model.parameters()), rho=rho)


def test_steps_inside_of_the_backward_pass_are_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match="TensorSelector: optimizer must not step inside of the backward pass"):
        TensorSelector(model, OPTIMIZERS["AdamW-in-backward"][0](model.parameters()))


def test_bad_selections_are_refused_and_change_nothing() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    loss_of(model).backward()
    optimizer.step()
    selector = TensorSelector(model, optimizer, rho=0.2)
    before = snapshot(model, optimizer)

    def closure() -> Tensor:
        return loss_of(model)

    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"closure must be given to measure FLOPs or importance, got None"):
        selector.select()
    with pytest.raises(ValueError, match=r"closure must return a scalar loss that has a graph.*, got float"):
        selector.select(lambda: 1.0)
    with pytest.raises(ValueError, match=r"closure must return a scalar loss.*, got \[12\], grad_fn None"):
        selector.select(lambda: torch.ones(12))
    with pytest.raises(
        ValueError, match=r"rho must be at least 0\.3\d+ for any tensor to fit \(the forward pass is 0\.3"
    ):
        selector.select(closure)
    with pytest.raises(ValueError, match=r"importance must be above 0 for a tensor, got at most -1.0"):
        selector.select(importance=dict.fromkeys(names, -1.0))
    with pytest.raises(ValueError, match=r"importance must have an entry for each tensor alone, got .*'other'"):
        selector.select(importance={**dict.fromkeys(names, 1.0), "other": 1.0})
    with pytest.raises(ValueError, match=r"importance must be finite, got nan for "):
        selector.select(importance=dict.fromkeys(names, float("nan")))
    with pytest.raises(ZeroDivisionError):
        selector.importance(lambda: 1 / 0)
    nothing = TensorSelector(model, optimizer)
    with pytest.raises(ValueError, match=r"closure must do work that torch's FLOP counter counts, got a loss with 0"):
        nothing.select(lambda: sum(p.sum() for p in model.parameters()))
    assert_same(snapshot(model, optimizer), before)
    assert selector.selection is None


@pytest.mark.parametrize("other", ["rho", "tensors"])
def test_a_state_of_another_run_is_refused_and_changes_nothing(other: str) -> None:
    model = net()
    saved = TensorSelector(model, torch.optim.SGD(model.parameters())).state_dict()
    different = net(layers=5 if other == "rho" else 3)
    optimizer = torch.optim.SGD(different.parameters())
    selector = TensorSelector(different, optimizer, rho=0.9 if other == "rho" else 0.5)
    selector.select(lambda: loss_of(different))
    before = snapshot(different, optimizer)
    with pytest.raises(ValueError, match=f"TensorSelector.load_state_dict: {other} must be the saved run's"):
        selector.load_state_dict(saved)
    with pytest.raises(ValueError, match="state_dict must be one of TensorSelector, got one without 'rho'"):
        selector.load_state_dict({})
    assert_same(snapshot(different, optimizer), before)
