"""MLoRE: folding a model, and what one task holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from moe_mtl.models.mlore import MLoREConfig, MLoREForMultiTask

TASKS = [
    {"name": "semseg", "kind": "segmentation", "num_outputs": 4},
    {"name": "depth", "kind": "depth"},
    {"name": "scene", "kind": "multiclass", "num_outputs": 3},
]
SMALL: dict[str, Any] = {
    "image_size": [16, 24],
    "hidden_size": 12,
    "num_hidden_layers": 4,
    "num_levels": 2,
    "expert_ranks": [1, 2, 3, 5],
    "num_selected": 2,
    "task_rank": 2,
    "decoder_dim": 6,
    "decoder_stages": 2,
    "tasks": TASKS,
    "initializer_range": 0.3,
}


def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def build(**fields: Any) -> MLoREForMultiTask:
    torch.manual_seed(0)
    model = MLoREForMultiTask(MLoREConfig(**(SMALL | fields))).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return model


def test_the_papers_experts() -> None:
    config = MLoREConfig()
    assert config.expert_ranks == [16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128]
    assert (config.num_selected, config.task_rank, config.balance_weight) == (9, 72, 3e-4)


def test_a_folded_model_answers_the_same_saves_and_loads(tmp_path: Path) -> None:
    model = build()
    config = model.config
    whole = model(pixels(), output_routing=True)
    assert model.fold_for_inference() is model
    assert not config.folded  # other models may have been built from the same one
    folded = model(pixels(), output_routing=True)
    for task, logits in folded.logits.items():
        torch.testing.assert_close(logits, whole.logits[task], rtol=1e-4, atol=1e-5)
    for record, other in zip(folded.routing, whole.routing, strict=True):
        assert all(torch.equal(record.indices[task], other.indices[task]) for task in model.tasks)
    model.save_pretrained(tmp_path)
    again = MLoREForMultiTask.from_pretrained(tmp_path, tasks=["depth"])
    assert torch.equal(again(pixels()).logits["depth"], model(pixels(), tasks="depth").logits["depth"])
    assert again.state_dict().keys() == model.extract_task("depth").state_dict().keys()


def test_folding_after_extraction_is_extraction_after_folding() -> None:
    one = build().extract_task("depth").fold_for_inference()
    other = build().fold_for_inference().extract_task("depth")
    assert one.config.to_dict() == other.config.to_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name])


def test_latency_aware_balance_is_by_rank() -> None:
    """Of the same choices another loss, unless all cost the same."""
    for ranks, same in (([1, 2, 3, 5], False), ([3, 3, 3, 3], True)):
        losses = [
            build(balance_weight=0.5, expert_ranks=ranks, latency_aware=aware).train()(pixels()).auxiliary_loss.item()
            for aware in (False, True)
        ]
        assert (losses[0] == pytest.approx(losses[1], rel=1e-4)) == same


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_selected": 5}, "num_selected"),
        ({"expert_ranks": []}, "number of expert_ranks"),
        ({"expert_ranks": [0, 1]}, "expert_ranks"),
        ({"num_levels": 5}, "num_levels"),
        ({"balance_weight": -1}, "balance_weight"),
        ({"latency_aware": True, "balance_weight": 0}, "latency_aware: expected a balance_weight above 0"),
    ],
)
def test_configs_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        MLoREConfig(**(SMALL | fields))
