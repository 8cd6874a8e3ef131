"""How many parameters each method trains on a model of the shape of Llama-3.1-8B, without its weights.

The formulas are per linear layer of `d` inputs and `o` outputs; 7 of them in each of 32 layers.
"""

import functools
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from tuner_zoo import CONFIGS, adapted

from moe_mtl.tuners import METHODS, LoRIConfig, RankConfig, count
from moe_mtl.tuners.lori import sparsify

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION, FEED_FORWARD = LINEARS[:4], LINEARS[4:]
SIZES = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 1024),
    "v_proj": (4096, 1024),
    "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}
LAYERS = 32
TASKS = [f"task{number}" for number in range(8)]


@functools.cache
def llama_8b() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=LAYERS,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=128256,
                tie_word_embeddings=False,
            )
        )


def of(config_class: type[RankConfig], **options: Any) -> PeftModel:
    adapter = config_class.adapter_class
    if adapter.by_task or adapter.by_preference:
        options["tasks"] = TASKS
    if config_class.layer_class is not RankConfig.layer_class:
        options["target_modules"] = [*ATTENTION, "mlp"]
    with torch.device("meta"):
        return get_peft_model(llama_8b(), config_class(**({"target_modules": LINEARS} | options)))


def total(formula: Any, linears: list[str] = LINEARS) -> int:
    return LAYERS * sum(formula(*SIZES[name]) for name in linears)


# By method: options, then what is trained and what is active of a layer.
FORMULAS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "FLYLORA": ({"r": 32, "num_selected": 8}, lambda d, o: 32 * o, lambda d, o: 8 * o),
    "SMORA": (
        {"r": 64, "num_selected": 8},
        lambda d, o: 64 * (d + o) + 64 * d,
        lambda d, o: 8 * (d + o) + 64 * d,
    ),
    "LORI": ({"r": 32}, lambda d, o: 32 * o, lambda d, o: 32 * o),
    "HYDRA_LORA": ({"r": 8}, *[lambda d, o: 8 * d + 3 * 8 * o + 3 * d] * 2),
    "MOE_LORA": (
        {"r": 8, "num_experts": 8, "embedding_dim": 64},
        lambda d, o: 64 * (d + o) + 8 * 64 + 8 * 64,
        lambda d, o: 64 * (d + o) + 8 * 64 + 64,
    ),
    "MTL_LORA": (
        {"r": 8},
        lambda d, o: 8 * d + 8 * 64 + 3 * 8 * o + 8 * 3,
        lambda d, o: 8 * d + 64 + 3 * 8 * o + 3,
    ),
    "MTLORA": (
        {"r": 16, "task_rank": 4},
        lambda d, o: 16 * (d + o) + 8 * 4 * (d + o),
        lambda d, o: 16 * (d + o) + 4 * (d + o),
    ),
    "PALORA": ({"r": 8}, *[lambda d, o: 8 * 8 * (d + o)] * 2),
    "MIXLORA": ({"r": 16, "num_experts": 8}, None, None),
}


@pytest.mark.parametrize("config_class", CONFIGS)
def test_counts(config_class: type[RankConfig]) -> None:
    method = str(METHODS[config_class])
    options, trained, active = FORMULAS[method]
    model = of(config_class, **options)
    try:
        found = count(model)
        in_optimiser = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert all(p.is_meta for p in model.parameters())
    finally:
        model.unload()
    if method == "MIXLORA":
        lora = total(lambda d, o: 16 * (d + o), ATTENTION)
        expert = total(lambda d, o: 16 * (d + o), FEED_FORWARD)
        router = LAYERS * 8 * 4096
        assert (found.trained, found.active) == (lora + 8 * expert + router, lora + 2 * expert + router)
    else:
        assert (found.trained, found.active) == (total(trained), total(active))
    assert found.trained == in_optimiser <= found.stored


def test_every_method_has_its_formula() -> None:
    assert set(FORMULAS) == {str(name) for name in METHODS.values()}


def test_figures_recomputed_from_shapes() -> None:
    """LoRA itself; what is trained of FlyLoRA and LoRI at rank 32; MTL-LoRA at width 4096."""
    base = sum(p.numel() for p in llama_8b().parameters())
    assert base / 1e9 == pytest.approx(8.03, abs=0.005)
    assert total(lambda d, o: 8 * (d + o)) == 20_971_520
    assert total(lambda d, o: 32 * (d + o)) / 1e6 == pytest.approx(83.89, abs=0.005)
    _, trained, active = FORMULAS["FLYLORA"]
    assert total(trained) / 1e6 == pytest.approx(44.04, abs=0.005)
    assert total(active) / 1e6 == pytest.approx(11.01, abs=0.005)
    assert total(active) / base == pytest.approx(0.0014, abs=5e-5)
    assert FORMULAS["MTL_LORA"][1](4096, 4096) == 131_608
    tenth = 0.1 * total(FORMULAS["LORI"][1])
    assert tenth / 1e6 == pytest.approx(4.4, abs=0.005)
    assert tenth / base == pytest.approx(0.0005, abs=5e-5)


def test_a_mask_is_counted() -> None:
    model = adapted(LoRIConfig)
    before = count(model)
    share = sparsify(model, 0.1)
    after = count(model)
    assert after.trained == after.active == round(share * before.trained)
    with pytest.raises(ValueError, match="expected one of default"):
        count(model, "other")
