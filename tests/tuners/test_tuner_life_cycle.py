"""Adapters through PEFT: saved, loaded, two at a time, in other dtypes; and what no config may say."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2MoeConfig, Qwen2MoeForCausalLM
from tuner_zoo import BY_TASK, CONFIGS, TASKS, adapted, batch, config_of, llama, targets_of, tasks_for

from moe_mtl.files import CheckpointError
from moe_mtl.tuners import METHODS, PaLoRAConfig, RankConfig, _export, load_adapter
from moe_mtl.tuners._base import RankLayer


@pytest.mark.parametrize("config_class", CONFIGS)
def test_saved_and_loaded(config_class: type[RankConfig], tmp_path: Path) -> None:
    model = adapted(config_class)
    model.save_pretrained(tmp_path)
    inputs = batch() | tasks_for(config_class, ["chat", "sql", "code"])
    expected = model(**inputs).logits
    loaded = load_adapter(tmp_path, llama())
    assert torch.equal(loaded(**inputs).logits, expected)
    assert type(loaded.peft_config["default"]) is config_class
    assert not [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    assert torch.equal(again.eval()(**inputs).logits, expected)
    assert [name for name, parameter in again.named_parameters() if parameter.requires_grad]


def test_a_fresh_process_loads_it(tmp_path: Path) -> None:
    adapted(BY_TASK[0]).save_pretrained(tmp_path)
    code = f"import moe_mtl.tuners, peft; print(peft.PeftConfig.from_pretrained({str(tmp_path)!r}).tasks)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(TASKS)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == METHODS[BY_TASK[0]]


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load_adapter(tmp_path, llama())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, first: state.pop(first), "does not fit the base model: .*missing adapter keys"),
        (lambda state, first: state[first].view(-1)[3:4].fill_(float("nan")), "finite weights, found 1 NaN"),
        (lambda state, first: state.update({first: state[first][:, :1].clone()}), "does not fit .*: size mismatch"),
        (lambda state, first: state.update({"a.b": torch.ones(2)}), "no place for 1 tensors, first a.b"),
    ],
)
def test_weights_that_do_not_fit(change: Callable[[dict[str, Any], str], Any], message: str, tmp_path: Path) -> None:
    """PEFT warns of what is missing, and is silent on NaN and on what it has no place for."""
    adapted(BY_TASK[0]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    change(state, min(state))
    save_file(state, path)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tmp_path, llama())


@pytest.mark.parametrize("options", [{"train_base": True}, {"modules_to_save": ["lm_head"]}])
def test_a_missing_base_weight_or_saved_module(options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT misses neither; one tensor too many does not make up for it."""
    adapted(PaLoRAConfig, **options).save_pretrained(tmp_path)
    load_adapter(tmp_path, llama())
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    del state[next(name for name in state if "moe_" not in name)]
    save_file(state | {"a.b": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"tensors? missing"):
        load_adapter(tmp_path, llama())


def test_a_plain_lora_with_a_tensor_too_many(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    load_adapter(tmp_path, llama())
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {"a.b": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"no place for 1 tensors, first a\.b"):
        load_adapter(tmp_path, llama())


def test_options_of_the_hub_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def resolve(name: str, **options: Any) -> Path:
        asked.update(options)
        return tmp_path

    adapted(BY_TASK[0]).save_pretrained(tmp_path)
    monkeypatch.setattr(_export, "resolve", resolve)
    load_adapter("owner/name", llama(), revision="v2", token="t")
    assert asked == {"revision": "v2", "cache_dir": None, "local_files_only": False, "token": "t"}
    with pytest.raises(TypeError, match="subfolder: expected none"):
        load_adapter("owner/name", llama(), subfolder="s")


def test_truncated_weights_and_those_beside_their_base(tmp_path: Path) -> None:
    adapted(BY_TASK[0]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")  # of the base model, which is not read
    load_adapter(tmp_path, llama())
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors of .* is truncated"):
        load_adapter(tmp_path, llama())


@pytest.mark.parametrize("config_class", CONFIGS)
def test_two_adapters_and_none(config_class: type[RankConfig]) -> None:
    model = adapted(config_class)
    inputs = batch() | tasks_for(config_class, ["chat", "sql", "code"])
    first = model(**inputs).logits
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    second = model(**inputs).logits
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, llama()(**batch()).logits)
    model.set_adapter("default")
    assert torch.equal(model(**inputs).logits, first)
    model.delete_adapter("second")
    assert torch.equal(model(**inputs).logits, first)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_bfloat16_base(config_class: type[RankConfig]) -> None:
    config = config_of(config_class, target_modules=targets_of(config_class), task_type="CAUSAL_LM")
    model = get_peft_model(llama().bfloat16(), config).train()
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    out = model(**batch(), **tasks_for(config_class, TASKS))
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_autocast(config_class: type[RankConfig]) -> None:
    model = adapted(config_class).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch(), **tasks_for(config_class, TASKS))
    out.loss.backward()
    torch.testing.assert_close(
        out.logits.float(), model(**batch(), **tasks_for(config_class, TASKS)).logits, rtol=0.1, atol=0.02
    )
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_is_frozen_stays_float32_on_a_bfloat16_base(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    for config_class in CONFIGS:
        config = config_of(config_class, target_modules=targets_of(config_class), task_type="CAUSAL_LM")
        model = get_peft_model(llama().bfloat16(), config).eval()
        model.save_pretrained(tmp_path / config.peft_type)
        loaded = PeftModel.from_pretrained(
            llama().bfloat16(), tmp_path / config.peft_type, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        inputs = batch() | tasks_for(config_class, TASKS)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        floats = [b for name, b in loaded.named_buffers() if "moe_adapters" in name and b.is_floating_point()]
        assert all(buffer.dtype == torch.float32 for buffer in floats), config_class


def test_layers_that_store_their_weight_turned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)).eval()
    config = config_of(BY_TASK[0], target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    ids = batch()["input_ids"]
    expected = model(input_ids=ids, tasks="chat").logits
    model.set_task("chat")
    merged = model.merge_and_unload()
    assert not [module for module in merged.modules() if isinstance(module, RankLayer)]
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged(input_ids=ids, tasks="chat").logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected 'chat', which is merged"):
        merged(input_ids=ids, tasks="sql")


def test_without_its_adapters_a_model_is_as_before() -> None:
    base = adapted(BY_TASK[0]).unload()
    assert not base._forward_pre_hooks
    assert not base._forward_pre_hooks_with_kwargs
    assert torch.equal(base(**batch()).logits, llama()(**batch()).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r: expected at least 1, found 0"),
        ({"scaling": "alpha*r"}, "scaling: expected one of"),
        ({"dropout": 1.0}, "dropout: expected a share"),
        ({"bias": "some"}, "bias: expected none or all"),
        ({"tasks": []}, "tasks: expected a list of those"),
        ({"tasks": "sql"}, "tasks: expected a list of those .* found 'sql'"),
        ({"tasks": ["a", "a"]}, "tasks: expected different names"),
    ],
)
def test_bad_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(BY_TASK[0], **options)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_of_a_mixture_the_stacked_experts_are_no_target_and_the_rest_is(config_class: type[RankConfig]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4, "vocab_size": 40}

    def base() -> Qwen2MoeForCausalLM:
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **more, num_key_value_heads=2)).eval()

    with pytest.raises(ValueError, match=r"found model\.layers\.0\.mlp\.experts of type .*Qwen2MoeExperts"):
        get_peft_model(base(), config_of(config_class, target_modules=["q_proj", "experts", "shared_expert"]))
    targets = ["q_proj", "shared_expert" if targets_of(config_class)[-1] == "mlp" else "shared_expert.down_proj"]
    model = get_peft_model(base(), config_of(config_class, target_modules=targets, task_type="CAUSAL_LM")).train()
    if config_class.adapter_class.by_task or config_class.adapter_class.by_preference:
        with pytest.raises(ValueError, match="expected 15, one per sample, found 3"):  # whose tokens lie in one row
            model(**batch(), **tasks_for(config_class, TASKS))
        return
    model(**batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_embedding_is_no_target() -> None:
    config = config_of(BY_TASK[0], target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"expected linear layers, found model\.embed_tokens"):
        get_peft_model(llama(), config)
