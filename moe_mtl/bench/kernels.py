"""Sparse experts beside those of others: forward, and forward with backward, on the same tensors, in turns.

Contenders: ours; the experts functions of transformers (eager, grouped_mm, batched_mm); ScatterMoE and Liger-Kernel on
a GPU where they are installed; and, as the ceiling, two dense products of as many operations. Before anything is timed
each contender's output is held to ours. Times are medians over rounds; ratios are medians of ratios within a round.

Shapes: `N` tokens, `D` width, `H` hidden width, `E` experts, `K` experts chosen per token.
"""

import importlib.util
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moe_mtl.ops  # noqa: F401 - registers our experts function

from .memory import peak_of_call, process_that_gives_back
from .report import aligned, require_known, to_stderr, write
from .timing import alternate, torch_threads

TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")
PEERS = (*TRANSFORMERS, "scattermoe", "liger")
OURS = "moe_mtl"
# E, N, D, H, K: the small shapes of multi-task models, then Qwen3-30B's.
SMALL = (
    (8, 256, 256, 512, 1),
    (8, 4096, 256, 512, 2),
    (8, 4096, 768, 768, 2),
    (16, 256, 768, 768, 1),
    (16, 4096, 192, 768, 4),
    (64, 256, 256, 512, 1),
    (64, 256, 768, 768, 1),
    (64, 4096, 256, 512, 1),
    (128, 1024, 384, 128, 4),
)
# The same work by 8 to 128 experts: the time should not grow.
CONSTANT_WORK = tuple((experts, 8192, 768, 1024, 2) for experts in (8, 32, 128))
GRID = (*SMALL, (128, 8192, 2048, 768, 8), (128, 32768, 2048, 768, 8), *CONSTANT_WORK)
BATCHED_BYTES = 2**30  # batched_mm copies an expert's weights for each routed copy: left out where that is more
EAGER_ELEMENTS = 2**31  # eager's backward makes a full-size zero tensor per expert: left out of it where they are more
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        dtypes: of float32, bfloat16, float16.
        parts: of forward, full (forward and backward).
        device: cpu or cuda; by default cuda where there is one.
        shapes: places in the grid, counted from 0; by default all on a GPU, the small ones on a CPU.
        rounds: measurements of each contender.
        slice_seconds: how long a measurement lasts at least.
        threads: of torch; its own choice by default.
        balanced: whether each expert gets the same number of tokens, instead of what a random router gives.
        memory: whether to measure the peak memory of a call too.
        tune: whether to measure tile sizes first and write the best into the table of the kernels; needs a GPU.
        seed: of tensors and routing.
        output: folder for kernels.json and kernels.svg.
    """

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    parts: tuple[str, ...] = ("forward", "full")
    device: str | None = None
    shapes: tuple[int, ...] | None = None
    rounds: int = 9
    slice_seconds: float = 0.05
    threads: int | None = None
    balanced: bool = False
    memory: bool = False
    tune: bool = False
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        require_known(self, {"dtypes": ("float32", "bfloat16", "float16"), "parts": ("forward", "full")})
        if self.shapes is not None:
            require_known(self, {"shapes": range(len(GRID))})
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, found {self.rounds}")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, found {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: expected one that is here, found cuda")
        if self.tune and self.on != "cuda":
            raise ValueError("tune: expected a GPU to tune for, found none")

    @property
    def on(self) -> str:
        """The device."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def grid(self) -> list[tuple[int, ...]]:
        """The shapes to measure."""
        if self.shapes is not None:
            return [GRID[place] for place in self.shapes]
        return list(GRID if self.on == "cuda" else SMALL)


def run(options: Options, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measures.

    Returns:
        as JSON types: one row per dtype, shape and part, with each contender's median seconds, its time as a multiple
        of ours, operations and bytes per second, and, if asked for, the bytes it held at its peak.

    Raises:
        RuntimeError: a contender computes something else.
    """
    if options.tune:
        from .tune import tune

        tune(options, progress)
    rows = []
    with torch_threads(options.threads):
        threads = torch.get_num_threads()
        for dtype, shape, part in itertools.product(options.dtypes, options.grid, options.parts):
            rows.append(_row(dtype, shape, part, options))
            progress(f"{dtype} {shape} {part}: timed")
    if options.memory:
        for row in rows:
            shape = tuple(row["shape"].values())
            with process_that_gives_back() as pool:
                peaks = pool.submit(_peaks, row["dtype"], shape, row["part"], options).result()
            for name, peak in peaks.items():
                row["results"][name]["peak"] = peak
            progress(f"{row['dtype']} {shape} {row['part']}: memory measured")
    result = {
        "bench": "kernels",
        "options": asdict(options),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.on == "cuda" else "cpu",
        "threads": threads,
        "rows": rows,
    }
    write(result, options.output, plot(result))
    return result


def main(options: Options) -> dict[str, Any]:
    """`run`, with steps on standard error and the table on standard output."""
    result = run(options, to_stderr)
    print(table(result))
    return result


def table(result: Mapping[str, Any]) -> str:
    """Times, and in brackets multiples of ours; then the geometric mean of the best peer's multiple."""
    names = [name for name in (OURS, *PEERS, "dense") if any(name in row["results"] for row in result["rows"])]
    rows, memory = [], []
    for row in result["rows"]:
        head = [row["dtype"], *(str(row["shape"][key]) for key in "ENDHK"), row["part"]]
        found = [row["results"].get(name) for name in names]
        times = ["" if one is None else f"{one['median'] * 1e3:,.2f} ({one['ratio']:.2f})" for one in found]
        ours = row["results"][OURS]
        speed = [f"{ours['operations_per_second'] / 1e12:,.3f}", f"{ours['bytes_per_second'] / 1e9:,.1f}"]
        rows.append([*head, *times, *speed])
        if row["results"][OURS].get("peak") is not None:
            memory.append([*head, *("" if one is None else f"{one['peak'] / 2**20:,.1f}" for one in found)])
    header = ["dtype", *"ENDHK", "part"]
    where = f"torch {result['torch']}, {result['device']}, {result['threads']} threads"
    lines = [f"{where}; milliseconds, in brackets as a multiple of ours; then ours in TFLOP/s and GB/s", ""]
    lines += aligned([*header, *names, "TFLOP/s", "GB/s"], rows)
    if memory:
        lines += ["", "peak memory of a call, MiB", "", *aligned([*header, *names], memory)]
    for part in result["options"]["parts"]:
        best = [
            min(found["ratio"] for name, found in row["results"].items() if name in PEERS)
            for row in result["rows"]
            if row["part"] == part
        ]
        mean = float(torch.tensor(best).log().mean().exp())
        lines.append(f"{part}: the best peer takes {mean:.2f} times ours (geometric mean), {min(best):.2f} at least")
    return "\n".join(lines)


def plot(result: Mapping[str, Any]) -> bytes | None:
    """Times as multiples of ours, as an SVG; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    groups = [(d, p) for d in result["options"]["dtypes"] for p in result["options"]["parts"]]
    figure = Figure(figsize=(11, 3.2 * len(groups)), layout="constrained")
    for axes, (dtype, part) in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups, strict=True):
        rows = [row for row in result["rows"] if (row["dtype"], row["part"]) == (dtype, part)]
        names = [name for name in (*PEERS, "dense") if any(name in row["results"] for row in rows)]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            heights = [row["results"].get(name, {"ratio": math.nan})["ratio"] for row in rows]
            axes.bar([x + i * width for x in range(len(rows))], heights, width, label=name)
        labels = [", ".join(f"{key} {size}" for key, size in row["shape"].items()) for row in rows]
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(rows))], labels, fontsize=7, rotation=15)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_ylabel("time, multiple of ours")
        axes.set_title(f"{dtype}, {part}, {result['device']}")
        axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _row(dtype: str, shape: Sequence[int], part: str, options: Options) -> dict[str, Any]:
    _, tokens, width, hidden, chosen = shape
    calls = contenders(getattr(torch, dtype), shape, part, options)
    wait = torch.cuda.synchronize if options.on == "cuda" else lambda: None
    timings = alternate(calls, options.rounds, options.slice_seconds, wait)
    operations = (1 if part == "forward" else 3) * 2 * tokens * chosen * 3 * width * hidden
    size = getattr(torch, dtype).itemsize
    results = {
        name: {
            "median": timing.median,
            "ratio": timing.ratio(timings[OURS]),
            "operations_per_second": operations / timing.median,
            "bytes_per_second": least_bytes(shape, part, size) / timing.median,
        }
        for name, timing in timings.items()
    }
    return {
        "dtype": dtype,
        "shape": dict(zip("ENDHK", shape, strict=True)),
        "part": part,
        "operations": operations,
        "results": results,
    }


def _peaks(dtype: str, shape: Sequence[int], part: str, options: Options) -> dict[str, int | None]:
    calls = contenders(getattr(torch, dtype), shape, part, options)
    with torch_threads(options.threads):
        return {name: peak_of_call(call, options.on) for name, call in calls.items()}


def least_bytes(shape: Sequence[int], part: str, size: int) -> int:
    """What must be read and written once: tokens, weights and outputs; in a full pass their gradients, and what the
    activation was given, kept for the backward."""
    experts, tokens, width, hidden, chosen = shape
    used = min(experts, tokens * chosen) * 3 * width * hidden
    if part == "forward":
        return size * (2 * tokens * width + used)
    weights = 2 * used + experts * 3 * width * hidden  # read twice, and every gradient is written
    return size * (6 * tokens * width + weights + 2 * tokens * chosen * 2 * hidden)


def contenders(
    dtype: torch.dtype, shape: Sequence[int], part: str, options: Options
) -> dict[str, Callable[[], object]]:
    """One call per contender, on the same weights, tokens and routing: SwiGLU experts as Qwen3-MoE has them.

    Raises:
        RuntimeError: one computes something else than ours.
    """
    experts, tokens, width, hidden, chosen = shape
    torch.manual_seed(options.seed)
    config = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=hidden, num_experts=experts, num_experts_per_tok=chosen
    )
    with torch.device(options.on):
        module = Qwen3MoeExperts(config).to(dtype)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        x_ND = torch.randn(tokens, width).to(dtype).requires_grad_(part == "full")
        if options.balanced:
            indices_NK = (torch.arange(tokens * chosen) % experts).view(tokens, chosen)
        else:
            indices_NK = torch.rand(tokens, experts).topk(chosen).indices
        weights_NK = torch.rand(tokens, chosen).softmax(-1).to(dtype).requires_grad_(part == "full")
        grad_ND = torch.randn(tokens, width).to(dtype)
    leaves = [x_ND, weights_NK, *module.parameters()]

    def timed(forward: Callable[[], Tensor], of: list[Tensor]) -> Callable[[], object]:
        if part == "full":
            return lambda: torch.autograd.grad(forward(), of, grad_ND)
        return torch.no_grad()(forward)

    def experts_of(name: str) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            config._experts_implementation = name
            return module(x_ND, indices_NK, weights_NK)

        return forward

    forwards = {name: experts_of(name) for name in (OURS, *TRANSFORMERS)}
    if tokens * chosen * 3 * width * hidden * dtype.itemsize > BATCHED_BYTES:
        del forwards["batched_mm"]
    if part == "full" and experts * experts * 3 * width * hidden > EAGER_ELEMENTS:
        del forwards["eager"]
    lists = dict.fromkeys(forwards, leaves)
    if options.on == "cuda":
        for name, make in (("scattermoe", _scattermoe), ("liger", _liger)):
            made = make(module, x_ND, indices_NK, weights_NK)
            if made is not None:
                forwards[name], own = made
                lists[name] = [x_ND, weights_NK, *own]
    expected = torch.no_grad()(forwards[OURS])().float()
    for name, forward in forwards.items():
        error = float((torch.no_grad()(forward)().float() - expected).norm() / expected.norm())
        if not error < TOLERANCE[dtype]:
            raise RuntimeError(f"{name} computes something else: its output is off by {error:.1e} of ours")
    calls = {name: timed(forward, lists[name]) for name, forward in forwards.items()}

    with torch.device(options.on):
        copies_SD = torch.randn(tokens * chosen, width).to(dtype).requires_grad_(part == "full")
        up_PD = torch.randn(2 * hidden, width).to(dtype).requires_grad_(part == "full")
        down_DH = torch.randn(width, hidden).to(dtype).requires_grad_(part == "full")
        grad_SD = torch.randn(tokens * chosen, width).to(dtype)

    def dense() -> object:
        y_SD = (copies_SD @ up_PD.t())[:, :hidden] @ down_DH.t()
        return torch.autograd.grad(y_SD, [copies_SD, up_PD, down_DH], grad_SD) if part == "full" else y_SD

    calls["dense"] = dense if part == "full" else torch.no_grad()(dense)
    return calls


Made = tuple[Callable[[], Tensor], list[Tensor]] | None


def _scattermoe(module: Qwen3MoeExperts, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Made:
    """https://github.com/shawntan/scattermoe, whose second half of the first layer is the gate."""
    if importlib.util.find_spec("scattermoe") is None:
        return None
    from scattermoe.mlp import GLUMLP

    experts, wide, width = module.gate_up_proj.shape
    mlp = GLUMLP(width, wide // 2, experts, indices_NK.shape[1]).to(x_ND.device, x_ND.dtype)
    with torch.no_grad():
        gate, up = module.gate_up_proj.chunk(2, dim=1)
        mlp.experts.weight.copy_(torch.cat([up, gate], dim=1))
        mlp.output_experts.weight.copy_(module.down_proj)
    return lambda: mlp(x_ND, weights_NK, indices_NK), list(mlp.parameters())


def _liger(module: Qwen3MoeExperts, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Made:
    """https://github.com/linkedin/Liger-Kernel, from the release on that has fused experts."""
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError:
        return None
    indices_NK = indices_NK.to(torch.int32)
    own = [module.gate_up_proj, module.down_proj]
    return lambda: LigerFusedMoEFunction.apply(x_ND, *own, indices_NK, weights_NK), own
