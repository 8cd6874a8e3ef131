"""M³ViT: the paper's sizes, what one task computes, and configs that cannot be."""

import copy
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from moe_mtl.models.m3vit import M3ViTConfig, M3ViTForMultiTask

PASCAL = [
    {"name": "semseg", "kind": "segmentation", "num_outputs": 21},
    {"name": "human_parts", "kind": "segmentation", "num_outputs": 7},
    {"name": "saliency", "kind": "saliency"},
    {"name": "edges", "kind": "edges"},
    {"name": "normals", "kind": "normals", "num_outputs": 3},
]
TASKS = [PASCAL[0] | {"num_outputs": 4}, PASCAL[4], {"name": "scene", "kind": "multiclass", "num_outputs": 3}]
SMALL: dict[str, Any] = {
    "image_size": [16, 24],
    "patch_size": 8,
    "hidden_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_experts": 6,
    "num_selected": 2,
    "expert_dim": 10,
    "decoder_dim": 6,
    "decoder_stages": 2,
}


def build(gate: str = "multi_gate", **fields: Any) -> M3ViTForMultiTask:
    torch.manual_seed(0)
    model = M3ViTForMultiTask(
        M3ViTConfig(**(SMALL | {"gate": gate, "tasks": TASKS, "initializer_range": 0.3} | fields))
    )
    return model.eval()


def pixels(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def test_small_holds_the_published_parameters() -> None:
    """42.5 M counts the weight matrices of the blocks alone: no biases, norms, gates, patches, or decoders."""
    config = M3ViTConfig.of_size("small", image_size=[512, 512], tasks=PASCAL)
    with torch.device("meta"):
        model = M3ViTForMultiTask(config)
    matrices = 0
    for name, parameter in model.blocks.named_parameters():
        if ".gates." not in name and ".b_" not in name and parameter.dim() > 1:
            matrices += parameter.numel()
    d, h = 384, 384
    assert matrices == 12 * 4 * d * d + 6 * 8 * d * d + 6 * 16 * 2 * d * h
    assert round(matrices / 1e6, 1) == 42.5
    gates = sum(p.numel() for name, p in model.named_parameters() if ".gates." in name)
    assert gates == 5 * 6 * 16 * d  # 0.18 M
    decoder = sum(p.numel() for p in model.heads["edges"].parameters())
    assert round(decoder / 1e6, 2) == 2.66


@pytest.mark.parametrize(("size", "width", "heads"), [("tiny", 192, 3), ("small", 384, 12), ("base", 768, 12)])
def test_sizes(size: str, width: int, heads: int) -> None:
    config = M3ViTConfig.of_size(size, image_size=[128, 256], num_experts=8)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (width, heads, 12)
    assert config.num_selected * config.expert_dim == config.mlp_ratio * width  # a token costs what it does when dense
    assert config.num_experts == 8
    assert config.expert_blocks == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize("gate", ["multi_gate", "task_conditioned"])
def test_m3vit_one_task_runs_one_task(gate: str) -> None:
    """The official code's `single_task` is ignored in multi-gate mode: every task runs, the whole backbone each."""
    model = build(gate)
    seen: list[int] = []
    for block in model.config.expert_blocks:
        experts = model.blocks[block].mlp.experts
        experts.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[1])))
    whole = model(pixels()).logits
    tokens = 3 * (1 + 2 * 3)
    assert seen == [3 * tokens] * 2
    seen.clear()
    alone = model(pixels(), tasks="normals").logits
    assert seen == [tokens] * 2
    assert list(alone) == ["normals"]
    torch.testing.assert_close(alone["normals"], whole["normals"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", ["multi_gate", "task_conditioned"])
def test_all_tasks_share_what_stands_before_the_first_experts(gate: str) -> None:
    model = build(gate)
    rows: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and name.startswith("blocks"):
            module.register_forward_hook(lambda m, x, y, name=name: rows.update({name: len(y)}))
    model(pixels())
    assert rows == {f"blocks.{i}.norm{j}": 1 if i < 2 else 3 for i in range(4) for j in (1, 2)}


@pytest.mark.parametrize("gate", ["multi_gate", "task_conditioned"])
def test_checkpointing_changes_no_gradient(gate: str) -> None:
    labels = {"scene": torch.tensor([0, 2, 1]), "normals": torch.nn.functional.normalize(pixels(), dim=1)}
    found = []
    for checkpointing in (False, True):
        model = build(gate, noise_std=1.0, z_weight=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        out = model(pixels(), labels=labels)
        assert out.auxiliary_loss is not None
        out.loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any(".gate" in name for name in found[0])
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


def test_a_task_of_an_extraction_holds_its_gates_alone() -> None:
    model = build()
    small = model.extract_task("normals")
    gates = [name for name in small.state_dict() if ".gates." in name]
    assert gates == [f"blocks.{i}.mlp.router.gates.normals" for i in (1, 3)]
    assert [name for name in small.state_dict() if name.startswith("heads.")] == [
        name for name in model.state_dict() if name.startswith("heads.normals.")
    ]


def test_stored_experts_are_those_of_the_config() -> None:
    model = build(experts_kept={"3": [0, 2, 5]})
    assert len(model.blocks[1].mlp.experts.w_up) == 6
    assert len(model.blocks[3].mlp.experts.w_up) == 3
    record = model(pixels(), output_routing=True).routing[1]
    assert record.layer == "blocks.3"
    assert all(set(i.flatten().tolist()) <= {0, 2, 5} for i in record.indices.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_selected": 7}, "num_selected"),
        ({"image_size": [16, 20]}, "multiples of the patch of 8, found 20"),
        ({"image_size": [16]}, "height and width"),
        ({"hidden_size": 13}, "multiple of num_attention_heads"),
        ({"gate": "noisy"}, "gate must be one of multi_gate, task_conditioned, found 'noisy'"),
        ({"noise_std": -1.0}, "noise_std"),
        ({"experts_kept": {"2": [0, 1]}}, r"blocks with experts, \[1, 3\], found '2'"),
        ({"experts_kept": {"1": [1, 0]}}, "increasing numbers below 6"),
        ({"experts_kept": {"1": [1]}}, "leave 2 experts to choose"),
        ({"tasks": [{"name": "a", "kind": "binary"}, {"name": "b", "kind": "binary", "space": "a"}]}, "for tables"),
    ],
)
def test_configs_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        M3ViTConfig(**(copy.deepcopy(SMALL) | {"tasks": TASKS} | fields))


def test_unknown_size() -> None:
    with pytest.raises(ValueError, match="tiny, small, base, found 'huge'"):
        M3ViTConfig.of_size("huge")
