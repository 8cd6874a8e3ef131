"""One task of M³ViT beside all its tasks, sparse layers of few and of many experts, and the memory of streamed experts.

Models have random weights and are measured in turns, in one run; ratios are medians of ratios within a round.

Parts: `latency` is the forward of one task, extracted, beside that of all tasks, and the ratio that their multiply-adds
predict; `experts` a training step of one sparse layer (forward, backward, balance; no optimiser, whose work grows with
what is stored) with few and with many experts, as many chosen; `memory` what loading a model and answering one image
holds at its peak, with all weights in memory and with `offload_experts`, which leaves experts and heads on disk, each
in a process of its own. What that saves is told in two ways, beside the peak with all weights in memory and beside the
size of the model's weights; and so is how far each peak lies above the weights that are in memory: what activations
take, and loading.
"""

import gc
import math
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..layers.moe import SparseExperts, SparseMLP, TaskRouter
from ..models import AutoModelForMultiTask
from ..models.m3vit import SIZES, M3ViTConfig, M3ViTForMultiTask
from ..pathway import cost
from .memory import give_back_what_is_freed, peak_of_call
from .report import aligned, require_known, to_stderr, write
from .timing import alternate, torch_threads

PARTS = ("latency", "experts", "memory")
# Those of PASCAL-Context.
TASKS = [
    {"name": "semseg", "kind": "segmentation", "num_outputs": 21},
    {"name": "human_parts", "kind": "segmentation", "num_outputs": 7},
    {"name": "saliency", "kind": "saliency"},
    {"name": "edges", "kind": "edges"},
    {"name": "normals", "kind": "normals", "num_outputs": 3},
]
TASK = "semseg"
# Size and image.
MODELS = {
    "tiny-64x64": ("tiny", [64, 64]),
    "tiny-128x256": ("tiny", [128, 256]),
    "small-224x224": ("small", [224, 224]),
}
ASKED = {"latency": 0.15, "experts": 1.10}  # at most: apart from what is predicted; a multiple of the time
SMALL_ROUNDS = 3


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        parts: of latency, experts, memory.
        models: of tiny-64x64, tiny-128x256, small-224x224, for latency.
        batches: images of a forward.
        experts: of a sparse layer; the first is what the others are compared with.
        tokens: of a step of that layer.
        width: of the tokens.
        hidden: of an expert.
        selected: experts chosen per token.
        memory_size: of tiny, small, base: the model whose memory is measured.
        rounds: measurements of each contender; of the model small at most 3.
        slice_seconds: how long a measurement lasts at least; 0 for one call.
        threads: of torch.
        seed: of weights and inputs.
        output: folder for vision.json.
    """

    parts: tuple[str, ...] = PARTS
    models: tuple[str, ...] = tuple(MODELS)
    batches: tuple[int, ...] = (1, 16)
    experts: tuple[int, ...] = (8, 64)
    tokens: int = 8192
    width: int = 384
    hidden: int = 384
    selected: int = 4
    memory_size: str = "small"
    rounds: int = 9
    slice_seconds: float = 0.2
    threads: int = 1
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        require_known(self, {"parts": PARTS, "models": MODELS})
        if self.memory_size not in SIZES:
            raise ValueError(f"memory_size: expected one of {', '.join(SIZES)}, found {self.memory_size!r}")
        if not 0 <= self.slice_seconds < math.inf:
            raise ValueError(f"slice_seconds: expected seconds, at least 0, found {self.slice_seconds}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer in [0, 2^63), found {self.seed}")
        if self.output is not None and (file := _file_among(Path(self.output))):
            raise ValueError(f"output: expected a folder or none yet, found a file: {file}")
        for name in ("tokens", "width", "hidden", "selected", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name, least in (("batches", 1), ("experts", self.selected)):
            if not getattr(self, name) or min(getattr(self, name)) < least:
                raise ValueError(f"{name}: expected numbers of at least {least}, found {getattr(self, name)}")


def _file_among(path: Path) -> Path | None:
    """The file that stands in the way of a folder, if there is one."""
    return next((one for one in (path, *path.parents) if one.exists() and not one.is_dir()), None)


def run(options: Options, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measures.

    Returns:
        as JSON types: `latency`, one row per model and batch; `experts`, one per number of experts; `memory`.
    """
    result: dict[str, Any] = {
        "bench": "vision",
        "options": asdict(options),
        "torch": torch.__version__,
        "asked": ASKED,
    }
    with torch_threads(options.threads):
        if "latency" in options.parts:
            result["latency"] = []
            for name in options.models:
                result["latency"] += latency(name, options)
                progress(f"{name}: timed")
                gc.collect()
        if "experts" in options.parts:
            result["experts"] = layers(options)
            progress("experts: timed")
    if "memory" in options.parts:
        result["memory"] = memory(options)
        progress("memory: measured")
    write(result, options.output)
    return result


def main(options: Options) -> dict[str, Any]:
    """`run`, with steps on standard error and the table on standard output."""
    result = run(options, to_stderr)
    print(table(result))
    return result


def latency(name: str, options: Options) -> list[dict[str, Any]]:
    """One task and all, for every batch."""
    size, image_size = MODELS[name]
    config = M3ViTConfig.of_size(size, image_size=image_size, tasks=TASKS)
    torch.manual_seed(options.seed)
    model = M3ViTForMultiTask(config).eval()
    alone = model.extract_task(TASK)
    with torch.device("meta"):
        shapes = M3ViTForMultiTask(config)
    counts = {"one": cost(shapes, TASK).multiply_adds, "all": cost(shapes).multiply_adds}
    rows = []
    for batch in options.batches:
        images = torch.randn(batch, 3, *image_size)
        rounds = min(options.rounds, SMALL_ROUNDS) if size == "small" else options.rounds
        with torch.inference_mode():
            timings = alternate(
                {"one": lambda images=images: alone(images), "all": lambda images=images: model(images)},
                rounds,
                options.slice_seconds,
            )
        measured, predicted = timings["one"].ratio(timings["all"]), counts["one"] / counts["all"]
        rows.append(
            {
                "model": name,
                "batch": batch,
                "rounds": rounds,
                "seconds": {call: timing.median for call, timing in timings.items()},
                "multiply_adds": counts,
                "ratio": measured,
                "predicted": predicted,
                "apart": measured / predicted - 1,
            }
        )
    return rows


def step_of(experts: int, options: Options) -> Callable[[], object]:
    """A training step of one layer of sparse experts on random tokens, which every number of experts sees alike."""
    torch.manual_seed(options.seed)
    router = TaskRouter(options.width, experts, options.selected, [TASK], balance_weight=0.01)
    layer = SparseMLP("layer", router, SparseExperts(experts, options.width, options.hidden)).train()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    generator = torch.Generator().manual_seed(options.seed)
    tokens = torch.randn(1, 1, options.tokens, options.width, generator=generator).requires_grad_()

    def step() -> None:
        out = layer(tokens, [TASK], None, False)
        (out.hidden.square().mean() + sum(out.auxiliary)).backward()
        layer.zero_grad()
        tokens.grad = None

    return step


def layers(options: Options) -> list[dict[str, Any]]:
    """The step with every number of experts, beside the first."""
    steps = {str(experts): step_of(experts, options) for experts in options.experts}
    timings = alternate(steps, options.rounds, options.slice_seconds)
    first = timings[str(options.experts[0])]
    return [
        {
            "experts": experts,
            "copies_per_expert": options.tokens * options.selected / experts,
            "seconds": timings[str(experts)].median,
            "ratio": timings[str(experts)].ratio(first),
        }
        for experts in options.experts
    ]


def memory(options: Options) -> dict[str, Any]:
    """Bytes: of the model, of its experts, and peaks.

    Returns:
        `saved`: the held peak less the offloaded one; `below_model`: the model's size less the offloaded peak, negative
        where that is above; `beyond_weights`: each peak less the weights that are in memory, all of them or, offloaded,
        two experts, the head of one task, and what is neither. None where peaks cannot be measured.
    """
    config = M3ViTConfig.of_size(options.memory_size, image_size=[64, 64], tasks=TASKS)
    torch.manual_seed(options.seed)
    model = M3ViTForMultiTask(config).eval()
    sizes = {name: p.numel() * p.itemsize for name, p in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    heads = sum(size for name, size in sizes.items() if name.startswith("heads."))
    one_head = sum(size for name, size in sizes.items() if name.startswith(f"heads.{TASK}."))
    two = 2 * experts // (len(config.expert_blocks) * config.num_experts)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        peaks = {way: _in_a_process(folder, way == "offloaded", options.threads) for way in ("held", "offloaded")}
    held, offloaded = peaks.values()
    total = sum(sizes.values())
    resident = {"held": total, "offloaded": total - experts + two - heads + one_head}
    return {
        "model": options.memory_size,
        "model_bytes": total,
        "expert_bytes": experts,
        "two_experts_bytes": two,
        "heads_bytes": heads,
        "peaks": peaks,
        "saved": None if held is None or offloaded is None else held - offloaded,
        "asked": experts - two,
        "below_model": None if offloaded is None else total - offloaded,
        "beyond_weights": {way: None if peak is None else peak - resident[way] for way, peak in peaks.items()},
    }


def _in_a_process(folder: str, offload: bool, threads: int) -> int | None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, folder, offload, threads).result()


def _peak(folder: str, offload: bool, threads: int) -> int | None:
    give_back_what_is_freed()

    @torch.inference_mode()
    def load_and_answer() -> None:
        model = AutoModelForMultiTask.from_pretrained(folder, offload_experts=offload)
        model(**model.example_inputs(), tasks=[TASK])
        del model
        gc.collect()

    with torch_threads(threads):
        return peak_of_call(load_and_answer)


def table(result: Mapping[str, Any]) -> str:
    """What is measured beside what is asked."""
    lines = [f"torch {result['torch']}, {result['options']['threads']} threads"]
    if "latency" in result:
        lines += ["", f"one task ({TASK}) beside all {len(TASKS)}: milliseconds, and their ratio", ""]
        header = ["model", "batch", "one", "all", "ratio", "by multiply-adds", "apart"]
        rows = [
            [
                row["model"],
                str(row["batch"]),
                *(f"{row['seconds'][call] * 1e3:,.1f}" for call in ("one", "all")),
                *(f"{row[field]:.3f}" for field in ("ratio", "predicted")),
                f"{row['apart']:+.1%}",
            ]
            for row in result["latency"]
        ]
        lines += [*aligned(header, rows), f"asked: apart by at most {ASKED['latency']:.0%}"]
    if "experts" in result:
        options = result["options"]
        lines += [
            "",
            f"training step of a sparse layer, {options['tokens']} tokens, width {options['width']}, experts of "
            f"{options['hidden']}, {options['selected']} chosen",
            "",
        ]
        rows = [
            [str(r["experts"]), f"{r['copies_per_expert']:,.0f}", f"{r['seconds'] * 1e3:,.1f}", f"{r['ratio']:.3f}"]
            for r in result["experts"]
        ]
        lines += aligned(["experts", "copies of each", "ms", "multiple of the first"], rows)
        lines.append(f"asked: at most {ASKED['experts']:.2f}")
    if "memory" in result:
        found = result["memory"]
        told = {name: found[name] for name in ("model_bytes", "expert_bytes", "two_experts_bytes", "heads_bytes")}
        told |= {f"peak, {way}": peak for way, peak in found["peaks"].items()}
        told |= {"saved": found["saved"], "asked: at least": found["asked"]}
        told |= {"below the model's size": found["below_model"]}
        told |= {f"peak beyond weights, {way}": size for way, size in found["beyond_weights"].items()}
        rows = [[name, "" if size is None else f"{size / 2**20:,.1f}"] for name, size in told.items()]
        lines += ["", f"memory of {found['model']}, one image of 64 x 64", "", *aligned(["", "MiB"], rows)]
    return "\n".join(lines)
