"""A step changes random generators and buffers as one forward pass does."""

# ruff: noqa: NPY002 (NumPy's global generator is what these tests are about)
from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from leanops.optim import MeZO, SeedPool, ZoLog, replay_
from leanops.optim.zo import estimate
from leanops.optim.zo.forward_state import Generators, modules_of

MODES = ("auto", "scratch", "copy", "inplace")
VARIANTS: dict[str, dict[str, Any]] = {
    "spsa": {},
    "one_sided": {},
    "fzoo": {"directions": 2},
    "hizoo": {},
}


# --- generators -------------------------------------------------------------------------------------------------------

DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(4),
    "numpy": lambda: np.random.rand(4),
    "one numpy normal": lambda: np.random.randn(),
    "three numpy normals": lambda: np.random.randn(3),
    "random": lambda: random.random(),
    "random normal": lambda: random.gauss(0.0, 1.0),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", DRAWS)
def test_evaluations_of_a_step_draw_the_same_and_the_state_advances_once(kind: str, mode: str) -> None:
    draw = DRAWS[kind]

    def seed() -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)

    seed()
    wanted = [torch.as_tensor(draw()).double() for _ in range(4)]
    p = nn.Parameter(torch.randn(4))
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(torch.as_tensor(draw()).double())
        return p.sum()

    opt = MeZO([p], lr=0.0, perturb=mode)
    seed()
    for step in range(3):
        seen.clear()
        opt.step(closure)
        assert len(seen) >= 2
        assert all(torch.equal(s, wanted[step]) for s in seen)
    assert torch.equal(torch.as_tensor(draw()).double(), wanted[3])


def test_a_closure_may_begin_to_draw_from_numpy_at_a_later_step() -> None:
    p = nn.Parameter(torch.randn(4))
    seen: list[float] = []
    opt = MeZO([p], lr=0.0)

    def closure(draws: bool) -> Tensor:
        if draws:
            seen.append(np.random.rand())
        return p.sum()

    opt.step(lambda: closure(False))
    np.random.seed(0)
    wanted = np.random.rand(3)
    np.random.seed(0)
    for step in range(3):
        seen.clear()
        opt.step(lambda: closure(True))
        assert seen == [wanted[step]] * 2


def test_numpy_generators_of_any_kind_are_restored() -> None:
    usual = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        generators = Generators()
        for _ in range(2):
            generators.save([])
            first = np.random.rand(3).tolist(), np.random.randn()
            generators.restore()
            assert (np.random.rand(3).tolist(), np.random.randn()) == first
    finally:
        np.random.set_bit_generator(usual)


def test_masks_drawn_by_numpy_are_the_same_in_all_evaluations_of_a_step() -> None:
    """Wav2Vec2 masks its input in training by NumPy's global generator."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.5,
        mask_time_length=2,
    )
    model = transformers.Wav2Vec2Model(config).train()
    audio = torch.randn(2, 1000)
    losses: list[float] = []

    def closure() -> Tensor:
        loss = model(audio).last_hidden_state[..., 0].square().sum()
        losses.append(float(loss))
        return loss

    np.random.seed(0)
    with torch.no_grad():
        torch.manual_seed(0)
        one = float(closure())
        torch.manual_seed(0)
        other = float(closure())
    assert abs(one - other) > 1e-2 * one  # two calls draw two masks
    for mode in MODES:
        losses.clear()
        opt = MeZO(model.parameters(), lr=0.0, eps=1e-6, perturb=mode, model=model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            opt.step(closure)
        assert max(losses) - min(losses) < 1e-3 * one


# --- buffers ----------------------------------------------------------------------------------------------------------


def with_batch_norm() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
    return model.train(), torch.randn(16, 5)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def same_buffers(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("pass_model", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_evaluation_of_a_step_moves_running_statistics(variant: str, mode: str, pass_model: bool) -> None:
    model, x = with_batch_norm()
    start = buffers(model)
    seen: list[dict[str, Tensor]] = []
    after: list[dict[str, Tensor]] = []

    def closure() -> Tensor:
        seen.append(buffers(model))
        loss = model(x).square().mean()
        after.append(buffers(model))
        return loss

    model_option = {"model": model} if pass_model else {}
    opt = MeZO(model.parameters(), lr=1e-3, perturb=mode, variant=variant, **VARIANTS[variant], **model_option)
    for step in range(3):
        seen.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            opt.step(closure)
        assert all(same_buffers(s, start) for s in seen)
        start = buffers(model)
        assert same_buffers(start, after[-1])
        assert int(start["1.num_batches_tracked"]) == step + 1


@pytest.mark.parametrize("pass_model", [True, False])
def test_running_statistics_are_not_taken_for_hidden_weights(pass_model: bool) -> None:
    """The search repeats an evaluation because of the unused weight; both start from the same statistics."""
    model, x = with_batch_norm()
    model.register_parameter("unused", nn.Parameter(torch.randn(3)))
    opt = MeZO(model.parameters(), lr=0.0, perturb="scratch", model=model if pass_model else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        opt.step(lambda: model(x).square().mean())
    assert opt._evaluator._perturber.held is None  # type: ignore[union-attr]


CLOSURES: dict[str, Callable[[nn.Module, Tensor], Callable[[], Tensor]]] = {
    "a free variable": lambda model, x: lambda: model(x).mean(),
    "a default": lambda model, x: lambda m=model: m(x).mean(),
    "a partial": lambda model, x: functools.partial(lambda m: m(x).mean(), model),
    "an attribute": lambda model, x: Trainer(model, x).loss,
    "an item": lambda model, x: lambda parts={"model": [model]}: parts["model"][0](x).mean(),
    "a function of a function": lambda model, x: functools.wraps(print)(lambda: Trainer(model, x).loss()),
}


class Trainer:
    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x

    def loss(self) -> Tensor:
        return self.model(self.x).mean()


@pytest.mark.parametrize("kind", CLOSURES)
def test_modules_are_found_by_what_a_closure_refers_to(kind: str) -> None:
    model, x = with_batch_norm()
    assert modules_of(CLOSURES[kind](model, x)) == [model]


def test_the_search_for_modules_survives_any_object() -> None:
    class Proxy:
        @property
        def __class__(self) -> Any:  # type: ignore[override]
            raise RuntimeError("a proxy of nothing")

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("a proxy of nothing")

    loop: list[Any] = [Proxy(), np, torch, 3, None, iter([]), object()]
    loop.append(loop)
    unset: Tensor

    def closure() -> Any:
        return loop, unset

    assert modules_of(closure) == []
    if loop is None:
        unset = torch.ones(1)


class Counter(nn.Module):
    """Buffers that a forward pass replaces, makes, and writes through ``data``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("made", None)
        self.register_buffer("alias", self.weight.detach())
        self.register_buffer("table", torch.randn(600, 600))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.average.data.mul_(0.9).add_(x.mean(0))
        self.made = self.average * 2 if self.made is None else self.made + 1
        return (x * self.weight).sum() + self.average.sum() + self.made.sum() + self.calls + self.table[0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_buffers_of_any_kind_are_those_of_one_evaluation(mode: str) -> None:
    torch.manual_seed(0)
    model, x = Counter(), torch.randn(3, 4)
    torch.manual_seed(0)
    twin = Counter()
    opt = MeZO(model.parameters(), lr=0.0, perturb=mode, model=model)
    for _ in range(3):
        opt.step(lambda: model(x))
        with torch.no_grad():
            twin(x)
        changed, wanted = buffers(model), buffers(twin)
        if mode == "inplace":  # it does not restore the weights to the bit
            torch.testing.assert_close(changed.pop("alias"), wanted.pop("alias"))
        assert same_buffers(changed, wanted)
        assert model.alias.data_ptr() == model.weight.data_ptr()


@pytest.mark.parametrize("mode", ["scratch", "copy"])
def test_a_step_that_fails_leaves_the_buffers(mode: str) -> None:
    model, x = with_batch_norm()
    start = buffers(model)
    opt = MeZO(model.parameters(), lr=1e-3, perturb=mode)
    calls = 0

    def closure(fail_at: int) -> Tensor:
        nonlocal calls
        calls += 1
        loss = model(x).square().mean()
        if calls == fail_at:
            raise RuntimeError("stop")
        return loss

    for fail_at in (1, 2, 3):
        calls = 0
        with pytest.raises(RuntimeError, match="stop"):
            opt.step(lambda fail_at=fail_at: closure(fail_at))  # type: ignore[misc]
        assert same_buffers(buffers(model), start)
    with pytest.raises(FloatingPointError):
        opt.step(lambda: model(x).square().mean() * float("nan"))
    assert same_buffers(buffers(model), start)


def test_a_pool_of_seeds_moves_running_statistics_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for small in (0, 1 << 20):  # scratch, copy
        monkeypatch.setattr(estimate, "SMALL", small)
        model, x = with_batch_norm()
        pool = SeedPool(8)
        for _ in range(2):
            pool.step_(model, lambda model=model, x=x: model(x).square().mean(), 3)
        assert int(model[1].num_batches_tracked) == 2


def test_replay_says_which_buffers_it_does_not_restore(tmp_path: Any) -> None:
    model, x = with_batch_norm()
    opt = MeZO(model.parameters(), lr=1e-3, model=model, log_file=tmp_path / "run.zolog")
    for _ in range(3):
        opt.step(lambda: model(x).square().mean())
    opt.log.close()
    names = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert ZoLog.load(tmp_path / "run.zolog").header["buffers"] == names
    start, _ = with_batch_norm()
    with pytest.warns(UserWarning, match=r"buffers.*1\.running_mean"):
        replay_(start, tmp_path / "run.zolog")
    assert all(map(torch.equal, start.parameters(), model.parameters()))

    resumed, _ = with_batch_norm()
    resumed.load_state_dict(model.state_dict())
    again = MeZO(resumed.parameters(), lr=1e-3, model=resumed)
    again.load_state_dict(opt.state_dict())
    again.step(lambda: resumed(x).square().mean())
    opt.step(lambda: model(x).square().mean())
    assert again.log.to_bytes() == opt.log.to_bytes()


def test_a_log_of_a_run_that_changes_no_buffer_has_none() -> None:
    model, x = with_batch_norm()
    model.eval()
    opt = MeZO(model.parameters(), lr=1e-3, model=model)
    opt.step(lambda: model(x).square().mean())
    assert "buffers" not in opt.log.header
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replay_(with_batch_norm()[0], opt.log)
