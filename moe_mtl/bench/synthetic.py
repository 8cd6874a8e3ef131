"""The synthetic study of MMoE: does a shared bottom fall behind as the tasks grow apart?

Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018, section
3.3 and figure 4: two regression tasks of a known correlation; shared bottom, OMoE and MMoE of the same number of
parameters. The generator draws its sines anew each time, so that one data set says little: losses are averaged over
draws and compared pair by pair on the same draw.

Differs from the paper in: 20 draws by default, not 200 runs; every row is seen once, so that no model overfits;
learning rates are chosen on validation rows; twenty draws train at once, as one batch of models. All layers of all
models start alike, with Glorot's uniform initialisation and biases of 0 (the default of the paper's framework); this
library's own experts start larger than its towers.

Shapes: `N` draws, `B` rows, `D` features, `T` tasks.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from ..data import load
from ..models import model_class
from ..models._tabular import TabularModel
from .report import aligned, curves, to_stderr, write
from .timing import torch_threads

EXPERTS = {"num_experts": 8, "expert_dims": [16]}
TOWER_DIMS = [8]
TASKS = ("y1", "y2")
DRAWS_AT_ONCE = 20
EVALUATED_ROWS = 4096  # of each draw at a time


@dataclass(frozen=True)
class Options:
    """What to study; the defaults take half an hour on one core, and 3 GB.

    Attributes:
        correlations: cosines between the tasks' weight vectors.
        models: of shared_bottom, omoe, mmoe.
        draws: data sets per correlation.
        learning_rates: the one with the least mean validation loss is chosen per model and correlation.
        epochs: passes over the training rows.
        batch_size: rows per step.
        schedule: of the learning rate: constant, or cosine, which ends at 0.
        scale: c, the length of the weight vectors: how far the sines bend.
        frequency: standard deviation of the sines' alpha: how often they bend.
        rows: training rows of each draw.
        seed: of the first draw and of all weights.
        threads: of torch; its own choice by default.
        output: folder for synthetic.json, and synthetic.svg where matplotlib is installed.
    """

    correlations: tuple[float, ...] = (1.0, 0.9, 0.5, 0.0)
    models: tuple[str, ...] = ("shared_bottom", "omoe", "mmoe")
    draws: int = 20
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    epochs: int = 1
    batch_size: int = 128
    schedule: str = "constant"
    scale: float = 0.3
    frequency: float = 1.0
    rows: int = 204_800
    seed: int = 0
    threads: int | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.models) - {"shared_bottom", "omoe", "mmoe"}:
            raise ValueError(f"models: expected shared_bottom, omoe, mmoe, found {sorted(unknown)[0]!r}")
        for name, lowest in (("draws", 2), ("epochs", 1), ("batch_size", 1), ("rows", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}: expected at least {lowest}, found {getattr(self, name)}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule: expected constant or cosine, found {self.schedule!r}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates: expected positive numbers, found {self.learning_rates}")


@dataclass(frozen=True)
class Draws:
    """Rows of every draw: inputs `[N, B, D]` and labels `[N, B, T]` of each part."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def draw(correlation: float, seeds: Sequence[int], options: Options) -> Draws:
    """A data set per seed, of one correlation; a seed gives the same sines and inputs at every correlation."""
    stacked: dict[str, tuple[Tensor, Tensor]] = {}
    for i, seed in enumerate(seeds):
        splits = load(
            "mmoe-synthetic",
            correlation=correlation,
            scale=options.scale,
            frequency=options.frequency,
            train_rows=options.rows,
            seed=seed,
        )
        for name, rows in splits.parts().items():
            columns = {column: rows[column].to_numpy() for column in rows.column_names}
            x_BD = np.stack([columns[feature["name"]] for feature in splits.features], axis=1)
            y_BT = np.stack([columns[task] for task in TASKS], axis=1)
            if name not in stacked:  # at once: two copies of all rows are a lot
                stacked[name] = (torch.empty(len(seeds), *x_BD.shape), torch.empty(len(seeds), *y_BT.shape))
            for whole, values in zip(stacked[name], (x_BD, y_BT), strict=True):
                whole[i] = torch.from_numpy(values)
    return Draws(**stacked)


def build(name: str, num_features: int) -> TabularModel:
    """The paper's sizes: 8 experts of 16 units, towers of 8; the shared bottom as wide as those allow: 113."""
    model = model_class(name)
    sizes: dict[str, Any] = EXPERTS
    if name == "shared_bottom":
        experts, width, tower = EXPERTS["num_experts"], EXPERTS["expert_dims"][0], TOWER_DIMS[0]
        total = num_features * width * experts + width * tower * len(TASKS)
        sizes = {"bottom_dims": [round(total / (num_features + tower * len(TASKS)))]}
    config = model.config_class(
        features=[{"name": f"x{i}", "kind": "numeric"} for i in range(num_features)],
        tasks=[{"name": task, "kind": "regression"} for task in TASKS],
        numeric_embedding="scaled",
        tower_dims=TOWER_DIMS,
        **sizes,
    )
    built = model(config)
    with torch.no_grad():
        for parameter_name, parameter in built.named_parameters():
            if "bias" in parameter_name:
                nn.init.zeros_(parameter)
            else:
                for matrix_OI in parameter.view(-1, *parameter.shape[-2:]).unbind():
                    nn.init.xavier_uniform_(matrix_OI)
    return built


class _Core(nn.Module):
    """Trunk and towers: a model without the check of its inputs, which cannot run under vmap."""

    def __init__(self, model: TabularModel):
        super().__init__()
        self.trunk, self.towers = model.trunk, model.towers

    def forward(self, x_BD: Tensor) -> Tensor:
        states = self.trunk(x_BD, list(TASKS), False).states
        return torch.cat([self.towers[task](states[task]) for task in TASKS], dim=-1)


def train(name: str, draws: Draws, learning_rate: float, options: Options, seed: int) -> dict[str, list[float]]:
    """Trains one model per draw, all in one batch; Adam works number by number, so they do not touch each other.

    `seed` is of all weights.

    Returns:
        mean squared error over both tasks, by draw, after the last epoch: `train`, `validation`, `test`.
    """
    x_NBD, y_NBT = draws.train
    torch.manual_seed(seed)
    cores = [_Core(build(name, x_NBD.shape[-1])) for _ in range(len(x_NBD))]
    parameters, _ = stack_module_state(cores)
    skeleton = cores[0].to("meta")

    def answer(state: Mapping[str, Tensor], x_BD: Tensor) -> Tensor:
        return functional_call(skeleton, state, (x_BD,))

    forward = vmap(answer)
    optimizer = torch.optim.Adam(parameters.values(), lr=learning_rate, fused=True)
    order = torch.Generator().manual_seed(options.seed)
    steps = options.epochs * math.ceil(x_NBD.shape[1] / options.batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if options.schedule == "cosine" else None
    for _ in range(options.epochs):
        for index in torch.randperm(x_NBD.shape[1], generator=order).split(options.batch_size):
            optimizer.zero_grad()
            error = forward(parameters, x_NBD[:, index]) - y_NBT[:, index]
            error.square().mean(dim=(1, 2)).sum().backward()
            optimizer.step()
            if cosine is not None:
                cosine.step()

    def error_of(x_NBD: Tensor, y_NBT: Tensor) -> list[float]:
        total_N = torch.zeros(len(x_NBD), dtype=torch.float64)
        for x, y in zip(x_NBD.split(EVALUATED_ROWS, 1), y_NBT.split(EVALUATED_ROWS, 1), strict=True):
            total_N += (forward(parameters, x) - y).square().mean(2).sum(1, dtype=torch.float64)
        return (total_N / x_NBD.shape[1]).tolist()

    with torch.no_grad():
        parts = {"train": draws.train, "validation": draws.validation, "test": draws.test}
        return {part: error_of(*rows) for part, rows in parts.items()}


def run(options: Options, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Runs the study.

    Returns:
        as JSON types: per correlation the label correlation, per model the chosen learning rate and the test losses by
        draw, and per pair of models the mean difference with its standard error; and `gaps`, how each model's lag on
        MMoE grows from the highest to the lowest correlation.
    """
    with torch_threads(options.threads):
        rows = []
        for correlation in options.correlations:
            losses_of, label_correlations = _train_all(correlation, options, progress)
            row: dict[str, Any] = {
                "correlation": correlation,
                "label_correlation": statistics.fmean(label_correlations),
                "models": {},
            }
            for name, tried in losses_of.items():
                rate = min(tried, key=lambda r: statistics.fmean(tried[r]["validation"]))
                losses = tried[rate]
                row["models"][name] = {
                    "learning_rate": rate,
                    "test": _summary(losses["test"]),
                    "train": _summary(losses["train"]),
                    "tried": {str(r): _summary(found["test"])["mean"] for r, found in tried.items()},
                    "by_draw": losses["test"],
                }
                progress(f"correlation {correlation}: {name} {row['models'][name]['test']['mean']:.5f}")
            row["differences"] = _differences({name: found["by_draw"] for name, found in row["models"].items()})
            rows.append(row)
    result = {
        "bench": "synthetic",
        "options": {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()},
        "parameters": {name: sum(p.numel() for p in build(name, 100).parameters()) for name in options.models},
        "correlations": rows,
        "gaps": {
            name: _gap(rows, name)
            for name in options.models
            if name != "mmoe" and "mmoe" in options.models and len(rows) > 1
        },
    }
    write(result, options.output, curves(result))
    return result


def _train_all(
    correlation: float, options: Options, progress: Callable[[str], None]
) -> tuple[dict[str, dict[float, dict[str, list[float]]]], list[float]]:
    """Model -> learning rate -> losses as of `train`, and the labels' correlation, both by draw."""
    found: dict[str, dict[float, dict[str, list[float]]]] = {
        name: {rate: {"train": [], "validation": [], "test": []} for rate in options.learning_rates}
        for name in options.models
    }
    label_correlations: list[float] = []
    for start in range(0, options.draws, DRAWS_AT_ONCE):
        seeds = range(options.seed + start, options.seed + min(start + DRAWS_AT_ONCE, options.draws))
        draws = draw(correlation, seeds, options)
        label_correlations += (float(torch.corrcoef(y_BT.t())[0, 1]) for y_BT in draws.train[1])
        for name, tried in found.items():
            for rate, losses in tried.items():
                for part, by_draw in train(name, draws, rate, options, seeds[0]).items():
                    losses[part] += by_draw
        del draws  # before the next are drawn
        if options.draws > DRAWS_AT_ONCE:
            progress(f"correlation {correlation}: {start + len(seeds)} of {options.draws} draws")
    return found, label_correlations


def main(options: Options) -> dict[str, Any]:
    """`run`, with steps on standard error and the table on standard output."""
    result = run(options, to_stderr)
    print(table(result))
    return result


def table(result: Mapping[str, Any]) -> str:
    """Test loss by correlation and model, and the paired differences to MMoE."""
    names = list(result["parameters"])
    others = [name for name in names if name != "mmoe" and "mmoe" in names]
    header = ["correlation", "labels'", *names]
    header += [text for name in others for text in (f"{name} - mmoe", "log of ratio")] + ["learning rates"]
    rows = []
    for row in result["correlations"]:
        cells = [f"{row['correlation']:.2f}", f"{row['label_correlation']:.2f}"]
        cells += [f"{row['models'][name]['test']['mean']:.5f}" for name in names]
        for name in others:
            difference = row["differences"][f"{name} - mmoe"]
            ratio = difference["log_ratio"]
            cells.append(f"{difference['mean']:+.5f} ± {difference['standard_error']:.5f}")
            cells.append(f"{ratio['mean']:+.3f} ± {ratio['standard_error']:.3f}")
        rows.append([*cells, " ".join(f"{row['models'][name]['learning_rate']:g}" for name in names)])
    parameters = ", ".join(f"{name} {count:,}" for name, count in result["parameters"].items())
    lines = [
        f"parameters: {parameters}",
        "mean squared error on test rows, mean over draws; differences and ratios paired, draw by draw",
        "",
    ]
    lines += aligned(header, rows)
    for name, gap in result["gaps"].items():
        ratio, difference = gap["log_ratio"]["growth"], gap["difference"]["growth"]
        says = {part: "holds" if gap[part]["holds"] else "does not hold" for part in ("log_ratio", "difference")}
        lines += [
            "",
            f"{name}'s lag on MMoE grows from correlation {gap['highest']:.2f} to {gap['lowest']:.2f} by"
            f" {ratio['mean']:+.3f} ± {ratio['standard_error']:.3f} (log of the ratio),"
            f" {difference['mean']:+.5f} ± {difference['standard_error']:.5f} (difference):",
            f"the paper's ordering {says['log_ratio']} in the ratio, {says['difference']} in the difference "
            "(growth and lag above two standard errors)",
        ]
    return "\n".join(lines)


def _summary(losses: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(losses), "standard_error": statistics.stdev(losses) / math.sqrt(len(losses))}


def _differences(losses: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, own in losses.items():
        for other, theirs in losses.items():
            if name != other:
                pairs = [a - b for a, b in zip(own, theirs, strict=True)]
                ratios = [math.log(a / b) for a, b in zip(own, theirs, strict=True)]
                found[f"{name} - {other}"] = {
                    **_summary(pairs),
                    "log_ratio": _summary(ratios),
                    "worse_in": sum(p > 0 for p in pairs),
                }
    return found


def _gap(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Lag of a model on MMoE at the lowest correlation, at the highest, and its growth, draw by draw.

    `log_ratio` is the logarithm of the ratio of the losses, as these differ tenfold from draw to draw; `difference` is
    what the paper's figure shows.
    """
    ordered = sorted(rows, key=lambda row: row["correlation"])
    ends = [[row["models"][model]["by_draw"] for model in (name, "mmoe")] for row in (ordered[0], ordered[-1])]
    found: dict[str, Any] = {"lowest": ordered[0]["correlation"], "highest": ordered[-1]["correlation"]}
    for measure, of in (("log_ratio", lambda a, b: math.log(a / b)), ("difference", lambda a, b: a - b)):
        low, high = ([of(a, b) for a, b in zip(own, theirs, strict=True)] for own, theirs in ends)
        growth = [a - b for a, b in zip(low, high, strict=True)]
        told: dict[str, Any] = {"at_lowest": _summary(low), "at_highest": _summary(high), "growth": _summary(growth)}
        told["holds"] = all(told[part]["mean"] > 2 * told[part]["standard_error"] for part in ("at_lowest", "growth"))
        found[measure] = told
    return found
