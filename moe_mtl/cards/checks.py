"""No number without a record: what `moe-mtl cards check` holds every card to. Reads headers and text only; no torch."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..files import CheckpointError, ModelNotFoundError, UnsafeFileError, read_json
from ..hub import ADAPTER, CONFIG, MANIFEST, PICKLES, file_sha256, read_config, zoo, zoo_folder
from ..training.saved import RECIPE
from .curves import CURVES
from .page import PAGE, PROMPT, RESULTS, ZOO, index_pages, pictures, render, replace_block
from .record import RECORD, family, load_record, this_row
from .routing import ROUTING

MAX_BYTES = 2_000_000
FILES = (PAGE, RECORD, RECIPE, MANIFEST)
# In prose, a decimal is a result without a record. These are none: code, links, and the names of licences.
_NO_RESULTS = re.compile(
    r"^```.*?^```|`[^`\n]+`|https?://[^\s)>]+|doi:\S+|arXiv:\S+|CC BY(?:-SA)? 4\.0|Apache-2\.0", re.S | re.M
)
_DECIMAL = re.compile(r"(?<![\w.])\d*\.\d+|\d+\s?%")


def check(names: str | Path | Iterable[str | Path] = "all") -> list[str]:
    """Problems of cards, each as `<card>: <what>`; an empty list means that every number has its record.

    Args:
        names: zoo names or folders; "all" checks every card and the table of the zoo besides.
    """
    known = zoo()
    if names == "all":
        problems = [f"{zoo_folder()}: expected cards, found none"] if not known else []
        return problems + [p for folder in known.values() for p in check_card(folder)] + check_index()
    chosen = [names] if isinstance(names, (str, Path)) else list(names)
    return [p for name in chosen for p in check_card(known.get(str(name), Path(name)))]


def check_card(folder: Path) -> list[str]:
    """Problems of one card's folder."""
    problems = [f"{folder.name}: {problem}" for problem in _check_files(folder)]
    if problems:  # the rest would only repeat it
        return problems
    try:
        record = load_record(folder)
        found = _check_record(folder, record) + _check_recipe(folder, record)
        found = found or _check_page(folder)
    except (ValueError, OSError) as error:
        found = [str(error)]
    return [f"{folder.name}: {problem}" for problem in found]


def check_index() -> list[str]:
    """Problems of the tables of the zoo."""
    try:
        pages = index_pages()
    except (ValueError, OSError) as error:
        return [f"table of the zoo: {error}"]
    problems = [] if pages else [f"{zoo_folder().name}/{PAGE}: expected a table between {ZOO[0]} and {ZOO[1]}"]
    for page, content in pages.items():
        try:
            text = page.read_text(encoding="utf-8")
            if replace_block(text, ZOO, content) != text:
                problems.append(f"{page.parent.name}/{PAGE}: the table of the zoo is stale; run moe-mtl cards build")
        except ValueError as error:
            problems.append(f"{page.parent.name}/{PAGE}: {error}")
    return problems


def decimals_in_prose(page: str) -> list[str]:
    """Decimals and percentages outside front matter, generated block, code and links, with the number of the line."""
    # Blanked, not removed: the line numbers stay right.
    begin, end = (re.escape(marker) for marker in RESULTS)
    for pattern in (re.compile(r"\A---\n.*?\n---\n", re.S), re.compile(f"{begin}.*?{end}", re.S), _NO_RESULTS):
        page = pattern.sub(lambda match: "\n" * match.group().count("\n"), page)
    return [
        f"line {i}: {match.group()}" for i, line in enumerate(page.split("\n"), 1) for match in _DECIMAL.finditer(line)
    ]


def shipped_files(folder: Path) -> tuple[str, ...]:
    """The model's own files in a card's folder."""
    from . import text_variants, variants

    table = (folder / "preprocessor_config.json").is_file() or not (folder / "tokenizer_config.json").is_file()
    return (variants if table else text_variants).files(folder)


def _check_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        return [f"expected a folder, found none at {folder}"]
    entries = sorted(folder.iterdir())
    names = [entry.name for entry in entries]
    known = (*FILES, *shipped_files(folder))
    problems = [f"expected the file {name}, found none" for name in known if name not in names]
    problems += [f"{name}: pickles are never shipped" for name in names if name.endswith(PICKLES)]
    further = {*known, CURVES, ROUTING}
    problems += [f"{name}: no file of a card" for name in names if name not in further and not name.endswith(PICKLES)]
    size = sum(entry.stat().st_size for entry in entries)
    return problems + ([f"expected at most {MAX_BYTES:,} bytes, found {size:,}"] if size > MAX_BYTES else [])


def _check_record(folder: Path, record: dict[str, Any]) -> list[str]:
    problems = []
    kind, where = family(record), ADAPTER if family(record) == "adapter" else CONFIG
    config = read_json(folder, ADAPTER) if kind == "adapter" else read_config(folder)
    model_type = str(config.get("peft_type")).lower() if kind == "adapter" else config["model_type"]
    if record["name"] != folder.name:
        problems.append(f"{RECORD}: expected the name {folder.name}, found {record['name']}")
    if model_type != record["model_type"]:
        problems.append(f"{RECORD} is of a {record['model_type']}, {where} of a {model_type}")
    tasks = [task if isinstance(task, str) else task["name"] for task in config.get("tasks") or []]
    if tasks != list(this_row(record)["metrics"]) and (tasks or kind == "table"):
        problems.append(f"{where} has the tasks {tasks}, {RECORD} measures {list(this_row(record)['metrics'])}")
    weights = next(name for name in shipped_files(folder) if name.endswith(".safetensors"))
    try:
        checkpoint = Checkpoint(folder, weights=weights)
    except (CheckpointError, UnsafeFileError, ModelNotFoundError) as error:
        return [*problems, str(error)]
    found = {
        "sha256": file_sha256(folder / weights),
        "bytes": (folder / weights).stat().st_size,
        "tensors": len(checkpoint.shapes),
        "elements": checkpoint.num_elements,
    }
    for key, value in record["weights"].items():
        if found[key] != value:
            problems.append(f"{weights} is not that of {RECORD}: expected {key} {value}, found {found[key]}")
    if this_row(record)["parameters"] > checkpoint.num_elements:
        problems.append(f"{RECORD} counts more parameters than {weights} holds, {checkpoint.num_elements:,}")
    return problems


def _check_recipe(folder: Path, record: dict[str, Any]) -> list[str]:
    from ..training.recipe import load_recipe, recipe_sha256

    problems = []
    used = {(record["recipe"], record["recipe_sha256"])} | {(r["recipe"], r["recipe_sha256"]) for r in record["rows"]}
    for name, recorded in sorted(used):
        current = recipe_sha256(load_recipe(name))
        if current != recorded:
            problems.append(f"the recipe {name} changed since the record was made: {recorded[:12]}, now {current[:12]}")
    resolved = load_recipe(folder / RECIPE)
    if recipe_sha256(resolved) != record["recipe_sha256"]:
        problems.append(f"{RECIPE} is not the recipe of {RECORD}")
    if resolved.data.path is not None:
        problems.append(f"{RECIPE}: expected no data.path, found {resolved.data.path!r}")
    return problems


def _check_page(folder: Path) -> list[str]:
    page = (folder / PAGE).read_text(encoding="utf-8")
    problems = [f"{PAGE}, {found}: a number without a record" for found in decimals_in_prose(page)]
    problems += [f"{PAGE}: prose is missing at {prompt}" for prompt in re.findall(f"{re.escape(PROMPT)}.*", page)]
    for name, drawing in pictures(load_record(folder)).items():
        if not (folder / name).is_file() or (folder / name).read_text("utf-8") != drawing:
            problems.append(f"{name} is not what {RECORD} gives; run moe-mtl cards build")
    if render(folder, page) != page:
        problems.append(f"{PAGE} is not what {RECORD} gives; run moe-mtl cards build")
    return problems
