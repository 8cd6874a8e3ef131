"""Runs records again and holds what comes out to what they say."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ..files import ModelNotFoundError
from ..hub import zoo, zoo_folder
from ..naming import nearest
from ..training.recipe import load_recipe
from .environment import made_as_here
from .kinds import kind_of
from .record import BUDGETS, SAME_DIGITS, load_record, this_row, tolerance
from .variants import train


@dataclass(frozen=True)
class Repetition:
    """One number of a record, measured again."""

    card: str
    model: str
    task: str
    metric: str
    seed: int
    expected: float
    measured: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return abs(self.measured - self.expected) <= self.tolerance

    def __str__(self) -> str:
        told = "ok" if self.agrees else f"OFF BY MORE THAN {self.tolerance:g}"
        what = f"{self.card} {self.model} seed {self.seed} {self.task} {self.metric}"
        return f"{what}: expected {self.expected:.4f}, measured {self.measured:.4f}, {told}"


def reproduce(
    names: str | Iterable[str] = "all",
    *,
    budget: str = "ci",
    data_path: str | None = None,
    progress: bool = True,
    echo: Callable[[str], None] = print,
) -> list[Repetition]:
    """Trains records again; every number is told, expected beside measured.

    Args:
        names: zoo names; "all" takes every record that the budget allows.
        budget: `ci`: of each record made for it, the shipped model alone; `nightly`: every record, row and seed.
        data_path: where the rows are, for data sets that are read from a path.
        progress: whether training shows its progress.
        echo: gets a line per number.

    Raises:
        ValueError: an unknown budget, or no record for it: nothing to repeat must not look like success.
        ModelNotFoundError: no such card.
    """
    if budget not in BUDGETS:
        raise ValueError(f"budget: expected one of {', '.join(BUDGETS)}, found {budget!r}")
    known = zoo()
    chosen = list(known) if names == "all" else [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in known:
            raise ModelNotFoundError(f"no card {name!r} in {zoo_folder()}{nearest(name, known)}")
    if names == "all" and budget == "ci":
        chosen = [name for name in chosen if load_record(known[name])["budget"] == "ci"]
    if not chosen:
        raise ValueError(f"expected at least one record with the budget {budget} in {zoo_folder()}, found none")
    found = []
    for name in chosen:
        for repetition in _repeat(known[name], budget, data_path, progress):
            echo(str(repetition))
            found.append(repetition)
    return found


def _repeat(folder: Path, budget: str, data_path: str | None, progress: bool) -> Iterator[Repetition]:
    record = load_record(folder)
    rows = {row["model"]: row for row in record["rows"]}
    seeds = [record["shipped_seed"]] if budget == "ci" else record["seeds"]
    baseline = next((rows[name]["recipe"] for name in ("shared_bottom", "multi_task_vit") if name in rows), None)
    kind = kind_of(load_recipe(record["recipe"]))
    tasks = list((rows["lora-each"] if "lora-each" in rows else rows.get("single_task", this_row(record)))["metrics"])
    same = made_as_here(record)
    with TemporaryDirectory() as runs:
        for variant in kind.variants(record["recipe"], baseline, data_path, tasks):
            if budget == "ci" and variant.role != "this":
                continue
            for seed in seeds:
                measured = train(variant, seed, Path(runs), progress).metrics["test"]
                for task, metrics in rows[variant.model]["metrics"].items():
                    for metric, entry in metrics.items():
                        expected = entry["values"][record["seeds"].index(seed)]
                        value = measured[task][metric]
                        allowed = SAME_DIGITS * max(1.0, abs(expected)) if same else tolerance(metric, entry)
                        yield Repetition(record["name"], variant.model, task, metric, seed, expected, value, allowed)
