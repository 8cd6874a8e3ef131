"""What `from_pretrained` refuses, on one small model; `test_hub.py` has the files, `contract` all models."""

import json
from pathlib import Path

import pytest
import torch
from by_hand import model_of, rows
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_mtl import AutoModelForMultiTask, AutoProcessor, TabularProcessor, VisionProcessor, hub
from moe_mtl.files import CheckpointError
from moe_mtl.models import REGISTRY, model_class

TASKS = [{"name": "b", "kind": "binary"}, {"name": "a", "kind": "regression"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model_of("mmoe", tasks=TASKS, num_experts=3, expert_dims=[4]).float().save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **changes: Tensor | None) -> None:
    """Rewrites tensors of the folder; None drops one."""
    state = {**load_file(folder / "model.safetensors"), **{name.replace("__", "."): t for name, t in changes.items()}}
    save_file({name: t for name, t in state.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers__a__output__bias": None}, "1 missing: towers.a.output.bias"),
        (
            {"towers__a__output__bias": torch.zeros(2)},
            r"of another shape: towers.a.output.bias \(expected \[1\], found",
        ),
        ({"extra": torch.zeros(2)}, "1 unexpected: extra"),
        (
            {"towers__a__output__bias": torch.tensor([float("nan")])},
            "finite weights, found 1 .* in towers.a.output.bias",
        ),
    ],
)
def test_weights_that_do_not_fit(folder: Path, changes: dict[str, Tensor | None], message: str) -> None:
    change(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForMultiTask.from_pretrained(folder)


def test_another_tasks_broken_weights_are_not_even_read(folder: Path) -> None:
    before = AutoModelForMultiTask.from_pretrained(folder)(numeric=rows().float()).logits["b"]
    change(folder, towers__a__output__bias=torch.tensor([float("nan")]))
    alone = AutoModelForMultiTask.from_pretrained(folder, tasks=["b"])
    assert torch.equal(alone(numeric=rows().float()).logits["b"], before)


def test_a_model_of_another_type(folder: Path) -> None:
    with pytest.raises(ValueError, match="holds a model of type 'mmoe', PLEForMultiTask loads 'ple'"):
        REGISTRY["ple"].from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mmeo"}))
    with pytest.raises(ValueError, match="unknown model type 'mmeo'; did you mean 'mmoe'"):
        AutoModelForMultiTask.from_pretrained(folder)
    with pytest.raises(ValueError, match="unknown model type 'bert'"):
        model_class("bert")


def test_a_config_with_a_field_that_does_not_exist(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_expert": 3}))
    with pytest.raises(ValueError, match="unknown field 'num_expert'; did you mean 'num_experts'"):
        AutoModelForMultiTask.from_pretrained(folder)


def test_tasks_need_something_to_read_from(folder: Path) -> None:
    model = AutoModelForMultiTask.from_pretrained(folder)
    with pytest.raises(ValueError, match="use extract_task"):
        type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), tasks=["b"])


@pytest.mark.parametrize(("name", "kind"), [("mmoe-digits", TabularProcessor), ("m3vit-digit-pairs", VisionProcessor)])
def test_the_processor_of_any_model(name: str, kind: type) -> None:
    processor = AutoProcessor.from_pretrained(name)
    assert type(processor) is kind
    assert processor == kind.from_pretrained(name)


def test_an_adapter_has_no_processor_of_rows() -> None:
    adapter = next(name for name, folder in hub.zoo().items() if (folder / hub.ADAPTER).is_file())
    for auto in (AutoModelForMultiTask, AutoProcessor):
        with pytest.raises(ValueError, match=r"found in .* an adapter; load it with"):
            auto.from_pretrained(adapter)
