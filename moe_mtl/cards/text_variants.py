"""What the card of a language model or an adapter compares: the same functions as `variants` has for tables.

An adapter is held to PEFT's LoRA three times, each with a learning rate of its own: with as many trained parameters
(`lora`); with fewer ranks, of the order of what a token meets, which differs from method to method and stands in the
table (`lora-active`); and one LoRA per task that shares the budget of steps (`lora-each`).
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub import ADAPTER, ADAPTER_WEIGHTS, CONFIG, WEIGHTS
from ..training.recipe import Recipe, RecipeError, load_recipe
from .bootstrap import Statistic, mean_statistic
from .variants import Trained, Variant, canonical

if TYPE_CHECKING:
    import numpy as np

    from ..data import TextSplits

SHARED, ACTIVE, EACH = "lora", "lora-active", "lora-each"
PRIMARY = "exact_match"
CLOSE = 0.1  # by what share the numbers of trained parameters may differ and still be called equal


@dataclasses.dataclass(frozen=True)
class TextTask:
    """A task of text, as a card names it."""

    name: str


def files(folder: Path) -> tuple[str, ...]:
    """What a card ships."""
    model = (CONFIG, WEIGHTS, "generation_config.json")
    return (*((ADAPTER, ADAPTER_WEIGHTS) if (folder / ADAPTER).is_file() else model), "tokenizer_config.json")


def measured_tasks(recipe: Recipe, splits: "TextSplits") -> list[TextTask]:
    """The tasks a recipe trains."""
    return [TextTask(task) for task in recipe.model.tasks or splits.tasks]


def alone(tasks: list[TextTask]) -> list[str]:
    """Tasks that get an adapter of their own."""
    return [task.name for task in tasks]


def variants(recipe: str | Path, baseline: str | Path | None, data_path: str | None, tasks: list[str]) -> list[Variant]:
    """A card's model and, of an adapter, the three LoRAs beside it, from the recipes of these names in its folder.

    Raises:
        RecipeError: a baseline with other data, another base model or another budget.
    """
    if baseline is not None:
        raise RecipeError(f"{recipe}: expected no --baseline, as text is compared with {SHARED}, {ACTIVE} and {EACH}")
    overrides = [] if data_path is None else [("data.path", data_path)]
    own, name = load_recipe(recipe, overrides), canonical(recipe)
    if own.model.adapter is None:
        return [Variant(str(own.model.type), "this", name, own, {"all": own})]
    found = [Variant(own.model.adapter.method.lower(), "this", name, own, {"all": own})]
    for stem in (SHARED, ACTIVE, EACH):
        beside = f"{name.rpartition('/')[0]}/{stem}"
        other = load_recipe(beside, overrides)
        if other.data != own.data or other.model.source != own.model.source:
            raise RecipeError(f"{beside}: expected the data and the base model of {recipe}")
        steps = own.train.max_steps if stem != EACH else -(-(own.train.max_steps or 0) // len(tasks))
        for key, expected in {
            "max_steps": steps,
            "batch_size": own.train.batch_size,
            "epochs": own.train.epochs,
        }.items():
            if getattr(other.train, key) != expected:
                raise RecipeError(
                    f"{beside}: expected the train.{key} {expected}, so that both have the same budget, "
                    f"found {getattr(other.train, key)}"
                )
        parts = {"all": other}
        if stem == EACH:
            parts = {t: dataclasses.replace(other, model=dataclasses.replace(other.model, tasks=[t])) for t in tasks}
        found.append(Variant(stem, "baseline", beside, other, parts))
    return found


def cost_of(trained: Trained) -> dict[str, int]:
    """Of all adapters that it takes to answer every task: trained parameters, and multiply-adds of one token."""
    costs = [_cost(folder) for folder in trained.folders.values()]
    # A token is of one task: of several adapters it meets one.
    return {"parameters": sum(one[0] for one in costs), "multiply_adds": max(one[1] for one in costs)}


def task_costs(folder: Path, tasks: list[TextTask]) -> dict[str, dict[str, int]]:
    """Of the plain LoRA that answers a task alone; of an adapter that cannot be taken apart, and of a model, of all."""
    from ..training.text_run import load_text
    from ..tuners import extract_task

    model, _, told = load_text(folder)
    whole = _cost(folder)
    found = {}
    for task in tasks:
        parameters, active = whole
        if (folder / ADAPTER).is_file():
            try:
                lora = extract_task(model, task.name if told else None)
            except NotImplementedError:
                pass
            else:
                parameters = sum(p.numel() for name, p in lora.named_parameters() if "lora_" in name)
                active = parameters
        found[task.name] = {"parameters": parameters, "multiply_adds": active}
    return found


def _cost(folder: Path) -> tuple[int, int]:
    """Trained parameters, and those that one token of one task is multiplied with."""
    from ..training.text_run import load_text
    from ..tuners import RankTuner, count

    model, _, _ = load_text(folder)
    if not (folder / ADAPTER).is_file():
        table = model.get_input_embeddings().weight.numel()
        tied = model.config.tie_word_embeddings  # then the table is multiplied with too, as the head
        return model.num_parameters(), model.num_parameters() - (0 if tied else table)
    if isinstance(model.base_model, RankTuner):
        found = count(model)
        return found.trained, found.active
    number = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return number, number


Answers = dict[str, "np.ndarray"]


def answer(trained: Trained, rows: Any, batch_size: int) -> Answers:
    """Whether each example of a task is answered right, by task."""
    from ..data.text import encode
    from ..training.text_run import load_text
    from ..training.text_trainer import evaluate_text, pad_token

    found: Answers = {}
    for label, folder in trained.folders.items():
        model, tokenizer, told = load_text(folder)
        names = list(dict.fromkeys(example.task for example in rows)) if label == "all" else [label]
        examples = [example for example in rows if example.task in names]
        table = encode(examples, tokenizer, told or names)
        exact = evaluate_text(model, table, batch_size, pad_token(tokenizer)).exact.numpy()
        for number, task in enumerate(table.tasks):
            found[task] = exact[table.task.numpy() == number]
    return found


def statistics(task: TextTask, answers: list[Answers]) -> tuple[Statistic, int] | None:
    """Exact match of a task as a function of row counts, one value per seed, and how many rows count."""
    import numpy as np

    values_SB = np.stack([one[task.name] for one in answers]).astype(np.float64)
    return mean_statistic(values_SB), values_SB.shape[1]


def close(own: dict[str, Any], shared: dict[str, Any]) -> None:
    """Raises RecipeError unless two rows train about as many parameters."""
    if abs(own["parameters"] - shared["parameters"]) > CLOSE * own["parameters"]:
        raise RecipeError(
            f"{shared['recipe']}: expected about as many trained parameters as {own['recipe']}, "
            f"{own['parameters']:,}, found {shared['parameters']:,}"
        )
