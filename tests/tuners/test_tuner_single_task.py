"""One task alone: merged into the weights, or extracted as a plain LoRA."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tuner_zoo import BY_TASK, CONFIGS, MERGEABLE, TASKS, adapted, batch, choose, config_of, llama, one_task, tasks_for

from moe_mtl.tuners import RankConfig, extract_task


@pytest.mark.parametrize("config_class", MERGEABLE)
def test_merged_weights_answer_for_one_task(config_class: type[RankConfig]) -> None:
    model = adapted(config_class)
    ids = batch()["input_ids"]
    expected = model(input_ids=ids, **tasks_for(config_class, ["chat"] * 3)).logits
    asks = config_class.adapter_class.by_task or config_class.adapter_class.by_preference
    if asks:
        with pytest.raises(ValueError, match="to merge; choose"):
            model.merge_adapter()
        choose(model, config_class, "chat")
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    if asks:
        with pytest.raises(ValueError, match=r"expected .*chat.*, which is merged"):
            model(input_ids=ids, **tasks_for(config_class, ["sql"] * 3))
        choose(model, config_class, None)
    with model.disable_adapter():  # which takes it out of the weights
        torch.testing.assert_close(model(input_ids=ids).logits, llama()(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    found = model(input_ids=ids, **tasks_for(config_class, ["chat"] * 3)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    choose(model, config_class, "chat")
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    if asks:
        with pytest.raises(ValueError, match=r"expected .*chat.*, which is merged"):
            merged(input_ids=ids, **tasks_for(config_class, ["sql"] * 3))


@pytest.mark.parametrize("config_class", sorted(set(CONFIGS) - set(MERGEABLE), key=lambda c: c.__name__))
def test_what_depends_on_the_input_is_not_merged(config_class: type[RankConfig]) -> None:
    model = adapted(config_class)
    before = copy.deepcopy(llama().state_dict())
    with pytest.raises(NotImplementedError, match="token by token"):
        model.merge_adapter()
    with pytest.raises(NotImplementedError, match="token by token"):
        extract_task(model)
    assert torch.equal(model.get_base_model().lm_head.weight, before["lm_head.weight"])


@pytest.mark.parametrize("config_class", MERGEABLE)
def test_extracted_task_is_a_lora(config_class: type[RankConfig]) -> None:
    model = adapted(config_class)
    ids = batch()["input_ids"]
    for task in TASKS:
        lora = extract_task(model, **one_task(config_class, task))
        expected = model(input_ids=ids, **tasks_for(config_class, [task] * 3)).logits
        torch.testing.assert_close(lora(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert lora.get_base_model().lm_head.weight is model.get_base_model().lm_head.weight


def test_extracted_tasks_are_loaded_by_peft_alone(tmp_path: Path) -> None:
    ids, task, expected = batch()["input_ids"], TASKS[-1], {}
    llama().save_pretrained(tmp_path / "base")
    for config_class in MERGEABLE:
        model, name = adapted(config_class), config_class.__name__
        extract_task(model, **one_task(config_class, task)).save_pretrained(tmp_path / name)
        expected[name] = model(input_ids=ids, **tasks_for(config_class, [task] * 3)).logits
    code = f"""
import sys, peft, safetensors.torch, torch, transformers
logits = {{}}
for name in {list(expected)}:
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    logits[name] = peft.PeftModel.from_pretrained(base, name)(input_ids=torch.tensor({ids.tolist()})).logits.detach()
safetensors.torch.save_file(logits, "logits.safetensors")
assert not [name for name in sys.modules if name.startswith("moe_mtl")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors"), expected, rtol=1e-4, atol=1e-5)


def test_extracting_leaves_the_model_as_it_was() -> None:
    model = adapted(BY_TASK[0], modules_to_save=["lm_head"], bias="all")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert before["base_model.model.lm_head.modules_to_save.default.weight"]
    extract_task(model, "chat")
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_extracting_takes_along_what_was_trained_in_full(tmp_path: Path) -> None:
    model = adapted(BY_TASK[0], modules_to_save=["lm_head"])
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    ids = batch()["input_ids"]
    for name in ("default", "second"):
        model.base_model.model.lm_head.modules_to_save[name].weight.data.normal_()
    for name in ("second", "default"):
        model.set_adapter(name)
        expected = model(input_ids=ids, tasks="chat").logits
        model.set_adapter("default")
        lora = extract_task(model, "chat", name)
        torch.testing.assert_close(lora(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        lora.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(llama(), tmp_path / name).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_merged_adapters_are_not_extracted_and_belong_to_one_task() -> None:
    model = adapted(BY_TASK[0])
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    before = weight.detach().clone()
    model.set_task("sql")
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="unmerge_adapter first"):
        extract_task(model, "sql")
    model.set_task("chat")
    with pytest.raises(ValueError, match="expected one for all that is merged, found chat and sql"):
        model.merge_adapter(["second"])
    model.unmerge_adapter()
    torch.testing.assert_close(weight, before, rtol=1e-5, atol=1e-6)
    model.set_task("sql")
    model.merge_adapter(["default"])
    model.set_task(None)
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match="expected 'sql', which is merged"):
        merged(**batch(), tasks="chat")
    again = get_peft_model(merged, config_of(BY_TASK[0], target_modules=["q_proj"])).eval()
    assert not torch.equal(again(**batch(), tasks="chat").logits, again(**batch(), tasks="code").logits)


def test_a_merge_while_several_tasks_are_set() -> None:
    model = adapted(BY_TASK[0])
    with model.base_model.tasks(TASKS), pytest.raises(ValueError, match="to merge; choose it with set_task"):
        model.merge_adapter()


def test_extract_of_an_unknown_task_or_adapter() -> None:
    model = adapted(BY_TASK[0])
    with pytest.raises(ValueError, match="did you mean 'chat'"):
        extract_task(model, "chta")
    with pytest.raises(ValueError, match="expected one of default"):
        extract_task(model, "chat", "other")


def test_an_extracted_lora_names_the_base_model_as_the_adapter_did() -> None:
    model = adapted(MERGEABLE[0])
    model.active_peft_config.base_model_name_or_path = "some/base"
    lora = extract_task(model, **one_task(MERGEABLE[0], TASKS[0]))
    assert lora.active_peft_config.base_model_name_or_path == "some/base"
