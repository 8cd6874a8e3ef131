"""What a recipe may say: five dataclasses, read strictly from YAML.

A recipe file holds only what differs from the defaults below. An unknown key, a value of the wrong type or two settings that cannot go
together are errors that name the key, raised before anything is loaded; this module imports neither torch nor transformers.
"""

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 reads 1e-3 as a string
_ALIASES = {"uniform": None, "uncertainty": "UW", "dwa": "DWA", "random": "Random"}


class RecipeError(ValueError):
    """A recipe that cannot be followed: the message names the section and the key."""


@dataclass
class DataSection:
    """Where the rows come from.

    Attributes:
        name: a data set of `moe_mtl.data`: digits, census-income, mmoe-synthetic, multitab-bench, table.
        path: file or folder of the rows, for the data sets that read one; passed on as the option `path`.
        options: further options of that data set, checked by it.
    """

    name: str = "digits"
    path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelSection:
    """Which model, new or saved.

    Attributes:
        type: model type of a new model, for example `mmoe`.
        source: written `from` in YAML: zoo name, folder or Hub id of a saved model to fine-tune; excludes `type`.
        tasks: names of the data's tasks to train; all by default.
        add_tasks: with `from`: names of the data's tasks that the saved model lacks and that get a new gate and tower.
        drop_tasks: with `from`: names of the saved model's tasks to remove.
        freeze: patterns (`fnmatch`) of parameter names that are not trained. `*` with `add_tasks` freezes all but what is new.
        config: every other key of the section: fields of the model's config, checked by it.
    """

    type: str | None = None
    source: str | None = None
    tasks: list[str] | None = None
    add_tasks: list[str] = field(default_factory=list)
    drop_tasks: list[str] = field(default_factory=list)
    freeze: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class EarlyStopping:
    """Stops when a validation metric no longer improves; the best weights are restored in any case.

    Attributes:
        metric: `mean_auc` (any metric, averaged over the tasks that have it), `income/auc` (one task's) or `loss`.
        patience: evaluations without improvement until training stops.
    """

    metric: str = "loss"
    patience: int = 3


@dataclass
class TaskSampling:
    """Batches of one task each, for rows that carry the label of one task only.

    Attributes:
        temperature: a task with n labelled rows is drawn with probability proportional to n^(1/temperature): 1 follows the data,
            large values make the tasks equally frequent.
    """

    temperature: float = 1.0


@dataclass
class TrainSection:
    """How to train.

    Attributes:
        epochs: passes over the training rows; excludes `max_steps`. 10 where neither is given.
        max_steps: optimiser steps.
        batch_size: rows per step and device.
        eval_batch_size: rows per forward pass of evaluation and prediction.
        learning_rate: peak learning rate.
        weight_decay: decoupled, on weight matrices only (not on biases and norms).
        schedule: learning rate over the steps. `one_cycle` rises over the warm-up (30 % by default) and falls to 0 along cosines.
        warmup: share of the steps (below 1) or number of steps (1 and above) of linear rise.
        optimizer: `adamw` or `adam` (L2 in the gradient).
        betas: decay rates of Adam's moments.
        loss_balancing: `uniform` (the tasks' own weights), `uncertainty`, `dwa`, `random`, or a scalarizer of TorchJD by class name; with
            options as a mapping `{name: STCH, mu: 0.5}`.
        gradient_balancing: an aggregator of TorchJD by class name, for example `PCGrad`, or a mapping with options; on shared
            parameters only. Excludes `loss_balancing`.
        task_weights: factor of each task's loss, by task; others keep the data's.
        task_sampling: batches of one task each, for data whose rows carry one label.
        early_stopping: off by default. Evaluation on the validation rows happens at the end of every epoch, or every `eval_steps`.
        eval_steps: optimiser steps between evaluations, instead of epochs.
        save_steps: optimiser steps between checkpoints, instead of epochs; 0 for none.
        seed: of initialisation, shuffling and dropout.
        precision: `fp32` or `bf16` (autocast).
        gradient_accumulation: batches per optimiser step.
        max_grad_norm: gradients are scaled down to this norm; 0 for never.
        report_to: `none`, `tensorboard`, `trackio` or `wandb`.
        logging_steps: optimiser steps between log entries.
    """

    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int = 512
    eval_batch_size: int = 4096
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    schedule: Literal["constant", "linear", "cosine", "one_cycle"] = "one_cycle"
    warmup: float | None = None
    optimizer: Literal["adamw", "adam"] = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    loss_balancing: str | dict[str, Any] = "uniform"
    gradient_balancing: str | dict[str, Any] | None = None
    task_weights: dict[str, float] = field(default_factory=dict)
    task_sampling: TaskSampling | None = None
    early_stopping: EarlyStopping | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_accumulation: int = 1
    max_grad_norm: float = 0.0
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    logging_steps: int = 50


@dataclass
class EvalSection:
    """What is measured once training is over.

    Attributes:
        splits: of `validation`, `test`, `train`.
        bootstrap: resamples for the standard error of each metric; 0 for none.
        group: column whose rows form one group of `group_auc`, for example a user's id.
    """

    splits: list[str] = field(default_factory=lambda: ["validation", "test"])
    bootstrap: int = 0
    group: str | None = None


@dataclass
class CardSection:
    """Which model card the runs of this recipe feed.

    Attributes:
        name: of the card's folder.
        seeds: one run each.
        budget: what a run may cost, in words: `2 cpu-minutes`.
    """

    name: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    budget: str | None = None


@dataclass
class Recipe:
    """A whole recipe; see the sections."""

    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    card: CardSection = field(default_factory=CardSection)

    def validate(self) -> None:
        """Raises RecipeError for settings that cannot be or cannot go together."""
        model, train = self.model, self.train
        if (model.type is None) == (model.source is None):
            found = "neither" if model.type is None else "both"
            raise RecipeError(f"model: expected either 'type' (a new model) or 'from' (a saved one), found {found}")
        if model.type is not None and (model.add_tasks or model.drop_tasks):
            raise RecipeError("model.add_tasks and model.drop_tasks change a saved model: they need model.from, found model.type")
        if train.epochs is not None and train.max_steps is not None:
            raise RecipeError("train: expected 'epochs' or 'max_steps', found both")
        for name in ("epochs", "max_steps", "batch_size", "eval_batch_size", "eval_steps", "gradient_accumulation", "logging_steps"):
            _check(getattr(train, name) is None or getattr(train, name) >= 1, f"train.{name}", "at least 1", getattr(train, name))
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup", "save_steps", "seed"):
            value = getattr(train, name)
            _check(value is None or 0 <= value < float("inf"), f"train.{name}", "a finite number, at least 0", value)
        _check(len(train.betas) == 2 and all(0 <= beta < 1 for beta in train.betas), "train.betas", "two numbers in [0, 1)", train.betas)
        for task, weight in train.task_weights.items():
            _check(0 <= weight < 1e6, f"train.task_weights.{task}", "a number in [0, 1e6)", weight)
        if train.task_sampling is not None:
            _check(train.task_sampling.temperature > 0, "train.task_sampling.temperature", "above 0", train.task_sampling.temperature)
            if self.loss_method is not None or self.gradient_method is not None:
                raise RecipeError("train.task_sampling gives batches of one task: there is nothing to balance; remove one of the two")
        if train.early_stopping is not None:
            _check(train.early_stopping.patience >= 1, "train.early_stopping.patience", "at least 1", train.early_stopping.patience)
        if self.loss_method is not None and self.gradient_method is not None:
            raise RecipeError(
                f"train: loss_balancing {self.loss_method[0]!r} and gradient_balancing {self.gradient_method[0]!r} would weigh the tasks "
                "twice; choose one of them"
            )
        for split in self.eval.splits:
            _check(split in ("validation", "test", "train"), "eval.splits", "of validation, test, train", split)
        _check(self.eval.bootstrap >= 0, "eval.bootstrap", "at least 0", self.eval.bootstrap)

    @property
    def loss_method(self) -> tuple[str, dict[str, Any]] | None:
        """Name of TorchJD's scalarizer and its options, or None where the losses are simply added."""
        name, options = _method(self.train.loss_balancing, "train.loss_balancing")
        name = _ALIASES.get(name, name)
        if name is None and options:
            raise RecipeError(f"train.loss_balancing: 'uniform' has no options, found {', '.join(options)}")
        return None if name is None else (name, options)

    @property
    def gradient_method(self) -> tuple[str, dict[str, Any]] | None:
        """Name of TorchJD's aggregator and its options, or None."""
        if self.train.gradient_balancing is None:
            return None
        return _method(self.train.gradient_balancing, "train.gradient_balancing")

    def to_dict(self) -> dict[str, Any]:
        """All sections with all fields, as they stand in a YAML file."""
        out = dataclasses.asdict(self)
        model = out["model"]
        model["from"] = model.pop("source")
        model.update(model.pop("config"))
        return out

    def to_yaml(self) -> str:
        """What `load_recipe` reads back as the same recipe, defaults written out."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    @property
    def sha256(self) -> str:
        """See `recipe_sha256`."""
        return recipe_sha256(self)


def recipe_sha256(recipe: Recipe) -> str:
    """Hash of all that the recipe asks for, defaults included.

    Left out: `data.path` (what was read has its own hash), `train.seed` (the seeds of a card share one recipe), the card, and what is logged.
    """
    content = recipe.to_dict()
    del content["card"], content["data"]["path"]
    for name in ("seed", "report_to", "logging_steps"):
        del content["train"][name]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def list_recipes() -> dict[str, Path]:
    """The recipes that come with the library: `<data set>/<model>` -> file."""
    from ..hub import recipes_folder

    folder = recipes_folder()
    return {str(path.relative_to(folder).with_suffix("").as_posix()): path for path in sorted(folder.glob("*/*.yaml"))}


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe: an existing path, or `<data set>/<model>` with or without `.yaml` and a leading `recipes/`.

    Raises:
        RecipeError: there is none; the message names the nearest.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = list_recipes()
    name = str(name_or_path).removeprefix("recipes/").removesuffix(".yaml")
    if name in known:
        return known[name]
    raise RecipeError(f"no recipe {str(name_or_path)!r}: it is neither a file nor a recipe of the library{_nearest(name, known)}")


def load_recipe(name_or_path: str | Path, overrides: Iterable[tuple[str, str]] = ()) -> Recipe:
    """Reads a recipe and applies overrides such as `("train.learning_rate", "1e-3")`.

    Raises:
        RecipeError: no such recipe, no YAML, an unknown key, a value of the wrong type, settings that cannot go together.
    """
    path = find_recipe(name_or_path)
    content = _read_yaml(path.read_text(encoding="utf-8"), str(path))
    return parse_recipe({} if content is None else content, overrides)


def parse_recipe(content: Mapping[str, Any], overrides: Iterable[tuple[str, str]] = ()) -> Recipe:
    """A recipe from its YAML content; raises as `load_recipe` does."""
    content = _copy(content)
    for key, value in overrides:
        _override(content, key, value)
    recipe = _build(Recipe, content, "")
    recipe.validate()
    return recipe


# --- building ---


def _check(condition: bool, key: str, expected: str, found: Any) -> None:
    if not condition:
        raise RecipeError(f"{key}: expected {expected}, found {found!r}")


def _method(value: str | dict[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    if isinstance(value, str):
        return value, {}
    if not isinstance(value.get("name"), str):
        raise RecipeError(f"{key}: expected a name or a mapping with a 'name', found {value!r}")
    return value["name"], {option: item for option, item in value.items() if option != "name"}


def _nearest(name: str, known: Iterable[str]) -> str:
    import difflib

    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _build(cls: type, content: Any, where: str) -> Any:
    """The dataclass `cls` from a mapping, `where` being its dotted key."""
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where or 'recipe'}: expected a mapping of keys, found {content!r:.80}")
    hints = typing.get_type_hints(cls)
    if cls is ModelSection:
        content = _fold_config(content)
        hints["from"] = hints.pop("source")
    values = {}
    for key, value in content.items():
        if key not in hints:
            place = f"section {where!r}" if where else "recipe"
            raise RecipeError(f"{place}: unknown key {key!r}{_nearest(str(key), hints)}")
        name = "source" if cls is ModelSection and key == "from" else key
        values[name] = _coerce(value, hints[key], f"{where}.{key}" if where else key)
    return cls(**values)


def _fold_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the keys of the model section that are no fields of ours into `config`."""
    own = {f.name for f in dataclasses.fields(ModelSection)} - {"source", "config"} | {"from"}
    folded = {key: value for key, value in content.items() if key in own}
    rest = {key: value for key, value in content.items() if key not in own}
    for key in ("features", "config"):
        if key in rest:
            raise RecipeError(f"section 'model': {key!r} cannot be set: write the fields of the model's config into the section itself")
    return {**folded, "config": rest}


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` if it is of the type `hint`; integers pass for floats, and so do strings such as 1e-3."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _numbers(value)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        options = [argument for argument in arguments if argument is not type(None)]
        for option in options[:-1]:
            try:
                return _coerce(value, option, where)
            except RecipeError:
                continue
        return _coerce(value, options[-1], where)
    if origin is Literal:
        _check(value in arguments, where, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin is list:
        _check(isinstance(value, list), where, "a list", value)
        return [_coerce(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _check(isinstance(value, Mapping), where, "a mapping", value)
        return {str(key): _coerce(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if hint is float:
        value = _numbers(value)
        _check(isinstance(value, (int, float)) and not isinstance(value, bool), where, "a number", value)
        return float(value)
    if hint is int:
        _check(isinstance(value, int) and not isinstance(value, bool), where, "an integer", value)
        return value
    _check(isinstance(value, hint), where, {"str": "text", "bool": "true or false"}.get(hint.__name__, hint.__name__), value)
    return value


def _numbers(value: Any) -> Any:
    """Strings such as 1e-3 as floats, also inside lists and mappings."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _numbers(item) for key, item in value.items()}
    return value


def _override(content: dict[str, Any], key: str, value: str) -> None:
    """Sets a dotted key in YAML content. Text fields take the value as it is typed, so that a path `1` stays text."""
    *parents, last = key.split(".")
    if not parents or not all((*parents, last)):
        raise RecipeError(f"override {key!r}: expected <section>.<key>, for example train.batch_size; sections: {_sections()}")
    if parents[0] not in {f.name for f in dataclasses.fields(Recipe)}:
        raise RecipeError(f"override {key!r}: unknown section {parents[0]!r}{_nearest(parents[0], _sections().split(', '))}")
    place = content
    for parent in parents:
        if not isinstance(place.get(parent), dict):
            # `train.loss_balancing: UW` becomes a mapping when one of its options is set.
            place[parent] = {"name": place[parent]} if isinstance(place.get(parent), str) else {}
        place = place[parent]
    place[last] = value if key in _TEXT_KEYS else _read_yaml(value, f"override {key}")


def _sections() -> str:
    return ", ".join(f.name for f in dataclasses.fields(Recipe))


_TEXT_KEYS = {"data.name", "data.path", "model.type", "model.from", "eval.group", "card.name", "card.budget"}


def _read_yaml(text: str, where: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader, but a key that stands twice is an error instead of the last one winning."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise RecipeError(f"{where}: the key {key!r} stands twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: this is no YAML: {' '.join(str(error).split())}") from None
