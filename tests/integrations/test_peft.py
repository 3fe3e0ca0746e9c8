"""MeZO over a PEFT model: only parameters that require grad move, and the base keeps its bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from leanops.optim import MeZO, replay_

peft = pytest.importorskip("peft", reason="needs peft: pip install 'leanops[dev]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'leanops[dev]'")


def make_model(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
    )
    base = transformers.LlamaForCausalLM(config).to(dtype)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    return peft.get_peft_model(base, lora, autocast_adapter_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("perturb", ["auto", "copy"])
def test_only_the_adapters_move(dtype: torch.dtype, perturb: str) -> None:
    model = make_model(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tokens = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))
    opt = MeZO(model.parameters(), lr=1e-2, eps=1e-2, rounding="stochastic", model=model, perturb=perturb)
    for _ in range(5):
        opt.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    adapters = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved == adapters
    assert all("lora_" in n for n in adapters)

    start = make_model(dtype)
    replay_(start, roundtrip(opt))
    for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q), name


def roundtrip(opt: MeZO) -> Any:
    return type(opt.log).from_bytes(opt.log.to_bytes())


def test_the_adapters_learn() -> None:
    model = make_model(torch.float32)
    tokens = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))
    opt = MeZO(model.parameters(), lr=2e-2, eps=1e-2, distribution="rademacher", model=model)
    model.eval()
    with torch.no_grad():
        first = model(input_ids=tokens, labels=tokens).loss.item()
    for _ in range(150):
        opt.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    with torch.no_grad():
        assert model(input_ids=tokens, labels=tokens).loss.item() < first - 0.02


def test_a_merged_adapter_is_the_model_that_was_tuned() -> None:
    model = make_model(torch.float32).eval()
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    opt = MeZO(model.parameters(), lr=1e-2, eps=1e-2, model=model)
    for _ in range(3):
        opt.step(lambda: model(input_ids=tokens, labels=tokens).loss)
    with torch.no_grad():
        tuned = model(input_ids=tokens).logits
        merged = model.merge_and_unload()(input_ids=tokens).logits
    torch.testing.assert_close(merged, tuned)
