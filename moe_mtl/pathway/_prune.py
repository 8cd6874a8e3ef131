"""Leaves out the experts that a task seldom chooses, and says what that changes.

Shapes: `N` tokens, `E` experts, `K` experts chosen per token.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..models import MultiTaskModel
from ..models._vision import block_of

RULES = ("keep_mass", "mod_squad")


@dataclass(frozen=True)
class PruneReport:
    """What `prune` left out, and what that changes on the data it was measured on.

    Attributes:
        tasks: those of the pruned model.
        rule: with its threshold, as text.
        rows: of data.
        kept: layer -> numbers of the experts that are kept.
        stored: layer -> how many there were before.
        choices_lost: layer -> task -> share of its choices that fell on experts which are left out.
        parameters: before and after, the other tasks' being gone in both.
        difference: task -> largest and mean absolute difference of the logits.
        loss: task -> mean over the batches with labels of it of the task's loss, before and after.
    """

    tasks: tuple[str, ...]
    rule: str
    rows: int
    kept: dict[str, list[int]]
    stored: dict[str, int]
    choices_lost: dict[str, dict[str, float]]
    parameters: tuple[int, int]
    difference: dict[str, tuple[float, float]]
    loss: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return json.loads(json.dumps(asdict(self)))


def prune(
    model: MultiTaskModel,
    task: str | Sequence[str],
    data: Dataset | Iterable[Mapping[str, Any]],
    *,
    rule: str = "keep_mass",
    keep: float = 0.99,
    theta: float = 3.0,
    batch_size: int = 32,
) -> tuple[MultiTaskModel, PruneReport]:
    """Extracts a task, and leaves out the experts that it seldom chooses on calibration data.

    Rules, each applied to every layer and task; with several tasks an expert stays that one of them keeps. Never fewer
    than `K` stay, the most chosen.

    - `keep_mass`: the fewest experts that together have the share `keep` of the choices. With `keep=1.0` those go that
      were never chosen, and on that data nothing changes.
    - `mod_squad`: experts with more than `theta / K` percent of the choices, which is more than `theta` percent of the
      tokens (Chen et al., "Mod-Squad", CVPR 2023, section 3.4).

    Args:
        model: with layers of sparse experts; left as it is.
        task: a name, or names.
        data: batches, mappings with `pixel_values`, and `labels` or not; or a data set whose slices are such batches.
            It is gone through twice, without augmentation.
        rule, keep, theta: see above.
        batch_size: of slices of a data set.

    Returns:
        the model, on the device of `model`, which saves, loads, extracts and prunes like any other; and the report.

    Raises:
        UnknownTaskError: a task that the model does not have.
        ValueError: an unknown rule, a threshold out of range, a model without sparse experts, no data.

    Differs from the official code in: usage is counted over the data given, not a running mean over training; the
    softmax still goes over all experts, where the code's goes over those that are left, which changes every weight.
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, found {rule!r}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a share in (0, 1], found {keep!r}")
    if not 0 <= theta <= 100:
        raise ValueError(f"theta: expected a percentage, found {theta!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    if not isinstance(data, Dataset) and iter(data) is data:
        data = list(data)  # it would be empty the second time
    whole = model.extract_task(task)
    if not hasattr(whole.config, "expert_blocks"):
        raise ValueError(
            f"expected a model whose blocks choose experts that are stacked (m3vit, mod_squad), found a "
            f"{whole.config.model_type}"
        )
    counts, selected = _usage(whole, data, batch_size)
    chosen: dict[str, list[int]] = {}
    for layer, by_task in counts.items():
        if rule == "keep_mass":
            keeps = [keep_mass(counts_E, selected[layer], keep) for counts_E in by_task.values()]
        else:
            keeps = [mod_squad(counts_E, selected[layer], theta) for counts_E in by_task.values()]
        chosen[layer] = sorted(set().union(*keeps))
    config: Any = copy.deepcopy(whole.config)
    before = config.experts_kept or {}
    stored = {layer: len(before.get(block_of(layer), of[whole.tasks[0]])) for layer, of in counts.items()}
    config.experts_kept = before | {block_of(layer): experts for layer, experts in chosen.items()}
    config.validate()
    small = whole.reduced(config)
    rows, difference, loss = _compared(whole, small, data, batch_size)
    return small, PruneReport(
        tasks=tuple(whole.tasks),
        rule=f"keep_mass keep={keep:g}" if rule == "keep_mass" else f"mod_squad theta={theta:g}",
        rows=rows,
        kept=chosen,
        stored=stored,
        choices_lost={
            layer: {name: 1 - int(c_E[chosen[layer]].sum()) / int(c_E.sum()) for name, c_E in by_task.items()}
            for layer, by_task in counts.items()
        },
        parameters=(whole.num_parameters(), small.num_parameters()),
        difference=difference,
        loss=loss,
    )


def keep_mass(counts_E: Tensor, num_selected: int, keep: float) -> list[int]:
    """The fewest experts with the share `keep` of the choices, at least `K`; of equals the lower number."""
    order_E = counts_E.sort(descending=True, stable=True).indices
    shares_E = counts_E[order_E].cumsum(0).double() / counts_E.sum()
    number = max(int((shares_E < keep).sum()) + 1, num_selected)
    return order_E[:number].tolist()


def mod_squad(counts_E: Tensor, num_selected: int, theta: float) -> list[int]:
    """The experts with more than `theta / K` percent of the choices, at least the `K` most chosen."""
    percent_E = 100 * counts_E.double() / counts_E.sum()
    number = max(int((percent_E > theta / num_selected).sum()), num_selected)
    return counts_E.sort(descending=True, stable=True).indices[:number].tolist()


def _batches(
    model: MultiTaskModel, data: Dataset | Iterable[Mapping[str, Any]], batch_size: int
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Inputs and labels of the model's tasks, on its device."""
    if isinstance(data, Dataset):
        table: Any = data
        data = (table[start : start + batch_size] for start in range(0, len(table), batch_size))
    for batch in data:
        if not isinstance(batch, Mapping) or model.main_input_name not in batch:
            found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"data: expected mappings with {model.main_input_name!r}, found {found}")
        inputs = {model.main_input_name: batch[model.main_input_name].to(model.device)}
        labels = {task: value.to(model.device) for task, value in (batch.get("labels") or {}).items()}
        yield inputs, {task: labels[task] for task in model.tasks if task in labels}


@torch.no_grad()
def _usage(model: MultiTaskModel, data: Any, batch_size: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
    """Layer -> task -> how often each expert was chosen, `[E]`; and layer -> `K`."""
    counts: dict[str, dict[str, Tensor]] = {}
    selected: dict[str, int] = {}
    rows = 0
    for inputs, _ in _batches(model, data, batch_size):
        rows += len(inputs[model.main_input_name])
        for record in model(**inputs, output_routing=True, return_dict=True).routing:
            for task, indices_NK in record.indices.items():
                counts_E = torch.bincount(indices_NK.flatten(), minlength=len(record.experts[task])).cpu()
                by_task = counts.setdefault(record.layer, {})
                by_task[task] = by_task[task] + counts_E if task in by_task else counts_E
                selected[record.layer] = indices_NK.shape[1]
    if not rows:
        raise ValueError("data: expected at least one row, found none")
    if not counts:
        raise ValueError(f"expected a model with layers of sparse experts, found {type(model).__name__} without")
    return counts, selected


@torch.no_grad()
def _compared(
    whole: MultiTaskModel, small: MultiTaskModel, data: Any, batch_size: int
) -> tuple[int, dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """Rows; task -> largest and mean difference of logits; task -> losses of both."""
    rows, labelled = 0, {task.name: task for task in whole.config.parsed_tasks}
    largest, total, number = (dict.fromkeys(whole.tasks, 0.0) for _ in range(3))
    losses: dict[str, list[tuple[float, float]]] = {}
    for inputs, labels in _batches(whole, data, batch_size):
        rows += len(inputs[whole.main_input_name])
        outs = [model(**inputs, labels=labels or None, return_dict=True) for model in (whole, small)]
        for task in whole.tasks:
            apart = (outs[0].logits[task] - outs[1].logits[task]).abs().double()
            largest[task] = max(largest[task], float(apart.max()))
            total[task] += float(apart.sum())
            number[task] += apart.numel()
        for task in labels:
            if not bool(labelled[task].labelled(labels[task]).any()):
                continue
            losses.setdefault(task, []).append((float(outs[0].task_losses[task]), float(outs[1].task_losses[task])))
    difference = {task: (largest[task], total[task] / number[task]) for task in whole.tasks}
    means = {task: [sum(values) / len(pairs) for values in zip(*pairs, strict=True)] for task, pairs in losses.items()}
    return rows, difference, {task: (mean[0], mean[1]) for task, mean in means.items()}
