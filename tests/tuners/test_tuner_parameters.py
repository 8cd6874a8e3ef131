"""Adapters on the stacked experts of a mixture, which are tensors and no layers of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from tuner_zoo import CONFIGS, MERGEABLE, TASKS, batch, config_of

from moe_mtl.tuners import METHODS, RankConfig, count, extract_task, load_adapter
from moe_mtl.tuners._parameters import ParamWrapper
from moe_mtl.tuners.lori import LoRIConfig, sparsify

FIXED = [config for config in MERGEABLE if not config.adapter_class.by_preference]
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 40, "num_experts_per_tok": 2, "experts_implementation": "eager"}


def mixture(kind: str = "mixtral") -> Any:
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)).eval()
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=3, moe_intermediate_size=12, head_dim=8)).eval()


def adapted(config_class: type[RankConfig], kind: str = "mixtral", **options: Any) -> PeftModel:
    given = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS, "task_type": "CAUSAL_LM"} | options
    base = mixture(kind)
    torch.manual_seed(1)
    return get_peft_model(base, config_of(config_class, **given)).eval()


def call(config_class: type[RankConfig], task: str) -> dict[str, Any]:
    return {"tasks": task} if config_class.adapter_class.by_task else {}


def plainly(model: PeftModel, task: str, ids: Tensor) -> Tensor:
    """Logits of the base model with every expert's matrix added to its weight, one after the other, in float64."""
    base, changed = mixture(model.config.model_type).double(), {}
    for key, layer in model.double().get_base_model().named_modules():
        if not hasattr(layer, "moe_adapters"):
            continue
        adapter = layer.moe_adapters["default"]
        told = TASKS.index(task) if adapter.by_task else None
        stacked = isinstance(layer, ParamWrapper)
        deltas = []
        for one in [adapter.of_expert(number) for number in range(3)] if stacked else [adapter]:
            a_RD, b_OR = one.as_lora(told)
            deltas.append(adapter.config.scale * b_OR @ a_RD)
        name = f"{key.replace('.base_layer', '')}.{layer.parameter_name if stacked else 'weight'}"
        weight = base.get_parameter(name).detach()
        changed[name] = weight + (torch.stack(deltas) if stacked else deltas[0])
    return torch.func.functional_call(base, changed, (ids,)).logits


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("config_class", FIXED)
def test_every_expert_has_its_own_matrix_of_the_task(config_class: type[RankConfig], kind: str) -> None:
    model = adapted(config_class, kind).double()
    ids = batch()["input_ids"]
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert sorted({(w.parameter_name, w.in_features, w.out_features) for w in wrappers}) == sorted(
        {("gate_up_proj", 16, 48), ("down_proj", 24, 16)}
        if kind == "mixtral"
        else {("gate_up_proj", 16, 24), ("down_proj", 12, 16)}
    )
    before = model.get_base_model()(ids, **call(config_class, "sql")).logits
    for task in ("chat", "code") if config_class.adapter_class.by_task else ("chat",):
        found = model(input_ids=ids, **call(config_class, task)).logits
        torch.testing.assert_close(found, plainly(model, task, ids), rtol=1e-9, atol=1e-9)
    assert torch.equal(model.get_base_model()(ids, **call(config_class, "sql")).logits, before)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, mixture(kind).double()(ids).logits)


@pytest.mark.parametrize("config_class", FIXED)
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradients(config_class: type[RankConfig], reentrant: bool | None) -> None:
    model = adapted(config_class).double().train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = batch()["input_ids"]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("moe_adapters" in name for name in trained)
    expected = torch.autograd.grad(plainly(model, "chat", ids).square().sum(), list(trained.values()))
    model(input_ids=ids, use_cache=False, **call(config_class, "chat")).logits.square().sum().backward()
    for (name, parameter), wanted in zip(trained.items(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-6, atol=1e-9, msg=name)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)


@pytest.mark.parametrize("config_class", FIXED)
def test_it_is_saved_merged_and_made_a_lora(config_class: type[RankConfig], tmp_path: Path) -> None:
    model = adapted(config_class)
    inputs = {"input_ids": batch()["input_ids"]}
    given = call(config_class, "chat")
    expected = model(**inputs, **given).logits
    model.save_pretrained(tmp_path / "ours")
    loaded = load_adapter(tmp_path / "ours", mixture())
    assert torch.equal(loaded(**inputs, **given).logits, expected)
    lora = extract_task(model, given.get("tasks"))
    torch.testing.assert_close(lora(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    lora.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(mixture(), str(tmp_path / "lora"))
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    if given:
        loaded.set_task("chat")
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    if given:
        with pytest.raises(ValueError, match="expected 'chat', which is merged"):
            loaded(**inputs, tasks="sql")
    loaded.unmerge_adapter()
    torch.testing.assert_close(loaded(**inputs, **given).logits, expected, rtol=1e-4, atol=1e-5)
    merged = loaded.merge_and_unload()
    assert not any(hasattr(module, "moe_adapters") for module in merged.modules())
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_one_call_is_for_one_task() -> None:
    config_class = next(config for config in FIXED if config.adapter_class.by_task)
    model = adapted(config_class)
    ids = batch()["input_ids"]
    expected = model(input_ids=ids, tasks="chat").logits
    for tasks in (["chat"] * 3, torch.tensor([1, 1, 1]), torch.ones(3, 5, dtype=torch.int64)):
        torch.testing.assert_close(model(input_ids=ids, tasks=tasks).logits, expected)
    with pytest.raises(ValueError, match=r"tasks: expected one for the whole batch, .* found sql and chat"):
        model(input_ids=ids, tasks=["chat", "sql", "chat"])
    with pytest.raises(ValueError, match="expected one of sql, chat, code per sample, found none"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="did you mean 'chat'"):
        model(input_ids=ids, tasks="caht")


def test_a_second_adapter_on_the_same_parameters() -> None:
    config_class = next(config for config in FIXED if config.adapter_class.by_task)
    model = adapted(config_class)
    given = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}
    before = model(input_ids=batch()["input_ids"], tasks="sql").logits
    model.add_adapter("second", config_of(config_class, **given))
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert len(wrappers) == 4
    assert all(set(wrapper.moe_adapters) == {"default", "second"} for wrapper in wrappers)
    assert torch.equal(model(input_ids=batch()["input_ids"], tasks="sql").logits, before)
    model.base_model.set_adapter(["default", "second"])
    both = model(input_ids=batch()["input_ids"], tasks="sql").logits
    assert not torch.allclose(both, before, atol=1e-5)


def test_without_a_shared_pair() -> None:
    config_class = next(config for config, name in METHODS.items() if name == "MTLORA")
    model = adapted(config_class, shared_in_tasks=False)
    ids = batch()["input_ids"]
    expected = plainly(model, "code", ids)
    torch.testing.assert_close(model(input_ids=ids, tasks="code").logits, expected)
    wrapper = next(module for module in model.modules() if isinstance(module, ParamWrapper))
    adapter: Any = wrapper.moe_adapters["default"]
    assert adapter.num_trained() == sum(p.numel() for p in adapter.parameters())
    assert adapter.num_active() * 3 * 3 == adapter.num_trained()  # of tasks and of experts


def test_lori_is_masked_over_experts_too() -> None:
    model = adapted(LoRIConfig)
    dense = count(model).trained
    sparsify(model, 0.25)
    assert count(model).trained == pytest.approx(dense / 4, abs=1)
    model.train()(**batch()).loss.backward()
    for wrapper in (module for module in model.modules() if isinstance(module, ParamWrapper)):
        adapter: Any = wrapper.moe_adapters["default"]
        assert not adapter.b_OP.grad[~adapter.mask_OR].any()
        assert adapter.b_OP.grad[adapter.mask_OR].any()


@pytest.mark.parametrize("config_class", [config for config in CONFIGS if config not in FIXED])
def test_what_differs_by_sample_or_token_is_refused(config_class: type[RankConfig]) -> None:
    why = "sample by sample" if config_class.adapter_class.by_preference else "token by token|depend"
    with pytest.raises(ValueError, match=f"target_parameters: expected none, as .* adds no fixed matrix .*({why})"):
        config_of(config_class, target_parameters=PARAMETERS)


def test_what_else_cannot_be() -> None:
    with pytest.raises(ValueError, match="dropout: expected 0 beside target_parameters, found 0"):
        config_of(FIXED[0], target_parameters=PARAMETERS, dropout=0.1)
    with pytest.raises(ValueError, match=r"expected weights of shape \[E, O, D\], found .*gate.weight of \[3, 16\]"):
        adapted(FIXED[0], target_parameters=["gate.weight"])
