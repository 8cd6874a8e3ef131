"""TaskExpert: where its decoder reads, and what one task pays for."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from moe_mtl.models.taskexpert import TaskExpertConfig, TaskExpertForMultiTask

TASKS = [
    {"name": "semseg", "kind": "segmentation", "num_outputs": 4},
    {"name": "depth", "kind": "depth"},
    {"name": "scene", "kind": "multiclass", "num_outputs": 3},
]
SMALL: dict[str, Any] = {
    "image_size": [16, 24],
    "hidden_size": 12,
    "num_hidden_layers": 5,
    "num_levels": 2,
    "num_experts": 3,
    "decoder_dim": 6,
    "decoder_stages": 2,
    "tasks": TASKS,
    "initializer_range": 0.3,
}


def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def build(**fields: Any) -> TaskExpertForMultiTask:
    torch.manual_seed(0)
    return TaskExpertForMultiTask(TaskExpertConfig(**(SMALL | fields))).eval()


def test_levels_stand_in_equal_steps_and_the_last_after_all_blocks() -> None:
    assert TaskExpertConfig().levels(4) == [3, 6, 9, 12]
    assert TaskExpertConfig(num_hidden_layers=24).levels(4) == [6, 12, 18, 24]
    assert build().decoder.reads == [2, 5]
    with pytest.raises((StrictDataclassError, ValueError), match="num_levels"):
        TaskExpertConfig(num_hidden_layers=3, num_levels=4)


def test_one_task_pays_for_no_other_gate_memory_or_head() -> None:
    model = build()
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, x, y, name=name: ran.append(name))
    model(pixels(), tasks="depth")
    assert not any(task in name for name in ran for task in ("semseg", "scene"))
    small = model.extract_task("depth")
    names = set(small.state_dict())
    assert names == {n for n in model.state_dict() if not any(task in n for task in ("semseg", "scene"))}
    assert [n for n in names if ".gates." in n and "depth" in n]
    torch.testing.assert_close(small(pixels()).logits["depth"], model(pixels()).logits["depth"], rtol=1e-5, atol=1e-5)


def test_all_tasks_share_one_pass_of_backbone_and_experts() -> None:
    model = build()
    seen: list[int] = []
    for level in model.decoder.levels:
        level.experts.register_forward_hook(lambda m, x, y: seen.append(len(y)))
    out = model(pixels(), output_routing=True)
    assert seen == [3, 3]
    assert out.last_hidden_state.shape == (3, 3, 2 * 3, 6)
    assert [record.layer for record in out.routing] == ["decoder.levels.0", "decoder.levels.1"]
    for record in out.routing:
        assert record.grid == (2, 3)
        assert not record.indices
        for weights in record.weights.values():
            assert weights.shape == (3 * 6, 4)
            torch.testing.assert_close(weights.sum(1), torch.ones(18))


def test_memory_of_a_task_reaches_its_own_answer_alone() -> None:
    model = build()
    before = model(pixels()).logits
    torch.nn.init.normal_(model.decoder.levels[0].writes["depth"].weight)
    after = model(pixels()).logits
    assert not torch.allclose(after["depth"], before["depth"])
    assert torch.equal(after["semseg"], before["semseg"])
    assert torch.equal(after["scene"], before["scene"])
