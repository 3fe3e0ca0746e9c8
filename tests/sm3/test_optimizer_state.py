"""SM3's state is saved, loaded, copied and pickled without losing a bit, and refused where it does not fit."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sm3.parameters import equal
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from leanops.optim import SM3, fuse_into_backward

BF16, F16, F32, I8 = torch.bfloat16, torch.float16, torch.float32, torch.int8


def model_of(dtype: torch.dtype = F32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(12, 5), nn.LayerNorm(5)).to(dtype)


def train(model: nn.Module, opt: Any, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(6, 3, 4, generator=g).to(next(model.parameters()).dtype)
        opt.zero_grad()
        (model(x) * torch.randn(6, 5, generator=g)).float().pow(2).mean().backward()
        opt.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.0},
    {"momentum_dtype": I8, "stochastic_rounding": True, "seed": 7},
    {"momentum_dtype": BF16, "beta": 0.9, "capturable": True},
    {"momentum_dtype": I8, "momentum_on": "gradient_unpublished", "cover_warmup": 2},
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_resumes_to_the_same_bits(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """torch's default load_state_dict would cast covers and momenta to the dtype of the weights."""
    whole, parts = model_of(dtype), model_of(dtype)
    a, b = SM3(whole.parameters(), **options), SM3(parts.parameters(), **options)
    train(whole, a, 6)
    train(parts, b, 3)
    state = through_a_file(b.state_dict())
    weights = through_a_file(parts.state_dict())

    resumed = model_of(dtype)
    resumed.load_state_dict(weights)
    c = SM3(resumed.parameters(), lr=123.0)
    c.load_state_dict(state)
    assert equal(c.state_dict()["state"], b.state_dict()["state"])
    assert c.state_dict()["param_groups"] == b.state_dict()["param_groups"]
    train(resumed, c, 3, start=3)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert equal(a.state_dict()["state"], c.state_dict()["state"])


def test_a_saved_state_has_an_entry_an_axis_and_shares_memory_with_the_optimizer() -> None:
    model = model_of(BF16)
    opt = SM3(model.parameters(), momentum_dtype=I8)
    train(model, opt, 2)
    saved = opt.state_dict()["state"]
    assert {k: list(v.shape) for k, v in saved[0]["cover"].items()} == {"0": [4], "1": [3], "2": [2]}
    assert {k: str(v.dtype) for k, v in saved[2].items() if isinstance(v, Tensor)} == {
        "step": "torch.float32",
        "momentum_buffer": "torch.int8",
        "momentum_scale": "torch.float32",
    }
    assert saved[3]["momentum_buffer"].dtype == F32
    assert "momentum_scale" not in saved[3]
    p = model[2].weight
    assert saved[2]["cover"]["1"].data_ptr() == opt.state[p]["cover"].data_ptr() + 5 * 4
    opt.state_dict()["state"][2]["cover"]["0"].zero_()
    assert not opt.state[p]["cover"][:5].any()


def test_loaded_state_is_a_copy() -> None:
    model = model_of()
    opt = SM3(model.parameters())
    train(model, opt, 2)
    state = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(state)
    opt.load_state_dict(state)
    train(model, opt, 2, start=2)
    assert equal(state["state"], kept["state"])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_copies_and_pickles_go_on_independently(options: dict[str, Any]) -> None:
    model = model_of()
    opt = SM3(model.named_parameters(), **options)
    train(model, opt, 2)
    runs = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt))), (model, opt)]
    for m, o in runs:
        train(m, o, 2, start=2)
    for m, o in runs[:2]:
        assert all(map(torch.equal, m.parameters(), model.parameters()))
        assert equal(o.state_dict()["state"], opt.state_dict()["state"])
        assert o.param_groups[0]["param_names"][0] == "0.weight"
        assert o._step_supports_amp_scaling == opt._step_supports_amp_scaling


def test_older_states_get_defaults_for_options_that_they_lack() -> None:
    model = model_of()
    opt = SM3(model.parameters(), lr=0.5)
    train(model, opt, 2)
    old = copy.deepcopy(opt.state_dict())
    for name in ("capturable", "seed", "stochastic_rounding", "momentum_dtype", "fused", "foreach", "differentiable"):
        del old["param_groups"][0][name]
    for entry in old["state"].values():
        entry["step"] = int(entry["step"])
    opt.load_state_dict(old)
    train(model, opt, 1, start=2)
    assert float(opt.state[model[0].weight]["step"]) == 3
    assert opt.state[model[0].weight]["step"].dtype == F32

    pickled = opt.__getstate__()
    del pickled["defaults"]["seed"], pickled["param_groups"][0]["seed"]
    revived = SM3.__new__(SM3)
    revived.__setstate__(pickled)
    assert revived.defaults["seed"] == revived.param_groups[0]["seed"] == 0
    train(model, revived, 1, start=3)


def test_a_loaded_step_count_is_float32_on_the_cpu() -> None:
    """As in torch, unless the optimizer is capturable or fused."""
    model = model_of()
    opt = SM3(model.parameters())
    train(model, opt, 1)
    state = opt.state_dict()
    for entry in state["state"].values():
        entry["step"] = entry["step"].to(torch.float64)
    opt.load_state_dict(state)
    assert {s["step"].device.type for s in opt.state.values()} == {"cpu"}
    assert {s["step"].dtype for s in opt.state.values()} == {F32}


def test_states_that_do_not_fit_are_refused_and_nothing_changes() -> None:
    model = model_of()
    opt = SM3(model.parameters(), momentum_dtype=I8)
    train(model, opt, 2)
    good = copy.deepcopy(opt.state_dict())

    def expect(message: str, change: Any) -> None:
        bad = copy.deepcopy(good)
        change(bad)
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(bad)
        assert equal(opt.state_dict()["state"], good["state"])
        assert opt.state_dict()["param_groups"] == good["param_groups"]

    entry = "SM3.load_state_dict: "
    expect(
        entry
        + r"axis 1 of the cover of parameter 2 must have shape \[12\] for a parameter of shape \[5, 12\], got \[3\]",
        lambda s: s["state"][2]["cover"].update({"1": torch.zeros(3)}),
    )
    expect(entry + "the cover of parameter 2 must have an entry for", lambda s: s["state"][2]["cover"].pop("1"))
    expect(entry + "the state of parameter 0 must have 'step'", lambda s: s["state"][0].pop("step"))
    expect(
        entry + "the state of parameter 0 must have 'step' and in 'cover' a dict of axes, got cover: NoneType",
        lambda s: s["state"][0].update(cover=None),
    )
    expect(entry + "the state of parameter 0 must be a dict, got int", lambda s: s["state"].update({0: 3}))
    for step, seen in ((None, "None"), ("a", "'a'"), (torch.zeros(2), r"shape \[2\] on cpu")):
        expect(
            entry + f"the step of parameter 0 must be one number, got {seen}",
            lambda s, step=step: s["state"][0].update(step=step),
        )
    expect(
        entry + "axis 1 of the cover of parameter 2 must have data, got a meta tensor",
        lambda s: s["state"][2]["cover"].update({"1": torch.zeros(12, device="meta")}),
    )
    expect(
        entry + r"momentum_buffer of parameter 2 must have shape \[5, 12\]",
        lambda s: s["state"][2].update(momentum_buffer=torch.zeros(5, 13)),
    )
    expect(
        entry + "momentum_buffer of parameter 2 must be float32, bfloat16 or int8, got torch.float64",
        lambda s: s["state"][2].update(momentum_buffer=torch.zeros(5, 12, dtype=torch.float64)),
    )
    expect(
        entry + r"momentum_scale of parameter 2 must have shape \[5, 1\]",
        lambda s: s["state"][2].update(momentum_scale=torch.zeros(5, 2)),
    )
    expect(
        entry + "momentum_scale of parameter 2 must be a tensor, got NoneType",
        lambda s: s["state"][2].pop("momentum_scale"),
    )
    expect("SM3: momentum must be in", lambda s: s["param_groups"][0].update(momentum=1.5))
    expect("SM3: momentum_dtype must be one of", lambda s: s["param_groups"][0].update(momentum_dtype="float16"))
    expect("different number of parameter groups", lambda s: s["param_groups"].append({"params": []}))
    expect("doesn't match the size", lambda s: s["param_groups"][0]["params"].pop())
    adam = torch.optim.AdamW(model.parameters())
    adam.step()
    foreign = adam.state_dict()
    with pytest.raises(ValueError, match=r"the state of parameter 0 must have 'step'.*got .*exp_avg"):
        opt.load_state_dict(foreign)
    assert equal(opt.state_dict()["state"], good["state"])


def test_hooks_of_users_see_and_make_saved_states() -> None:
    model = model_of()
    opt = SM3(model.parameters())
    train(model, opt, 1)
    seen: list[Any] = []
    opt.register_state_dict_post_hook(lambda o, s: seen.append(set(s["state"][2]["cover"])))
    opt.register_load_state_dict_pre_hook(lambda o, s: seen.append(set(s["state"][2]["cover"])))
    opt.register_load_state_dict_post_hook(lambda o: seen.append(o.state[model[2].weight]["cover"].shape[0]))
    opt.load_state_dict(opt.state_dict())
    assert seen == [{"0", "1"}, {"0", "1"}, 17]


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_saves_and_loads_it(tmp_path: Path, flatten: bool) -> None:
    """torch.distributed.checkpoint, in one process: by parameters' names, as nested or as flat names."""
    dcp = pytest.importorskip("torch.distributed.checkpoint", reason="this torch has no torch.distributed")
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    layout = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, other = model_of(BF16), model_of(BF16)
    opt = SM3(model.parameters(), momentum_dtype=I8, lr=0.3)
    train(model, opt, 3)
    fresh = SM3(other.parameters(), momentum_dtype=I8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is no process group
        dcp.save({"opt": get_optimizer_state_dict(model, opt, options=layout)}, checkpoint_id=tmp_path)
        state = {"opt": get_optimizer_state_dict(other, fresh, options=layout)}
        assert all(
            map(torch.equal, other.parameters(), model_of(BF16).parameters())
        )  # get_optimizer_state_dict took a step of length 0
        dcp.load(state, checkpoint_id=tmp_path)
        set_optimizer_state_dict(other, fresh, state["opt"], options=layout)
    assert equal(fresh.state_dict()["state"], opt.state_dict()["state"])
    assert fresh.param_groups[0]["lr"] == 0.3
    other.load_state_dict(model.state_dict())
    train(model, opt, 2, start=3)
    train(other, fresh, 2, start=3)
    assert all(map(torch.equal, other.parameters(), model.parameters()))


def test_fused_and_plain_optimizers_load_each_others_states() -> None:
    model, other = model_of(BF16), model_of(BF16)
    options: dict[str, Any] = {"momentum_dtype": I8, "stochastic_rounding": True}
    plain, fused = SM3(model.parameters(), **options), fuse_into_backward(SM3, other.parameters(), **options)
    for opt, m in ((plain, model), (fused, other)):
        train(m, opt, 2)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert equal(plain.state_dict()["state"], fused.state_dict()["state"])
    assert plain.state_dict()["param_groups"] == fused.state_dict()["param_groups"]
    a, b = plain.state_dict(), fused.state_dict()
    plain.load_state_dict(through_a_file(b))
    fused.load_state_dict(through_a_file(a))
    for opt, m in ((plain, model), (fused, other)):
        train(m, opt, 2, start=2)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("dtype", [F32, I8])
@pytest.mark.parametrize(
    "drop",
    [
        lambda opt, p: opt.state.clear(),
        lambda opt, p: opt.state.pop(p),
        lambda opt, p: opt.state.update({p: {}}),
        lambda opt, p: opt.state[p].pop("momentum_buffer"),
        lambda opt, p: opt.state[p].update({k: v.clone() for k, v in opt.state[p].items()}),  # move it
        lambda opt, p: opt.load_state_dict(opt.state_dict()),
    ],
    ids=["clear", "pop", "replace", "pop an entry", "move", "load"],
)
def test_the_memory_of_large_state_is_free_once_the_state_drops_it(drop: Any, dtype: torch.dtype) -> None:
    p, q, small = (nn.Parameter(torch.ones(n, n)) for n in (300, 300, 3))
    opt, ref = SM3([p, small], momentum_dtype=dtype), SM3([q], momentum_dtype=dtype)
    for _ in range(3):
        p.grad, q.grad, small.grad = (torch.ones_like(t) for t in (p, q, small))
        opt.step()
        ref.step()
    memory = StorageWeakRef(opt.state[p]["momentum_buffer"].untyped_storage())
    drop(opt, p)
    assert memory.expired()
    if len(opt.state.get(p, ())) < len(ref.state[q]) - 1:  # the whole entry was dropped
        ref.state.clear()
    elif "momentum_buffer" not in opt.state[p]:
        del ref.state[q]["momentum_buffer"]
    for _ in range(2):
        opt.step()
        ref.step()
        assert torch.equal(p, q)
    assert equal(dict(opt.state[p]), dict(ref.state[q]))
