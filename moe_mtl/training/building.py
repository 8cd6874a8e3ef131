"""From a recipe's model section to a model and its processor: new, or a saved one with tasks added or dropped."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from ..data.images import ImageSplits
from ..data.processor import TabularProcessor
from ..data.splits import DataSplits
from ..data.vision_processor import VisionProcessor
from ..models import AutoModelForMultiTask, MultiTaskModel, model_class
from ..models._vision import VisionModel
from ..naming import nearest
from .recipe import ModelSection, Recipe, RecipeError

Processor = TabularProcessor | VisionProcessor


def build(recipe: Recipe, splits: DataSplits | ImageSplits) -> tuple[MultiTaskModel, Processor]:
    """The model to train and its processor, fitted on the training rows or taken from the saved model.

    Raises:
        RecipeError: a task, config field or parameter pattern that does not exist; a model that is not for such data; a
            saved model that cannot take a further task.
    """
    section = recipe.model
    fitted: Processor = splits.processor if isinstance(splits, ImageSplits) else splits.fit_processor()
    for field in _from_data(fitted):
        if field in section.config:
            raise RecipeError(f"section 'model': {field!r} comes from the data and cannot be set")
    if section.source is None:
        processor = fitted.for_tasks(_chosen(section.tasks, _names(fitted), "model.tasks"))
        fields = _from_data(processor) | {"tasks": _weighted(processor, recipe)}
        model = _configured(str(section.type), fields | section.config, type(fitted), section.backbone)
        new: set[str] = set()
    else:
        model, processor, new = _from_saved(section, fitted, recipe)
    freeze(model, section.freeze, new)
    return model, processor


def _from_data(processor: Processor) -> dict[str, Any]:
    """What of a model's config the data decide, beside the tasks."""
    if isinstance(processor, VisionProcessor):
        return {"image_size": list(processor.image_size)}
    return {"features": processor.features}


def _names(processor: Processor) -> list[str]:
    return [task.name for task in processor.parsed_tasks]


def _from_saved(section: ModelSection, fitted: Processor, recipe: Recipe) -> tuple[MultiTaskModel, Processor, set[str]]:
    source = str(section.source)
    if section.tasks is not None:
        raise RecipeError("model.tasks chooses the tasks of a new model; with model.from use add_tasks and drop_tasks")
    model = AutoModelForMultiTask.from_pretrained(source)
    _check_kind(f"model.from: {source}", type(model), type(fitted))
    saved: Processor = type(fitted).from_pretrained(source)
    if isinstance(saved, TabularProcessor) and isinstance(fitted, TabularProcessor):
        _check_declared(recipe, saved, fitted)
    if section.drop_tasks:
        _chosen(section.drop_tasks, model.tasks, "model.drop_tasks")
        kept = [task for task in model.tasks if task not in section.drop_tasks]
        if not kept:
            raise RecipeError(f"model.drop_tasks leaves no task of {section.source}")
        model = model.extract_task(kept)
        for name in section.drop_tasks:
            if name in model.tasks:
                users = [t.name for t in model.config.parsed_tasks if name in {t.space, *(t.product_of or ())}]
                raise RecipeError(f"model.drop_tasks: {name!r} cannot go, as {', '.join(users)} needs it")
    for task in section.add_tasks:
        if task in model.tasks:
            raise RecipeError(f"model.add_tasks: {section.source} has a task {task!r} already")
    added = _chosen(section.add_tasks, _names(fitted), "model.add_tasks") if section.add_tasks else []
    absent = [task for task in model.tasks if task not in _names(saved)]
    if absent:
        raise RecipeError(f"model.from: the processor of {section.source} lacks the task {absent[0]!r} of its model")
    saved = saved.for_tasks(model.tasks)
    processor = _grown(saved, fitted, added)
    config = {
        key: value
        for key, value in model.config.to_diff_dict().items()
        if key in type(model.config).__dataclass_fields__
    }
    config |= {"tasks": _weighted(processor, recipe)} | section.config
    grown = _configured(model.config.model_type, config, type(fitted))
    return grown, processor, _copy_weights(model, grown, section)


def _check_declared(recipe: Recipe, saved: TabularProcessor, fitted: TabularProcessor) -> None:
    """What a saved model has learnt stays: a recipe that declares it otherwise would not get what it says."""
    options, source = recipe.data.options, recipe.model.source

    def check(what: str, old: Any, new: Any) -> None:
        if new != old:
            raise RecipeError(f"{what}: expected {old!r}, as {source} was trained with, found {new!r}")

    for task in options.get("tasks") or ():
        name = task["name"] if isinstance(task, Mapping) else task
        if name not in {*saved.labels, *recipe.model.add_tasks}:
            raise RecipeError(
                f"data.tasks: {name!r} is no task of {source}: name it in model.add_tasks, or leave it out"
            )
    if options.get("features") is not None:
        check("data.features", *([(f["name"], f["kind"]) for f in p.features] for p in (saved, fitted)))
    if "missing_values" in options:
        check("data.missing_values", list(saved.missing_values), list(fitted.missing_values))
    new_tasks = {task.name: task for task in fitted.parsed_tasks}
    for task in saved.parsed_tasks:
        label = saved.labels[task.name]
        if task.name not in new_tasks or label.within:  # a space that was left behind is declared by nobody
            continue
        for old, new, fields in (
            (task, new_tasks[task.name], ("kind", "weight", "group", "metrics", "space", "product_of")),
            (label, fitted.labels[task.name], ("columns", "positive", "negative", "all_of", "weight_column")),
        ):
            for field in fields:
                check(f"data.tasks: {task.name}: {field}", getattr(old, field), getattr(new, field))


def _grown(saved: Processor, fitted: Processor, added: list[str]) -> Processor:
    """The processor of a saved model, with tasks added that were fitted on new data."""
    # What was learnt stays as it is: columns or the pictures' size, and the labels of the old tasks (a regression's
    # scale is part of its answers).
    old = saved.parsed_tasks
    tasks = old + [task for task in fitted.parsed_tasks if task.name in added]
    if isinstance(saved, VisionProcessor) and isinstance(fitted, VisionProcessor):
        if saved.image_size != fitted.image_size:
            raise RecipeError(
                f"model.from: expected pictures of {list(saved.image_size)} as the saved model takes, found data of "
                f"{list(fitted.image_size)}"
            )
        classes = {name: of for name, of in fitted.classes.items() if name in added} | saved.classes
        units = {name: of for name, of in fitted.units.items() if name in added} | saved.units
        return VisionProcessor(saved.image_size, tasks, classes, units, saved.image_mean, saved.image_std, saved.fit)
    assert isinstance(saved, TabularProcessor)
    assert isinstance(fitted, TabularProcessor)
    labels = {task.name: saved.labels[task.name] if task in old else fitted.labels[task.name] for task in tasks}
    group = fitted.group_column or saved.group_column
    return TabularProcessor(saved.columns, tasks, labels, group, saved.known_columns, saved.missing_values)


def _check_kind(where: str, model: type[MultiTaskModel], processor: type) -> None:
    """A model of tables reads no pictures, nor the other way."""
    if model.processor_class is not processor:
        of = {TabularProcessor: "rows of a table", VisionProcessor: "pictures"}
        raise RecipeError(
            f"{where}: expected a model of {of[processor]}, as the data are, found one of {of[model.processor_class]}"
        )


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


def _configured(
    model_type: str, fields: dict[str, Any], processor: type, backbone: str | None = None
) -> MultiTaskModel:
    try:
        cls = model_class(model_type)
    except ValueError as error:
        raise RecipeError(f"model.type: {error}") from None
    _check_kind(f"model.type: {model_type}", cls, processor)
    known = cls.config_class.__dataclass_fields__
    for key in fields:
        if key not in known:
            own = [name for name in known if name not in PreTrainedConfig.__dataclass_fields__]
            raise RecipeError(
                f"section 'model': unknown key {key!r}: {model_type} has no such field{nearest(key, own)}"
            )
    try:
        config: Any = cls.config_class(**fields)
        config.validate()
    except (StrictDataclassError, ValueError) as error:
        raise RecipeError(f"section 'model': {' '.join(str(error.__cause__ or error).split())}") from None
    if backbone is None:
        return cls(config)
    if not issubclass(cls, VisionModel):
        raise RecipeError(f"model.backbone: expected none, as a {model_type} reads a table, found {backbone!r}")
    try:
        return cls.from_backbone(backbone, config).train()
    except (ValueError, OSError) as error:
        raise RecipeError(f"model.backbone: {backbone}: {str(error).strip().splitlines()[0]}") from None


def _chosen(names: list[str] | None, known: list[str], where: str) -> list[str]:
    if names is None:
        return known
    for name in names:
        if name not in known:
            raise RecipeError(f"{where}: unknown task {name!r}{nearest(name, known)}")
    if not names:
        raise RecipeError(f"{where}: expected at least one of {', '.join(known)}, found an empty list")
    return [name for name in known if name in names]


def _weighted(processor: Processor, recipe: Recipe) -> list[dict[str, Any]]:
    weights, known = recipe.train.task_weights, _names(processor)
    for name in weights:
        if name not in known:
            raise RecipeError(f"train.task_weights: unknown task {name!r}{nearest(name, known)}")
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
