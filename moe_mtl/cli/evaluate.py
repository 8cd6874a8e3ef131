"""Measures a saved model: on a split of the data it was trained on, or on the labelled rows of files.

moe-mtl evaluate runs/digits-mmoe
moe-mtl evaluate runs/digits-mmoe --data rows.parquet --task digit

With --task only what these tasks need is loaded, the loss is theirs, and files need no other label columns.
"""

import argparse
from pathlib import Path
from typing import Any

from ._arguments import Parser, UsageError
from ._console import metric_rows, print_json, quiet_libraries, table

SPLITS = ("test", "validation", "train")


def configure(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, zoo name or Hub id")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="CSV, Parquet or JSON lines with the label columns")
    parser.add_argument("--delimiter", metavar="CHARACTER", help="of CSV files; by default that of the training data")
    parser.add_argument("--split", choices=SPLITS, help="of the recipe's data; by default test")
    parser.add_argument("--recipe", metavar="RECIPE", help="says where the data are; by default what trained the model")
    parser.add_argument("--task", nargs="+", action="extend", metavar="TASK", help="measure these only")
    parser.add_json()
    parser.add_overrides()


def run(arguments: argparse.Namespace) -> None:
    from ..hub import resolve
    from ..training.recipe import load_recipe
    from ..training.saved import recipe_of

    if arguments.data and (arguments.split or arguments.recipe or arguments.overrides):
        raise UsageError("--data measures files: it goes with neither --split, --recipe nor keys of a recipe")
    if arguments.delimiter is not None and not arguments.data:
        raise UsageError("--delimiter is for files of --data; a recipe's is --data.delimiter")
    folder = resolve(arguments.model)
    with quiet_libraries():
        if arguments.data:
            what, result = ", ".join(arguments.data), _on_files(folder, arguments)
        else:
            from ..training.run import evaluate

            name, overrides, split = arguments.recipe, arguments.overrides, arguments.split or SPLITS[0]
            given = None if name is None else load_recipe(name, overrides)
            result = evaluate(folder, split, given, overrides, arguments.task)
            what = f"{split} rows of {(given or recipe_of(folder, overrides)).data.name}"
    if arguments.json:
        print_json({"model": arguments.model, "rows": what, "loss": result.loss, "metrics": result.metrics})
        return
    print(f"{arguments.model} on {what}, loss {result.loss:.4f}:\n\n{table(metric_rows(result.metrics))}")


def _on_files(folder: Path, arguments: argparse.Namespace) -> Any:
    from ..data import TabularProcessor
    from ..hub import is_text_model
    from ..training.evaluation import evaluate
    from ..training.predict import open_rows
    from ..training.run import encoded, load_measured
    from ..training.saved import batch_size_of, recipe_of

    if is_text_model(folder):
        from ..data.instruct import read_examples
        from ..training.text_run import chat_of, evaluate_examples

        if arguments.delimiter is not None:
            raise UsageError("--delimiter is for CSV files; a language model reads JSON lines")
        examples, train = list(read_examples(arguments.data, chat_of(folder))), recipe_of(folder).train
        return evaluate_examples(
            folder, examples, train.eval_batch_size, None, train.max_length, train.truncate, arguments.task
        )
    model, processor, tasks = load_measured(folder, arguments.task)
    if not isinstance(processor, TabularProcessor):
        raise UsageError("--data measures rows of tables; a model of pictures is measured on a split of its data")
    rows = encoded(open_rows(folder, arguments.data, arguments.delimiter), processor, tasks)
    return evaluate(model, rows, batch_size_of(folder), tasks, processor.unscale)
