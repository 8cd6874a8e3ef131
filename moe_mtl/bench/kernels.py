"""Sparse experts beside those of transformers: forward, and forward with backward, on the same tensors, in turns.

Contenders: ours, the experts functions of transformers (eager, grouped_mm, batched_mm), and, as the ceiling, two dense
products of as many operations. Times are medians over rounds; ratios are medians of ratios within a round.

Shapes: `N` tokens, `D` width, `H` hidden width, `E` experts, `K` experts chosen per token.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moe_mtl.ops  # noqa: F401 - registers our experts function

from .report import aligned, to_stderr, write
from .timing import alternate, torch_threads

PEERS = ("eager", "grouped_mm", "batched_mm")
OURS = "moe_mtl"
# E, N, D, H, K: the small shapes of multi-task models.
GRID = (
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
BATCHED_BYTES = 2**30  # batched_mm copies an expert's weights for each routed copy: left out where that is more
EAGER_ELEMENTS = 2**31  # eager's backward makes a full-size zero tensor per expert: left out of it where they are more


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        dtypes: of float32, bfloat16.
        parts: of forward, full (forward and backward).
        shapes: places in the grid, counted from 0; all by default.
        rounds: measurements of each contender.
        slice_seconds: how long a measurement lasts at least.
        threads: of torch; its own choice by default.
        balanced: whether each expert gets the same number of tokens, instead of what a random router gives.
        seed: of tensors and routing.
        output: folder for kernels.json.
    """

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    parts: tuple[str, ...] = ("forward", "full")
    shapes: tuple[int, ...] = tuple(range(len(GRID)))
    rounds: int = 9
    slice_seconds: float = 0.05
    threads: int | None = None
    balanced: bool = False
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        for name, values, known in (
            ("dtypes", self.dtypes, ("float32", "bfloat16")),
            ("parts", self.parts, ("forward", "full")),
            ("shapes", self.shapes, range(len(GRID))),
        ):
            if not values or set(values) - set(known):
                raise ValueError(f"{name}: expected some of {', '.join(map(str, known))}, found {list(values)}")
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, found {self.rounds}")


def run(options: Options, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measures.

    Returns:
        as JSON types: one row per dtype, shape and part, with each contender's median seconds and its time as a
        multiple of ours.
    """
    rows = []
    with torch_threads(options.threads):
        threads = torch.get_num_threads()
        for dtype, place, part in itertools.product(options.dtypes, options.shapes, options.parts):
            rows.append(_row(dtype, GRID[place], part, options))
            progress(f"{dtype} {GRID[place]} {part}: done")
    result = {
        "bench": "kernels",
        "options": asdict(options),
        "torch": torch.__version__,
        "threads": threads,
        "rows": rows,
    }
    write(result, options.output)
    return result


def main(options: Options) -> dict[str, Any]:
    """`run`, with steps on standard error and the table on standard output."""
    result = run(options, to_stderr)
    print(table(result))
    return result


def table(result: Mapping[str, Any]) -> str:
    """Times, and in brackets multiples of ours; then the geometric mean of the best peer's multiple."""
    names = (OURS, *PEERS, "dense")
    rows = []
    for row in result["rows"]:
        cells = [row["dtype"], *(str(row["shape"][key]) for key in "ENDHK"), row["part"]]
        for name in names:
            found = row["results"].get(name)
            cells.append("" if found is None else f"{found['median'] * 1e3:,.2f} ({found['ratio']:.2f})")
        rows.append(cells)
    lines = [
        f"torch {result['torch']}, {result['threads']} threads; milliseconds, in brackets as a multiple of ours",
        "",
    ]
    lines += aligned(["dtype", *"ENDHK", "part", *names], rows)
    for part in result["options"]["parts"]:
        best = [
            min(found["ratio"] for name, found in row["results"].items() if name in PEERS)
            for row in result["rows"]
            if row["part"] == part
        ]
        mean = float(torch.tensor(best).log().mean().exp())
        lines.append(
            f"{part}: the best of transformers takes {mean:.2f} times ours (geometric mean), {min(best):.2f} at least"
        )
    return "\n".join(lines)


def _row(dtype: str, shape: Sequence[int], part: str, options: Options) -> dict[str, Any]:
    experts, tokens, width, hidden, chosen = shape
    calls = contenders(getattr(torch, dtype), shape, part, options)
    timings = alternate(calls, options.rounds, options.slice_seconds)
    return {
        "dtype": dtype,
        "shape": dict(zip("ENDHK", (experts, tokens, width, hidden, chosen), strict=True)),
        "part": part,
        "operations": (1 if part == "forward" else 3) * 2 * tokens * chosen * 3 * width * hidden,
        "results": {
            name: {"median": timing.median, "ratio": timing.ratio(timings[OURS])} for name, timing in timings.items()
        },
    }


def contenders(
    dtype: torch.dtype, shape: Sequence[int], part: str, options: Options
) -> dict[str, Callable[[], object]]:
    """One call per contender, on the same weights, tokens and routing: SwiGLU experts as Qwen3-MoE has them."""
    experts, tokens, width, hidden, chosen = shape
    torch.manual_seed(options.seed)
    config = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=hidden, num_experts=experts, num_experts_per_tok=chosen
    )
    module = Qwen3MoeExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    module.to(dtype)
    x_ND = torch.randn(tokens, width).to(dtype).requires_grad_(part == "full")
    if options.balanced:
        indices_NK = (torch.arange(tokens * chosen) % experts).view(tokens, chosen)
    else:
        indices_NK = torch.rand(tokens, experts).topk(chosen).indices
    weights_NK = torch.rand(tokens, chosen).softmax(-1).to(dtype).requires_grad_(part == "full")
    leaves = [x_ND, weights_NK, *module.parameters()]
    grad_ND = torch.randn(tokens, width).to(dtype)

    def timed(forward: Callable[[], Tensor], of: list[Tensor]) -> Callable[[], object]:
        if part == "full":
            return lambda: torch.autograd.grad(forward(), of, grad_ND)
        return torch.no_grad()(forward)

    def experts_of(name: str) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            config._experts_implementation = name
            return module(x_ND, indices_NK, weights_NK)

        return forward

    names = [OURS, *PEERS]
    if tokens * chosen * 3 * width * hidden * dtype.itemsize > BATCHED_BYTES:
        names.remove("batched_mm")
    if part == "full" and experts * experts * 3 * width * hidden > EAGER_ELEMENTS:
        names.remove("eager")
    calls = {name: timed(experts_of(name), leaves) for name in names}

    copies_SD = torch.randn(tokens * chosen, width).to(dtype).requires_grad_(part == "full")
    up_PD = torch.randn(2 * hidden, width).to(dtype).requires_grad_(part == "full")
    down_DH = torch.randn(width, hidden).to(dtype).requires_grad_(part == "full")
    grad_SD = torch.randn(tokens * chosen, width).to(dtype)

    def dense() -> object:
        y_SD = (copies_SD @ up_PD.t())[:, :hidden] @ down_DH.t()
        return torch.autograd.grad(y_SD, [copies_SD, up_PD, down_DH], grad_SD) if part == "full" else y_SD

    calls["dense"] = dense if part == "full" else torch.no_grad()(dense)
    return calls
