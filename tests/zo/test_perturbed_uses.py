"""During evaluations every use of a weight reads round(W + c z), whatever the closure does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zo.runs import DTYPES, bits

import leanops as lo
from leanops.common import seeds as seed_rule
from leanops.optim import MeZO

EPS = 1e-2


def perturbed(p: Tensor, sign: int, tensor_id: int = 0, *, step: int = 0, distribution: str = "gaussian") -> Tensor:
    out = torch.empty_like(p)
    seed = seed_rule.derive(0, step, 0)
    lo.zo_axpy_into_(out, p.detach(), seed, sign * EPS, tensor_ids=[tensor_id], distribution=distribution)
    return out


def evaluate(params: list[nn.Parameter], use: Callable[[], Tensor], **options: Any) -> list[Tensor]:
    """The results of ``use`` at +eps and at -eps, after a check that the weights keep their bits.

    The first step evaluates twice or more at +eps, to find hidden weights and randomness; the last two results count.
    """
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(use().clone())
        return torch.zeros(())

    before = [bits(p) for p in params]
    MeZO(params, lr=0.0, eps=EPS, **options).step(closure)
    assert all(torch.equal(a, bits(p)) for a, p in zip(before, params, strict=True))
    return seen[-2:]


@pytest.mark.parametrize("mode", ["scratch", "copy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_a_use_reads_the_rounded_perturbed_weight(dtype: torch.dtype, distribution: str, mode: str) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 5).to(dtype))
    plus, minus = evaluate([p], lambda: p + 0, distribution=distribution, perturb=mode)
    assert torch.equal(plus, perturbed(p, 1, distribution=distribution))
    assert torch.equal(minus, perturbed(p, -1, distribution=distribution))


USES: dict[str, Callable[[nn.Parameter, nn.Parameter], Tensor]] = {
    "transpose kept": lambda a, b: _kept(a, b, lambda w: w.t()),
    "view kept": lambda a, b: _kept(a, b, lambda w: w.view(-1)),
    "slice kept": lambda a, b: _kept(a, b, lambda w: w[1:]),
    "detach kept": lambda a, b: _kept(a, b, lambda w: w.detach()),
    "data kept": lambda a, b: _kept(a, b, lambda w: w.data),
    "T kept": lambda a, b: _kept(a, b, lambda w: w.T),
    "chunks kept": lambda a, b: _kept(a, b, lambda w: w.chunk(2)[1]),
    "numpy kept": lambda a, b: torch.from_numpy(_kept_raw(a, b, lambda w: w.detach().numpy())),
    "direct numpy kept": lambda a, b: torch.from_numpy(_kept_raw(a, b, lambda w: w.numpy(force=True))),
    "list of both": lambda a, b: torch.cat([a, b]),
    "keyword": lambda a, b: torch.add(input=a, other=b),
    "operator": lambda a, b: a @ b.T,
    "method": lambda a, b: a.mul(b).exp(),
    "functional": lambda a, b: nn.functional.linear(a, b),
    "stacked": lambda a, b: torch.stack((a, b)).sum(0),
    "same twice": lambda a, b: a * a + b,
    "out": lambda a, b: torch.add(a, b, out=torch.empty(4, 3)),
    "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "iteration": lambda a, b: sum(row for row in a) + b[0],
    "shape getters": lambda a, b: torch.full(a.shape, float(a.numel() + len(b) + a.size(0) + a.stride(0))),
    "like": lambda a, b: torch.zeros_like(a) + b.new_ones(b.shape) + a.requires_grad,
    "deep copy": lambda a, b: __import__("copy").deepcopy(a).detach() + b,
}


def _kept(a: nn.Parameter, b: nn.Parameter, view: Callable[[Tensor], Tensor]) -> Tensor:
    """A view of a is read after a use of b, which must not take the view's scratch memory."""
    held = view(a)
    other = b * 2
    return held.reshape(-1)[:3] + other[0]


def _kept_raw(a: nn.Parameter, b: nn.Parameter, view: Callable[[Tensor], Any]) -> Any:
    held = view(a)
    other = (b * 2).numpy()
    return held + other


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_every_kind_of_use_sees_the_perturbed_weights(use: Callable[[Any, Any], Tensor]) -> None:
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
    results = evaluate([a, b], lambda: use(a, b), perturb="scratch")
    for sign, seen in zip((1, -1), results, strict=True):
        with torch.no_grad():
            wanted = use(nn.Parameter(perturbed(a, sign, 0)), nn.Parameter(perturbed(b, sign, 1)))
        assert torch.equal(seen, wanted)


MODULES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "linear": lambda: (nn.Linear(5, 3), (torch.randn(4, 5),)),
    "conv": lambda: (nn.Conv2d(2, 3, 3), (torch.randn(1, 2, 6, 6),)),
    "channels last": lambda: (
        nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last),
        (torch.randn(1, 2, 6, 6).to(memory_format=torch.channels_last),),
    ),
    "embedding": lambda: (nn.Embedding(7, 3), (torch.tensor([[1, 2], [6, 1]]),)),
    "lstm": lambda: (nn.LSTM(3, 4, 2), (torch.randn(5, 2, 3),)),
    "attention": lambda: (nn.MultiheadAttention(8, 2).eval(), (torch.randn(3, 2, 8),) * 3),
    "transformer": lambda: (nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (torch.randn(2, 5, 8),)),
    "norms": lambda: (nn.Sequential(nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(2, 6)), (torch.randn(4, 6),)),
    "weight norm": lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), (torch.randn(4, 5),)),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_scratch_and_copy_agree_on_modules(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    params = list(model.parameters())

    def use() -> Tensor:
        out = model(*inputs)
        return out[0] if isinstance(out, tuple) else out

    scratch = evaluate(params, use, perturb="scratch")
    copy = evaluate(params, use, perturb="copy")
    assert all(map(torch.equal, scratch, copy))
    assert not torch.equal(scratch[0], scratch[1])


@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
def test_an_embedding_perturbs_only_the_rows_that_are_looked_up(ids: torch.dtype, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(40_000, 4)
    tokens = torch.tensor([[5, 39_999, 5], [0, 17, 5]], dtype=ids)
    sizes: list[int] = []
    from leanops.optim.zo.strategy import Strategy

    original = Strategy.prepared

    def noting(self: Any, *args: Any) -> Any:
        write = original(self, *args)

        def noted(outs: list[Tensor], *rest: Any) -> None:
            sizes.append(sum(t.numel() for t in outs))
            write(outs, *rest)

        return noted

    monkeypatch.setattr(Strategy, "prepared", noting)
    plus, minus = evaluate([table.weight], lambda: table(tokens), perturb="scratch")
    assert sizes == [4 * 4, 4 * 4, 4 * 4]
    assert torch.equal(plus, nn.functional.embedding(tokens, perturbed(table.weight, 1)))
    assert torch.equal(minus, nn.functional.embedding(tokens, perturbed(table.weight, -1)))
    with pytest.raises(IndexError):
        evaluate([table.weight], lambda: table(torch.tensor([-1])), perturb="scratch")


def test_tied_weights_are_perturbed_once() -> None:
    torch.manual_seed(0)
    table, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = table.weight
    tokens = torch.tensor([1, 8, 3])
    plus, _ = evaluate([table.weight], lambda: head(table(tokens)), perturb="scratch")
    w = perturbed(table.weight, 1)
    assert torch.equal(plus, nn.functional.linear(nn.functional.embedding(tokens, w), w))


def test_scratch_is_as_large_as_the_largest_use() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(20)])
    opt = MeZO(model.parameters(), perturb="scratch")
    x = torch.randn(2, 32)
    opt.step(lambda: model(x).sum())
    arena = opt._evaluator._perturber.arenas[torch.device("cpu")]
    assert arena._buffer.numel() == 4 * (32 * 32 + 32)


class Hidden(nn.Module):
    """A model that uses its weight through an older view, which no torch function connects with the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Parameter(torch.randn(4))
        self.weight = nn.Parameter(torch.randn(4))
        self.unused = nn.Parameter(torch.randn(4))
        self.alias = self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.alias + self.seen).sum()


def test_hidden_weights_are_found_and_perturbed_in_place() -> None:
    torch.manual_seed(0)
    model, x = Hidden(), torch.randn(4)
    before = {n: bits(p) for n, p in model.named_parameters()}
    opt = MeZO(model.parameters(), lr=0.0, eps=EPS, model=model, perturb="scratch")
    seen: list[float] = []

    def closure() -> Tensor:
        seen.append(float(model(x)))
        return model(x)

    with pytest.warns(UserWarning, match=r"without passing a torch function.*weight"):
        opt.step(closure)
    opt.step(closure)
    for step, (plus, minus) in enumerate((seen[-4:-2], seen[-2:])):
        for sign, value in ((1, plus), (-1, minus)):
            w = {n: perturbed(p, sign, i, step=step) for i, (n, p) in enumerate(model.named_parameters())}
            assert value == float((x * w["weight"] + w["seen"]).sum())
    assert all(torch.equal(bits(p), before[n]) for n, p in model.named_parameters())


def test_an_unused_weight_is_not_taken_for_a_hidden_one() -> None:
    p, unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    opt = MeZO([p, unused], lr=0.0, perturb="scratch")
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return p.sum()

    opt.step(closure)
    assert calls == 3
    assert opt._evaluator._perturber.held is None
    opt.step(closure)
    assert calls == 5


def test_a_hidden_weight_is_found_although_the_loss_is_coarse() -> None:
    """The loss is a count that stays the same. Intermediate results show that the weight takes part."""
    torch.manual_seed(0)
    model, x = Hidden(), torch.randn(4)
    opt = MeZO(model.parameters(), lr=0.0, model=model, perturb="scratch")
    with pytest.warns(UserWarning, match="weight"):
        opt.step(lambda: (torch.mul(model(x), 1.0) > -1e9).sum())


def test_scripted_and_compiled_modules_see_the_perturbed_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5)
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    params = list(plain.parameters())
    wanted = evaluate(params, lambda: plain(x), perturb="copy")
    scripted = torch.jit.trace(plain, x, check_trace=False)
    compiled = torch.compile(plain, backend="eager")
    with pytest.warns(UserWarning, match="weight|0"):
        got = evaluate(params, lambda: scripted(x), perturb="scratch")
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(got, wanted, strict=True))
    assert all(map(torch.equal, evaluate(params, lambda: compiled(x), perturb="scratch"), wanted))
    opt = MeZO(params, model=compiled)
    opt.step(lambda: compiled(x).sum())
    assert type(opt._evaluator._perturber).__name__ == "Copy"


def measured(model: nn.Module, closure: Callable[[], Tensor], steps: int = 1, **options: Any) -> list[float]:
    opt = MeZO(model.parameters(), eps=EPS, **options)
    for _ in range(steps):
        opt.step(closure)
    return opt.log.scalars().ravel().tolist()


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x[0]),
    "hessian": lambda f, x: torch.func.hessian(lambda y: f(y).sum())(x[0]),
    "functional_call": lambda f, x: torch.func.functional_call(f, dict(f.named_parameters()), (x,)),
}


@pytest.mark.parametrize("name", [*TRANSFORMS, "autograd"])
def test_a_closure_may_differentiate(name: str) -> None:
    """It differentiates by its inputs. The graph holds each use of a weight with the perturbed value."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(6, 4)

    def closure() -> Tensor:
        if name != "autograd":
            return TRANSFORMS[name](model, x).square().mean()
        with torch.enable_grad():
            y = x.clone().requires_grad_()
            return torch.autograd.grad(model(y).sum(), y)[0].square().mean()

    scratch, copied = (measured(model, closure, lr=0.0, perturb=mode) for mode in ("scratch", "copy"))
    assert scratch[0] != 0.0
    assert scratch == pytest.approx(copied, rel=1e-4)


@pytest.mark.parametrize("mode", ["scratch", "copy", "inplace"])
@pytest.mark.parametrize("variant", ["spsa", "one_sided", "fzoo", "hizoo"])
def test_autocast_around_the_step_equals_autocast_around_the_model(mode: str, variant: str) -> None:
    """autocast caches casts of the weights, and a cached cast must not outlive its evaluation."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))

    def run(outside: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        inner, outer = (torch.autocast("cpu", torch.bfloat16, enabled=on) for on in (not outside, outside))

        def closure() -> Tensor:
            if outside:
                return model(x).float().square().mean()
            with inner:
                return model(x).float().square().mean()

        with outer:
            directions = 2 if variant == "fzoo" else 1
            return measured(model, closure, 3, lr=1e-2, perturb=mode, variant=variant, directions=directions)

    assert run(True) == run(False)


@pytest.mark.parametrize("mode", ["scratch", "copy"])
def test_the_default_device_changes_nothing(mode: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    wanted = measured(model, lambda: model(x).sum(), lr=0.0, perturb=mode)
    with torch.device("meta"):
        assert measured(model, lambda: model(x).sum(), lr=0.0, perturb=mode) == wanted


@pytest.mark.parametrize("mode", ["scratch", "copy"])
def test_a_step_inside_a_compiled_function_runs_eagerly_and_calls_compiled_models(mode: str) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *args: graphs.append(graph) or graph(*args)

    torch._dynamo.reset()
    model = nn.Linear(5, 2)
    start = bits(model.weight)
    compiled, x = torch.compile(model, backend=backend), torch.randn(3, 5)
    opt = MeZO(model.parameters(), lr=1e-2, perturb=mode)
    torch.compile(lambda: opt.step(lambda: compiled(x).square().mean()), backend="eager")()
    assert opt.steps == 1
    assert not torch.equal(bits(model.weight), start)
    assert len(graphs) == (3 if mode == "copy" else 0)  # scratch perturbs uses in eager functions alone


def test_non_contiguous_and_empty_parameters() -> None:
    p = nn.Parameter(torch.randn(6, 5).t()[:, ::2])
    empty = nn.Parameter(torch.empty(0, 3))
    before = p.detach().clone()
    plus, minus = evaluate([p, empty], lambda: p + empty.sum())
    assert torch.equal(plus, perturbed(p.contiguous(), 1))
    assert torch.equal(minus, perturbed(p.contiguous(), -1))
    MeZO([p, empty], lr=1.0).step(lambda: p.sum() + empty.sum())
    assert not torch.equal(p, before)
