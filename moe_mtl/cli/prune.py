"""Extracts tasks from a model with sparse experts, and leaves out the experts that they seldom choose.

  moe-mtl prune m3vit-photo-tiles edges --keep 0.99 --output runs/edges

Which experts that are is counted on a part of the data that the model was trained on. What it changes is measured there
too and told: choices lost, how far the answers move, and the loss.
"""

import argparse
from typing import Any

from ._arguments import Parser, UsageError
from ._console import print_json, quiet_libraries, say, table

SPLITS = ("validation", "train", "test")


def configure(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, zoo name or Hub id")
    parser.add_argument("tasks", nargs="+", metavar="TASK")
    parser.add_argument("--keep", type=float, metavar="SHARE", help="of a task's choices; by default 0.99")
    parser.add_argument(
        "--theta", type=float, metavar="PERCENT", help="Mod-Squad's rule instead: experts that fewer tokens choose go"
    )
    parser.add_argument("--split", choices=SPLITS, default=SPLITS[0], help="to count on; by default validation")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_json()
    parser.add_overrides()


def run(arguments: argparse.Namespace) -> None:
    from ..hub import is_text_model, resolve
    from .extract import check_output, write_model

    if arguments.keep is not None and arguments.theta is not None:
        raise UsageError("--keep and --theta are two rules: choose one of them")
    folder = resolve(arguments.model)
    check_output(arguments.output, folder)
    if is_text_model(folder):
        raise UsageError(f"expected a model with sparse experts, found a language model or adapter in {folder}")
    with quiet_libraries():
        small, report = _pruned(folder, arguments)
        told = write_model(small, folder, arguments.output)
    if arguments.json:
        print_json(told | {"report": report.to_dict()})
        return
    before, after = report.parameters
    layers = [
        {
            "layer": layer,
            "experts": f"{len(kept)} of {report.stored[layer]}",
            "choices lost": f"{max(report.choices_lost[layer].values()):.2%}",
        }
        for layer, kept in report.kept.items()
    ]
    changes = [
        {
            "task": task,
            "largest change of a logit": f"{largest:.3g}",
            "mean": f"{mean:.3g}",
            "loss before": f"{report.loss[task][0]:.4f}" if task in report.loss else "",
            "after": f"{report.loss[task][1]:.4f}" if task in report.loss else "",
        }
        for task, (largest, mean) in report.difference.items()
    ]
    print(
        f"{report.rule}, counted on {report.rows} rows of {arguments.split}:\n\n{table(layers)}\n\n{table(changes)}\n"
    )
    say(f"wrote {arguments.output}: {', '.join(told['tasks'])} with {after:,} of {before:,} parameters")


def _pruned(folder: Any, arguments: argparse.Namespace) -> Any:
    """The smaller model and what it lost."""
    from .. import pathway
    from ..data import VisionProcessor, is_images
    from ..models import AutoModelForMultiTask
    from ..tasks import check_task_names
    from ..training.run import encoded, load_data
    from ..training.saved import recipe_of

    recipe = recipe_of(folder, arguments.overrides)
    if not is_images(recipe.data.name):
        raise UsageError(f"expected a model for pictures, whose experts are chosen, found one of {recipe.data.name}")
    model = AutoModelForMultiTask.from_pretrained(folder)
    names = check_task_names(arguments.tasks, model.tasks)
    processor = VisionProcessor.from_pretrained(folder).for_tasks(names)
    rows: Any = encoded(load_data(recipe).parts()[arguments.split], processor)
    options: dict[str, Any] = {"batch_size": recipe.train.eval_batch_size}
    if arguments.theta is not None:
        options |= {"rule": "mod_squad", "theta": arguments.theta}
    elif arguments.keep is not None:
        options["keep"] = arguments.keep
    return pathway.prune(model, names, rows, **options)
