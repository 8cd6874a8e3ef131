"""A small model of every type for tables, with fields off their defaults wherever that is possible, and rows for it.

Nothing here names a model: a new paper's file in `moe_mtl/models` is found in the registry and gets all contract tests.
"""

import copy
import dataclasses
import functools
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig

from moe_mtl.models import REGISTRY, MultiTaskConfig, MultiTaskModel
from moe_mtl.models._tabular import TabularModel
from moe_mtl.tasks import KINDS, Task, parse_tasks

MODEL_TYPES = sorted(name for name, model in REGISTRY.items() if issubclass(model, TabularModel))

FEATURES: list[dict[str, Any]] = [
    {"name": "age", "kind": "numeric", "bins": [-1.0, -0.5, 0.0, 0.25, 2.0]},
    {"name": "city", "kind": "categorical", "num_categories": 7},
    {"name": "income", "kind": "numeric"},
    {"name": "tags_seen", "kind": "multi_hot", "num_categories": 5, "pooling": "mean", "max_length": 4},
    {"name": "history", "kind": "sequence", "num_categories": 9, "pooling": "max", "max_length": 4},
    {"name": "device", "kind": "categorical", "num_categories": 3},
    {"name": "clicks", "kind": "numeric", "bins": [0.0, 1.0]},
    {"name": "basket", "kind": "multi_hot", "num_categories": 4, "pooling": "sum", "max_length": 3},
]
# Every kind, a space, a product, groups, weights; not in alphabetical order, which JSON would otherwise hide.
TASKS: list[dict[str, Any]] = [
    {"name": "view", "kind": "binary", "group": "act", "metrics": ["auc"]},
    {"name": "buy", "kind": "binary", "weight": 0.5, "group": "act", "space": "view"},
    {"name": "view_buy", "kind": "binary", "product_of": ["view", "buy"]},
    {"name": "price", "kind": "regression", "group": "value"},
    {"name": "colour", "kind": "multiclass", "num_outputs": 3, "weight": 2},
    {"name": "badges", "kind": "multilabel", "num_outputs": 2, "group": "value"},
    {"name": "area", "kind": "regression", "num_outputs": 2, "group": "value"},
]
TASK_NAMES = [task["name"] for task in TASKS]
TOWER_TASKS = [task["name"] for task in TASKS if "product_of" not in task]

# What no rule could guess. A field of a new paper needs a line here only if the rules of `others` do not fit it.
_SMALL = {
    "features": FEATURES,
    "tasks": TASKS,
    "embedding_dim": 3,
    "numeric_embedding_dim": 4,
    "tower_dims": [5, 4],
    "initializer_range": 0.5,
    "activation": "tanh",
    "num_experts": 5,
    "gate_gamma": 1.5,
}
WRITTEN_BY_THE_LIBRARY = {"experts_kept", "expert_groups", "meta_groups"}


def own_fields(config_class: type[MultiTaskConfig]) -> list[dataclasses.Field]:
    """The fields that this library added."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return [field for field in dataclasses.fields(config_class) if field.name not in inherited]


def others(default: Any) -> list[Any]:
    """Values other than the default, most welcome first."""
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        return [default + 1, default - 1]
    if isinstance(default, float):
        return [default / 2 + 0.125]
    if isinstance(default, list) and all(isinstance(item, int) for item in default):
        return [[7, 6]]
    return []


def config_of(model_type: str, **overrides: Any) -> MultiTaskConfig:
    """A small config of that type in which every field that can differ from its default does."""
    return REGISTRY[model_type].config_class(**copy.deepcopy({**_off_default(model_type), **overrides}))


@functools.cache
def _off_default(model_type: str) -> dict[str, Any]:
    config_class = REGISTRY[model_type].config_class
    default = config_class()
    chosen: dict[str, Any] = {}
    for field in own_fields(config_class):
        if field.name in WRITTEN_BY_THE_LIBRARY:
            continue
        candidates = [_SMALL[field.name]] if field.name in _SMALL else others(getattr(default, field.name))
        for value in candidates:
            try:
                config_class(**{field.name: value})
            except (StrictDataclassError, ValueError):
                continue
            chosen[field.name] = value
            break
    return chosen


def _variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Each type, and each again with one switch the other way, so that neither side goes untested."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for model_type in MODEL_TYPES:
        config = config_of(model_type)
        found[model_type] = (model_type, {})
        for field in own_fields(type(config)):
            value = getattr(config, field.name)
            for other in [not value] if isinstance(value, bool) else _SWITCHES.get(field.name, []):
                # The encoder is the same in every model: once is enough.
                if other == value or (field.name == "numeric_embedding" and model_type != MODEL_TYPES[0]):
                    continue
                try:
                    config_of(model_type, **{field.name: other})
                except StrictDataclassError:
                    continue
                found[f"{model_type}-{field.name}={other}"] = (model_type, {field.name: other})
    return found


_SWITCHES = {"gate": ["dselect_k"], "numeric_embedding": ["scaled", "periodic"]}
VARIANTS = _variants()


def variant_of(name: str, **overrides: Any) -> MultiTaskModel:
    model_type, fields = VARIANTS[name]
    return model_of(model_type, **{**fields, **overrides})


def model_of(model_type: str, seed: int = 0, **overrides: Any) -> MultiTaskModel:
    """In evaluation mode, float32."""
    torch.manual_seed(seed)
    model = REGISTRY[model_type](config_of(model_type, **overrides)).eval()
    with torch.no_grad():  # running statistics as after training: a fresh model's batch norm does nothing
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
    return model


def inputs_of(config: MultiTaskConfig, rows: int = 6, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    kinds: dict[str, list[dict[str, Any]]] = {"numeric": [], "categorical": [], "sequences": []}
    for feature in config.features:
        kinds[{"multi_hot": "sequences", "sequence": "sequences"}.get(feature["kind"], feature["kind"])].append(feature)
    if kinds["numeric"]:
        inputs["numeric"] = torch.randn(rows, len(kinds["numeric"]), generator=generator)
    if kinds["categorical"]:
        columns = [torch.randint(f["num_categories"], (rows,), generator=generator) for f in kinds["categorical"]]
        inputs["categorical"] = torch.stack(columns, dim=1)
    if kinds["sequences"]:
        cells = [torch.randint(-1, f["num_categories"], (rows, 4), generator=generator) for f in kinds["sequences"]]
        inputs["sequences"] = torch.stack(cells, dim=1)
        inputs["sequences"][:1] = -1  # a row whose cells are all empty
    return inputs


def labels_of(config: MultiTaskConfig, rows: int = 6, seed: int = 2, missing: bool = True) -> dict[str, Tensor]:
    """Labels of every task; the last row lacks all of them."""
    generator = torch.Generator().manual_seed(seed)
    labels = {task.name: random_labels(task, rows, generator) for task in parse_tasks(config.tasks)}
    if missing:
        for name, task in zip(labels, parse_tasks(config.tasks), strict=True):
            labels[name][-1] = task.missing
    return labels


def random_labels(task: Task, rows: int, generator: torch.Generator) -> Tensor:
    if task.kind == "multiclass":
        return torch.randint(task.num_outputs, (rows,), generator=generator)
    if task.kind == "regression":
        shape = (rows,) if task.num_outputs == 1 else (rows, task.num_outputs)
        return torch.randn(shape, generator=generator)
    shape = (rows, task.num_outputs) if task.kind == "multilabel" else (rows,)
    labels = torch.randint(2, shape, generator=generator).to(KINDS[task.kind].label_dtype)
    labels[0] = 1
    return labels
