"""Makes a card: trains the model and its baselines over the seeds, compares them, writes the folder at once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint
from ..files import staged_folder
from ..hub import file_sha256, write_manifest, zoo_folder
from ..training.recipe import load_recipe
from ..training.saved import RECIPE
from . import image_variants, text_variants
from .bootstrap import paired_bootstrap
from .environment import hardware, packages
from .external import compared, external_rows, kept_rows, write_record
from .kinds import kind_of
from .page import PAGE, build_index, pictures, prose_of, render
from .record import LOWER_IS_BETTER, RECORD, family, load_record, measure, record_problems
from .routing import measure_routing
from .variants import Trained, canonical, train

RESAMPLES, CONFIDENCE = 1000, 0.95


def make(
    recipe: str | Path,
    *,
    baseline: str | Path | None = None,
    data_path: str | None = None,
    runs: str | Path | None = None,
    budget: str = "nightly",
    external: str | Path | None = None,
    echo: Callable[[str], None] = print,
) -> Path:
    """Writes `model_cards/<card.name>/` and the table of the zoo; returns the folder.

    The shipped weights are those of the seed that is best on the validation rows; the test rows choose nothing.

    Args:
        recipe: of the model, name or file; `card.name` and `card.seeds` say what to make.
        baseline: of a table, recipe of a shared bottom on the same data; by default `shared_bottom` beside the recipe.
        data_path: where the rows are, for data sets that are read from a path.
        runs: folder that keeps the trained models, so that a second card, or a second try, does not train them again.
        budget: `ci` if the record is small enough to be repeated at every change, else `nightly`.
        external: `trees.json` of `moe-mtl bench trees`: other tools on the same rows; by default those of the record
            that is replaced, if its data are the same.
        echo: gets a line for each model trained.

    Raises:
        RecipeError: a recipe that cannot be followed, or baselines with another budget.
        ValueError: fewer than 3 seeds, or no card name.
        OSError: nothing is half-written.
    """
    own = load_recipe(recipe, [] if data_path is None else [("data.path", data_path)])
    if own.card.name is None or len(set(own.card.seeds)) < 3:
        raise ValueError(
            f"{recipe}: expected card.name and at least 3 card.seeds, found {own.card.name!r}, {own.card.seeds}"
        )
    if not {"validation", "test"} <= set(own.eval.splits):
        raise ValueError(f"{recipe}: expected eval.splits with validation and test, found {own.eval.splits}")
    if runs is None:
        with TemporaryDirectory() as folder:
            return make(
                recipe, baseline=baseline, data_path=data_path, runs=folder, budget=budget, external=external, echo=echo
            )
    from ..training.run import load_data

    splits: Any = load_data(own)
    kind = kind_of(own)
    tasks = kind.measured_tasks(own, splits)
    name = canonical(recipe)
    chosen = kind.variants(name, baseline, data_path, kind.alone(tasks))
    if kind is image_variants:
        image_variants.check_costs(chosen, splits)
    trained: dict[str, list[Trained]] = {}
    for variant in chosen:
        for seed in own.card.seeds:
            one = train(variant, seed, Path(runs), progress=False)
            trained.setdefault(variant.model, []).append(one)
            echo(f"{variant.model} seed {seed}: {_told(one.metrics['test'])} ({one.wall_s:.0f} s)")

    shipped = best_seed([one.metrics["validation"] for one in trained[chosen[0].model]])
    best = trained[chosen[0].model][shipped].folders["all"]
    seeds = own.card.seeds
    rows = [
        # Of the shipped seed: how many experts a task keeps may depend on what was learnt.
        variant.row | kind.cost_of(trained[variant.model][shipped]) | {"metrics": _metrics(trained[variant.model])}
        for variant in chosen
    ]
    if kind is text_variants and len(rows) > 1:
        text_variants.close(rows[0], rows[1])
    shipped_files = kind.files(best)
    weights = next(one for one in shipped_files if one.endswith(".safetensors"))
    checkpoint = Checkpoint(best, weights=weights)
    command = f"moe-mtl cards make {name}" + (f" --data.path {Path(data_path).name}" if data_path else "")
    record = {
        "name": own.card.name,
        **_family(kind, own),
        "model_type": chosen[0].model,
        "command": command,
        "recipe": name,
        "recipe_sha256": rows[0]["recipe_sha256"],
        "data": {k: splits.info[k] for k in ("name", "sha256", "licence", "source", "rows") if k in splits.info},
        "seeds": seeds,
        "shipped_seed": seeds[shipped],
        "weights": {
            "sha256": file_sha256(best / weights),
            "bytes": (best / weights).stat().st_size,
            "tensors": len(checkpoint.shapes),
            "elements": checkpoint.num_elements,
        },
        "rows": rows,
        "single_task_cost": kind.task_costs(best, tasks),
        "comparison": _comparison(kind, tasks, trained, splits.test, own.train.eval_batch_size),
        "bootstrap": {"resamples": RESAMPLES, "confidence": CONFIDENCE, **_groups_of(splits.test)},
        "wall_s": round(sum(one.wall_s for variant in trained.values() for one in variant), 1),
        "hardware": hardware(),
        "budget": budget,
    }
    record["packages"] = packages(family(record))
    if curves := _curves(trained):
        record["curves"] = curves
    if kind is image_variants:
        folders = [one.folders["all"] for one in trained[chosen[0].model]]
        if routing := measure_routing(folders, shipped, splits.test, own.train.eval_batch_size):
            record["routing"] = routing
    earlier = zoo_folder() / own.card.name
    others = external_rows(external, record) if external is not None else []
    if external is None and (earlier / RECORD).exists():
        others = kept_rows(load_record(earlier), record)
    if others:
        record["external"] = others
        if not compared(record):
            echo(f"the other tools were not compared with these weights: moe-mtl bench trees --model {own.card.name}")
    return write_card(record, best, shipped_files)


def write_card(record: dict[str, Any], trained: Path, files: tuple[str, ...]) -> Path:
    """The card's folder from its record and the trained model, in one rename; prose that is there stays."""
    if problems := record_problems(record):
        raise ValueError(f"{RECORD}: " + "; ".join(problems))
    target = zoo_folder() / record["name"]
    prose = prose_of(target, record)
    with staged_folder(target) as folder:
        for name in files:
            shutil.copyfile(trained / name, folder / name)
        # Without the path: where the rows lay is nobody's business, and elsewhere on the reader's machine.
        resolved = load_recipe(trained / RECIPE)
        resolved.data.path = None
        (folder / RECIPE).write_text(resolved.to_yaml(), encoding="utf-8")
        write_record(folder, record)
        for picture, drawing in pictures(record).items():
            (folder / picture).write_text(drawing, encoding="utf-8")
        (folder / PAGE).write_text(render(folder, prose), encoding="utf-8")
        write_manifest(folder)
    build_index()
    return target


def _family(kind: Any, own: Any) -> dict[str, str]:
    """What a record says of its kind of model; of a table nothing."""
    if kind is text_variants:
        return {"family": "adapter" if own.model.adapter else "language model"}
    return {"family": "vision model"} if kind is image_variants else {}


def _groups_of(rows: Any) -> dict[str, int]:
    """How many pictures the rows were cut from, where that was said."""
    groups_N = getattr(rows, "groups_N", None)
    return {} if groups_N is None else {"groups": len(groups_N.unique())}


def best_seed(validation: list[dict[str, dict[str, float]]]) -> int:
    """Position of the run whose primary metrics, each task's first, are best on average."""

    def score(metrics: dict[str, dict[str, float]]) -> float:
        primary = [next(iter(values.items())) for values in metrics.values()]
        return sum(-value if metric in LOWER_IS_BETTER else value for metric, value in primary) / len(primary)

    return max(range(len(validation)), key=lambda i: score(validation[i]))


def _metrics(trained: list[Trained]) -> dict[str, dict[str, Any]]:
    first = trained[0].metrics["test"]
    for one in trained:
        for task, metrics in one.metrics["test"].items():
            for metric, value in metrics.items():
                if value is None:
                    raise ValueError(f"{task} {metric} is not defined on the test rows")
    return {
        task: {metric: measure([one.metrics["test"][task][metric] for one in trained]) for metric in metrics}
        for task, metrics in first.items()
    }


def _curves(trained: dict[str, list[Trained]]) -> dict[str, Any]:
    """Validation over the steps, a list per seed, of the models that were measured at the same steps as the first."""
    found: dict[str, Any] = {}
    first = next(iter(trained.values()))[0].curve
    for model, runs in trained.items():
        curves = [one.curve for one in runs]
        if (
            first is not None
            and first["step"]
            and all(one is not None and one["step"] == first["step"] for one in curves)
        ):
            values = [one["exact_match"] for one in curves if one is not None]
            found[model] = {"step": first["step"], "exact_match": values}
    return found


def _comparison(
    kind: Any, tasks: list[Any], trained: dict[str, list[Trained]], rows: Any, batch_size: int
) -> list[dict[str, Any]]:
    own, *baselines = trained
    groups_B = getattr(rows, "groups_N", None)
    groups_B = None if groups_B is None else groups_B.numpy()
    found: list[dict[str, Any]] = []
    if not baselines:
        return found
    answers = {model: [kind.answer(one, rows, batch_size) for one in trained[model]] for model in trained}
    for task in tasks:
        judged = {variant: kind.statistics(task, answers[variant]) for variant in trained}
        metric = next(iter(trained[own][0].metrics["test"][task.name]))
        if groups_B is not None and len(np.unique(groups_B[rows.present(task.name).numpy()])) < 2:
            continue  # labelled in one photograph alone: nothing says how another one would be
        for baseline in baselines:
            mine, theirs = judged[own], judged[baseline]
            if mine is not None and theirs is not None:
                difference = paired_bootstrap(
                    mine[0], theirs[0], mine[1], resamples=RESAMPLES, confidence=CONFIDENCE, groups_B=groups_B
                )
                found.append({"baseline": baseline, "task": task.name, "metric": metric, **vars(difference)})
    return found


def _told(metrics: dict[str, dict[str, float]]) -> str:
    return ", ".join(
        f"{task} {metric} {value:.4f}" for task, values in metrics.items() for metric, value in list(values.items())[:1]
    )
