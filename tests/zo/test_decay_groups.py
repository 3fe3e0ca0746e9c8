"""decay_groups over many model families: norms and biases do not decay, whatever the model calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from leanops.optim import MeZO, decay_groups

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED = {**SMALL, "num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8}
# The family's config class, its model class, the config's values, and the norms' classes as its paper calls them.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2},
        {"LayerNorm"},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GATED, {"LlamaRMSNorm"}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GATED, {"Qwen3RMSNorm"}),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        {"LayerNorm"},
    ),
    "opt": ("OPTConfig", "OPTForCausalLM", {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}, {"LayerNorm"}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        {"T5LayerNorm"},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", {**SMALL, "intermediate_size": 24}, {"LayerNorm"}),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {**SMALL, "intermediate_size": 24, "image_size": 16, "patch_size": 8},
        {"LayerNorm"},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**GATED, "num_local_experts": 2}, {"MixtralRMSNorm"}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GATED, {"Gemma2RMSNorm"}),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {**SMALL, "bias": True, "new_decoder_architecture": True, "num_kv_heads": 1},
        {"LayerNorm"},
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {**GATED, "num_local_experts": 2}, {"GptOssRMSNorm"}),
    "resnet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        {"BatchNorm2d"},
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        {
            **SMALL,
            "intermediate_size": 24,
            "conv_dim": (8, 8),
            "conv_stride": (2, 2),
            "conv_kernel": (3, 3),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        {"GroupNorm", "LayerNorm"},
    ),
}


def decaying(model: nn.Module) -> set[str]:
    """The names that decay_groups lets decay, after a check that every trained parameter is in one group."""
    groups = decay_groups(model, 0.1)
    names = [n for g in groups for n, _ in g["params"]]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    return {n for g in groups if g["weight_decay"] for n, _ in g["params"]}


def truth(model: nn.Module, norms: set[str]) -> set[str]:
    """What decays: everything but the parameters of the family's norm classes, and the biases of linear, convolutional
    and expert modules."""
    seen: set[str] = set()
    free: set[str] = set()
    for path, module in model.named_modules():
        kind = type(module).__name__
        seen.add(kind)
        for own, _ in module.named_parameters(recurse=False):
            if kind in norms or own in ("bias", "gate_up_proj_bias", "down_proj_bias"):
                free.add(f"{path}.{own}")
    assert norms <= seen, f"the model has no {norms - seen}"
    return {n for n, p in model.named_parameters() if p.requires_grad} - free


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_biases_of_a_family_are_exempt(family: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'leanops[dev]'")
    config, kind, values, norms = FAMILIES[family]
    model = getattr(transformers, kind)(getattr(transformers, config)(**values))
    wanted = truth(model, norms)
    assert decaying(model) == wanted
    assert len(wanted) < len(list(model.parameters()))


def test_norms_and_biases_of_torch_are_exempt() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert decaying(layer) == {
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"
    }  # fmt: skip
    assert decaying(nn.LSTM(3, 4, num_layers=2, bidirectional=True)) == {
        f"weight_{kind}_l{layer}{way}" for kind in ("ih", "hh") for layer in (0, 1) for way in ("", "_reverse")
    }
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    assert decaying(attention) == {"in_proj_weight", "out_proj.weight"}
    for norm in (nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.BatchNorm3d(4),
                 nn.SyncBatchNorm(4), nn.InstanceNorm2d(4, affine=True)):  # fmt: skip
        assert decaying(nn.Sequential(norm)) == set()


class Debiased(nn.Module):
    """Attributes whose names suggest the opposite of what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.debias_proj = nn.Linear(3, 3)
        self.layernorm_mlp = nn.Linear(3, 3)
        self.relative_attention_bias = nn.Embedding(4, 2)
        self.ln = MyRMSNorm(3)
        self.relative_position_bias_table = nn.Parameter(torch.ones(5, 2))
        self.layer_norm_weight = nn.Parameter(torch.ones(3))
        self.normal = nn.Parameter(torch.ones(3))


class MyRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))


def test_the_type_decides_and_not_the_attribute() -> None:
    assert decaying(Debiased()) == {
        "debias_proj.weight",
        "layernorm_mlp.weight",
        "relative_attention_bias.weight",
        "relative_position_bias_table",
        "normal",
    }


def test_a_parametrized_bias_or_norm_stays_exempt() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    for i, name in ((0, "weight"), (0, "bias"), (1, "weight")):
        nn.utils.parametrize.register_parametrization(model[i], name, nn.Identity())
    assert decaying(model) == {"0.parametrizations.weight.original"}


def test_a_weight_that_a_norm_shares_is_exempt() -> None:
    model = nn.ModuleDict({"scale": nn.Conv1d(1, 1, 1), "norm": nn.LayerNorm((1, 1, 1))})
    model["norm"].weight = model["scale"].weight
    assert decaying(model) == set()


def test_frozen_parameters_are_left_out_and_names_are_the_plain_models() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    wrapped = torch.compile(nn.DataParallel(model))
    (free,) = decay_groups(wrapped, 0.1)
    assert ([n for n, _ in free["params"]], free["weight_decay"]) == (["0.bias", "1.weight", "1.bias"], 0.0)
    assert [e["name"] for e in MeZO(decay_groups(wrapped, 0.1)).log.params()] == ["0.bias", "1.weight", "1.bias"]
