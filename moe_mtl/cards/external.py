"""Other tools on a card's rows: takes what `moe-mtl bench trees --output DIR` wrote, `trees.json`, into a record."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json, write_atomically
from .page import build_card
from .record import RECORD, load_record, record_problems, this_row

NAME = ", one model per task"


def external_rows(trees: str | Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools of a `trees.json` as rows for `record`, on the tasks that both have.

    Where the same weights were compared with a tool, the row also holds the paired difference, weights minus tool.

    Raises:
        ModelNotFoundError, CheckpointError: no such file, or no JSON.
        ValueError: not what `moe-mtl bench trees` writes, or measured on other rows.
    """
    path = Path(trees)
    found = read_json(path.parent, path.name)
    try:
        if found["bench"] != "trees":
            raise ValueError(f"{path}: expected a result of moe-mtl bench trees, found one of {found['bench']!r}")
        if any(found["data"][key] != record["data"][key] for key in ("sha256", "rows")):
            raise ValueError(f"{path} was measured on other rows than {record['name']}: {found['data']['name']}")
        compared = found["models"].get(record["name"]) == record["weights"]["sha256"]
        rows: dict[str, dict[str, Any]] = {}
        for task, tools in found["tasks"].items():
            if "auc" not in this_row(record)["metrics"].get(task, {}):
                continue
            for tool, measured in tools.items():
                row = rows.setdefault(tool, {"model": tool + NAME, "source": found["command"], "metrics": {}})
                row["metrics"][task] = {"auc": measured["auc"]}
                if compared:
                    difference = measured["differences"][record["name"]]
                    row.setdefault("differences", {})[task] = {"auc": difference}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a result of moe-mtl bench trees, found none: {error}") from error
    if not rows:
        raise ValueError(f"{path}: expected a task of {record['name']}, found {', '.join(found['tasks']) or 'none'}")
    return list(rows.values())


def kept_rows(earlier: Mapping[str, Any], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the record that is replaced, if its data are the same; differences only of the same weights."""
    if earlier["data"] != record["data"]:
        return []
    gone = set() if earlier["weights"] == record["weights"] else {"differences"}
    return [{key: value for key, value in row.items() if key not in gone} for row in earlier.get("external", [])]


def compared(record: Mapping[str, Any]) -> bool:
    """Whether every tool stands beside these very weights."""
    return all("differences" in row for row in record["external"])


def attach(folder: str | Path, trees: str | Path) -> None:
    """Writes the tools of a `trees.json` into a finished card: its record and its page; nothing is trained.

    Raises:
        ValueError: as `external_rows`; or the file compares no or other weights with the tools than this card's.
    """
    folder = Path(folder)
    record = load_record(folder)
    record["external"] = external_rows(trees, record)
    if not compared(record):
        raise ValueError(
            f"{trees} does not compare the weights of {record['name']} as they are: "
            f"run moe-mtl bench trees --model {record['name']} again"
        )
    if problems := record_problems(record):
        raise ValueError(f"{trees}: " + "; ".join(problems))
    write_record(folder, record)
    build_card(folder)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """`results.json` of a card's folder."""
    write_atomically(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
