"""Counts, for each task and for all together: parameters that must be stored and read, and multiply-adds for one row.

`touched` parameters are those that answering the task can read; of them a row reads the `active` ones (of an embedding
table, only the rows it looks up). Counted while the model that `moe-mtl extract` would write answers a row.
"""

import argparse
from pathlib import Path
from typing import Any

from ._arguments import Parser
from ._console import print_json, quiet_libraries, table


def configure(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, zoo name or Hub id")
    parser.add_argument(
        "--task", nargs="+", action="extend", metavar="TASK", help="count these together; by default each, and all"
    )
    parser.add_json()


def run(arguments: argparse.Namespace) -> None:
    from ..hub import is_text_model, resolve
    from ..models import AutoModelForMultiTask
    from ..pathway import Cost, cost

    if is_text_model(folder := resolve(arguments.model)):
        _of_text(folder, arguments)
        return
    with quiet_libraries():
        model = AutoModelForMultiTask.from_pretrained(arguments.model)
        wanted = [arguments.task] if arguments.task else [None, *([task] for task in model.tasks)]
        costs = [cost(model, tasks) for tasks in wanted]
    if arguments.json:
        print_json([one.to_dict() for one in costs])
        return

    def name(one: Cost) -> str:
        return "all" if list(one.tasks) == model.tasks else ", ".join(one.tasks)

    print(f"{arguments.model}: {model.config.model_type}, {costs[0].stored:,} parameters stored; per row of data:\n")
    print(table([_row(name(one), one) for one in costs]))
    parts = list(dict.fromkeys(part for one in costs for part in one.parts))
    for field in ("touched", "multiply_adds"):
        print(f"\n{field.replace('_', '-')} by part:\n")
        by_part = [
            {"task": name(one)} | {p: vars(one.parts[p])[field] for p in parts if p in one.parts} for one in costs
        ]
        print(table(by_part))


def _of_text(folder: Path, arguments: argparse.Namespace) -> None:
    """Of a language model and its adapter."""
    from ..cards.text_variants import TextTask, task_costs
    from ..tasks import check_task_names
    from ..training.text_run import load_text
    from ..tuners import RankTuner, count

    with quiet_libraries():
        model, _, tasks = load_text(folder)
        prefix = getattr(getattr(model, "base_model", None), "prefix", None)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        base = sum(n for name, n in sizes.items() if not prefix or prefix not in name)
        own = isinstance(getattr(model, "base_model", None), RankTuner)
        added = vars(count(model)) if own else {"stored": sum(sizes.values()) - base}
        chosen = check_task_names(arguments.task, tasks or []) if arguments.task else tasks or []
        alone = task_costs(folder, [TextTask(task) for task in chosen])
    told: dict[str, Any] = {"base": base, "adapter": added}
    told["one task alone"] = {task: cost["parameters"] for task, cost in alone.items()}
    if arguments.json:
        print_json(told)
        return
    print(f"{arguments.model}: parameters\n")
    rows = [{"part": "base model", "stored": told["base"]}, {"part": "adapter, all tasks", **added}]
    rows += [
        {"part": f"adapter, {task} alone, until it is merged", "stored": n["parameters"]} for task, n in alone.items()
    ]
    print(table(rows))


def _row(name: str, one: Any) -> dict[str, Any]:
    return {
        "task": name,
        "touched": one.touched,
        "active": one.active,
        "table rows": one.table_rows,
        "multiply-adds": one.multiply_adds,
        "share": f"{one.share['multiply_adds']:.0%}",
    }
