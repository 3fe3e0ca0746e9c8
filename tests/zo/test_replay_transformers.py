"""The replay of what save_pretrained writes, where the file has other names and other tensors than the model."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from leanops.bench import cli
from leanops.optim import LogError, MeZO, ZoLog, replay_, replay_file
from leanops.optim.zo import replay_file as replay_file_module
from leanops.optim.zo.file_views import View, ViewTrace
from leanops.optim.zo.transformers_layout import layout

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")
pytest.importorskip("peft", reason="needs peft: pip install 'leanops[dev]'")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {"vocab_size": 32, **SMALL}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_key_value_heads": 2}


def made(kind: str, config: str, **options: Any) -> Any:
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**options))


MODELS = {
    "llama": made("LlamaForCausalLM", "LlamaConfig", **TEXT),
    "llama, tied": made("LlamaForCausalLM", "LlamaConfig", **TEXT, tie_word_embeddings=True),
    "vit": made("ViTForImageClassification", "ViTConfig", **SMALL, image_size=8, patch_size=4),
    "mixtral": made("MixtralForCausalLM", "MixtralConfig", **TEXT, num_local_experts=4, num_key_value_heads=2),
    "qwen2 moe": made("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **TEXT, **EXPERTS, shared_expert_intermediate_size=8),
    "nomic bert": made("NomicBertForMaskedLM", "NomicBertConfig", **TEXT),
    "dinov2": made("Dinov2Model", "Dinov2Config", **SMALL, image_size=8, patch_size=4, use_swiglu_ffn=True),
    "llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TEXT),
            vision_config=transformers.CLIPVisionConfig(**SMALL, image_size=8, patch_size=4),
        )
    ),
    "gpt2": made("GPT2LMHeadModel", "GPT2Config", vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16),
}
WAYS: list[dict[str, Any]] = [
    {"momentum": 0.6, "weight_decay": 0.1},
    {"distribution": "lowrank", "period": 2},
    {"rounding": "stochastic", "directions": 2},
]


def train(model: Any, steps: int = 3, **options: Any) -> ZoLog:
    """A few steps of any loss of all weights."""
    opt = MeZO(model.named_parameters(), lr=3e-2, eps=1e-2, model=model, **options)
    for _ in range(steps):
        opt.step(lambda: sum((p.double() ** 2).mean() + p.double().mean() for p in model.parameters()))
    return ZoLog.from_bytes(opt.log.to_bytes())


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(dtype, {}) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    + [(torch.bfloat16, options) for options in WAYS],
    ids=str,
)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_the_folder_has_the_bits_of_replay_in_memory(
    make: Any, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_file_module, "_SLICE", 13)  # slices begin anywhere
    torch.manual_seed(0)
    model = make().to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    memory = copy.deepcopy(model)
    log = train(model, **options)
    replay_(memory, log)
    memory.save_pretrained(tmp_path / "memory", max_shard_size="4KB")
    replay_file(tmp_path / "base", log, tmp_path / "out")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) >= 3
    assert not same(loaded(tmp_path / "base"), loaded(tmp_path / "out"))
    assert same(loaded(tmp_path / "memory"), loaded(tmp_path / "out"))
    for path in (tmp_path / "memory").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    again = type(model).from_pretrained(tmp_path / "out", dtype=dtype)
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["vit", "mixtral", "nomic bert"])
def test_parameters_and_rows_that_stand_still(name: str, tmp_path: Path) -> None:
    """A row of fused experts is an expert."""
    torch.manual_seed(0)
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "base")
    memory = copy.deepcopy(model)
    first = next(n for n, p in model.named_parameters() if p.dim() == (3 if name == "mixtral" else 2))
    frozen = [n for n, _ in model.named_parameters() if "k_proj" in n or "norm" in n]
    log = train(model, exclude={first: [0, 2], **dict.fromkeys(frozen)})
    replay_(memory, log)
    memory.save_pretrained(tmp_path / "memory")
    replay_file(tmp_path / "base", log, tmp_path / "out")
    assert same(loaded(tmp_path / "memory"), loaded(tmp_path / "out"))


def test_fused_experts_are_moved_in_the_tensors_that_hold_them(tmp_path: Path) -> None:
    """An expert's gate and up are runs of the fused tensor, which is never made."""
    MODELS["mixtral"]().save_pretrained(tmp_path)
    shapes = {n: tuple(t.shape) for n, t in loaded(tmp_path).items()}
    found = layout(tmp_path, shapes)
    _, group = found["model.layers.1.mlp.experts.gate_up_proj"]
    assert group.parameters == {"model.layers.1.mlp.experts.gate_up_proj": (4, 32, 16)}
    assert group.in_runs
    prefix = "model.layers.1.block_sparse_moe.experts"
    assert group.tensors[f"{prefix}.0.w1.weight"] == View((16, 16), (16, 1), 0)
    assert group.tensors[f"{prefix}.2.w3.weight"] == View((16, 16), (16, 1), 2 * 512 + 256)


def test_what_a_conversion_joins_is_found_by_indices(tmp_path: Path) -> None:
    """q, k and v are three parameters and one tensor of the file."""
    MODELS["nomic bert"]().save_pretrained(tmp_path)
    tensors = loaded(tmp_path)
    found = layout(tmp_path, {n: tuple(t.shape) for n, t in tensors.items()})
    name = next(n for n in found.names if n.endswith("layers.0.self_attn.k_proj.weight"))
    _, group = found[name]
    assert len(group.parameters) == 3
    ((file, view),) = group.tensors.items()
    assert view is None
    assert sorted(group.indices()[file].flatten().tolist()) == list(range(3 * 16 * 16))


@pytest.mark.parametrize("turned", [True, False])
def test_a_conversion_that_transposes_or_joins(turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, Transpose, WeightConverter

    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the table
    rule = (
        WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", [Transpose(0, 1)])
        if turned
        else WeightConverter(
            "mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Transpose(0, 1), Chunk(dim=0)]
        )
    )
    table = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(table, "LlamaForCausalLM", [rule])
    torch.manual_seed(0)
    model = made("LlamaForCausalLM", "LlamaConfig", **TEXT)()
    model.save_pretrained(tmp_path / "base", max_shard_size="2KB")
    names = loaded(tmp_path / "base")
    assert turned or "model.layers.0.mlp.gate_up.weight" in names
    memory = copy.deepcopy(model)
    log = train(model, distribution="lowrank")
    replay_(memory, log)
    memory.save_pretrained(tmp_path / "memory", max_shard_size="2KB")
    replay_file(tmp_path / "base", log, tmp_path / "out")
    assert same(loaded(tmp_path / "memory"), loaded(tmp_path / "out"))


@pytest.mark.parametrize("original", [True, False])
def test_a_name_that_means_another_tensor_in_the_file(
    original: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """input_layernorm of the model is a_norm in the file, whose input_layernorm is another norm."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import GroupWeightRename

    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the table
    rule = GroupWeightRename(["a_norm", "input_layernorm"], ["input_layernorm", "post_attention_layernorm"])
    table = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(table, "LlamaForCausalLM", [rule])
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path / "base", save_original_format=original)
    assert ("model.layers.0.a_norm.weight" in loaded(tmp_path / "base")) == original
    memory = copy.deepcopy(model)
    log = train(model, exclude=re.compile("post_attention_layernorm"))
    replay_(memory, log)
    memory.save_pretrained(tmp_path / "memory", save_original_format=original)
    replay_file(tmp_path / "base", log, tmp_path / "out")
    assert same(loaded(tmp_path / "memory"), loaded(tmp_path / "out"))


def test_names_of_an_old_checkpoint(tmp_path: Path) -> None:
    """BERT's file on the hub has gamma and beta."""
    model = made("BertForMaskedLM", "BertConfig", **TEXT)()
    model.save_pretrained(tmp_path / "base")
    (file,) = (tmp_path / "base").glob("*.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def hub(name: str) -> str:
        return next((name.replace(new, of) for new, of in old.items() if name.endswith(new)), name)

    save_file({hub(n): t for n, t in load_file(file).items()}, file)
    log = train(model)
    replay_file(tmp_path / "base", log, tmp_path / "out")
    got = loaded(tmp_path / "out")
    assert any(n.endswith("gamma") for n in got)
    assert all(torch.equal(got[hub(n)], p) for n, p in model.named_parameters())


def test_a_default_device_says_nothing(tmp_path: Path) -> None:
    """Of tensors that are moved as they are, and of joined ones."""
    model = MODELS["nomic bert"]()
    model.save_pretrained(tmp_path / "base")
    log = train(model)
    model.save_pretrained(tmp_path / "end")
    with torch.device("meta"):
        replay_file(tmp_path / "base", log, tmp_path / "out")
    assert same(loaded(tmp_path / "out"), loaded(tmp_path / "end"))


def test_the_look_at_the_rules_leaves_no_trace(tmp_path: Path) -> None:
    MODELS["mixtral"]().save_pretrained(tmp_path)
    shapes = {n: tuple(t.shape) for n, t in loaded(tmp_path).items()}
    state = torch.get_rng_state()
    before = logging.root.manager.disable
    layout(tmp_path, shapes)
    assert torch.equal(state, torch.get_rng_state())
    assert logging.root.manager.disable == before


def test_names_by_the_model_are_in_the_file_too(tmp_path: Path) -> None:
    """Saved with save_original_format=False."""
    model = MODELS["mixtral"]()
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    log = train(model)
    replay_file(tmp_path / "base", log, tmp_path / "out")
    assert "model.layers.0.mlp.experts.gate_up_proj" in loaded(tmp_path / "out")
    assert all(torch.equal(loaded(tmp_path / "out")[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("bare", [True, False])
def test_a_base_model_under_a_model_for_a_task(bare: bool, tmp_path: Path) -> None:
    """GPT-2's file lacks the prefix of GPT2LMHeadModel's names."""
    model = MODELS["gpt2"]()
    model.transformer.save_pretrained(tmp_path / "base")
    if not bare:  # as the file on the hub: the configuration is of the model for a task
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    log = train(model)
    replay_file(tmp_path / "base", log, tmp_path / "out")
    got = loaded(tmp_path / "out")
    assert all(torch.equal(got[n.removeprefix("transformer.")], p) for n, p in model.named_parameters())


def test_a_file_beside_its_config(tmp_path: Path) -> None:
    model = MODELS["vit"]()
    model.save_pretrained(tmp_path)
    train(model).save(tmp_path / "run.zolog")
    words = [str(tmp_path / n) for n in ("model.safetensors", "run.zolog", "out.safetensors")]
    assert cli.main(["replay", words[0], words[1], "-o", words[2]]) == 0
    model.save_pretrained(tmp_path / "end")
    assert same(load_file(words[2]), loaded(tmp_path / "end"))


def test_an_adapter_of_a_vit(tmp_path: Path) -> None:
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(MODELS["vit"](), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "base")
    opt = MeZO(model.parameters(), lr=1e-2, eps=1e-2, model=model)
    opt.step(lambda: sum(p.sum() for p in model.parameters()))
    model.save_pretrained(tmp_path / "end")
    replay_file(tmp_path / "base", opt.log, tmp_path / "out")
    assert same(loaded(tmp_path / "out"), loaded(tmp_path / "end"))
    assert (tmp_path / "out" / "adapter_config.json").exists()


def refusal(folder: Path, log: ZoLog, **options: Any) -> str:
    with pytest.raises(LogError) as error:
        replay_file(folder, log, folder.parent / "out", **options)
    assert not (folder.parent / "out").exists()
    return str(error.value)


def test_the_error_says_what_would_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["vit"]()
    base = tmp_path / "base"
    model.save_pretrained(base)
    log = train(model)
    config = json.loads((base / "config.json").read_text())
    wanted = {
        "has no MyViT": {**config, "architectures": ["MyViT"]},
        "names no architecture": {},
        "gives no layout of ViTForImageClassification: ": {**config, "hidden_size": "wide"},
        "lead to no tensor": {**config, "architectures": ["LlamaForCausalLM"]},
    }
    for message, text in wanted.items():
        (base / "config.json").write_text(json.dumps(text))
        found = refusal(base, log)
        assert message in found
        assert "--names FILE.json" in found
        assert "replay_ on the model in memory" in found
        assert "\n" not in found
    (base / "config.json").write_text(json.dumps(config))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers.conversion_mapping", None)
        assert "has no rules for names; transformers 5 has" in refusal(base, log)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.core_model_loading.rename_source_key", lambda: None)
        assert "gives no layout of ViTForImageClassification: TypeError" in refusal(base, log)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        assert "ViTForImageClassification may need transformers, which does not import: " in refusal(base, log)
    bias = "vit.layers.0.attention.q_proj.bias"
    assert f"names gives typo for {bias}, which is not in the file" in refusal(base, log, names={bias: "typo"})
    assert "got classifier.bias for several" in refusal(base, log, names={bias: "classifier.bias"})


def test_given_names_go_before_the_rules(tmp_path: Path) -> None:
    model = MODELS["vit"]()
    model.save_pretrained(tmp_path / "base")
    (file,) = (tmp_path / "base").glob("*.safetensors")
    tensors = load_file(file)
    tensors["head"] = tensors.pop("classifier.weight")
    save_file(tensors, file)
    log = train(model)
    assert "classifier.weight, which is not" in refusal(tmp_path / "base", log)
    replay_file(tmp_path / "base", log, tmp_path / "out", names={"classifier.weight": "head"})
    got = loaded(tmp_path / "out")
    assert torch.equal(got["head"], model.classifier.weight)
    assert torch.equal(got["vit.encoder.layer.1.output.dense.bias"], model.vit.layers[1].mlp.fc2.bias)


# --- views ------------------------------------------------------------------------------------------------------------

A = torch.arange(2 * 3 * 4).view(2, 3, 4)
CONVERSIONS = {
    "itself": lambda a: a,
    "chunks": lambda a: [c.contiguous() for c in a.chunk(3, 1)],
    "chunks of chunks": lambda a: [d.squeeze(0) for c in a.chunk(2, 2) for d in c.contiguous().chunk(2, 0)],
    "transposed": lambda a: a.transpose(1, 2).contiguous(),
    "transposed, then a part": lambda a: a.transpose(0, 2).contiguous()[1:3],
    "interleaved": lambda a: a.reshape(2, 3, 2, 2).transpose(2, 3).reshape(2, 3, 4).contiguous(),
    "flat": lambda a: a.transpose(1, 2).reshape(-1),
    "flat, then a part": lambda a: a.transpose(1, 2).contiguous().view(-1)[5:11],
    "a number": lambda a: a[1, 2, 3].clone(),
    "joined": lambda a: torch.cat([a, a]),
    "added": lambda a: a + 1,
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_view_tells_the_elements(name: str) -> None:
    empty = torch.empty(A.shape, dtype=A.dtype, device="meta")
    trace = ViewTrace({"a": empty})
    with trace:
        results = CONVERSIONS[name](empty)
    wanted = CONVERSIONS[name](A)
    results, wanted = (x if isinstance(x, list) else [x] for x in (results, wanted))
    for result, right in zip(results, wanted, strict=True):
        assert trace.sources(result) == {"a"}
        if (view := trace.view(result)) is None:
            assert name in ("interleaved", "flat", "flat, then a part", "joined", "added")
            continue
        got = A.flatten().as_strided(*view)
        assert torch.equal(got, right)
        assert view.is_run == (got.flatten().diff() == 1).all().item()
        assert math.prod(view.shape) == result.numel()
