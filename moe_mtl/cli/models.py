"""Lists the models of the zoo, ready to load by name, and the model types that a recipe can train."""

import argparse
from pathlib import Path
from typing import Any

from ._arguments import Parser
from ._console import print_json, table


def configure(parser: Parser) -> None:
    parser.add_json()


def run(arguments: argparse.Namespace) -> None:
    from ..hub import zoo

    found = [_row(name, folder) for name, folder in zoo().items()]
    if arguments.json:
        print_json({"models": found, "types": _types(), "methods": _methods()})
        return
    # At once: for what follows everything is imported, which takes seconds.
    print(
        f"Models of the zoo, for from_pretrained and every command that takes a MODEL:\n\n{table(found)}\n", flush=True
    )
    print(f"Model types, for model.type of a recipe:\n\n{table(_types())}\n", flush=True)
    print(f"Methods on a language model, for model.adapter.method of a recipe:\n\n{table(_methods())}")


def _row(name: str, folder: Path) -> dict[str, Any]:
    from ..files import read_json
    from ..hub import ADAPTER, read_config

    adapter = (folder / ADAPTER).is_file()
    config = read_json(folder, ADAPTER) if adapter else read_config(folder)
    return {
        "name": name,
        "type": str(config["peft_type"]).lower() if adapter else config["model_type"],
        "parameters": _parameters(folder, config),
        "tasks": [task if isinstance(task, str) else task["name"] for task in config.get("tasks") or []],
        "test": _test(folder),
    }


def _parameters(folder: Path, config: dict[str, Any]) -> int:
    """As its record has them, else counted on the model without its memory; the weights' file also holds buffers."""
    if (record := _record(folder)) is not None:
        from ..cards.record import this_row

        return this_row(record)["parameters"]
    from ..models import model_class

    cls = model_class(config["model_type"])
    return cls.count_parameters(cls.config_class.from_dict(config))


def _test(folder: Path) -> list[str]:
    """Of each task its first metric, mean over the seeds; nothing where the folder has no record."""
    if (record := _record(folder)) is None:
        return []
    from ..cards.record import this_row

    firsts = {task: next(iter(metrics.items())) for task, metrics in this_row(record)["metrics"].items()}
    return [f"{task} {metric} {measured['mean']:.4f}" for task, (metric, measured) in firsts.items()]


def _record(folder: Path) -> dict[str, Any] | None:
    from ..cards.record import RECORD, load_record

    return load_record(folder) if (folder / RECORD).is_file() else None


def _types() -> list[dict[str, Any]]:
    import sys

    from ..models import REGISTRY

    return [
        {"type": name, "paper": _summary(sys.modules[cls.__module__].__doc__)} for name, cls in sorted(REGISTRY.items())
    ]


def _methods() -> list[dict[str, Any]]:
    import sys

    from ..tuners import METHODS

    modules = {str(name).lower(): sys.modules[config.__module__] for config, name in METHODS.items()}
    return [{"method": name, "paper": _paper(module.__doc__)} for name, module in sorted(modules.items())]


def _paper(text: str | None) -> str:
    return " ".join((text or "").strip().partition("\n\n")[0].split()).rstrip(".")


def _summary(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0].rstrip(".")
