"""Models whose backward passes differ: tied and shared weights, attention, adapters, convolutions, transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from selection.runs import Net, net
from torch import Tensor, nn


def tied() -> Net:
    model = net()
    model.head.weight = model.embed.weight
    return model


def shared() -> Net:
    model = net()
    model.layers[3].up_proj.weight = model.layers[1].up_proj.weight
    return model


class Attention(nn.Module):
    """Attention: products of activations, with one projection for k and v."""

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
    """LoRA on a frozen linear layer; the forward pass merges the product of the two factors into its weight."""

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
