"""What a recipe may say: five dataclasses, read strictly from YAML.

A recipe file holds only what differs from the defaults below. An unknown key, a value of the wrong type or two
settings that cannot go together are errors that name the key, raised before anything is loaded; this module imports
neither torch nor transformers.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..naming import nearest
from .strict import RecipeError, build, check, read_yaml, unbuild, write_yaml

_ALIASES = {"uncertainty": "UW", "dwa": "DWA", "random": "Random"}


@dataclass
class DataSection:
    """Where the rows come from.

    Attributes:
        name: a data set of `moe_mtl.data`, such as digits, table, instruct or photo-tiles.
        path: file or folder of the rows, for the data sets that read one.
        options: every other key of the section: options of that data set, checked by it.
    """

    name: str = "digits"
    path: str | list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict, metadata={"rest": True})


# Recipes that do not use what was added later keep their hash, and so the records that name it.
_LATER = {"added": True}


@dataclass
class AdapterSection:
    """LoRA experts on a language model: a method of PEFT, which knows those of `moe_mtl.tuners` too.

    Attributes:
        method: as PEFT names it, like `mtl_lora`, `smora`, `lora`; capitals do not matter.
        config: every other key of the section: fields of the method's config, checked by it. Its `tasks` come from the
            data; `target_modules` is `all-linear` unless given.
    """

    method: str = "lora"
    config: dict[str, Any] = field(default_factory=dict, metadata={"rest": True})


@dataclass
class ModelSection:
    """Which model, new or saved.

    Attributes:
        type: model type of a new model, for example `mmoe`; for text one of transformers, for example `llama`.
        backbone: for pictures, with `type`: a ViT, DeiT or DINOv2 of transformers to start from, its Hub id or folder.
        source: written `from` in YAML: zoo name, folder or Hub id of a saved model to fine-tune; excludes `type`.
        tasks: names of the data's tasks to train; all by default.
        add_tasks: with `from`: names of the data's tasks that the saved model lacks and that get a new gate and tower.
        drop_tasks: with `from`: names of the saved model's tasks to remove.
        freeze: patterns (`fnmatch`) of parameter names that are not trained. `*` with `add_tasks` freezes all but
            what is new.
        adapter: for text, with `from`: what is trained instead of the model's own weights. Where `from` is an adapter
            itself, that one is trained on.
        sparsity: for text, where `from` is a LoRI adapter: the share of what it trained, the smallest, to leave out for
            good. The rest is trained again from 0 (LoRI-S).
        dtype: for text, with `from`: of the weights as they are loaded; by default as they are stored.
        quantization: for text, with `from`: `8bit` or `4bit` (QLoRA), by bitsandbytes; needs an adapter.
        config: every other key of the section: fields of the model's config, checked by it.
    """

    type: str | None = None
    backbone: str | None = field(default=None, metadata=_LATER)
    source: str | None = field(default=None, metadata={"key": "from"})
    tasks: list[str] | None = None
    add_tasks: list[str] = field(default_factory=list)
    drop_tasks: list[str] = field(default_factory=list)
    freeze: list[str] = field(default_factory=list)
    adapter: AdapterSection | None = field(default=None, metadata=_LATER)
    sparsity: float | None = field(default=None, metadata=_LATER)
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(default=None, metadata=_LATER)
    quantization: Literal["8bit", "4bit"] | None = field(default=None, metadata=_LATER)
    config: dict[str, Any] = field(default_factory=dict, metadata={"rest": True})


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
    """Batches of one task each, for rows that carry the label of one task only; or of one data set each.

    Attributes:
        temperature: a task with n labelled rows is drawn with probability proportional to n^(1/temperature): 1
            follows the data, large values make the tasks equally frequent.
        by: `task`, or, for the data set `mixed`, `data_set`: then a batch trains all tasks of one of its parts.
    """

    temperature: float = 1.0
    by: Literal["task", "data_set"] = "task"


@dataclass
class TrainSection:
    """How to train.

    Attributes:
        epochs: passes over the training rows; excludes `max_steps`. 10 where neither is given.
        max_steps: optimiser steps.
        batch_size: rows per step and device.
        eval_batch_size: rows per forward pass of evaluation and prediction; of pictures choose far fewer, such as 64.
        learning_rate: peak learning rate.
        weight_decay: decoupled, on weight matrices only (not on biases and norms).
        schedule: learning rate over the steps. `one_cycle` rises over the warm-up (30 % by default) and falls to 0
            along cosines.
        warmup: share of the steps (below 1) or number of steps (1 and above) of linear rise.
        optimizer: `adamw`, `adam` (L2 in the gradient) or `sgd`.
        betas: decay rates of Adam's moments; of `sgd` the first is the momentum.
        loss_balancing: `uniform` (the tasks' own weights), `uncertainty`, `dwa`, `random`, or a scalarizer of TorchJD
            by class name; with options as a mapping `{name: STCH, mu: 0.5}`.
        gradient_balancing: an aggregator of TorchJD by class name, for example `PCGrad`, or a mapping with options; on
            shared parameters only. Excludes `loss_balancing`.
        task_weights: factor of each task's loss, by task; others keep the data's.
        task_sampling: batches of one task each, for data whose rows carry one label.
        early_stopping: off by default. Evaluation on the validation rows happens at the end of every epoch, or every
            `eval_steps`.
        eval_steps: optimiser steps between evaluations, instead of epochs.
        save_steps: optimiser steps between checkpoints, 0 for none; by default at the end of an epoch, half a minute
            apart at least.
        seed: of initialisation, shuffling and dropout.
        precision: `fp32` or `bf16` (autocast).
        gradient_accumulation: batches per optimiser step.
        max_grad_norm: gradients are scaled down to this norm; 0 for never.
        report_to: `none`, `tensorboard`, `trackio` or `wandb`.
        logging_steps: optimiser steps between log entries.
        max_length: for text: tokens of the longest example; longer ones are refused, or cut where `truncate` is set.
        truncate: for text: cut what is longer than `max_length` at its end.
        packing: for text: put several examples into one row of `max_length` tokens, which attention keeps apart (by
            TRL); saves padding.
        gradient_checkpointing: for text and pictures: compute layers again in the backward instead of keeping what they
            made.
        save_dtype: for tables and pictures: what the file holds parameters in, half as large as by default; they are
            rounded before anything is measured, so that the numbers are those of the file. It is loaded in the dtype
            that it was trained in.
    """

    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int = 512
    eval_batch_size: int = 4096
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    schedule: Literal["constant", "linear", "cosine", "polynomial", "one_cycle"] = "one_cycle"
    warmup: float | None = None
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
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
    max_length: int | None = field(default=None, metadata=_LATER)
    truncate: bool = field(default=False, metadata=_LATER)
    packing: bool = field(default=False, metadata=_LATER)
    gradient_checkpointing: bool = field(default=False, metadata=_LATER)
    save_dtype: Literal["bfloat16", "float16"] | None = field(default=None, metadata=_LATER)


@dataclass
class EvalSection:
    """What is measured once training is over.

    Attributes:
        splits: of `validation`, `test`, `train`.
        bootstrap: resamples for the standard error of each metric; 0 for none.
    """

    splits: list[str] = field(default_factory=lambda: ["validation", "test"])
    bootstrap: int = 0


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
        if model.backbone is not None and model.type is None:
            raise RecipeError("model.backbone is what a new model starts from: it needs model.type, found model.from")
        if model.type is not None and (model.add_tasks or model.drop_tasks):
            raise RecipeError(
                "model.add_tasks and model.drop_tasks change a saved model: they need model.from, found model.type"
            )
        if model.source is None and (model.adapter or model.dtype or model.quantization or model.sparsity is not None):
            raise RecipeError("model.adapter, sparsity, dtype and quantization are for a saved model: use model.from")
        sparsity = model.sparsity
        check(sparsity is None or 0 < sparsity < 1, "model.sparsity", "a share above 0 and below 1", sparsity)
        if model.quantization is not None and model.adapter is None:
            raise RecipeError("model.quantization: expected a model.adapter, as quantised weights are not trained")
        if (train.packing or train.truncate) and train.max_length is None:
            raise RecipeError("train.packing and train.truncate: expected train.max_length, found none")
        if train.epochs is not None and train.max_steps is not None:
            raise RecipeError("train: expected 'epochs' or 'max_steps', found both")
        for name in (
            "epochs",
            "max_steps",
            "batch_size",
            "eval_batch_size",
            "eval_steps",
            "gradient_accumulation",
            "max_length",
        ):
            value = getattr(train, name)
            check(value is None or value >= 1, f"train.{name}", "at least 1", value)
        check(train.logging_steps >= 1, "train.logging_steps", "at least 1", train.logging_steps)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup", "save_steps", "seed"):
            value = getattr(train, name)
            check(value is None or 0 <= value < float("inf"), f"train.{name}", "a finite number, at least 0", value)
        betas = train.betas
        check(len(betas) == 2 and all(0 <= b < 1 for b in betas), "train.betas", "two numbers in [0, 1)", betas)
        for task, weight in train.task_weights.items():
            check(0 <= weight < 1e6, f"train.task_weights.{task}", "a number in [0, 1e6)", weight)
        if train.task_sampling is not None:
            temperature = train.task_sampling.temperature
            check(temperature > 0, "train.task_sampling.temperature", "above 0", temperature)
            balanced = self.loss_method is not None or self.gradient_method is not None
            if balanced and train.task_sampling.by == "task":
                raise RecipeError(
                    "train.task_sampling: batches of one task leave nothing to balance; remove one of the two"
                )
        if train.early_stopping is not None:
            patience = train.early_stopping.patience
            check(patience >= 1, "train.early_stopping.patience", "at least 1", patience)
        if self.loss_method is not None and self.gradient_method is not None:
            raise RecipeError(
                f"train: loss_balancing {self.loss_method[0]!r} and gradient_balancing {self.gradient_method[0]!r} "
                "would weigh the tasks twice; choose one of them"
            )
        for split in self.eval.splits:
            check(split in ("validation", "test", "train"), "eval.splits", "of validation, test, train", split)
        check(self.eval.bootstrap >= 0, "eval.bootstrap", "at least 0", self.eval.bootstrap)

    @property
    def loss_method(self) -> tuple[str, dict[str, Any]] | None:
        """Name of TorchJD's scalarizer and its options, or None where the losses are simply added."""
        name, options = _method(self.train.loss_balancing, "train.loss_balancing")
        if name != "uniform":
            return _ALIASES.get(name, name), options
        if options:
            raise RecipeError(f"train.loss_balancing: 'uniform' has no options, found {', '.join(options)}")
        return None

    @property
    def gradient_method(self) -> tuple[str, dict[str, Any]] | None:
        """Name of TorchJD's aggregator and its options, or None."""
        if self.train.gradient_balancing is None:
            return None
        return _method(self.train.gradient_balancing, "train.gradient_balancing")

    def to_dict(self) -> dict[str, Any]:
        """All sections with all fields, as they stand in a YAML file."""
        return _copy(unbuild(self))

    def to_yaml(self) -> str:
        """What `load_recipe` reads back as the same recipe, defaults written out."""
        return write_yaml(self.to_dict())

    @property
    def sha256(self) -> str:
        """See `recipe_sha256`."""
        return recipe_sha256(self)


def recipe_sha256(recipe: Recipe) -> str:
    """Hash of all that the recipe asks for, defaults included.

    Left out: `data.path` (what was read has its own hash), `train.seed` (the seeds of a card share one recipe), the
    card, and what is logged.
    """
    content = recipe.to_dict()
    del content["card"], content["data"]["path"]
    for name in ("seed", "report_to", "logging_steps"):
        del content["train"][name]
    for section, part in (("model", recipe.model), ("train", recipe.train)):
        for one in dataclasses.fields(part):
            if one.metadata.get("added") and getattr(part, one.name) == one.default:
                del content[section][one.name]
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
    raise RecipeError(
        f"no recipe {str(name_or_path)!r}: it is neither a file nor a recipe of the library{nearest(name, known)}"
    )


def load_recipe(name_or_path: str | Path, overrides: Iterable[tuple[str, str]] = ()) -> Recipe:
    """Reads a recipe and applies overrides such as `("train.learning_rate", "1e-3")`.

    Raises:
        RecipeError: no such recipe, no YAML, an unknown key, a value of the wrong type, settings that cannot go
            together.
    """
    path = find_recipe(name_or_path)
    content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    return parse_recipe({} if content is None else content, overrides)


def parse_recipe(content: Mapping[str, Any], overrides: Iterable[tuple[str, str]] = ()) -> Recipe:
    """A recipe from its YAML content; raises as `load_recipe` does."""
    check(isinstance(content, Mapping), "recipe", "a mapping of sections", content)
    own = _copy(content)
    for key, value in overrides:
        _override(own, key, value)
    recipe = build(Recipe, own)
    recipe.validate()
    return recipe


def _method(value: str | dict[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    if isinstance(value, str):
        return value, {}
    if not isinstance(value.get("name"), str):
        raise RecipeError(f"{key}: expected a name or a mapping with a 'name', found {value!r}")
    return value["name"], {option: item for option, item in value.items() if option != "name"}


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _override(content: dict[str, Any], key: str, value: str) -> None:
    """Sets a dotted key in YAML content. Text fields take the value as it is typed, so that a path `1` stays text; a
    list of them begins with a bracket."""
    *parents, last = key.split(".")
    if not parents or not all((*parents, last)):
        raise RecipeError(
            f"override {key!r}: expected <section>.<key>, for example train.batch_size; sections: {_sections()}"
        )
    if parents[0] not in {f.name for f in dataclasses.fields(Recipe)}:
        raise RecipeError(
            f"override {key!r}: unknown section {parents[0]!r}{nearest(parents[0], _sections().split(', '))}"
        )
    place = content
    for parent in parents:
        if not isinstance(place.get(parent), dict):
            # `train.loss_balancing: UW` becomes a mapping when one of its options is set.
            place[parent] = {"name": place[parent]} if isinstance(place.get(parent), str) else {}
        place = place[parent]
    as_typed = key in _TEXT_KEYS and not value.startswith("[")
    place[last] = value if as_typed else read_yaml(value, f"override {key}")


def _sections() -> str:
    return ", ".join(f.name for f in dataclasses.fields(Recipe))


_TEXT_KEYS = {"data.name", "data.path", "model.type", "model.backbone", "model.from", "card.name", "card.budget"}
