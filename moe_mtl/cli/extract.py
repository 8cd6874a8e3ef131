"""Saves the smaller model that answers some tasks only, with a processor that asks for their labels only.

  moe-mtl extract runs/digits-mmoe digit --output runs/digit
  moe-mtl extract mtl-lora-word-edits reverse --output runs/reverse

Of an adapter on a language model a task alone is a plain LoRA, or with --merge a language model without adapters:
both run where moe_mtl is not installed.

The answers are those of the full model; what each architecture saves, moe-mtl cost tells.
"""

import argparse
from pathlib import Path
from typing import Any

from ._arguments import Parser, UsageError
from ._console import print_json, quiet_libraries, say


def configure(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, zoo name or Hub id")
    parser.add_argument("tasks", nargs="+", metavar="TASK")
    parser.add_argument(
        "--fold",
        action="store_true",
        help="absorb batch norms into the weights (HoME): faster, and equal to rounding instead of to the bit",
    )
    parser.add_argument("--merge", action="store_true", help="of an adapter: write the whole model, its task merged in")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_json()


def run(arguments: argparse.Namespace) -> None:
    from ..hub import is_text_model, resolve

    check_output(arguments.output, folder := resolve(arguments.model))
    with quiet_libraries():
        if is_text_model(folder):
            if arguments.fold or len(arguments.tasks) > 1:
                raise UsageError("of an adapter expected one task and no --fold")
            told = extract_adapter(folder, arguments.tasks[0], arguments.output, arguments.merge)
        elif arguments.merge:
            raise UsageError("--merge is for adapters on language models; this one is not an adapter")
        else:
            told = extract(folder, arguments.tasks, arguments.output, arguments.fold)
    if arguments.json:
        print_json(told)
        return
    say(
        f"wrote {arguments.output}: {', '.join(told['tasks'])} with {told['parameters']:,} of "
        f"{told['parameters_of_all']:,} parameters"
    )


def check_output(output: str | Path, folder: Path) -> None:
    """Raises before any work where the output is the model itself, or a folder of something else."""
    from ..files import require_replaceable

    if Path(output).resolve() == folder.resolve():
        raise UsageError(f"--output: expected another folder than the model's own, found {output}")
    require_replaceable(Path(output))


def extract(model: str | Path, tasks: list[str], output: str | Path, fold: bool = False) -> dict[str, Any]:
    """Writes the folder, whole or not at all, and tells what is in it."""
    from ..hub import resolve
    from ..models import AutoModelForMultiTask

    folder = resolve(model)
    small = AutoModelForMultiTask.from_pretrained(folder, tasks=tasks)
    if fold:
        small.fold_for_inference()
    return write_model(small, folder, output)


def write_model(small: Any, folder: Path, output: str | Path) -> dict[str, Any]:
    """Writes a model that was made of the one in `folder`, with what goes along, and tells what is in it."""
    from ..files import staged_folder, write_atomically
    from ..hub import write_manifest
    from ..training.recipe import RecipeError
    from ..training.saved import RECIPE, recipe_of

    processor = small.processor_class.from_pretrained(folder).for_tasks(small.tasks)
    try:
        recipe = recipe_of(folder).to_yaml()
    except RecipeError:
        recipe = None
    with staged_folder(output) as staging:
        small.save_pretrained(staging)
        processor.save_pretrained(staging)
        if recipe is not None:
            write_atomically(staging / RECIPE, recipe)
        write_manifest(staging)
    return {
        "output": str(output),
        "tasks": small.tasks,
        "parameters": small.num_parameters(),
        "parameters_of_all": type(small).count_parameters(type(small).config_class.from_pretrained(folder)),
    }


def extract_adapter(folder: Path, task: str, output: str | Path, merge: bool = False) -> dict[str, Any]:
    """Writes one task's LoRA, or the model that it is merged into, whole or not at all, and tells what is in it."""
    from ..files import staged_folder
    from ..hub import ADAPTER, write_manifest
    from ..training.text_run import load_text
    from ..training.text_trainer import save_model
    from ..tuners import RankTuner, extract_task

    if not (folder / ADAPTER).is_file():
        raise UsageError(f"expected an adapter, found a language model: {folder} answers all its tasks with all of it")
    model, tokenizer, known = load_text(folder)
    parameters_of_all = model.num_parameters()
    if not isinstance(model.base_model, RankTuner):
        raise UsageError(f"expected an adapter of this library, found PEFT's {type(model.active_peft_config).__name__}")
    if not known:
        raise UsageError(
            f"{folder} does not tell tasks apart: PEFT's merge_and_unload, or moe_mtl.extract_task without a task"
        )
    lora = extract_task(model, task)
    small = lora.merge_and_unload() if merge else lora
    with staged_folder(output) as staging:
        save_model(small, staging)
        tokenizer.save_pretrained(staging)
        write_manifest(staging)
    parameters = small.num_parameters()
    return {"output": str(output), "tasks": [task], "parameters": parameters, "parameters_of_all": parameters_of_all}
