"""From a recipe's model section to a model and its processor: new, or a saved one with tasks added or dropped."""

from fnmatch import fnmatchcase
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ..data.processor import TabularProcessor
from ..data.splits import DataSplits
from ..models import AutoModelForMultiTask, MultiTaskModel, model_class
from ..naming import nearest
from .recipe import ModelSection, Recipe, RecipeError


def build(recipe: Recipe, splits: DataSplits) -> tuple[MultiTaskModel, TabularProcessor]:
    """The model to train and its processor, fitted on the training rows or taken from the saved model.

    Raises:
        RecipeError: a task, config field or parameter pattern that does not exist; a saved model that cannot take a
            further task.
    """
    section = recipe.model
    if "features" in section.config:
        raise RecipeError("section 'model': 'features' come from the data and cannot be set")
    fitted = splits.fit_processor()
    if section.source is None:
        processor = fitted.for_tasks(_chosen(section.tasks, list(fitted.labels), "model.tasks"))
        fields = {"features": processor.features, "tasks": _weighted(processor, recipe)}
        model = _configured(str(section.type), fields | section.config)
        new: set[str] = set()
    else:
        model, processor, new = _from_saved(section, fitted, recipe)
    freeze(model, section.freeze, new)
    return model, processor


def _from_saved(
    section: ModelSection, fitted: TabularProcessor, recipe: Recipe
) -> tuple[MultiTaskModel, TabularProcessor, set[str]]:
    source = str(section.source)
    if section.tasks is not None:
        raise RecipeError("model.tasks chooses the tasks of a new model; with model.from use add_tasks and drop_tasks")
    model = AutoModelForMultiTask.from_pretrained(source)
    saved = TabularProcessor.from_pretrained(source)
    if section.drop_tasks:
        _chosen(section.drop_tasks, model.tasks, "model.drop_tasks")
        kept = [task for task in model.tasks if task not in section.drop_tasks]
        if not kept:
            raise RecipeError(f"model.drop_tasks leaves no task of {section.source}")
        model = model.extract_task(kept)
    for task in section.add_tasks:
        if task in model.tasks:
            raise RecipeError(f"model.add_tasks: {section.source} has a task {task!r} already")
    added = _chosen(section.add_tasks, list(fitted.labels), "model.add_tasks") if section.add_tasks else []
    absent = [task for task in model.tasks if task not in saved.labels]
    if absent:
        raise RecipeError(f"model.from: the processor of {section.source} lacks the task {absent[0]!r} of its model")
    saved = saved.for_tasks(model.tasks)
    # What was learnt stays as it is: columns, and the labels of the old tasks (a regression's scale is part of its
    # answers).
    old = saved.parsed_tasks
    tasks = old + [task for task in fitted.parsed_tasks if task.name in added]
    labels = {task.name: saved.labels[task.name] if task in old else fitted.labels[task.name] for task in tasks}
    group = fitted.group_column or saved.group_column
    processor = TabularProcessor(saved.columns, tasks, labels, group, saved.known_columns, saved.missing_values)
    config = {
        key: value
        for key, value in model.config.to_diff_dict().items()
        if key in type(model.config).__dataclass_fields__
    }
    config |= {"features": model.config.features, "tasks": _weighted(processor, recipe)} | section.config
    grown = _configured(model.config.model_type, config)
    return grown, processor, _copy_weights(model, grown, section)


def _copy_weights(old: MultiTaskModel, new: MultiTaskModel, section: ModelSection) -> set[str]:
    """Copies what both have. Returns the names of what only the new model has."""
    source, target = old.state_dict(), new.state_dict()
    for name, value in source.items():
        if name not in target or target[name].shape != value.shape:
            found = (
                "is gone"
                if name not in target
                else f"has the shape {list(target[name].shape)} instead of {list(value.shape)}"
            )
            what = f"add_tasks {section.add_tasks}" if section.add_tasks else f"the fields {sorted(section.config)}"
            raise RecipeError(f"model: with {what} a {new.config.model_type} cannot keep its weights: {name!r} {found}")
    with torch.no_grad():
        for name, value in source.items():
            target[name].copy_(value)
    return set(target) - set(source)


def _configured(model_type: str, fields: dict[str, Any]) -> MultiTaskModel:
    try:
        cls = model_class(model_type)
    except ValueError as error:
        raise RecipeError(f"model.type: {error}") from None
    known = cls.config_class.__dataclass_fields__
    for key in fields:
        if key not in known:
            raise RecipeError(
                f"section 'model': unknown key {key!r}: {model_type} has no such field{nearest(key, known)}"
            )
    try:
        config = cls.config_class(**fields)
        config.validate()
    except (StrictDataclassError, ValueError) as error:
        raise RecipeError(f"section 'model': {' '.join(str(error.__cause__ or error).split())}") from None
    return cls(config)


def _chosen(names: list[str] | None, known: list[str], where: str) -> list[str]:
    if names is None:
        return known
    for name in names:
        if name not in known:
            raise RecipeError(f"{where}: unknown task {name!r}{nearest(name, known)}")
    if not names:
        raise RecipeError(f"{where}: expected at least one of {', '.join(known)}, found an empty list")
    return [name for name in known if name in names]


def _weighted(processor: TabularProcessor, recipe: Recipe) -> list[dict[str, Any]]:
    weights = recipe.train.task_weights
    for name in weights:
        if name not in processor.labels:
            raise RecipeError(f"train.task_weights: unknown task {name!r}{nearest(name, processor.labels)}")
    return [task | ({"weight": weights[task["name"]]} if task["name"] in weights else {}) for task in processor.tasks]


def freeze(model: nn.Module, patterns: list[str], new: set[str]) -> None:
    """Keeps parameters from being trained, but for those in `new`. Raises RecipeError for a pattern without any."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matched = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matched:
            raise RecipeError(f"model.freeze: no parameter is called {pattern!r}{nearest(pattern, parameters)}")
        for name in matched:
            parameters[name].requires_grad_(name in new)
