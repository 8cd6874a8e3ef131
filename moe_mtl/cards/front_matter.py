"""The metadata at the head of a card, which the Hub reads."""

from collections.abc import Mapping
from typing import Any

from .record import DIGITS, family, this_row

WEIGHTS_LICENCE = "apache-2.0"
HUB_METRICS = {"auc": "roc_auc"}  # names of the Hub where they differ from ours
TEXT = "text-generation"


def front_matter(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The metadata that the Hub reads, YAML: the shipped weights' own test results, not the mean over the seeds."""
    from huggingface_hub import EvalResult, ModelCardData

    kinds = {task["name"]: task["kind"] for task in config.get("tasks", [])}
    text = family(record) in ("language model", "adapter")
    hub_task = _hub_task_of_images if family(record) == "vision model" else _hub_task
    tags = ["mixture-of-experts", "multi-task-learning", record["model_type"]]
    if text:
        tags = ["lora", "peft", *tags] if family(record) == "adapter" else tags[1:]
    shipped = record["seeds"].index(record["shipped_seed"])
    data = record["data"]["name"]
    evaluations = [
        EvalResult(
            task_type=TEXT if text else hub_task(kinds[task]),
            dataset_type=data,
            dataset_name=data,
            dataset_split="test",
            metric_type=HUB_METRICS.get(metric, metric),
            metric_name=f"{task} {metric}",
            metric_value=round(entry["values"][shipped], DIGITS),
        )
        for task, metrics in this_row(record)["metrics"].items()
        for metric, entry in metrics.items()
    ]
    card = ModelCardData(
        model_name=record["name"],
        license=WEIGHTS_LICENCE,
        library_name="moe_mtl",
        pipeline_tag=TEXT if text else hub_task(next(iter(kinds.values()))),
        tags=tags,
        eval_results=evaluations,
    )
    return card.to_yaml(line_break="\n") + "\n"


def _hub_task(kind: str) -> str:
    return "tabular-regression" if kind == "regression" else "tabular-classification"


def _hub_task_of_images(kind: str) -> str:
    of_maps = {"segmentation": "image-segmentation", "saliency": "image-segmentation", "depth": "depth-estimation"}
    return of_maps.get(kind, "image-to-image" if kind in ("edges", "normals") else "image-classification")
