"""SAK: what one task needs, and configs that cannot be."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from moe_mtl.models.sak import SAKConfig, SAKForMultiTask

TASKS = [
    {"name": "semseg", "kind": "segmentation", "num_outputs": 4},
    {"name": "depth", "kind": "depth"},
    {"name": "scene", "kind": "multiclass", "num_outputs": 3},
]
SMALL: dict[str, Any] = {
    "image_size": [16, 24],
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_levels": 2,
    "teachers": ["dino", "sam"],
    "adapter_dim": 3,
    "decoder_dim": 6,
    "decoder_stages": 2,
    "tasks": TASKS,
}


def test_one_task_needs_stem_and_all_paths_but_no_other_router() -> None:
    torch.manual_seed(0)
    model = SAKForMultiTask(SAKConfig(**SMALL)).eval()
    small = model.extract_task("depth")
    names = set(small.state_dict())
    assert names == {n for n in model.state_dict() if not any(task in n for task in ("semseg", "scene"))}
    assert sum(".adapters." in name and name.endswith("scale") for name in names) == 2 * 3
    pixels = torch.randn(3, 3, 16, 24)
    torch.testing.assert_close(small(pixels).logits["depth"], model(pixels).logits["depth"], rtol=1e-5, atol=1e-5)
    records = model(pixels, tasks="depth", output_routing=True).routing
    assert [record.layer for record in records] == ["decoder.routers.0", "decoder.routers.1"]
    assert all(list(record.weights) == ["depth"] for record in records)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teachers": []}, "number of teachers"),
        ({"teachers": ["sam", "sam"]}, "names of their own"),
        ({"teachers": ["stem"]}, "none of them 'stem'"),
        ({"teachers": ["a.b"]}, "a teacher's name"),
        ({"num_levels": 4}, "num_levels"),
        ({"adapter_dim": 0}, "adapter_dim"),
    ],
)
def test_configs_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        SAKConfig(**(SMALL | fields))
