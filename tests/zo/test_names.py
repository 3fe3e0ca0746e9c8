"""A log has the names of the plain model, and replays onto models and files with other names for the same tensors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import distributed, spawn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leanops.bench import cli
from leanops.optim import LISA, LogError, MeZO, ZoLog, replay_, replay_file
from leanops.optim.common.parameters import canonical_names, unwrapped
from leanops.optim.zo.names import match

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def checkpointed(model: nn.Sequential) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return nn.Sequential(*(checkpoint_wrapper(layer) for layer in model))


def inner_compiled(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(torch.compile(model[0]), model[1], torch.compile(model[2]))


def average(model: nn.Module) -> Tensor:
    return model(torch.ones(2, 3)).square().mean()


WRAPPERS = {
    "compile": torch.compile,
    "parallel": nn.DataParallel,
    "compiled parallel": lambda m: torch.compile(nn.DataParallel(m)),
    "parallel compiled": lambda m: nn.DataParallel(torch.compile(m)),
    "layers compiled": inner_compiled,
    "checkpointed": pytest.param(checkpointed, marks=distributed),
    "all": pytest.param(lambda m: torch.compile(nn.DataParallel(checkpointed(m))), marks=distributed),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("named", [False, True], ids=["parameters", "named_parameters"])
def test_the_log_has_the_plain_models_names(wrap: Any, named: bool) -> None:
    model, start = plain(), plain()
    wrapped = wrap(model)
    assert [n for n, _ in wrapped.named_parameters()] != NAMES
    assert canonical_names(wrapped) == NAMES
    opt = MeZO(wrapped.named_parameters() if named else wrapped.parameters(), lr=0.1, model=wrapped, perturb="copy")
    for _ in range(2):
        opt.step(lambda: average(model))
    assert [e["name"] for e in opt.log.params()] == NAMES
    replay_(start, opt.log)
    again = wrap(plain())
    replay_(again, opt.log)
    for p, q, r in zip(model.parameters(), start.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def checkpointed_whole(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(model)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        lambda m: torch.compile(nn.DataParallel(m)),
        pytest.param(lambda m: nn.DataParallel(checkpointed_whole(torch.compile(m))), marks=distributed),
    ],
    ids=["plain", "compiled parallel", "parallel checkpointed compiled"],
)
def test_a_selection_has_the_plain_models_names(wrap: Any) -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    wrapped = wrap(model)
    assert unwrapped(wrapped) is model
    assert LISA(wrapped, torch.optim.SGD(wrapped.parameters()), active=1).blocks == ["0.0", "0.1"]


def with_names(log: ZoLog, name: Any) -> ZoLog:
    """The log with other names, as earlier versions wrote them."""
    data = log.to_bytes()
    size = int.from_bytes(data[8:12], "little")
    header = json.loads(data[16 : 16 + size])
    old = ZoLog({k: v for k, v in header.items() if k not in ("format", "steps")})
    old.header["params"] = [{**e, "name": name(e["name"])} for e in header["params"]]
    old._body = log._body
    old._count = len(log)
    return old


@pytest.mark.parametrize(
    "prefixed",
    [
        lambda n: "_orig_mod." + n,
        lambda n: "module." + n,
        lambda n: "_orig_mod.module." + n,
        lambda n: "module._orig_mod." + n,
        lambda n: "_fsdp_wrapped_module." + n,
        lambda n: n.replace(".", "._checkpoint_wrapped_module."),
        lambda n: "module." + n.replace(".", "._orig_mod."),
    ],
)
def test_a_log_with_a_wrappers_names_fits_the_plain_model_and_the_wrapped_one(prefixed: Any, tmp_path: Path) -> None:
    model = plain()
    opt = MeZO(model.parameters(), lr=0.1, model=model)
    opt.step(lambda: average(model))
    old = with_names(opt.log, prefixed)
    assert old.params()[0]["name"] == prefixed("0.weight")
    for start in (plain(), torch.compile(plain()), nn.DataParallel(plain())):
        replay_(start, old)
        assert all(map(torch.equal, start.parameters(), model.parameters()))
    for log, name in ((old, str), (opt.log, prefixed)):
        tensors = {name(n): p.detach() for n, p in plain().named_parameters()}
        save_file(tensors, tmp_path / "base.safetensors")
        replay_file(tmp_path / "base.safetensors", log, tmp_path / "out.safetensors")
        tuned = load_file(tmp_path / "out.safetensors")
        assert all(torch.equal(tuned[name(n)], p) for n, p in model.named_parameters())
        replay_(tensors, log)
        assert all(torch.equal(tensors[name(n)], p) for n, p in model.named_parameters())
    swapped = plain()
    replay_({"a": swapped[0].weight, **dict(swapped.named_parameters())}, old, names={"0.weight": "a"})
    assert torch.equal(swapped[0].weight, model[0].weight)


def test_a_plain_model_may_have_a_submodule_named_module() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 1)})
    assert canonical_names(model) == ["module.weight", "module.bias"]
    assert canonical_names(nn.DataParallel(model)) == ["module.weight", "module.bias"]
    start = nn.ModuleDict({"module": copy.deepcopy(model["module"]), "other": nn.Linear(2, 1)})
    other = copy.deepcopy(start["other"])
    opt = MeZO(model.parameters(), lr=0.1, model=model)
    opt.step(lambda: model["module"](torch.ones(2)).sum())
    replay_(start, opt.log)
    assert all(map(torch.equal, start["module"].parameters(), model["module"].parameters()))
    assert all(map(torch.equal, start["other"].parameters(), other.parameters()))


def test_names_that_could_be_several_tensors_are_refused_and_nothing_changes() -> None:
    model = plain()
    opt = MeZO(model.parameters(), lr=0.1, model=model)
    opt.step(lambda: average(model))
    tensors = {
        f"{prefix}.{n}": p.detach().clone() for prefix in ("module", "_orig_mod") for n, p in plain().named_parameters()
    }
    before = {n: t.clone() for n, t in tensors.items()}
    with pytest.raises(
        LogError, match=r"0\.weight of the log could be _orig_mod\.0\.weight, module\.0\.weight; say which"
    ):
        replay_(tensors, opt.log)
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())
    replay_(tensors, opt.log, names={n: f"module.{n}" for n in NAMES})
    assert torch.equal(tensors["module.0.bias"], model[0].bias)
    log = with_names(opt.log, lambda n: n.replace("2.", "module.0."))
    with pytest.raises(LogError, match=r"parameters 0\.weight and module\.0\.weight of the log both fit|not there"):
        replay_({"0.weight": tensors["module.0.weight"], "0.bias": tensors["module.0.bias"]}, log)


def ddp_and_fsdp(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    assert canonical_names(torch.compile(DistributedDataParallel(plain()))) == NAMES
    sharded = FullyShardedDataParallel(
        plain(), use_orig_params=True, sharding_strategy=torch.distributed.fsdp.ShardingStrategy.NO_SHARD,
        device_id=torch.device("cpu"),
    )  # fmt: skip
    assert canonical_names(DistributedDataParallel(sharded)) == NAMES


@distributed
def test_names_under_ddp_and_fsdp() -> None:
    spawn(ddp_and_fsdp)


# --- adapters ---------------------------------------------------------------------------------------------------------

LORA = ["base_model.model.m.q_proj.lora_A.default.weight", "base_model.model.m.q_proj.lora_B.default.weight"]


@pytest.mark.parametrize(
    ("log", "file"),
    [
        (LORA, [n.replace(".default", "") for n in LORA]),
        ([n.replace(".default", "") for n in LORA], LORA),
        (LORA, [n.replace("default", "policy") for n in LORA]),
        ([n.removeprefix("base_model.model.") for n in LORA], [n.replace(".default", "") for n in LORA]),
        (["_orig_mod." + n for n in LORA], [n.replace(".default", "") for n in LORA]),
        (["base_model.model.head.modules_to_save.default.weight"], ["base_model.model.head.weight"]),
        (["base_model.model.e.trainable_tokens_delta.a"], ["base_model.model.e.trainable_tokens_delta"]),
        (["base_model.model.q.lora_magnitude_vector.default.weight"], ["base_model.model.q.lora_magnitude_vector"]),
        (["prompt_encoder.default.embedding.weight"], ["prompt_embeddings"]),
        (["base_model.model.k.ia3_l.default"], ["base_model.model.k.ia3_l"]),
    ],
)  # fmt: skip
def test_an_adapters_names_in_the_model_and_in_its_file(log: list[str], file: list[str]) -> None:
    assert match("op", log, log, [*file, "other.weight"]) == dict(zip(log, file, strict=True))


def test_an_adapter_that_could_be_two_is_refused_and_the_candidates_are_listed() -> None:
    log = [n.replace(".default", "") for n in LORA]
    both = [*LORA, *(n.replace("default", "other") for n in LORA)]
    with pytest.raises(
        LogError, match=r"op: parameter .*lora_A\.weight of the log could be .*default\.weight, .*other\.weight"
    ):
        match("op", log, log, both)
    assert match("op", LORA, LORA, both) == {n: n for n in LORA}
    assert match("op", ["a_b.c.weight"], ["a_b.c.weight"], ["a_b.weight"]) == {}  # no adapter, so no guess


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=str)
def test_a_log_of_adapters_replays_onto_their_saved_file(options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'leanops[dev]'")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'leanops[dev]'")

    def make() -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)
        return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)

    start, model = make(), make()
    start.save_pretrained(tmp_path / "start")
    ids = torch.arange(12).view(2, 6)
    opt = MeZO(model.parameters(), lr=1e-2, eps=1e-2, model=model, log_file=tmp_path / "run.zolog")
    for _ in range(3):
        opt.step(lambda: model(input_ids=ids, labels=ids).loss)
    opt.log.close()
    model.save_pretrained(tmp_path / "end")
    wanted = load_file(tmp_path / "end" / "adapter_model.safetensors")
    base = tmp_path / "start" / "adapter_model.safetensors"
    assert not any(".default." in n for n in wanted)

    tensors = load_file(base)
    replay_(tensors, opt.log)
    assert all(torch.equal(tensors[n], t) for n, t in wanted.items())
    out = tmp_path / "out.safetensors"
    assert cli.main(["replay", str(base), str(tmp_path / "run.zolog"), "-o", str(out)]) == 0
    assert all(torch.equal(load_file(out)[n], t) for n, t in wanted.items())
    assert any(not torch.equal(t, load_file(base)[n]) for n, t in wanted.items())
