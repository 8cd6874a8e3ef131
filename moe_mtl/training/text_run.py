"""A recipe of text from beginning to end: load, encode, train, measure, save. Nothing that is not whole appears."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ..data.text import Example, TextSplits, TokenTable, encode
from ..files import read_json
from ..hub import ADAPTER
from ..tasks import check_task_names
from ..tuners import RankTuner, count, load_adapter
from .preconditions import check_same_data
from .recipe import Recipe, RecipeError, load_recipe
from .run import RunResult, check_finite, load_data, record_of, save_run, trainer_options, training_arguments
from .saved import METRICS, RECIPE
from .text_building import base_model, build_text
from .text_trainer import (
    TextEvaluation,
    TextTrainer,
    curve,
    evaluate_text,
    keeps_packed_apart,
    pack,
    pad_token,
    save_model,
    task_keyword,
)

LIBRARIES = ("torch", "transformers", "peft", "moe-mtl")


def run_text(
    recipe: Recipe, output_dir: Path, progress: bool, resume: bool, tell: Callable[[str], None] | None
) -> RunResult:
    """Trains a language model, or an adapter on one; see `run`."""
    _check(recipe)
    start = time.perf_counter()
    splits = load_data(recipe)
    assert isinstance(splits, TextSplits)
    if resume:
        check_same_data(output_dir, splits.info)
    if recipe.model.tasks is not None:
        if unknown := [task for task in recipe.model.tasks if task not in splits.tasks]:
            raise RecipeError(f"model.tasks: expected some of {', '.join(splits.tasks)}, found {unknown[0]!r}")
        splits = splits.only(recipe.model.tasks)
    set_seed(recipe.train.seed)
    model, tokenizer, tasks = build_text(recipe, splits.tasks)
    wanted = {"train", "validation", *recipe.eval.splits}
    tables = {
        name: encode_split(recipe, part, tokenizer, tasks) for name, part in splits.parts().items() if name in wanted
    }
    for name, table in tables.items():
        if not len(table):
            raise RecipeError(f"data: expected examples in the {name} part, found none")
    if tell is not None:
        tell(f"{_trained(model):,} of {model.num_parameters():,} parameters are trained")
    output_dir.mkdir(parents=True, exist_ok=True)
    use_cache = model.config.use_cache  # the trainer turns it off
    trainer = _trainer(recipe, model, tokenizer, tables, splits.info, output_dir, progress)
    prepared = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume or None)
    trained = time.perf_counter()
    check_finite(model)
    model.config.use_cache = use_cache
    results = {
        name: evaluate_text(model, tables[name], recipe.train.eval_batch_size, pad_token(tokenizer))
        for name in recipe.eval.splits
    }
    told = {
        "curve": curve(trainer.state.log_history),
        "model_type": _type(model),
        "tasks": tasks,
        "parameters": _trained(model),
    }
    record = record_of(recipe, splits, trainer, results, told, (start, prepared, trained), LIBRARIES)

    def save(folder: Path) -> None:
        save_model(model, folder)
        tokenizer.save_pretrained(folder)

    save_run(output_dir, recipe, record, save)
    return RunResult(record["metrics"], output_dir, record, model, tokenizer)


def load_text(folder: Path) -> tuple[Any, Any, list[str] | None]:
    """A saved language model or adapter, its tokeniser, and the tasks that it tells apart, if it does."""
    model: Any
    tokenizer = AutoTokenizer.from_pretrained(folder)
    section = load_recipe(folder / RECIPE).model if (folder / RECIPE).is_file() else None
    tasks = None
    if not (folder / ADAPTER).is_file():
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    else:
        base = None  # as the adapter names it; or as it was in training
        if section is not None and section.adapter is not None and (section.dtype or section.quantization):
            base = base_model(section)
        model = load_adapter(folder, base)
        tasks = getattr(model.active_peft_config, "tasks", None)
        if task_keyword(model) == "task_ids":  # which PEFT knows by number alone
            tasks = read_json(folder, METRICS).get("tasks")
    if torch.accelerator.is_available() and (section is None or section.quantization is None):
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval(), tokenizer, tasks


def evaluate_saved_text(
    folder: Path, split: str, recipe: Recipe, tasks: str | Sequence[str] | None = None
) -> TextEvaluation:
    """Measures a saved language model or adapter again, by default on all tasks."""
    splits = load_data(recipe)
    assert isinstance(splits, TextSplits)
    if recipe.model.tasks is not None:
        splits = splits.only(recipe.model.tasks)
    train = recipe.train
    part = splits.parts()[split]
    return evaluate_examples(folder, part, train.eval_batch_size, splits.tasks, train.max_length, train.truncate, tasks)


def evaluate_examples(
    folder: Path,
    examples: Sequence[Example],
    batch_size: int,
    tasks: Sequence[str] | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    measured: str | Sequence[str] | None = None,
) -> TextEvaluation:
    """Measures a saved language model or adapter on examples, or on those of the `measured` tasks.

    Raises:
        DataError: an example of a task that the adapter does not know.
        UnknownTaskError: a measured task that neither adapter nor examples know.
    """
    model, tokenizer, own = load_text(folder)
    known = own or tasks or sorted({example.task for example in examples})
    for row, example in enumerate(examples):
        if example.task not in known:
            raise example.error(f"task: expected one of {', '.join(known)}, found {example.task!r}", row)
    names = check_task_names(measured, known)
    examples = [example for example in examples if example.task in names]
    table = encode(examples, tokenizer, known, max_length, truncate)
    return evaluate_text(model, table, batch_size, pad_token(tokenizer))


def chat_of(folder: Path) -> bool:
    """Whether a saved model was trained on plain prompts as messages of a user."""
    return (folder / RECIPE).is_file() and bool(load_recipe(folder / RECIPE).data.options.get("chat"))


def encode_split(recipe: Recipe, examples: Any, tokenizer: Any, tasks: list[str]) -> TokenTable:
    """Examples as a recipe wants them cut."""
    return encode(examples, tokenizer, tasks, recipe.train.max_length, recipe.train.truncate)


def _check(recipe: Recipe) -> None:
    """What is for rows of a table, not for text."""
    model, train = recipe.model, recipe.train
    for key, value in {
        "model.backbone": model.backbone,
        "model.add_tasks": model.add_tasks,
        "model.drop_tasks": model.drop_tasks,
        "train.task_weights": train.task_weights,
        "train.task_sampling": train.task_sampling,
        "train.loss_balancing": recipe.loss_method,
        "train.gradient_balancing": recipe.gradient_method,
        "eval.bootstrap": recipe.eval.bootstrap,
    }.items():
        if value:
            raise RecipeError(f"{key}: expected none, as {recipe.data.name} is text, whose batches mix the tasks")
    if train.save_dtype is not None:
        raise RecipeError(
            f"train.save_dtype: expected none, as {recipe.data.name} is text, which is saved as it was trained; see "
            "model.dtype"
        )


def _trainer(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    tables: dict[str, TokenTable],
    info: Mapping[str, Any],
    output_dir: Path,
    progress: bool,
) -> TextTrainer:
    section = recipe.train
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packed = None
    if section.packing:
        assert section.max_length is not None
        if not keeps_packed_apart(model, tables["train"]):
            found = recipe.model.source or recipe.model.type
            raise RecipeError(
                "train.packing: expected a model that keeps packed examples apart by their positions, found "
                f"{found}, whose tokens see the examples before their own; turn packing off"
            )
        packed = pack(tables["train"], section.max_length)
    return TextTrainer(
        model,
        training_arguments(section, output_dir),
        tables["train"],
        tables["validation"],
        tokenizer,
        packed=packed,
        **trainer_options(recipe, info, output_dir, progress),
    )


def _trained(model: Any) -> int:
    """How many parameters training moves; of a mask, what it leaves."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, RankTuner):
        return sum(sizes.values())
    of_adapters = sum(size for name, size in sizes.items() if ".moe_adapters." in name)
    return sum(sizes.values()) - of_adapters + count(model).trained


def _type(model: Any) -> str:
    if isinstance(model, PeftModel):
        return str(model.active_peft_config.peft_type.value).lower()
    return model.config.model_type
