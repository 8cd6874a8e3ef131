"""A small model of every type for images, with fields off their defaults wherever that is possible, and images for it.

Nothing here names a model: a new paper's file in `moe_mtl/models` is found in the registry and gets all contract tests.
"""

import copy
import functools
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from zoo import others, own_fields, random_labels

from moe_mtl.models import REGISTRY
from moe_mtl.models._vision import VisionConfig, VisionModel
from moe_mtl.tasks import Task, parse_tasks

MODEL_TYPES = sorted(name for name, model in REGISTRY.items() if issubclass(model, VisionModel))

# Every dense kind, and answers per image; not in alphabetical order, which JSON would otherwise hide.
TASKS: list[dict[str, Any]] = [
    {"name": "semseg", "kind": "segmentation", "num_outputs": 4},
    {"name": "saliency", "kind": "saliency", "weight": 5},
    {"name": "edges", "kind": "edges", "weight": 50},
    {"name": "normals", "kind": "normals", "num_outputs": 3, "weight": 10},
    {"name": "depth", "kind": "depth"},
    {"name": "scene", "kind": "multiclass", "num_outputs": 3, "weight": 0.5},
    {"name": "tilt", "kind": "regression"},
]
TASK_NAMES = [task["name"] for task in TASKS]
SIZE = [16, 24]

# What no rule could guess, or what would be large. A field of a new paper needs a line here only if the rules of
# `zoo.others` do not fit it.
_SMALL = {
    "tasks": TASKS,
    "image_size": SIZE,
    "patch_size": 4,
    "num_channels": 2,
    "hidden_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "layer_scale": 0.5,
    "decoder_dim": 8,
    "decoder_stages": 2,
    "initializer_range": 0.3,
    "num_experts": 4,
    "num_selected": 2,
    "expert_dim": 7,
    "condition_dim": 4,
    "attention_experts": 6,
    "attention_selected": 3,
    "attention_head_dim": 5,
    "num_levels": 2,
    "expert_ranks": [1, 2, 3, 4],
    "task_rank": 2,
    "teachers": ["dino", "clip"],
    "adapter_dim": 3,
}
WRITTEN_BY_THE_LIBRARY = {"experts_kept", "folded"}
QUIET = {"dropout": 0.0, "drop_path": 0.0, "noise_std": 0.0, "noisy_gating": False}


def config_of(model_type: str, **overrides: Any) -> VisionConfig:
    """A small config of that type in which every field that can differ from its default does. Overrides that the type
    has no field for are left out."""
    known = {field.name for field in own_fields(REGISTRY[model_type].config_class)}
    overrides = {name: value for name, value in overrides.items() if name in known}
    return REGISTRY[model_type].config_class(**copy.deepcopy({**_off_default(model_type), **overrides}))


@functools.cache
def _off_default(model_type: str) -> dict[str, Any]:
    config_class = REGISTRY[model_type].config_class
    fields = [field.name for field in own_fields(config_class) if field.name not in WRITTEN_BY_THE_LIBRARY]
    chosen = {name: _SMALL[name] for name in fields if name in _SMALL}
    default = config_class()
    for name in fields:
        for value in [] if name in chosen else others(getattr(default, name)):
            try:
                config_class(**chosen, **{name: value})
            except (StrictDataclassError, ValueError):
                continue
            chosen[name] = value
            break
    return chosen


def _variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Each type, and each again with one switch of its own the other way."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    shared = {field.name for field in own_fields(VisionConfig)}
    for model_type in MODEL_TYPES:
        config = config_of(model_type)
        found[model_type] = (model_type, {})
        for field in own_fields(type(config)):
            value = getattr(config, field.name)
            for other in [not value] if isinstance(value, bool) else _SWITCHES.get(field.name, []):
                if field.name not in shared or model_type == MODEL_TYPES[0]:  # what all share: once is enough
                    found[f"{model_type}-{field.name}={other}"] = (model_type, {field.name: other})
    return found


_SWITCHES = {"gate": ["task_conditioned"]}
VARIANTS = _variants()


def variant_of(name: str, **overrides: Any) -> VisionModel:
    model_type, fields = VARIANTS[name]
    return model_of(model_type, **{**fields, **overrides})


def model_of(model_type: str, seed: int = 0, **overrides: Any) -> VisionModel:
    """In evaluation mode, float32."""
    torch.manual_seed(seed)
    model = REGISTRY[model_type](config_of(model_type, **overrides)).eval()
    with torch.no_grad():  # statistics as after training: a fresh model's batch norm does nothing
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
        for name, parameter in model.named_parameters():
            if ".gates." in name and not parameter.any():  # gates that start at zero have learnt something
                parameter.normal_(std=0.5)
    return model


def inputs_of(config: VisionConfig, rows: int = 4, seed: int = 1) -> dict[str, Tensor]:
    shape = (rows, config.num_channels, *config.image_size)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


def labels_of(config: VisionConfig, rows: int = 4, seed: int = 2, missing: bool = True) -> dict[str, Tensor]:
    """Labels of every task; the last row lacks all of them, and every map some pixels."""
    generator = torch.Generator().manual_seed(seed)
    labels = {}
    for task in parse_tasks(config.tasks):
        labels[task.name] = _labels(task, rows, config.image_size, generator)
        if missing:
            labels[task.name][-1] = task.missing
            if task.dense:
                labels[task.name][..., :2, :5] = task.missing
    return labels


def _labels(task: Task, rows: int, size: list[int], generator: torch.Generator) -> Tensor:
    if not task.dense:
        return random_labels(task, rows, generator)
    if task.kind == "segmentation":
        return torch.randint(task.num_outputs, (rows, *size), generator=generator)
    if task.kind == "normals":
        return torch.nn.functional.normalize(torch.randn(rows, 3, *size, generator=generator), dim=1)
    values = torch.rand(rows, *size, generator=generator)
    return values if task.kind == "depth" else values.round()
