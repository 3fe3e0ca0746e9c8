"""The first step's diagnostics: they never raise, and they notice a closure whose loss does not repeat."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zo.estimates import estimates, spsa

from leanops.optim import MeZO, SeedPool
from leanops.optim.zo import estimate
from leanops.optim.zo.first_step import fingerprint

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
def test_the_estimate_of_a_head_over_a_quantized_base_is_the_one_written_by_hand(kind: str) -> None:
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
    before = [p.detach().clone() for p in model[2].parameters()]
    assert SeedPool(8).step_(model[2], lambda: model(x).square().mean(), 3) != 0.0
    assert not any(map(torch.equal, before, model[2].parameters()))


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


def test_a_fingerprint_shows_one_changed_element_of_any_kind_of_tensor() -> None:
    dense = torch.arange(1.0, 5.0)
    kinds = {
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
    for name, make in kinds.items():
        assert fingerprint(make(dense)) == fingerprint(make(dense)), name
        assert fingerprint(make(dense)) != fingerprint(make(other)), name


# --- two evaluations at the same weights ------------------------------------------------------------------------------


def private_torch(rng: torch.Generator) -> Tensor:
    return torch.rand(4, generator=rng)


def private_numpy(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.random(4, dtype=np.float32))


@pytest.mark.parametrize("mode", ["auto", "scratch", "copy", "inplace"])
@pytest.mark.parametrize("variant", ["spsa", "one_sided", "fzoo"])
def test_a_private_generator_gets_a_warning_once(mode: str, variant: str) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4))
    rng = np.random.default_rng(0)
    opt = MeZO([p], lr=0.0, perturb=mode, variant=variant, directions=2 if variant == "fzoo" else 1)
    with pytest.warns(UserWarning, match="at the same weights gave"):
        opt.step(lambda: (p * private_numpy(rng)).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: (p * private_numpy(rng)).sum())  # one warning a run is enough


def test_another_batch_at_each_call_gets_a_warning() -> None:
    torch.manual_seed(0)
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


def test_same_rng_false_expects_other_random_numbers_at_each_call(no_warning: None) -> None:
    p = nn.Parameter(torch.randn(4))
    estimates([p], lambda: (p * torch.rand(4)).sum(), same_rng=False)


def test_a_difference_in_the_last_bit_is_not_taken_for_randomness(no_warning: None) -> None:
    p = nn.Parameter(torch.ones(4))
    jitter = iter([0.0, 1e-7] * 10)
    estimates([p], lambda: p.double().sum() + next(jitter))


def test_a_weight_that_a_random_closure_may_hide_gets_a_warning() -> None:
    torch.manual_seed(0)
    p, unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    rng = torch.Generator().manual_seed(0)
    with (
        pytest.warns(UserWarning, match="at the same weights gave"),
        pytest.warns(UserWarning, match="cannot be told"),
    ):
        estimates([p, unused], lambda: (p * private_torch(rng)).sum(), perturb="scratch")
