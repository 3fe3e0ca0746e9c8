"""torch.compile(opt.step): one graph, which serves every learning rate and every momentum above 0."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leanops.optim import SM3

BF16, F32, I8 = torch.bfloat16, torch.float32, torch.int8


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(module)
        return module.forward

    def operators(self) -> list[list[str]]:
        return [[str(n.target) for n in g.graph.nodes if "leanops" in str(n.target)] for g in self.graphs]


def pair(**options: Any) -> tuple[list[nn.Parameter], SM3, list[nn.Parameter], SM3]:
    """Two optimizers over equal parameters in two groups: one is for compilation, the other runs eagerly."""
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=g) for s in [(6, 5), (4,), (), (3, 2, 4), (0, 3)]]
    values += [torch.randn(7, 3, generator=g).to(BF16)]

    def make() -> tuple[list[nn.Parameter], SM3]:
        ps = [nn.Parameter(v.clone()) for v in values]
        return ps, SM3([{"params": ps[:2], "momentum": 0.5}, {"params": ps[2:]}], **copy.deepcopy(options))

    return *make(), *make()


def set_grads(params: list[nn.Parameter], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)


def same(a: SM3, b: SM3) -> bool:
    pairs = zip(a.state.values(), b.state.values(), strict=True)
    return all(s.keys() == t.keys() and all(torch.equal(s[k], t[k]) for k in s) for s, t in pairs)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum_dtype": I8, "stochastic_rounding": True, "weight_decay": 0.1},
    {"beta": 0.9, "lr": torch.tensor(0.1), "capturable": True},
    {"maximize": True, "decoupled": False, "weight_decay": 0.1},
    {"momentum_on": "gradient_unpublished", "momentum_dtype": I8, "capturable": True, "weight_decay": 0.1},
]


@pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler.step:UserWarning"
)  # the scheduler wraps step after it was compiled
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_graph_without_breaks_for_every_learning_rate(options: dict[str, Any]) -> None:
    params, opt, others, plain = pair(**options)
    backend = Backend()
    step = torch.compile(opt.step, fullgraph=True, backend=backend)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (opt, plain)]
    for i in range(5):
        set_grads(params, i)
        set_grads(others, i)
        step()
        plain.step()
        if i == 3:  # and by hand
            for o in (opt, plain):
                for group in o.param_groups:
                    rate = group["lr"]
                    group["lr"] = rate.fill_(0.25) if isinstance(rate, Tensor) else 0.25
        else:
            for s in schedules:
                s.step()
        assert all(map(torch.equal, params, others)), i
        assert same(opt, plain)
    assert len(backend.graphs) == 1
    assert backend.operators()[0].count("leanops._sm3_compiled_step_") == 2  # one a group


def test_a_scheduler_made_before_compilation_adds_no_graph() -> None:
    """A scheduler wraps ``step``. torch.compile skips the wrapper and compiles the step inside it."""
    params, opt, *_ = pair()
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.7)
    backend = Backend()
    step = torch.compile(opt.step, backend=backend)
    for i in range(4):
        set_grads(params, i)
        step()
        schedule.step()
    assert backend.operators() == [["leanops._sm3_lr", "leanops._sm3_momentum", "leanops._sm3_compiled_step_"] * 2]


@pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler.step:UserWarning"
)  # the scheduler wraps step after it was compiled
def test_a_schedule_of_the_momentum_adds_no_graph() -> None:
    params, opt, others, plain = pair(momentum_dtype=I8)
    backend = Backend()
    step = torch.compile(opt.step, fullgraph=True, backend=backend)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=9) for o in (opt, plain)]
    for i in range(7):
        if i == 4:  # momentum 0 for a step, set by hand
            for o in (opt, plain):
                o.param_groups[0]["momentum"] = 0.0
        set_grads(params, i)
        set_grads(others, i)
        step()
        plain.step()
        assert all(map(torch.equal, params, others)), i
        assert same(opt, plain)
        for s in schedules:
            s.step()
    assert len(backend.graphs) == 1


def test_momentum_that_begins_later_is_a_second_graph() -> None:
    params, opt, others, plain = pair(momentum=0.0)
    backend = Backend()
    step = torch.compile(opt.step, fullgraph=True, backend=backend)
    for i, momentum in enumerate((0.0, 0.0, 0.5, 0.9)):
        for ps, o in ((params, opt), (others, plain)):
            set_grads(ps, i)
            o.param_groups[1]["momentum"] = momentum
            o.step() if o is plain else step()
        assert all(map(torch.equal, params, others)), i
        assert same(opt, plain)
    assert len(backend.graphs) == 2


_OF_GRADIENT = {"momentum_on": "gradient_unpublished", "decoupled": False, "weight_decay": 0.1, "lr": torch.tensor(0.1)}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # compiled before it looked
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("eager", {"momentum_dtype": I8, "weight_decay": 0.1, "stochastic_rounding": True}),
        ("eager", _OF_GRADIENT),
        ("inductor", _OF_GRADIENT),
    ],
    ids=str,
)
def test_a_warm_up_of_the_covers_is_a_graph_of_its_own(backend: str, options: dict[str, Any]) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    params, opt, others, plain = pair(cover_warmup=3, **options)
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(opt.step, fullgraph=True, backend=counter)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (opt, plain)]
    for i in range(6):
        for ps, o in ((params, opt), (others, plain)):
            set_grads(ps, i)
            o.grad_scale, o.found_inf = torch.tensor(4.0), torch.tensor(float(i == 1))
        step()
        plain.step()
        assert all(map(torch.equal, params, others)), i
        assert same(opt, plain), i
        for s in schedules:
            s.step()
    assert counter.frame_count == 2


def test_a_warm_up_that_begins_or_ends_otherwise_is_seen_by_a_compiled_step() -> None:
    params, opt, others, plain = pair(cover_warmup=2)
    for o in (opt, plain):
        o.param_groups[0]["momentum"] = 0.0
    both = ((params, opt), (others, plain))
    backend = Backend()
    step = torch.compile(opt.step, fullgraph=True, backend=backend)

    def check(times: int = 1) -> None:
        for i in range(times):
            for ps, _ in both:
                set_grads(ps, i)
            step()
            plain.step()
            assert all(map(torch.equal, params, others))
            assert same(opt, plain)

    check(1)
    for ps, o in both:  # state of one parameter that is made anew
        o.state[ps[0]] = {}
    check(4)
    for _, o in both:  # a state from within the warm-up, with the same entries
        state = o.state_dict()
        for entry in state["state"].values():
            entry["step"] = torch.tensor(1.0)
        o.load_state_dict(state)
    check(2)
    for _, o in both:  # another number of steps
        o.param_groups[1]["cover_warmup"] = 7
    check(4)
    for _, o in both:
        o.param_groups[1]["cover_warmup"] = 0
    check(2)


def test_inductor_gives_the_same_bits_from_one_compilation() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    params, opt, others, plain = pair(momentum_dtype=I8, momentum_on="gradient_unpublished")
    counter = CompileCounterWithBackend("inductor")
    step = torch.compile(opt.step, fullgraph=True, backend=counter)
    for i in range(4):
        set_grads(params, i)
        set_grads(others, i)
        opt.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.1 / (i + 1)
        step()
        plain.step()
    assert counter.frame_count == 1
    assert all(map(torch.equal, params, others))
    assert same(opt, plain)


def test_a_compiled_step_uses_state_options_and_groups_that_were_replaced() -> None:
    params, opt, others, plain = pair(momentum_dtype=I8)
    step = torch.compile(opt.step, fullgraph=True, backend=Backend())
    both = ((params, opt), (others, plain))

    def check() -> None:
        for ps, _ in both:
            set_grads(ps, 1)
        step()
        plain.step()
        assert all(map(torch.equal, params, others))
        assert same(opt, plain)

    check()
    for ps, o in both:  # replaced entries
        o.state[ps[0]]["cover"] = o.state[ps[0]]["cover"] * 2
        o.state[ps[1]]["step"] = torch.tensor(17.0)
    check()
    for _, o in both:  # options
        o.param_groups[0]["momentum"] = 0.25
        o.param_groups[1]["weight_decay"] = 0.5
    check()
    for ps, o in both:  # state that was dropped
        o.state[ps[3]] = {}
    check()
    opt.load_state_dict(copy.deepcopy(plain.state_dict()))
    check()
    extra = [nn.Parameter(torch.ones(3, 2)) for _ in both]
    for (ps, o), p in zip(both, extra, strict=True):
        o.add_param_group({"params": [p], "lr": 0.5})
        ps.append(p)
    check()
    for ps, _ in both:  # a parameter without gradient
        set_grads(ps, 2)
        ps[4].grad = ps[0].grad = None
    step()
    plain.step()
    assert all(map(torch.equal, params, others))
    assert same(opt, plain)


def test_compiled_and_plain_steps_may_alternate() -> None:
    params, opt, others, plain = pair()
    backend = Backend()
    step = torch.compile(opt.step, fullgraph=True, backend=backend)
    for i in range(6):
        set_grads(params, i)
        set_grads(others, i)
        opt.step() if i % 2 else step()
        plain.step()
    assert all(map(torch.equal, params, others))
    assert same(opt, plain)
    assert len(backend.graphs) == 1


def test_more_than_one_optimizer_can_be_compiled() -> None:
    for options in OPTIONS:
        torch._dynamo.reset()  # torch keeps eight graphs of a function
        for seed in (0, 1):
            params, opt, others, plain = pair(**options, seed=seed)
            step = torch.compile(opt.step, fullgraph=True, backend=Backend())
            for i in range(3):
                set_grads(params, i)
                set_grads(others, i)
                step()
                plain.step()
                assert all(map(torch.equal, params, others)), (options, seed, i)
            assert same(opt, plain)


def test_a_gradient_scaler_works_through_a_compiled_step() -> None:
    params, opt, others, plain = pair()
    compiled = torch.compile(opt.step, fullgraph=True, backend=Backend())
    for i, found in enumerate((0.0, 1.0, 0.0)):
        for ps, o in ((params, opt), (others, plain)):
            set_grads(ps, i)
            o.grad_scale, o.found_inf = torch.tensor(4.0), torch.tensor(found)
        compiled()
        plain.step()
    assert all(map(torch.equal, params, others))
    assert same(opt, plain)
    assert float(opt.state[params[0]]["step"]) == 2


def test_a_whole_training_step_compiles() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    plain = copy.deepcopy(model)
    opt, ref = SM3(model.parameters(), lr=0.05), SM3(plain.parameters(), lr=0.05)
    x = torch.randn(32, 4)

    def train(m: nn.Module, o: SM3) -> Tensor:
        loss = (m(x) - x.sum(1, keepdim=True)).pow(2).mean()
        loss.backward()
        o.step()
        o.zero_grad()
        return loss

    compiled = torch.compile(train, backend="aot_eager")  # backward() is a break of the graph in torch itself
    first, last = 0.0, 0.0
    for _ in range(30):
        last = compiled(model, opt).item()
        train(plain, ref)
        first = first or last
    assert last < 0.3 * first
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_a_compiled_step_refuses_what_a_plain_step_refuses() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    opt = SM3(table.parameters())
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(Exception, match="SM3 does not support sparse gradients; parameter 0"):
        torch.compile(opt.step, fullgraph=True, backend=Backend())()
    assert torch.equal(table.weight, before)

    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = SM3([w])
    step = torch.compile(opt.step, fullgraph=True, backend=Backend())
    step()
    before = w.detach().clone()
    for name, value, error in (
        ("lr", torch.zeros(2), "lr must be 1-element, got shape .2."),
        ("lr", "high", "lr must be a number or a one-element tensor, got 'high'"),
        ("momentum", 1.5, r"momentum must be in \[0, 1\), got 1.5"),
    ):
        kept, opt.param_groups[0][name] = opt.param_groups[0][name], value
        # a graph that raises leaves grad mode as the step set it
        with torch.enable_grad(), pytest.raises(Exception, match=f"SM3: (Tensor )?{error}"):
            step()
        opt.param_groups[0][name] = kept
        assert torch.equal(w, before)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_bad_number_in_a_later_group_leaves_the_earlier_groups_unchanged(backend: str) -> None:
    """Inductor reads the numbers of a group after it has moved the group before."""
    params, opt, *_ = pair()
    step = torch.compile(opt.step, fullgraph=True, backend=backend)
    set_grads(params, 0)
    step()
    before = [p.detach().clone() for p in params], copy.deepcopy([dict(s) for s in opt.state.values()])
    group = opt.param_groups[1]
    for name, value, error in (("lr", "high", "lr must be a number"), ("momentum", 1.5, "momentum must be in")):
        kept, group[name] = group[name], value
        with torch.enable_grad(), pytest.raises(Exception, match=f"SM3: {error}"):
            step()
        group[name] = kept
        assert all(map(torch.equal, params, before[0]))
        assert all(torch.equal(s[k], then[k]) for s, then in zip(opt.state.values(), before[1], strict=True) for k in s)
