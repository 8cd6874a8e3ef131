"""Models without experts on the same split: LightGBM and logistic regression, one per binary task.

What a table needs is often a gradient-boosted tree. This measures the strongest simple tools on the rows, columns and
split of a data set here, chooses by validation rows alone, and compares models of the zoo with them on the same test
rows (paired bootstrap). Needs LightGBM: pip install 'moe_mtl[trees]'.

moe-mtl bench trees --path census-income.test.gz --model mmoe-census-income-half ple-census-income-half --output out
moe-mtl cards build mmoe-census-income-half ple-census-income-half --external out/trees.json
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cards.bootstrap import auc_statistic, paired_bootstrap
from ..data import load
from ..data.processor import TabularProcessor
from ..hub import WEIGHTS, file_sha256, resolve
from ..models import AutoModelForMultiTask
from .report import aligned, to_stderr, write

LEAVES = (15, 31, 63)
RATES = (0.03, 0.1)
PENALTIES = (0.03, 0.1, 0.3, 1.0)
ROUNDS, PATIENCE = 2000, 50


@dataclass(frozen=True)
class Options:
    """What to compare.

    Attributes:
        data: name of a data set with binary tasks.
        path: its file, where it reads one.
        model: zoo names or folders to compare with; none by default.
        seeds: of LightGBM, averaged.
        threads: of LightGBM.
        output: folder for trees.json, which moe-mtl cards make and build take with --external.
    """

    data: str = "census-income"
    path: str | None = None
    model: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 2
    output: str | None = None

    def __post_init__(self) -> None:
        names = [Path(model).name for model in self.model]
        if len(set(names)) < len(names):
            raise ValueError(f"model: expected each once, found {', '.join(names)}")
        if not self.seeds:
            raise ValueError("seeds: expected at least one, found none")


def run(options: Options, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Test AUC of each tool and task; of each model besides, with the paired differences.

    Returns:
        JSON types: the `command`, the `data`, the sha256 of the weights of the `models` by name; under `tasks`, by task
        and tool, `auc`, `std`, `seconds` and by model `differences`, model minus tool; under `scores` the models' AUCs.

    Raises:
        ModuleNotFoundError: LightGBM is not installed.
        ModelNotFoundError: no such model.
        ValueError: the data set has no binary task.
    """
    import lightgbm as lgb
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import OneHotEncoder

    folders = {Path(model).name: resolve(model) for model in options.model}
    splits = load(options.data, **({} if options.path is None else {"path": options.path}))
    processor = splits.fit_processor()
    binary = [task["name"] for task in processor.tasks if task["kind"] == "binary"]
    if not binary:
        raise ValueError(f"data: expected a data set with a binary task, found {options.data}")
    encoded = {name: processor(part) for name, part in splits.parts().items()}
    inputs = {name: _columns(batch) for name, batch in encoded.items()}
    numeric = inputs["train"].shape[1] - sum(f["kind"] == "categorical" for f in processor.features)
    categorical = list(range(numeric, inputs["train"].shape[1]))
    sparse = inputs
    if categorical:
        one_hot = OneHotEncoder(handle_unknown="ignore").fit(inputs["train"][:, categorical])
        sparse = {k: _beside(columns[:, :numeric], one_hot, columns[:, categorical]) for k, columns in inputs.items()}

    model_scores = {name: _model_scores(folder, splits.test) for name, folder in folders.items()}
    result: dict[str, Any] = {
        "bench": "trees",
        "command": command(options),
        "data": splits.info,
        "models": {name: file_sha256(folder / WEIGHTS) for name, folder in folders.items()},
        "tasks": {},
        "scores": {},
    }
    for task in binary:
        labels = {name: batch["labels"][task].numpy() for name, batch in encoded.items()}
        scores: dict[str, np.ndarray] = {}
        seconds: dict[str, float] = {}

        start = time.perf_counter()
        fits = [
            LogisticRegression(C=penalty, max_iter=2000).fit(sparse["train"], labels["train"]) for penalty in PENALTIES
        ]
        best = max(fits, key=lambda f: roc_auc_score(labels["validation"], f.decision_function(sparse["validation"])))
        scores["logistic regression"] = best.decision_function(sparse["test"])[None]
        seconds["logistic regression"] = (time.perf_counter() - start) / len(PENALTIES)
        progress(f"{task}: logistic regression, C {best.C:g}")

        def boost(
            seed: int, leaves: int, rate: float, labels: dict[str, np.ndarray] = labels
        ) -> tuple[float, "lgb.Booster"]:
            train = lgb.Dataset(inputs["train"], labels["train"], categorical_feature=categorical)
            settings = {"objective": "binary", "metric": "auc", "num_leaves": leaves, "learning_rate": rate}
            settings |= {"seed": seed, "verbose": -1, "num_threads": options.threads, "deterministic": True}
            settings |= {"bagging_fraction": 0.8, "bagging_freq": 1, "feature_fraction": 0.8}
            held = lgb.Dataset(inputs["validation"], labels["validation"], reference=train)
            stop = lgb.early_stopping(PATIENCE, verbose=False)
            booster = lgb.train(settings, train, ROUNDS, valid_sets=[held], callbacks=[stop])
            return booster.best_score["valid_0"]["auc"], booster

        tried = {(leaves, rate): boost(options.seeds[0], leaves, rate)[0] for leaves in LEAVES for rate in RATES}
        leaves, rate = max(tried, key=tried.__getitem__)
        start = time.perf_counter()
        boosters = [boost(seed, leaves, rate)[1] for seed in options.seeds]
        seconds["LightGBM"] = (time.perf_counter() - start) / len(boosters)
        scores["LightGBM"] = np.stack([booster.predict(inputs["test"]) for booster in boosters])
        progress(f"{task}: LightGBM, {leaves} leaves, learning rate {rate:g}")

        judged = {name: found[task][None] for name, found in model_scores.items() if task in found}
        result["tasks"][task], result["scores"][task] = _measured(labels["test"], scores, judged, seconds)
    write(result, options.output)
    return result


def main(options: Options) -> dict[str, Any]:
    """`run`, with steps on standard error and the table on standard output."""
    result = run(options, to_stderr)
    print(table(result))
    return result


def command(options: Options) -> str:
    """The command line of these options; of a path the file's name only."""
    given: dict[str, Any] = {"path": options.path and Path(options.path).name}
    given |= {"model": " ".join(Path(model).name for model in options.model)}
    for name in ("data", "seeds", "threads"):
        value = getattr(options, name)
        if value != getattr(Options(), name):
            given[name] = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return " ".join(["moe-mtl bench trees", *[f"--{name} {value}" for name, value in given.items() if value]])


def table(result: dict[str, Any]) -> str:
    """Each tool and model by task, with each model's difference to the tool, 95 % interval."""
    models = list(result["models"])
    rows = []
    for task, tools in result["tasks"].items():
        for tool, row in tools.items():
            spread = "" if row["std"] is None else f"{row['std']:.5f}"
            gaps = [row["differences"].get(name) for name in models]
            told = ["" if g is None else f"{g['mean']:+.5f} ({g['ci_low']:+.5f} to {g['ci_high']:+.5f})" for g in gaps]
            rows.append([task, tool, f"{row['auc']:.5f}", spread, f"{row['seconds']:.1f}", *told])
        for name, auc in result["scores"][task].items():
            rows.append([task, name, f"{auc:.5f}", "", "", *[""] * len(models)])
    header = ["task", "tool", "test AUC", "sd over seeds", "s per fit", *[f"{name} minus it" for name in models]]
    return "\n".join(aligned(header, rows))


def _measured(
    labels: np.ndarray, scores: dict[str, np.ndarray], judged: dict[str, np.ndarray], seconds: dict[str, float]
) -> tuple[dict[str, Any], dict[str, float]]:
    """The tools' rows of one task, and the models' AUCs."""
    ones = np.ones(len(labels))
    models = {name: auc_statistic(labels, found) for name, found in judged.items()}
    tools: dict[str, Any] = {}
    for tool, found in scores.items():
        statistic = auc_statistic(labels, found)
        values = statistic(ones)
        tools[tool] = {
            "auc": float(values.mean()),
            "std": float(values.std(ddof=1)) if len(values) > 1 else None,
            "seconds": seconds[tool],
            "differences": {
                name: asdict(paired_bootstrap(model, statistic, len(labels))) for name, model in models.items()
            },
        }
    return tools, {name: float(model(ones)[0]) for name, model in models.items()}


def _model_scores(folder: Path, rows: Any) -> dict[str, np.ndarray]:
    """Logit of each binary task for each row, from the saved model and its own processor."""
    import torch

    processor = TabularProcessor.from_pretrained(folder)
    model = AutoModelForMultiTask.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(**processor(rows, labels=False)).logits
    return {t.name: logits[t.name].squeeze(1).numpy() for t in model.config.parsed_tasks if t.kind == "binary"}


def _columns(batch: dict[str, Any]) -> np.ndarray:
    kinds = [batch[kind].numpy().astype(np.float64) for kind in ("numeric", "categorical") if kind in batch]
    return np.concatenate(kinds, axis=1)


def _beside(numeric: np.ndarray, encoder: Any, categories: np.ndarray) -> Any:
    from scipy.sparse import csr_matrix, hstack

    return hstack([csr_matrix(numeric), encoder.transform(categories)]).tocsr()
