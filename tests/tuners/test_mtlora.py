"""MTLoRA: which layers have a pair per task, and what a task ships as where layers differ."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tuner_zoo import TASKS, adapted, batch, config_of, llama

from moe_mtl.tuners import MTLoRAConfig, extract_task
from moe_mtl.tuners._base import RankLayer


@pytest.mark.parametrize("task_modules", [["layers.1.self_attn.v_proj", "down_proj"], r".*(1\..*v_proj|down_proj)"])
@pytest.mark.parametrize("shared_in_tasks", [True, False])
def test_some_layers_have_a_pair_per_task(task_modules: list[str] | str, shared_in_tasks: bool, tmp_path: Path) -> None:
    model = adapted(MTLoRAConfig, task_modules=task_modules, shared_in_tasks=shared_in_tasks, task_rank=3)
    with_pairs = {
        layer.name for layer in model.modules() if isinstance(layer, RankLayer) and layer.adapter("default").has_pairs
    }
    assert with_pairs == {"model.layers.1.self_attn.v_proj", *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))}
    ids = batch()["input_ids"]
    for task in TASKS:
        lora = extract_task(model, task)
        torch.testing.assert_close(lora(input_ids=ids).logits, model(input_ids=ids, tasks=task).logits)
        lora.save_pretrained(tmp_path / task)
        loaded = PeftModel.from_pretrained(llama(), tmp_path / task).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids, tasks=task).logits)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(again(input_ids=ids, tasks=TASKS).logits, model(input_ids=ids, tasks=TASKS).logits)


def test_task_modules_that_fit_no_target() -> None:
    config = config_of(MTLoRAConfig, target_modules=["q_proj"], task_modules=["v_proj"])
    base = llama()
    with pytest.raises(ValueError, match=r"task_modules: expected some of the targets, such as .*q_proj, found"):
        get_peft_model(base, config)
    assert not [module for module in base.modules() if isinstance(module, RankLayer)]


def test_bad_fields() -> None:
    with pytest.raises(ValueError, match="task_rank: expected at least 1, found 0"):
        config_of(MTLoRAConfig, task_rank=0)
    with pytest.raises(ValueError, match="alpha: expected another number than 0"):
        config_of(MTLoRAConfig, alpha=0.0)


def test_the_scale_is_as_published() -> None:
    assert MTLoRAConfig(tasks=TASKS).scale == MTLoRAConfig(tasks=TASKS).task_scale == 4.0
