"""transformers' models on our experts: tiny ones from configs, logits and every gradient against its eager path."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

import moe_mtl.ops  # noqa: F401 - registers the experts function
from moe_mtl.ops.transformers import _activation as activation_of

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, num_experts=8, moe_intermediate_size=12, norm_topk_prob=True),
    "gpt_oss": lambda: GptOssConfig(**SMALL, num_local_experts=4, layer_types=["full_attention"] * 2),
    "nemotron_h": lambda: NemotronHConfig(
        **SMALL | {"num_hidden_layers": 2},
        layers_block_type=["attention", "moe"],
        n_routed_experts=4,
        moe_intermediate_size=12,
        moe_shared_expert_intermediate_size=12,
    ),
}


def build(name: str, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.set_experts_implementation(implementation)
    return model


def run(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tokens = torch.arange(3, 25).view(2, 11)
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": out.logits.detach()} | grads


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_and_gradients_are_those_of_the_eager_path(name: str) -> None:
    expected, found = run(build(name, "eager")), run(build(name, "moe_mtl"))
    assert found.keys() == expected.keys()
    assert sum("experts" in key for key in found) >= 2
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()), msg=key)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_through_the_kernels_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model whose activation they fuse, one that brings its own function."""
    pytest.importorskip("triton")
    asked: list[str] = []
    monkeypatch.setattr("moe_mtl.ops.experts.default_backend", lambda device: asked.append("triton") or "triton")
    expected, found = run(build(name, "eager")), run(build(name, "moe_mtl"))
    assert asked
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()), msg=key)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_torch_compile(name: str) -> None:
    torch.compiler.reset()
    expected, model = run(build(name, "moe_mtl")), build(name, "moe_mtl")
    experts = [module for module in model.modules() if hasattr(module, "has_gate")]
    assert len(experts) == 2
    for module in experts:
        module.compile(fullgraph=True, backend="aot_eager")
    found = run(model)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()), msg=key)


def test_torch_compile_of_a_whole_model() -> None:
    torch.compiler.reset()
    expected, model = run(build("qwen3_moe", "moe_mtl")), build("qwen3_moe", "moe_mtl")
    model.compile(backend="aot_eager")
    found = run(model)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()), msg=key)


def test_what_the_kernels_fuse_is_known_by_name() -> None:
    names = {
        name: [activation_of(module) for module in build(name, "moe_mtl").modules() if hasattr(module, "has_gate")]
        for name in CONFIGS
    }
    assert set(names["mixtral"] + names["qwen3_moe"]) == {"swiglu"}
    assert set(names["nemotron_h"]) == {"relu2"}
    assert all(callable(found) for found in names["gpt_oss"])


def test_gradient_checkpointing() -> None:
    expected, model = run(build("qwen3_moe", "moe_mtl")), build("qwen3_moe", "moe_mtl")
    model.gradient_checkpointing_enable()
    model.train()
    found = run(model)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, msg=key)


def test_lora_on_the_experts_through_peft() -> None:
    from peft import LoraConfig, get_peft_model

    outputs = []
    for implementation in ("eager", "moe_mtl"):
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
        model = build("qwen3_moe", implementation)
        torch.manual_seed(1)
        outputs.append(run(get_peft_model(model, config)))
    expected, found = outputs
    assert any("lora_A" in key for key in found)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()), msg=key)


def test_a_norm_after_each_expert_is_refused() -> None:
    model = build("mixtral", "moe_mtl")
    for module in model.modules():
        if hasattr(module, "has_gate"):
            module.has_post_expert_norm = True
    with pytest.raises(NotImplementedError, match="normalises each expert's output"):
        run(model)
