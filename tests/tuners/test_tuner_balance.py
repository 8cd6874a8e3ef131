"""Ranks chosen token by token, and evened out by a bias of the choice; masks of LoRI."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
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
