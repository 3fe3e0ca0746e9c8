"""Half fine-tuning: half of each category's matrices train, drawn anew from a seed by a rule."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
from selection.runs import LAYERS, OPTIMIZERS, Net, assert_same, backward_flops, loss_of, net, snapshot, state_bytes
from torch import nn

from leanops.optim import HalfFineTuning

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 9}


def make(name: str = "AdamW", **options: Any) -> tuple[Net, torch.optim.Optimizer, HalfFineTuning]:
    model = net()
    optimizer = OPTIMIZERS[name][0](model.parameters())
    return model, optimizer, HalfFineTuning(model, optimizer, **options)


def halves(model: nn.Module, **options: Any) -> HalfFineTuning:
    return HalfFineTuning(model, torch.optim.SGD(model.parameters()), **options)


def training(hft: HalfFineTuning) -> set[str]:
    """The matrices that train; a matrix trains with its bias or not at all."""
    names = set(hft.trainable)
    found = {m for m in hft.matrices if f"{m}.weight" in names or m in names}
    for m in found:
        assert {f"{m}.weight", f"{m}.bias"} & {n for n, _ in hft._freezer.model.named_parameters()} <= names
    return found


def llama() -> Any:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))


# --- the rule -------------------------------------------------------------------------------------------------------


def test_half_of_each_category_trains_in_every_round() -> None:
    hft = halves(llama())
    assert {c: len(m) for c, m in hft.categories.items()} == {"attention": 12, "mlp": 9, "norm": 7, "embedding": 2}
    for _ in range(30):
        trains = training(hft)
        for matrices in hft.categories.values():
            n = len(trains.intersection(matrices))
            assert n in (math.floor(len(matrices) / 2), math.ceil(len(matrices) / 2))
        hft.next_round()


def test_half_of_each_category_trains_within_every_block() -> None:
    """Two of q, k, v and o; one of two norms; one or two of gate, up and down, over the blocks as evenly as can be."""
    hft = halves(llama())
    for _ in range(30):
        trains = training(hft)
        mlp = []
        for i in range(3):
            block = f"model.layers.{i}."
            assert sum(m.startswith(f"{block}self_attn") for m in trains) == 2
            assert sum(m.startswith(block) and m.endswith("norm") for m in trains) == 1
            mlp.append(sum(m.startswith(f"{block}mlp") for m in trains))
        assert sorted(mlp) in ([1, 1, 2], [1, 2, 2])
        assert sum(m in trains for m in ("model.embed_tokens", "lm_head")) == 1
        hft.next_round()


def test_every_matrix_trains_in_half_of_the_rounds() -> None:
    """400 rounds: 200 within 5 deviations of a fair coin, for even and odd categories alike."""
    hft = halves(llama())
    rounds = 400
    drawn = [hft._draw(r) for r in range(rounds)]
    for name in hft._freezer.params:
        assert abs(sum(name in d for d in drawn) - rounds / 2) < 5 * math.sqrt(rounds) / 2, name


def test_rounds_are_independent() -> None:
    """The attention matrices of a round do not predict those of the next: 6 pairs, each 1/6 of the time."""
    hft = halves(llama())
    rounds = 600
    pairs = [frozenset(n for n in hft._draw(r) if n.startswith("model.layers.0.self_attn")) for r in range(rounds)]
    assert len(set(pairs)) == 6
    same = sum(a == b for a, b in itertools.pairwise(pairs))
    assert abs(same - rounds / 6) < 5 * math.sqrt(rounds * 5 / 36)


def test_draws_follow_from_the_seed_and_the_round_and_never_change() -> None:
    a, b, other = (make(seed=s)[2] for s in (4, 4, 5))
    assert [a._draw(r) for r in range(20)] == [b._draw(r) for r in range(20)]
    assert [a._draw(r) for r in range(20)] != [other._draw(r) for r in range(20)]
    assert [[i for i, m in enumerate(a.matrices) if f"{m}.weight" in a._draw(r)] for r in range(2)] == KNOWN


KNOWN = [[0, 2, 6, 7, 9, 11, 13, 14, 16, 17], [3, 4, 6, 9, 10, 12, 13, 15]]


def test_categories_of_known_models() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    bert = halves(transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))).categories
    layer = "bert.encoder.layer.0."
    assert [m.removeprefix(layer) for m in bert["attention"] if m.startswith(layer)] == [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    ]
    assert [m.removeprefix(layer) for m in bert["mlp"] if m.startswith(layer)] == ["intermediate.dense", "output.dense"]
    assert [m.removeprefix(layer) for m in bert["norm"] if m.startswith(layer)] == [
        "attention.output.LayerNorm",
        "output.LayerNorm",
    ]
    assert bert["other"] == ["bert.pooler.dense", "classifier"]
    assert len(bert["embedding"]) == 3

    gpt2 = halves(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=9)))
    assert gpt2.categories["embedding"] == ["transformer.wte", "transformer.wpe"]  # the head shares the weight of wte
    assert {c: len(m) for c, m in gpt2.categories.items()} == {"embedding": 2, "norm": 7, "attention": 6, "mlp": 6}

    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    )
    kinds = halves(t5, blocks=r"(en|de)coder\.block\.\d+").categories
    assert {c: len(m) for c, m in kinds.items()} == {"embedding": 3, "attention": 24, "mlp": 8, "norm": 12}


def test_categories_can_be_given() -> None:
    _, _, hft = make(categories={"up": r"up_proj$", "rest": ""})
    assert hft.categories["up"] == [f"layers.{i}.up_proj" for i in range(LAYERS)]
    assert set(hft.categories) == {"up", "rest"}
    _, _, hft = make(categories={"up": r"up_proj$"})
    assert set(hft.categories) == {"up", "other"}


def test_parameters_that_always_train_are_in_no_category() -> None:
    model, _, hft = make(always="^head|final")
    assert hft.always == ["final.bias", "final.weight", "head.weight"]
    assert not {"head", "final"} & set(hft.matrices)
    for _ in range(10):
        assert set(hft.always) <= set(hft.trainable)
        hft.next_round()
    hft.release()
    assert halves(model, always=[model.embed]).always == ["embed.weight"]


def test_a_model_without_blocks_is_one_block() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    hft = halves(model)
    assert hft.blocks == []
    assert len(training(hft)) == 2


def test_a_model_of_one_matrix_trains_it_in_every_round() -> None:
    hft = halves(nn.Linear(2, 2))
    assert all(hft._draw(r) == {"weight", "bias"} for r in range(10))


def test_frozen_parameters_stay_frozen() -> None:
    model = net()
    model.embed.weight.requires_grad_(False)
    hft = HalfFineTuning(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    assert "embed" not in hft.matrices
    for _ in range(10):
        hft.next_round()
        assert not model.embed.weight.requires_grad


# --- frozen matrices cost nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_frozen_matrices_is_freed(name: str) -> None:
    model, optimizer, hft = make(name, period=3)
    size = OPTIMIZERS[name][1]
    rounds = set()
    for step in range(12):
        loss_of(model, step).backward()
        trains = [p for p in model.parameters() if p.requires_grad]
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.step()
        if step >= 1:  # some optimizers make all state at construction, and the first step frees it
            assert state_bytes(optimizer) == sum(map(size, trains))
        rounds.add(tuple(hft.trainable))
        hft.step()
        assert not any(p in optimizer.state for p in model.parameters() if not p.requires_grad)
        optimizer.zero_grad()
    assert len(rounds) == 4


def test_gradients_of_frozen_matrices_are_not_computed() -> None:
    """For each frozen weight the backward pass leaves out one product, the weight's gradient."""
    full = net()
    everything = backward_flops(lambda: loss_of(full))
    model, _, hft = make(always="embed|norm")  # gradients of activations stay, so only the weights' products differ
    for _ in range(8):
        frozen = [m for m in hft.matrices if m not in training(hft)]
        saved = sum(2 * 12 * model.get_parameter(f"{m}.weight").numel() for m in frozen if m != "final")
        assert saved
        assert backward_flops(lambda: loss_of(model)) == everything - saved
        hft.next_round()


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [3, None])
@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "SM3"])
def test_a_run_resumes_to_the_same_bits_in_the_middle_of_a_round(name: str, period: int | None) -> None:
    def train(model: Net, optimizer: torch.optim.Optimizer, hft: HalfFineTuning, first: int, last: int) -> None:
        for step in range(first, last):
            loss_of(model, step).backward()
            optimizer.step()
            hft.step()
            optimizer.zero_grad()
            if period is None and step % 4 == 3:
                hft.next_round()

    model, optimizer, hft = make(name, period=period, seed=2)
    train(model, optimizer, hft, 0, 5)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), hft.state_dict()], file)
    train(model, optimizer, hft, 5, 11)

    file.seek(0)
    weights, state, position = torch.load(file, weights_only=True)
    again, resumed, halves_ = make(name, period=period, seed=2)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    halves_.load_state_dict(position)
    train(again, resumed, halves_, 5, 11)
    assert_same(snapshot(again, resumed), snapshot(model, optimizer))


@pytest.mark.parametrize("other", [{"period": 4}, {"seed": 1}, {"always": "head"}, {"categories": {"all": ""}}])
def test_a_state_of_another_run_is_refused_and_changes_nothing(other: dict[str, Any]) -> None:
    saved = make(period=3)[2].state_dict()
    model, optimizer, hft = make(**{"period": 3, **other})
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"HalfFineTuning.load_state_dict: \w+ must be the saved run's, "):
        hft.load_state_dict(saved)
    assert_same(snapshot(model, optimizer), before)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 0}, "HalfFineTuning: period must be an integer >= 1, got 0"),
        ({"seed": "a"}, "HalfFineTuning: seed must be an integer"),
        ({"blocks": "decoder"}, "HalfFineTuning: blocks must name modules of the model, got 'decoder'"),
        ({"always": "decoder"}, "HalfFineTuning: always must match a trainable parameter's name, got 'decoder'"),
        ({"categories": {"a": "("}}, r"HalfFineTuning: categories must hold regular expressions, got '\(' for 'a'"),
        ({"categories": ["a"]}, "HalfFineTuning: categories must map names to regular expressions, got list"),
        ({"blocks": 5}, "HalfFineTuning: blocks must be a regular expression, a module or a list, got 5"),
        ({"categories": {"a": 3}}, "HalfFineTuning: categories must hold regular expressions, got 3 for 'a'"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_frozen(options: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message):
        halves(model, **options)
    assert all(p.requires_grad for p in model.parameters())


def test_a_round_after_release_freezes_again() -> None:
    _, _, hft = make()
    trains = hft.trainable
    hft.release()
    hft.seek(0)
    assert hft.trainable == trains
    hft.release()
    hft.next_round()
    assert hft.trainable == [n for n in hft._freezer.params if n in hft._draw(1)]


def test_next_round_is_refused_where_a_period_decides() -> None:
    _, _, hft = make(period=3)
    before = hft.trainable
    with pytest.raises(RuntimeError, match=r"HalfFineTuning\.next_round: rounds follow from period, 3"):
        hft.next_round()
    assert hft.trainable == before
