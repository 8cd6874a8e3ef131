"""The page of a card: prose by hand, numbers from the record.

Only the front matter and the block between the markers are generated.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..hub import ADAPTER, read_config, zoo, zoo_folder
from . import curves as curve_pictures
from . import routing as routing_pictures
from .curves import CURVES, means
from .front_matter import front_matter
from .record import DIGITS, LOWER_IS_BETTER, SAME_DIGITS, family, load_record, measure, this_row, tolerance
from .routing import ROUTING

PAGE = "README.md"
RESULTS = ("<!-- results:begin -->", "<!-- results:end -->")
PROMPT = "<!-- write:"  # where the template wants prose
ZOO = ("<!-- zoo:begin -->", "<!-- zoo:end -->")
MANY = 4  # tasks whose metrics the table of the zoo tells one by one
# Of a recipe: what says which model or tasks, or changes no number.
NO_SETTINGS = ("type", "from", "tasks", "add_tasks", "drop_tasks", "seed", "report_to", "logging_steps", "save_steps")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_ROLES = {
    "single_task": "single-task (one model per task)",
    "shared_bottom": "shared-bottom",
    "multi_task_vit": "dense multi-task ViT",
}
# Of a family: what the columns of parameters and of multiply-adds count, and how one task is had alone.
_COUNTED = {
    "table": ("parameters", "multiply-adds per row", "`from_pretrained(..., tasks=[task])`"),
    "language model": ("parameters", "multiply-adds per token", "the same model"),
    "adapter": ("trained parameters", "of them met by a token", "`extract_task(model, task)`"),
    "vision model": ("parameters", "multiply-adds per image", "`from_pretrained(..., tasks=[task])`"),
}
_TEMPLATES = {
    "table": "TEMPLATE.md",
    "language model": "TEMPLATE-model.md",
    "adapter": "TEMPLATE-adapter.md",
    "vision model": "TEMPLATE-vision.md",
}


def build_card(folder: str | Path) -> Path:
    """Writes `README.md` of a card's folder anew from its record and config; the prose around the block stays.

    A folder without a page gets the prose of `model_cards/TEMPLATE.md`.

    Raises:
        ValueError: the record or the config is wrong, or the page has no block to fill.
    """
    folder = Path(folder)
    page, record = folder / PAGE, load_record(folder)
    for name, drawing in pictures(record).items():
        write_atomically(folder / name, drawing)
    write_atomically(page, render(folder, prose_of(folder, record)))
    return page


def pictures(record: Mapping[str, Any]) -> dict[str, str]:
    """The pictures of a card, by file name: they follow from the record."""
    drawn = {CURVES: curve_pictures.draw(record), ROUTING: routing_pictures.draw(record)}
    return {name: content for name, content in drawn.items() if content is not None}


def prose_of(folder: Path, record: Mapping[str, Any]) -> str:
    """The page as it stands, else the template with the names filled in."""
    if (folder / PAGE).exists():
        return (folder / PAGE).read_text(encoding="utf-8")
    template = (zoo_folder() / _TEMPLATES[family(record)]).read_text(encoding="utf-8")
    return template.replace("{name}", record["name"]).replace("{task}", next(iter(this_row(record)["metrics"])))


def render(folder: Path, page: str) -> str:
    """`page` with front matter and results as the record of `folder` has them."""
    record = load_record(folder)
    config = {} if (folder / ADAPTER).is_file() else read_config(folder)
    prose = _FRONT_MATTER.sub("", page)
    return f"---\n{front_matter(record, config)}---\n{replace_block(prose, RESULTS, results(record))}"


def replace_block(page: str, markers: tuple[str, str], content: str) -> str:
    """`page` with `content` between its two markers.

    Raises:
        ValueError: not exactly one pair of markers, in order.
    """
    begin, end = markers
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"expected one block from {begin} to {end}, found {page.count(begin)} and {page.count(end)}")
    return page[: page.index(begin)] + f"{begin}\n{content}\n{end}" + page[page.index(end) + len(end) :]


def results(record: Mapping[str, Any]) -> str:
    """The generated block: every table of a card and how to make it again."""
    parts = [_metrics_table(record)]
    if len(record["rows"]) > 1:
        parts += [_settings(record), _comparison(record), _cost_table(record)]
    if family(record) == "vision model":
        parts.insert(1, _delta(record))
    if record.get("curves"):
        parts.append(_curves(record))
    if record.get("routing"):
        parts.append(_routing(record))
    if record.get("external"):
        parts.append(_external(record))
    return "\n\n".join([*parts, _provenance(record)])


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns after the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _role(record: Mapping[str, Any], model: str) -> str:
    """What a row is called; a LoRA by its rank."""
    from ..training.recipe import load_recipe

    row = next(row for row in record["rows"] if row["model"] == model)
    if family(record) != "adapter" or row["role"] == "this":
        return _ROLES.get(model, model)
    adapter = load_recipe(row["recipe"]).model.adapter
    each = "a LoRA per task" if model == "lora-each" else "LoRA"
    return f"{each}, rank {adapter.config['r'] if adapter else '?'}"


def _metrics_table(record: Mapping[str, Any]) -> str:
    own = this_row(record)
    columns = [(task, metric) for task, metrics in own["metrics"].items() for metric in metrics]
    rows = []
    for row in record["rows"]:
        name = _role(record, row["model"])
        cells = [_spread(row["metrics"][task][metric]) for task, metric in columns]
        name = f"**{name}**" if row["role"] == "this" else name
        rows.append([name, f"{row['parameters']:,}", f"{row['multiply_adds']:,}", *cells])
    shipped = record["seeds"].index(record["shipped_seed"])
    cells = [_number(own["metrics"][task][metric]["values"][shipped]) for task, metric in columns]
    rows.append([f"these weights (seed {record['shipped_seed']})", "", "", *cells])
    header = ["model", *_COUNTED[family(record)][:2], *[f"{task} {_named(metric)}" for task, metric in columns]]
    seeds = f"Test rows; mean ± standard deviation over {len(record['seeds'])} seeds."
    return f"{seeds} ↓: lower is better.\n\n{table(header, rows)}"


def _settings(record: Mapping[str, Any]) -> str:
    """In which settings the recipes of model and baselines differ: such a difference is no merit of the model."""
    own = _settings_of(record["recipe"])
    told = []
    for name in dict.fromkeys(row["recipe"] for row in record["rows"] if row["role"] != "this"):
        theirs = _settings_of(name)
        differing = [key for key in own if key in theirs and own[key] != theirs[key]]
        differences = [f"{key} {_value(own[key])} here, {_value(theirs[key])} there" for key in differing]
        if differences:
            sentences = [f"The baselines follow `{name}`, whose settings differ: {'; '.join(differences)}."]
        else:
            sentences = [f"The baselines follow `{name}`; settings that both recipes have are the same."]
        for where, some, others in (("here", own, theirs), ("there", theirs, own)):
            if only := [f"{key} {_value(value)}" for key, value in some.items() if key not in others]:
                sentences.append(f"Only {where}: {', '.join(only)}.")
        told.append(" ".join(sentences))
    return "\n\n".join(told)


def _settings_of(recipe: str) -> dict[str, Any]:
    """What a recipe sets of model and training, defaults of training included."""
    from ..training.recipe import load_recipe

    content = load_recipe(recipe).to_dict()
    return {k: v for part in ("model", "train") for k, v in content[part].items() if k not in NO_SETTINGS}


def _value(value: Any) -> str:
    return "none" if value is None else json.dumps(value)


def _comparison(record: Mapping[str, Any]) -> str:
    rows = []
    for entry in record["comparison"]:
        interval = f"{_signed(entry['ci_low'])} to {_signed(entry['ci_high'])}"
        baseline = _role(record, entry["baseline"])
        what = f"{entry['task']} {_named(entry['metric'])}"
        rows.append([f"{baseline}, {what}", _signed(entry["mean"]), interval, verdict(entry)])
    bootstrap = record["bootstrap"]
    groups = bootstrap.get("groups")
    drawn = "the rows" if groups is None else f"the {groups} photographs that the rows were cut from"
    text = (
        "Difference to each baseline on the same test rows: paired bootstrap, "
        f"{bootstrap['resamples']:,} resamples of {drawn}, seeds averaged, {bootstrap['confidence']:.0%} interval."
    )
    told = "\n".join(f"- {line}" for line in _verdicts(record))
    return f"{text}\n\n{table(['baseline', 'difference', 'interval', 'verdict'], rows)}\n\n{told}"


def _verdicts(record: Mapping[str, Any]) -> list[str]:
    """Per baseline a sentence, what is lost first."""
    found: dict[str, dict[str, list[str]]] = {}
    for entry in record["comparison"]:
        found.setdefault(entry["baseline"], {}).setdefault(verdict(entry), []).append(entry["task"])
    kinds = {"worse": "worse on", "no difference shown": "not shown to differ on", "better": "better on"}
    lines = []
    for baseline, by_kind in found.items():
        told = "; ".join(f"{words} {', '.join(by_kind[kind])}" for kind, words in kinds.items() if kind in by_kind)
        lines.append(f"Against {_role(record, baseline)}: {told}.")
    return lines


def verdict(entry: Mapping[str, Any]) -> str:
    """Whether a difference is more than chance: the interval excludes 0."""
    low, high = entry["ci_low"], entry["ci_high"]
    if low <= 0 <= high:
        return "no difference shown"
    return "better" if (low > 0) != (entry["metric"] in LOWER_IS_BETTER) else "worse"


def _cost_table(record: Mapping[str, Any]) -> str:
    own = this_row(record)
    parameters, multiplied, how = _COUNTED[family(record)]
    costs = record["single_task_cost"]
    if family(record) == "adapter":
        found = {cost["parameters"] for cost in costs.values()}
        if found == {own["parameters"]} and all(c["multiply_adds"] == own["multiply_adds"] for c in costs.values()):
            return "One task alone takes all of the adapter."
        told = " or ".join(f"{number:,}" for number in sorted(found))
        return f"One task alone, {how}, is a LoRA of {told} parameters; merged, it costs nothing."
    header = ["one task alone", parameters, "of all", multiplied, "of all"]
    named = all("experts" in cost for cost in costs.values())
    rows = []
    for task, cost in costs.items():
        cells = [task]
        if named:
            kept, number = cost["experts"]["kept"], cost["experts"]["of"]
            which = "" if len(kept) == number else f": {', '.join(map(str, kept))}"
            cells.append(f"{len(kept)} of {number}{which}")
        for key in ("parameters", "multiply_adds"):
            cells += [f"{cost[key]:,}", f"{cost[key] / own[key]:.0%}"]
        rows.append(cells)
    if named:
        header.insert(1, "experts kept")
    return f"What one task costs, {how}:\n\n{table(header, rows)}"


def _curves(record: Mapping[str, Any]) -> str:
    """Exact match over the steps, mean over the tasks and seeds."""
    curves = record["curves"]
    header = ["mean exact match after steps", *[f"{step:g}" for step in next(iter(curves.values()))["step"]]]
    rows = [[_role(record, model), *[_number(value) for value in means(curve)]] for model, curve in curves.items()]
    same = [row for row in rows if len(row) == len(header)]
    told = "On the validation rows, mean over the tasks and the seeds; the bands show the seeds."
    return f"{told}\n\n![exact match over the steps]({CURVES})\n\n{table(header, same)}"


def _delta(record: Mapping[str, Any]) -> str:
    """The mean relative gain over one model per task, each task by its first metric, seed by seed."""
    rows = {row["model"]: row for row in record["rows"]}
    alone, told = rows["single_task"], []
    for model, row in rows.items():
        if model == "single_task":
            continue
        gains = []
        for task, metrics in row["metrics"].items():
            metric, entry = next(iter(metrics.items()))
            sign, base = -1 if metric in LOWER_IS_BETTER else 1, alone["metrics"][task][metric]["mean"]
            if not base:
                return f"Δm is not defined: the single-task models' {task} {metric} is 0."
            gains.append([sign * (value - base) / base for value in entry["values"]])
        entry = measure([sum(of_seed) / len(gains) for of_seed in zip(*gains, strict=True)])
        told.append(f"{_role(record, model)} {entry['mean']:+.2%} ± {entry['std']:.2%}")
    return (
        f"Δm, the mean over the tasks of the relative gain of the first metric over the single-task models' mean: "
        f"{'; '.join(told)}."
    )


def _routing(record: Mapping[str, Any]) -> str:
    """How much a choice of expert tells of the task, and the pictures."""
    rows = []
    for layer, entry in record["routing"]["layers"].items():
        found = measure(entry["information"])
        rows.append([layer, f"{found['mean']:.4f} ± {found['std']:.4f}", f"{entry['at_random']:.4f}"])
    header = ["layer", "information, nats", "of a random router"]
    return (
        "Which task uses which expert, on the test pictures: the mutual information between task and chosen expert, "
        "mean ± standard deviation over the seeds, and of a router that chooses at random on as many tokens. The "
        f"picture is of the shipped weights.\n\n{table(header, rows)}\n\n![experts by task, and where]({ROUTING})"
    )


def _external(record: Mapping[str, Any]) -> str:
    columns = list(
        dict.fromkeys((t, m) for peer in record["external"] for t, ms in peer["metrics"].items() for m in ms)
    )
    rows = []
    for peer in record["external"]:
        cells = [peer["metrics"].get(task, {}).get(metric) for task, metric in columns]
        rows.append([peer["model"], *["" if cell is None else _number(cell) for cell in cells], f"`{peer['source']}`"])
    header = ["other tools", *[f"{task} {_named(metric)}" for task, metric in columns], "measured by"]
    told = "\n".join(f"- {_who_is_ahead(record, task, metric)}" for task, metric in columns)
    return f"Other tools, measured by us on the same split:\n\n{table(header, rows)}\n\n{told}"


def _who_is_ahead(record: Mapping[str, Any], task: str, metric: str) -> str:
    """One sentence: the best of the other tools and the shipped weights; if not compared, and the seeds' mean."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    peers = [peer for peer in record["external"] if metric in peer["metrics"].get(task, {})]
    best = max(peers, key=lambda peer: sign * peer["metrics"][task][metric])
    gap = best.get("differences", {}).get(task, {}).get(metric)
    if gap is None:
        mean = this_row(record)["metrics"][task][metric]["mean"] - best["metrics"][task][metric]
        who, how = "the mean over the seeds", "not compared row by row"
    else:
        mean, who = gap["mean"], "these weights"
        word = verdict({"metric": metric, **gap})
        how = f"these weights minus it {_signed(gap['ci_low'])} to {_signed(gap['ci_high'])}"
        how += f", {word}" if word == "no difference shown" else ""
    if _number(abs(mean)) == _number(0):
        told = f"{best['model']}, and {who} are level"
    elif sign * mean < 0:
        told = f"{best['model']}, is ahead of {who} by {_number(abs(mean))}"
    else:
        told = f"{who} {'is' if gap is None else 'are'} ahead of {best['model']}, by {_number(abs(mean))}"
    return f"{task} {metric}: {told} ({how})."


def _provenance(record: Mapping[str, Any]) -> str:
    data = record["data"]
    split = ", ".join(f"{count:,} {name}" for name, count in data["rows"].items())
    source = f" Source: {data['source']}." if "source" in data else ""
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    allowed = ", ".join(
        f"{task} {metric} ±{tolerance(metric, entry):g}"
        for task, metrics in this_row(record)["metrics"].items()
        for metric, entry in metrics.items()
    )
    seeds = ", ".join(map(str, record["seeds"]))
    return f"""- Data: {data["name"]} ({data["licence"]}), {split} rows, sha256 `{data["sha256"]}`.{source}
- Recipe: `{record["recipe"]}`, sha256 `{record["recipe_sha256"]}`.
- Seeds: {seeds}; the shipped one is the best on validation.
- Made in {record["wall_s"]:,.0f} s on {record["hardware"]} with {packages}.
- Again: `moe-mtl cards reproduce {record["name"]}`. A seed agrees within {SAME_DIGITS:g} with these packages on such a
  processor; elsewhere, where sums round otherwise, what differs by more is called off: {allowed}.

```
{record["command"]}
```"""


def zoo_table(prefix: str = "") -> str:
    """The table of all cards, for a page from which the folder of the cards is `prefix`."""
    rows = []
    for name, folder in zoo().items():
        record = load_record(folder)
        own = this_row(record)
        # The first metric of a task is its primary one.
        primary = [(task, *next(iter(metrics.items()))) for task, metrics in own["metrics"].items()]
        measured = ", ".join(f"{task} {_named(metric)} {_spread(entry)}" for task, metric, entry in primary)
        if len(primary) > MANY and len({metric for _, metric, _ in primary}) == 1:
            values = zip(*(entry["values"] for _, _, entry in primary), strict=True)
            mean = measure([sum(of_seed) / len(primary) for of_seed in values])
            measured = f"mean {_named(primary[0][1])} of {len(primary)} tasks {_spread(mean)}"
        alone = ("single_task", "lora-each")
        verdicts = [verdict(entry) for entry in record["comparison"] if entry["baseline"] in alone]
        kinds = ("better", "worse", "no difference shown")
        counted = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in kinds if kind in verdicts)
        link = f"[{name}]({prefix}{name}/{PAGE})"
        rows.append([link, record["data"]["name"], f"{own['parameters']:,}", measured, counted])
    header = ["model", "data", "parameters", "test, mean ± sd over seeds", "tasks against single-task models"]
    return table(header, rows)


def index_pages() -> dict[Path, str]:
    """Pages that carry the table of the zoo, with the table as it should be: of the cards, and of the checkout."""
    cards = zoo_folder()
    pages = {cards / PAGE: ""} | ({cards.parent / PAGE: f"{cards.name}/"} if not cards.name.startswith("_") else {})
    return {
        page: zoo_table(prefix)
        for page, prefix in pages.items()
        if page.exists() and ZOO[0] in page.read_text(encoding="utf-8")
    }


def build_index() -> list[Path]:
    """Writes the table of the zoo anew wherever it stands."""
    for page, content in (pages := index_pages()).items():
        write_atomically(page, replace_block(page.read_text(encoding="utf-8"), ZOO, content))
    return list(pages)


def _named(metric: str) -> str:
    return f"{metric} ↓" if metric in LOWER_IS_BETTER else metric


def _number(value: float) -> str:
    return f"{value:.{DIGITS}f}"


def _signed(value: float) -> str:
    return f"{value:+.{DIGITS}f}"


def _spread(entry: Mapping[str, Any]) -> str:
    return f"{_number(entry['mean'])} ± {_number(entry['std'])}"
