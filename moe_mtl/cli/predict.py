"""Answers rows or pictures, in the units of the training data; of the model only what the tasks need is loaded.

  moe-mtl predict runs/digits-mmoe rows.csv --output answers.parquet --keep id
  moe-mtl predict runs/digits-mmoe rows.csv --task digit | head
  moe-mtl predict mtl-lora-word-edits prompts.jsonl --task reverse

  moe-mtl predict photo.jpg --model runs/photo-tiles-m3vit --task edges --output edges.png

Pictures: maps of a photograph's own size are drawn over it, into a picture, or of several tasks or pictures into a
folder; into a file that ends in .npy goes the map itself. Large photographs are answered window by window. What tasks
say with no map, a class or a value, goes into a file that ends in .jsonl, or into answers.jsonl of the folder.

A language model, or an adapter on one, answers JSON lines that have prompt or messages, and task unless --task says it
for all; a line of another task is then an error.

Columns: a binary task gives its probability, a regression its value, a multi-class task the most likely class and, as
<task>/<class>, all probabilities. Metrics taken from the file are those of moe-mtl evaluate, to the last bit.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from ._arguments import Parser, UsageError, positive
from ._console import quiet_libraries, say


def configure(parser: Parser) -> None:
    parser.add_argument("first", metavar="MODEL", help="folder, zoo name or Hub id; left out where --model names it")
    parser.add_argument(
        "inputs", nargs="*", metavar="ROWS", help="CSV, Parquet or JSON-lines file, pictures, or a folder of them"
    )
    parser.add_argument("--model", metavar="MODEL", help="instead of the first argument")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=".csv, .parquet or .jsonl, by default JSON lines on stdout; of pictures .png, .npy, .jsonl or a folder",
    )
    parser.add_argument("--task", nargs="+", action="extend", metavar="TASK", help="answer these only")
    parser.add_argument("--keep", nargs="+", action="extend", default=[], metavar="COLUMN", help="carry these along")
    parser.add_argument("--delimiter", metavar="CHARACTER", help="of a CSV file; by default that of the training data")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="by default what evaluation used")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="of text: of the longest answer; 256")


def run(arguments: argparse.Namespace) -> None:
    from ..hub import is_text_model, resolve
    from ..training.saved import batch_size_of

    if arguments.keep and not arguments.output:
        raise UsageError("--keep writes columns into a file: it needs --output")
    inputs = arguments.inputs if arguments.model is None else [arguments.first, *arguments.inputs]
    if not inputs:
        raise UsageError("the following arguments are required: ROWS; see moe-mtl predict --help")
    folder = resolve(arguments.first if arguments.model is None else arguments.model)
    if not is_text_model(folder) and _reads_pictures(folder):
        _pictures(folder, inputs, arguments)
        return
    if len(inputs) > 1:
        raise UsageError(f"unexpected argument {inputs[1]!r}; see moe-mtl predict --help")
    arguments.rows = inputs[0]
    if is_text_model(folder):
        _text(folder, arguments)
        return
    if arguments.max_new_tokens:
        raise UsageError("--max-new-tokens is for language models; this one answers rows of a table")
    batch_size = arguments.batch_size or batch_size_of(folder)
    with quiet_libraries():
        if arguments.output is None:
            _to_stdout(folder, arguments, batch_size)
            return
        from ..training.predict import predict_file

        done = predict_file(
            folder,
            arguments.rows,
            arguments.output,
            arguments.task,
            arguments.keep,
            batch_size,
            delimiter=arguments.delimiter,
        )
    columns = ", ".join([*done.columns[:8], *["..."] * (len(done.columns) > 8)])
    say(f"wrote {done.path}: {done.rows:,} rows, columns {columns}")


def _reads_pictures(folder: Path) -> bool:
    from ..data import VisionProcessor
    from ..hub import read_config
    from ..models import model_class

    return model_class(read_config(folder)["model_type"]).processor_class is VisionProcessor


def _pictures(folder: Path, inputs: list[str], arguments: argparse.Namespace) -> None:
    from ..training.image_predict import WINDOWS, predict_files
    from ..training.saved import batch_size_of

    if arguments.output is None:
        raise UsageError("--output: expected a picture, a .npy or .jsonl file or a folder for the answers, found none")
    if arguments.keep or arguments.delimiter or arguments.max_new_tokens:
        raise UsageError(
            "--keep and --delimiter are for rows of a table, --max-new-tokens for language models; this one reads "
            "pictures"
        )
    batch_size = arguments.batch_size or min(WINDOWS, batch_size_of(folder))
    with quiet_libraries():
        written = predict_files(folder, inputs, arguments.output, arguments.task, batch_size)
    shown = ", ".join([*map(str, written[:4]), *["..."] * (len(written) > 4)])
    say(f"wrote {shown}")


def _text(folder: Path, arguments: argparse.Namespace) -> None:
    from ..files import appearing_file
    from ..training.text_predict import predict_text

    tasks = arguments.task or [None]
    if len(tasks) > 1 or arguments.keep or arguments.delimiter:
        raise UsageError("of a language model expected at most one --task; --keep and --delimiter are for tables")
    if arguments.output is not None and not arguments.output.endswith(".jsonl"):
        raise UsageError(
            f"--output: expected a name that ends in .jsonl for answers in words, found {arguments.output}"
        )
    to_file = arguments.output is not None
    with quiet_libraries():
        answers = predict_text(
            folder, arguments.rows, tasks[0], arguments.batch_size or 16, arguments.max_new_tokens or 256, to_file
        )
        lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        if not to_file:
            for line in lines:
                sys.stdout.write(line)
            return
        written = 0
        with appearing_file(arguments.output) as path, open(path, "x", encoding="utf-8", newline="\n") as file:
            for line in lines:
                written += file.write(line) > 0
            file.flush()
            os.fsync(file.fileno())
    say(f"wrote {arguments.output}: {written:,} answers")


def _to_stdout(folder: Path, arguments: argparse.Namespace, batch_size: int) -> None:
    from ..data import TabularProcessor
    from ..models import AutoModelForMultiTask
    from ..training.predict import open_rows, predict

    source = open_rows(folder, arguments.rows, arguments.delimiter)
    processor = TabularProcessor.from_pretrained(folder)
    model = AutoModelForMultiTask.from_pretrained(folder, tasks=arguments.task)
    for chunk in predict(model, processor, source, batch_size, arguments.task):
        columns = [values.tolist() for values in chunk.values()]
        for row in zip(*columns, strict=True):
            sys.stdout.write(json.dumps(dict(zip(chunk, row, strict=True)), ensure_ascii=False) + "\n")
