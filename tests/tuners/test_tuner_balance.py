"""Ranks chosen token by token, and evened out by a bias of the choice; masks of LoRI."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments
from tuner_zoo import BY_TASK, CONFIGS, adapted, batch, config_of, llama

from moe_mtl.tuners import METHODS, BalanceRanks, RankConfig, load_adapter
from moe_mtl.tuners._balance import BalancedAdapter, BalancedConfig
from moe_mtl.tuners._base import RankLayer
from moe_mtl.tuners.lori import sparsify

BALANCED = [config for config in CONFIGS if issubclass(config, BalancedConfig)]


def balanced_adapters(model: nn.Module) -> list[BalancedAdapter]:
    return [module for module in model.modules() if isinstance(module, BalancedAdapter)]


@pytest.mark.parametrize("config_class", BALANCED)
def test_a_rank_that_is_chosen_less_than_the_mean_gets_a_larger_bias(config_class: type[RankConfig]) -> None:
    model = adapted(config_class, balance_rate=0.25)
    model(**batch())
    assert not any(adapter.counts_P.any() for adapter in balanced_adapters(model))  # answering does not count
    model.train()
    model(**batch()).loss.backward()
    model(**batch()).loss.backward()
    for adapter in balanced_adapters(model):
        assert adapter.counts_P.sum() == 2 * 3 * 5 * 2  # calls, samples, tokens, ranks chosen
        assert not adapter.bias_P.any()
    counts = [adapter.counts_P.clone() for adapter in balanced_adapters(model)]
    model.base_model.update_balance()
    for adapter, counts_P in zip(balanced_adapters(model), counts, strict=True):
        expected = [0.25 if n < 15 else -0.25 if n > 15 else 0.0 for n in counts_P.tolist()]
        assert adapter.bias_P.tolist() == expected
        assert not adapter.counts_P.any()


def counts_of(model: nn.Module) -> list[torch.Tensor]:
    """Of each adapter since the last time; starts anew."""
    found = [adapter.counts_P.clone() for adapter in balanced_adapters(model)]
    for adapter in balanced_adapters(model):
        adapter.counts_P.zero_()
    return found


LENGTHS = [5, 1, 3]


def padded(side: str) -> dict[str, torch.Tensor]:
    """Samples of `LENGTHS`, filled up to 5 tokens."""
    inputs, filled = batch(), torch.arange(5).expand(3, 5)
    if side == "left":
        filled = filled.flip(1)
    mask = (filled < torch.tensor(LENGTHS)[:, None]).long()
    return inputs | {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("config_class", BALANCED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(config_class: type[RankConfig], side: str) -> None:
    model = adapted(config_class).train()
    inputs = padded(side)
    expected = [torch.zeros(4, dtype=torch.int64) for _ in balanced_adapters(model)]
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        model(input_ids=ids[mask.bool()][None])
        for total, counts_P in zip(expected, counts_of(model), strict=True):
            total += counts_P
    assert all(total.sum() == 2 * sum(LENGTHS) for total in expected)
    for mask in (inputs["attention_mask"], inputs["attention_mask"].bool(), inputs["attention_mask"].float()):
        model(**inputs | {"attention_mask": mask})
        for found, wanted in zip(counts_of(model), expected, strict=True):
            assert torch.equal(found, wanted)
    plain = model.get_base_model()
    plain(inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"])  # by place
    for found, wanted in zip(counts_of(model), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("config_class", BALANCED)
def test_all_tokens_count_where_a_mask_is_not_of_padding(config_class: type[RankConfig]) -> None:
    model = adapted(config_class).train()
    ids = batch()["input_ids"]
    causal = torch.ones(3, 1, 5, 5, dtype=torch.bool).tril()
    packed = torch.tensor([[0, 1, 0, 1, 2]] * 3)
    calls = [{}, {"attention_mask": torch.ones(3, 5)}, {"attention_mask": causal}, {"position_ids": packed}]
    for call in calls:
        model(input_ids=ids, **call, use_cache=False)
        assert all(counts_P.sum() == 2 * 3 * 5 for counts_P in counts_of(model))
    layer = next(module for module in model.modules() if isinstance(module, RankLayer))
    model(**padded("right"))
    layer(torch.randn(3, 5, 16))  # by itself: the mask was of the call before
    assert layer.adapter("default").counts_P.sum() == 2 * (sum(LENGTHS) + 3 * 5)


@pytest.mark.parametrize("config_class", BALANCED)
def test_with_a_cache_the_last_columns_of_the_mask_are_of_the_call(config_class: type[RankConfig]) -> None:
    model = adapted(config_class).train()
    ids = batch()["input_ids"]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    cache = model(input_ids=ids[:, :3], attention_mask=mask[:, :3], use_cache=True).past_key_values
    assert all(counts_P.sum() == 2 * 6 for counts_P in counts_of(model))
    model(input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cache)
    assert all(counts_P.sum() == 2 * 5 for counts_P in counts_of(model))
    model.generate(input_ids=ids, attention_mask=padded("left")["attention_mask"], max_new_tokens=3, pad_token_id=0)
    assert all(counts_P.sum() == 2 * (sum(LENGTHS) + 2 * 3) for counts_P in counts_of(model))


@pytest.mark.parametrize("config_class", BALANCED)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_token_counts_once_under_checkpointing(config_class: type[RankConfig], reentrant: bool) -> None:
    model = adapted(config_class).train()
    model(**padded("right"))
    expected = counts_of(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(**padded("right"), use_cache=False).loss
    model(**padded("left"), use_cache=False)
    counts_of(model)
    loss.backward()
    assert not any(counts_P.any() for counts_P in counts_of(model))
    model(**padded("right"), use_cache=False).loss.backward()
    for found, wanted in zip(counts_of(model), expected, strict=True):
        assert torch.equal(found, wanted)


def test_of_encoder_and_decoder_all_tokens_count() -> None:
    """Both may have as many tokens, and the mask is of one of them."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    config = config_of(BALANCED[0], target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, config).train()
    inputs = {name: tensor for name, tensor in padded("right").items() if name != "position_ids"}
    model(**inputs)
    assert all(counts_P.sum() == 2 * 3 * 5 for counts_P in counts_of(model))


@pytest.mark.parametrize("config_class", BALANCED)
def test_the_balance_is_saved_and_a_trainer_keeps_it(config_class: type[RankConfig], tmp_path: Path) -> None:
    model = adapted(config_class, balance_rate=0.25)
    rows = [{name: tensor[0] for name, tensor in batch(1).items()} for _ in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[BalanceRanks()]).train()
    biases = [adapter.bias_P.clone() for adapter in balanced_adapters(model)]
    assert all(bias_P.any() for bias_P in biases)
    assert all((bias_P.abs() <= 0.75).all() for bias_P in biases)  # once per step, not per batch
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter", llama())
    for adapter, bias_P in zip(balanced_adapters(loaded), biases, strict=True):
        assert torch.equal(adapter.bias_P, bias_P)


def test_lori_keeps_the_largest_entries_of_all_layers(tmp_path: Path) -> None:
    config_class = next(config for config, name in METHODS.items() if name == "LORI")
    model = adapted(config_class)
    adapters = [layer.adapter("default") for layer in model.modules() if isinstance(layer, RankLayer)]
    before = torch.cat([adapter.b_OP.detach().abs().flatten() for adapter in adapters])
    assert sparsify(model, 0.25) == pytest.approx(0.25, abs=0.01)
    masks = torch.cat([adapter.mask_OR.flatten() for adapter in adapters])
    assert before[masks].min() >= before[~masks].max()
    assert not any(adapter.b_OP.any() for adapter in adapters)
    model.train()
    model(**batch()).loss.backward()
    for adapter in adapters:
        assert not adapter.b_OP.grad[~adapter.mask_OR].any()
        adapter.b_OP.data.normal_()
    model.eval().save_pretrained(tmp_path)
    expected = model(**batch()).logits
    assert torch.equal(load_adapter(tmp_path, llama())(**batch()).logits, expected)
    with pytest.raises(ValueError, match="expected a share"):
        sparsify(model, 0.0)
    with pytest.raises(ValueError, match="expected a trained adapter"):
        sparsify(adapted(config_class, init_weights=True), 0.1)
    assert not config_of(config_class).masked
    with pytest.raises(ValueError, match="expected a LoRI adapter, found 'default'"):
        sparsify(adapted(BY_TASK[0]))
