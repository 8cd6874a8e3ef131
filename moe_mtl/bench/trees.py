"""Models without experts on the same split: LightGBM and logistic regression, one per binary task.

What a table needs is often a gradient-boosted tree. This measures the strongest simple tools on the rows, columns and
split of a data set here, chooses by validation rows alone, and compares a model of the zoo with them on the same test
rows (paired bootstrap).

moe-mtl bench trees --path census-income.test.gz --model mmoe-census-income-half
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cards.bootstrap import auc_statistic, paired_bootstrap
from ..data import load
from ..data.processor import TabularProcessor
from ..files import write_atomically
from ..models import AutoModelForMultiTask
from .report import aligned

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
        model: zoo name or folder to compare with; none by default.
        seeds: of LightGBM, averaged.
        threads: of LightGBM.
        output: folder for trees.json.
    """

    data: str = "census-income"
    path: str | None = None
    model: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 2
    output: str | None = None


def run(options: Options, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Test AUC of each tool and task; with a model, its AUC and the paired differences.

    Raises:
        ModuleNotFoundError: LightGBM is not installed.
        ValueError: the data set has no binary task.
    """
    import lightgbm as lgb
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import OneHotEncoder

    splits = load(options.data, **({} if options.path is None else {"path": options.path}))
    processor = splits.fit_processor()
    encoded = {name: processor(part) for name, part in splits.parts().items()}
    inputs = {name: _columns(batch) for name, batch in encoded.items()}
    numeric = inputs["train"].shape[1] - sum(f["kind"] == "categorical" for f in processor.features)
    categorical = list(range(numeric, inputs["train"].shape[1]))
    one_hot = OneHotEncoder(handle_unknown="ignore").fit(inputs["train"][:, categorical])
    sparse = {name: _beside(columns[:, :numeric], one_hot, columns[:, categorical]) for name, columns in inputs.items()}

    model_scores = _model_scores(options, splits.test) if options.model is not None else {}
    result: dict[str, Any] = {"options": asdict(options), "data": splits.info, "tasks": {}}
    for task in (task["name"] for task in processor.tasks if task["kind"] == "binary"):
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

        if task in model_scores:
            scores[str(options.model)] = model_scores[task][None]
        result["tasks"][task] = _measured(labels["test"], scores, seconds, options.model)
    if options.output is not None:
        write_atomically(Path(options.output, "trees.json"), json.dumps(result, indent=2) + "\n")
    return result


def main(options: Options) -> dict[str, Any]:
    """`run`, and the table on standard output."""
    result = run(options)
    header = ["task", "tool", "test AUC", "sd over seeds", "s per fit", f"{options.model} minus it, 95 % interval"]
    rows = []
    for task, measured in result["tasks"].items():
        for tool, row in measured.items():
            spread = "" if row["std"] is None else f"{row['std']:.5f}"
            fit = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
            gap = row["difference"]
            told = "" if gap is None else f"{gap['mean']:+.5f} ({gap['ci_low']:+.5f} to {gap['ci_high']:+.5f})"
            rows.append([task, tool, f"{row['auc']:.5f}", spread, fit, told])
    print("\n".join(aligned(header, rows)))
    return result


def _measured(
    labels: np.ndarray, scores: dict[str, np.ndarray], seconds: dict[str, float], model: str | None
) -> dict[str, Any]:
    statistics = {tool: auc_statistic(labels, found) for tool, found in scores.items()}
    rows: dict[str, Any] = {}
    for tool, statistic in statistics.items():
        values = statistic(np.ones(len(labels)))
        gap = None
        if model in statistics and tool != model:
            gap = asdict(paired_bootstrap(statistics[model], statistic, len(labels)))
        rows[tool] = {
            "auc": float(values.mean()),
            "std": float(values.std(ddof=1)) if len(values) > 1 else None,
            "seconds": seconds.get(tool),
            "difference": gap,
        }
    return rows


def _model_scores(options: Options, rows: Any) -> dict[str, np.ndarray]:
    """Probability of each binary task for each row, from the saved model and its own processor."""
    processor = TabularProcessor.from_pretrained(str(options.model))
    model = AutoModelForMultiTask.from_pretrained(str(options.model))
    import torch

    with torch.inference_mode():
        logits = model(**processor(rows, labels=False)).logits
    return {task.name: task.predict(logits[task.name]).numpy() for task in model.config.parsed_tasks}


def _columns(batch: dict[str, Any]) -> np.ndarray:
    kinds = [batch[kind].numpy().astype(np.float64) for kind in ("numeric", "categorical") if kind in batch]
    return np.concatenate(kinds, axis=1)


def _beside(numeric: np.ndarray, encoder: Any, categories: np.ndarray) -> Any:
    from scipy.sparse import csr_matrix, hstack

    return hstack([csr_matrix(numeric), encoder.transform(categories)]).tocsr()
