"""The first step's diagnostics: they raise nothing, and find what plays a part in the loss."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import leanops as lo
from leanops.common import seeds as seed_rule
from leanops.optim import MeZO, SeedPool
from leanops.optim.zo import estimate
from leanops.optim.zo.first_step import fingerprint

EPS = 1e-2


def spsa(params: list[nn.Parameter], closure: Callable[[], Tensor], step: int = 0) -> float:
    """The estimate of a step, written by hand: the weights are set, evaluated, and put back."""
    before = [p.detach().clone() for p in params]
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            for i, (p, w) in enumerate(zip(params, before, strict=True)):
                lo.zo_axpy_into_(p, w, seed_rule.derive(0, step, 0), sign * EPS, tensor_ids=[i])
            losses.append(float(closure()))
        for p, w in zip(params, before, strict=True):
            p.copy_(w)
    return float(np.float32((losses[0] - losses[1]) / (2 * EPS)))


def estimates(params: Any, closure: Callable[[], Any], steps: int = 1, **options: Any) -> list[float]:
    opt = MeZO(params, **{"lr": 0.0, "eps": EPS, **options})
    for _ in range(steps):
        opt.step(closure)
    return [float(g) for g in opt.log.scalars().ravel()]


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# --- a diagnostic never raises ----------------------------------------------------------------------------------------


def quantized(config: str, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, Tensor]:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao comes with leanops[bench]")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).to(dtype)
    model[0].requires_grad_(False)
    quantization.quantize_(model[0], getattr(quantization, config)(**options))
    return model, torch.randn(8, 64, dtype=dtype)


TORCHAO = {
    "int8": ("Int8WeightOnlyConfig", torch.float32, {}),
    "int8 in bf16": ("Int8WeightOnlyConfig", torch.bfloat16, {}),
    "int8 activations": ("Int8DynamicActivationInt8WeightConfig", torch.float32, {}),
    "float8": ("Float8WeightOnlyConfig", torch.bfloat16, {}),
    "int4": ("IntxWeightOnlyConfig", torch.float32, {"weight_dtype": torch.int4}),
}


@pytest.mark.parametrize("kind", TORCHAO)
def test_a_head_over_a_quantized_base_takes_a_step_written_by_hand(kind: str) -> None:
    config, dtype, options = TORCHAO[kind]
    model, x = quantized(config, dtype, **options)
    head = list(model[2].parameters())

    def closure() -> Tensor:
        return model(x).float().square().mean()

    wanted = spsa(head, closure)
    assert wanted != 0.0
    for mode in ("scratch", "copy"):
        assert estimates(head, closure, perturb=mode) == [wanted]


def test_a_pool_of_seeds_steps_over_a_quantized_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "SMALL", 0)  # let auto be scratch
    model, x = quantized("Int8WeightOnlyConfig", torch.float32)
    SeedPool(8).step_(model[2], lambda: model(x).square().mean(), 3)


class Refusing(Tensor):
    """A subclass that allows a product with it, and nothing else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.mul:
            raise NotImplementedError(f"{func} is not implemented for Refusing")
        with torch._C.DisableTorchFunctionSubclass():
            return torch.mul(*(a.as_subclass(Tensor) if isinstance(a, Refusing) else a for a in args))


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.strided)


FROZEN: dict[str, Callable[[], tuple[Tensor, Callable[[Tensor], Tensor]]]] = {
    "strided nested": lambda: (nested(), lambda t: torch.stack([u.sum() for u in torch.mul(t, 2.0).unbind()]).sum()),
    "jagged nested": lambda: (
        torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged),
        lambda t: torch.mul(t, 2.0).values().sum(),
    ),
    "quint8": lambda: (
        torch.quantize_per_tensor(torch.randn(4), 0.1, 3, torch.quint8),
        lambda t: torch.dequantize(t).sum(),
    ),
    "meta": lambda: (torch.empty(4, device="meta"), lambda t: torch.ones(torch.add(t, 1.0).shape).sum()),
    "complex": lambda: (torch.randn(4, dtype=torch.complex64).conj(), lambda t: torch.abs(t).sum()),
    "coo": lambda: (torch.randn(4, 4).to_sparse(), lambda t: torch.sparse.mm(t, torch.ones(4, 1)).sum()),
    "csr": lambda: (torch.randn(4, 4).to_sparse_csr(), lambda t: torch.mv(t, torch.ones(4)).sum()),
    "float8": lambda: (torch.randn(4).to(torch.float8_e4m3fn), lambda t: t.float().sum()),
    "a subclass": lambda: (torch.randn(4).as_subclass(Refusing), lambda t: torch.mul(t, 2.0).sum()),
}


@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning", "ignore:.*beta state:UserWarning")
@pytest.mark.parametrize("kind", FROZEN)
def test_a_closure_may_compute_with_tensors_of_any_kind(kind: str) -> None:
    torch.manual_seed(0)
    p, unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    frozen, use = FROZEN[kind]()

    def closure() -> Tensor:
        return p.square().sum() * use(frozen)

    wanted = spsa([p], closure)
    assert estimates([p, unused], closure, perturb="scratch") == [wanted]


def test_a_fingerprint_shows_what_a_tensor_is_made_of() -> None:
    """One changed element shows, in every kind that has values to read."""
    dense = torch.arange(1.0, 5.0)
    made = {
        "dense": lambda t: t,
        "float8": lambda t: t.to(torch.float8_e4m3fn),
        "complex": lambda t: torch.complex(torch.zeros(4), t).conj(),
        "coo": lambda t: t.to_sparse(),
        "csr": lambda t: t.expand(2, 4).to_sparse_csr(),
        "nested": lambda t: torch.nested.nested_tensor([t, t[:2]]),
        "quint8": lambda t: torch.quantize_per_tensor(t, 0.1, 3, torch.quint8),
    }
    other = dense.clone()
    other[1] = 3.5
    for name, make in made.items():
        assert fingerprint(make(dense)) == fingerprint(make(dense)), name
        assert fingerprint(make(dense)) != fingerprint(make(other)), name


# --- memory of a perturbed weight that outlives its evaluation --------------------------------------------------------


class Caching(nn.Module):
    """Keeps what it made of its weight at the first call."""

    def __init__(self, make: Callable[[Tensor], Any], use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(3))
        self.make, self.use = make, use
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.make(self.weight)
        return self.use(x, self.kept) + self.bias


CACHES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor, Any], Tensor]]] = {
    "a view": (lambda w: w.detach().view(-1), lambda x, kept: x @ kept.view(3, 4).T),
    "a slice": (lambda w: w.detach()[1:], lambda x, kept: nn.functional.pad(x @ kept.T, (1, 0))),
    "a transpose": (lambda w: w.t(), lambda x, kept: x @ kept),
    "rows": (lambda w: list(w.unbind()), lambda x, kept: x @ torch.stack(kept).T),
    "another dtype": (
        lambda w: w.detach().view(torch.int32),
        lambda x, kept: x @ kept.view(torch.float32).T,
    ),
    "a function's cache": (lambda w: functools.partial(torch.mm, mat2=w.t()), lambda x, kept: kept(x)),
}


@pytest.mark.parametrize("mode", ["scratch", "auto"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_kept_view_follows_its_weight(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "SMALL", 0)  # let auto be scratch
    torch.manual_seed(0)
    model, x = Caching(*CACHES[kind]), torch.randn(5, 4)
    twin = Caching(*CACHES[kind])
    twin.load_state_dict(model.state_dict())
    opt = MeZO(model.parameters(), lr=1e-2, eps=EPS, perturb=mode)
    other = MeZO(twin.parameters(), lr=1e-2, eps=EPS, perturb="copy")
    with pytest.warns(UserWarning, match=r"still referred to.*: 0\."):
        opt.step(lambda: model(x).square().mean())
    for _ in range(3):
        opt.step(lambda: model(x).square().mean())
    for _ in range(4):
        other.step(lambda: twin(x).square().mean())
    assert opt.log.scalars().tolist() == other.log.scalars().tolist()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))  # between steps, too
        model.weight.zero_()
        assert torch.equal(model(x), model.bias.expand(5, 3))


def test_a_view_that_is_kept_at_a_later_step_follows_its_weight() -> None:
    torch.manual_seed(0)
    model, x = Caching(*CACHES["a view"]), torch.randn(5, 4)

    def closure(keep: bool) -> Tensor:
        if keep:
            return model(x).square().mean()
        return (x @ model.weight.T + model.bias).square().mean()

    opt = MeZO(model.parameters(), lr=0.0, eps=EPS, perturb="scratch")
    for _ in range(3):
        opt.step(lambda: closure(False))
    with pytest.warns(UserWarning, match="still referred to"):
        opt.step(lambda: closure(True))
    wanted = spsa(list(model.parameters()), lambda: closure(False), step=3)
    assert opt.log.scalars()[3, 0] == pytest.approx(wanted, rel=1e-5)


def test_memory_that_a_numpy_array_keeps_stays_valid() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(64))
    kept: list[Any] = []

    def closure() -> Tensor:
        if not kept:
            kept.append(p.detach().numpy())
        return p.sum()

    with pytest.warns(UserWarning, match="NumPy"):
        estimates([p], closure, perturb="scratch")
    gc.collect()
    filler = [torch.zeros(64) for _ in range(1000)]
    seen = torch.empty(64)
    lo.zo_axpy_into_(seen, p.detach(), seed_rule.derive(0, 0, 0), EPS)
    assert np.array_equal(kept[0], seen.numpy())
    assert filler


def test_what_an_evaluation_leaves_in_a_cycle_is_not_taken_for_kept(no_warning: None) -> None:
    p = nn.Parameter(torch.randn(4))

    def closure() -> Tensor:
        cycle: list[Any] = [p.detach()]
        cycle.append(cycle)
        return cycle[0].sum()

    opt = MeZO([p], lr=0.0, perturb="scratch")
    opt.step(closure)
    assert opt._evaluator._perturber.held is None  # type: ignore[union-attr]


def test_a_view_that_an_aborted_evaluation_kept_is_found_by_the_next() -> None:
    torch.manual_seed(0)
    model, x = Caching(*CACHES["a view"]), torch.randn(5, 4)
    fails = True

    def closure() -> Tensor:
        loss = model(x).square().mean()
        if fails:
            raise MemoryError("stop")
        return loss

    opt = MeZO(model.parameters(), lr=0.0, eps=EPS, perturb="scratch")
    with pytest.raises(MemoryError):
        opt.step(closure)
    fails = False
    with pytest.warns(UserWarning, match="still referred to"):
        opt.step(closure)
    assert [float(g) for g in opt.log.scalars()[:, 0]] == [spsa(list(model.parameters()), closure)]


# --- compiled functions -----------------------------------------------------------------------------------------------


class Counting:
    """A compiler backend that counts how often its graphs run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def small() -> tuple[nn.Module, Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Small(), torch.randn(3, 5)


def compiled_in_place(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    model.compile(backend=backend)
    return model


COMPILED: dict[str, Callable[[nn.Module, Any], Callable[[Tensor], Tensor]]] = {
    "module": lambda m, backend: torch.compile(m, backend=backend),
    "function": lambda m, backend: torch.compile(lambda x: m(x), backend=backend),
    "inner module": lambda m, backend: nn.Sequential(torch.compile(m, backend=backend), nn.Identity()),
    "in place": compiled_in_place,
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", COMPILED)
def test_a_compiled_closure_stays_compiled(
    kind: str, warm: bool, no_warning: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "SMALL", 0)  # let auto be scratch
    model, x = small()
    params = list(model.parameters())
    wanted = estimates(params, lambda: model(x).square().mean(), 3, lr=1e-2, perturb="copy")
    model, x = small()
    params = list(model.parameters())
    backend = Counting()
    opt = MeZO(params, lr=1e-2, eps=EPS, model=None if kind == "in place" else model)
    compiled = COMPILED[kind](model, backend)
    if warm:
        with torch.no_grad():
            compiled(x)
        backend.runs = 0
    for _ in range(3):
        opt.step(lambda: compiled(x).square().mean())
    assert backend.runs == 2 * 3 + 1  # the first step evaluates once more, and once as it was written
    assert opt.log.scalars().ravel().tolist() == wanted


def test_a_compiled_closure_that_runs_eagerly_says_so_once(no_warning: None) -> None:
    model, x = small()
    backend = Counting()
    compiled = torch.compile(model, backend=backend)
    opt = MeZO(model.parameters(), lr=1e-2, perturb="scratch")
    with pytest.warns(UserWarning, match=r"torch\.compile.*perturb='copy'"):
        opt.step(lambda: compiled(x).square().mean())
    opt.step(lambda: compiled(x).square().mean())
    assert backend.runs == 0


def test_a_compiled_function_without_weights_does_not_cost_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "SMALL", 0)
    model, x = small()
    loss = torch.compile(lambda y: y.square().mean(), backend="eager")
    opt = MeZO(model.parameters(), lr=0.0)
    with pytest.warns(UserWarning, match=r"torch\.compile"):
        opt.step(lambda: loss(model(x)))
    assert opt._evaluator._perturber.held is None  # type: ignore[union-attr]


def test_a_compiled_step_around_an_eager_closure_is_none_of_a_closure(no_warning: None) -> None:
    model, x = small()
    opt = MeZO(model.parameters(), lr=0.0, perturb="scratch")
    torch.compile(lambda: opt.step(lambda: model(x).sum()), backend="eager")()


# --- two evaluations at the same weights ------------------------------------------------------------------------------


def private_torch(rng: torch.Generator) -> Tensor:
    return torch.rand(4, generator=rng)


def private_numpy(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.random(4, dtype=np.float32))


@pytest.mark.parametrize("mode", ["auto", "scratch", "copy", "inplace"])
@pytest.mark.parametrize("variant", ["spsa", "one_sided", "fzoo"])
def test_a_private_generator_is_noticed(mode: str, variant: str) -> None:
    p = nn.Parameter(torch.randn(4))
    rng = np.random.default_rng(0)
    opt = MeZO([p], lr=0.0, perturb=mode, variant=variant, directions=2 if variant == "fzoo" else 1)
    with pytest.warns(UserWarning, match="at the same weights gave"):
        opt.step(lambda: (p * private_numpy(rng)).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: (p * private_numpy(rng)).sum())  # once a run is enough


def test_another_batch_at_each_call_is_noticed() -> None:
    p = nn.Parameter(torch.randn(4))
    batches = iter(torch.randn(10, 4))
    with pytest.warns(UserWarning, match="another batch"):
        estimates([p], lambda: (p * next(batches)).sum())


def test_a_closure_that_repeats_itself_is_evaluated_once_more_in_the_first_step(no_warning: None) -> None:
    p = nn.Parameter(torch.randn(4))
    for mode in ("auto", "scratch", "copy", "inplace"):
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            return (p * torch.rand(4)).sum()

        opt = MeZO([p], lr=0.0, perturb=mode)
        opt.step(closure)
        assert calls == 3
        opt.step(closure)
        assert calls == 5


def test_other_random_numbers_at_each_call_are_no_surprise_where_they_are_asked_for(no_warning: None) -> None:
    p = nn.Parameter(torch.randn(4))
    estimates([p], lambda: (p * torch.rand(4)).sum(), same_rng=False)


def test_a_last_bit_that_differs_is_no_randomness(no_warning: None) -> None:
    p = nn.Parameter(torch.ones(4))
    jitter = iter([0.0, 1e-7] * 10)
    estimates([p], lambda: p.double().sum() + next(jitter))


def test_hidden_weights_are_held_where_the_closure_is_random() -> None:
    p, unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    rng = torch.Generator().manual_seed(0)
    with (
        pytest.warns(UserWarning, match="at the same weights gave"),
        pytest.warns(UserWarning, match="cannot be told"),
    ):
        estimates([p, unused], lambda: (p * private_torch(rng)).sum(), perturb="scratch")
