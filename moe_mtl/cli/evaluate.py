"""Measures a saved model: on a split of the data it was trained on, or on the labelled rows of files.

moe-mtl evaluate runs/digits-mmoe
moe-mtl evaluate runs/digits-mmoe --data rows.parquet --task digit
"""

import argparse
from typing import Any

from ._arguments import Parser, UsageError
from ._console import metric_rows, print_json, quiet_libraries, table

SPLITS = ("test", "validation", "train")


def configure(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, zoo name or Hub id")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="CSV, Parquet or JSON lines with the label columns")
    parser.add_argument("--split", choices=SPLITS, help="of the recipe's data; by default test")
    parser.add_argument("--recipe", metavar="RECIPE", help="says where the data are; by default what trained the model")
    parser.add_argument("--task", nargs="+", action="extend", metavar="TASK", help="report these only")
    parser.add_json()
    parser.add_overrides()


def run(arguments: argparse.Namespace) -> None:
    from ..hub import resolve
    from ..training.recipe import load_recipe
    from ..training.saved import recipe_of

    if arguments.data and (arguments.split or arguments.recipe or arguments.overrides):
        raise UsageError("--data measures files: it goes with neither --split, --recipe nor keys of a recipe")
    folder = resolve(arguments.model)
    with quiet_libraries():
        if arguments.data:
            what, result = ", ".join(arguments.data), _on_files(folder, arguments.data)
        else:
            from ..training.run import evaluate

            name, overrides = arguments.recipe, arguments.overrides
            recipe = recipe_of(folder, overrides) if name is None else load_recipe(name, overrides)
            split = arguments.split or SPLITS[0]
            what, result = f"{split} rows of {recipe.data.name}", evaluate(folder, split, recipe)
    metrics = result.metrics
    if arguments.task:
        from ..tasks import check_task_names

        metrics = {task: metrics[task] for task in check_task_names(arguments.task, list(metrics))}
    if arguments.json:
        print_json({"model": arguments.model, "rows": what, "loss": result.loss, "metrics": metrics})
        return
    print(f"{arguments.model} on {what}, loss {result.loss:.4f}:\n\n{table(metric_rows(metrics))}")


def _on_files(folder: Any, files: list[str]) -> Any:
    from ..data import TabularProcessor, TensorTable
    from ..data.instruct import read_examples
    from ..hub import is_text_model
    from ..models import AutoModelForMultiTask
    from ..training.evaluation import evaluate_table
    from ..training.saved import batch_size_of

    if is_text_model(folder):
        from ..training.saved import recipe_of
        from ..training.text_run import chat_of, evaluate_examples

        examples, train = list(read_examples(files, chat_of(folder))), recipe_of(folder).train
        return evaluate_examples(
            folder, examples, train.eval_batch_size, max_length=train.max_length, truncate=train.truncate
        )
    model = AutoModelForMultiTask.from_pretrained(folder)
    if model.processor_class is not TabularProcessor:
        raise UsageError("--data measures rows of tables; a model of pictures is measured on a split of its data")
    processor = TabularProcessor.from_pretrained(folder)
    rows = TensorTable(processor(files))
    return evaluate_table(model, rows, batch_size_of(folder), model.config.parsed_tasks, processor.unscale)
