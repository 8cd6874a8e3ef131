"""Rank experts beside the same equation written out: forward, and forward with backward, in turns.

The contender writes its steps one after the other, as published code does: mask times product, the scale on the wide
side, a separate sum with the base's output. What is to gain are bytes, so they are counted: of tensors `N` by `D` or
`O`, each reading and each writing. Times are medians over rounds; ratios are medians of ratios within a round.

Shapes: `N` tokens, `D` width, `R` ranks, `K` of them chosen per token, `T` tasks, `O` output width.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.ranks import rank_experts
from .report import aligned, require_known, to_stderr, write
from .timing import alternate, torch_threads

OURS = "moe_mtl"
DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("lora", "gate", "smora", "flylora", "mtl-lora")
# N, D, O, R, K
GRID = ((256, 768, 768, 32, 8), (1024, 768, 768, 32, 8), (4096, 768, 768, 32, 8), (4096, 4096, 4096, 32, 8))
TASKS = 4
SCALE = 2.0


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        kinds: of lora, gate, smora, flylora, mtl-lora.
        dtypes: of float32, bfloat16, float16.
        parts: of forward, full (forward and backward).
        shapes: places in the grid, counted from 0.
        device: of torch, like cpu or cuda.
        compiled: whether to measure the written-out equation under torch.compile too.
        rounds: measurements of each contender.
        slice_seconds: how long a measurement lasts at least.
        threads: of torch; its own choice by default.
        seed: of the tensors.
        output: folder for ranks.json.
    """

    kinds: tuple[str, ...] = KINDS
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    parts: tuple[str, ...] = ("forward", "full")
    shapes: tuple[int, ...] = (0, 1, 2)
    device: str = "cpu"
    compiled: bool = False
    rounds: int = 9
    slice_seconds: float = 0.05
    threads: int | None = None
    seed: int = 0
    output: str | None = None

    def __post_init__(self) -> None:
        shapes = range(len(GRID))
        require_known(self, {"kinds": KINDS, "dtypes": DTYPES, "parts": ("forward", "full"), "shapes": shapes})
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, found {self.rounds}")


def run(options: Options, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measures.

    Returns:
        as JSON types: one row per dtype, shape, kind and part, with each contender's median seconds, its time as a
        multiple of ours, the bytes it moves, and the floor's bytes over its time.
    """
    rows = []
    with torch_threads(options.threads):
        threads = torch.get_num_threads()
        for dtype, place, kind, part in itertools.product(options.dtypes, options.shapes, options.kinds, options.parts):
            rows.append(_row(dtype, GRID[place], kind, part, options))
            progress(f"{dtype} {GRID[place]} {kind} {part}: done")
    result = {
        "bench": "ranks",
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
    """Times, in brackets multiples of ours; bytes in megabytes; the floor's bytes over our time."""
    names = list(result["rows"][0]["results"])
    rows = []
    for row in result["rows"]:
        cells = [row["dtype"], row["kind"], *(str(size) for size in row["shape"].values()), row["part"]]
        cells += [f"{found['median'] * 1e3:,.2f} ({found['ratio']:.2f})" for found in row["results"].values()]
        cells += [f"{row['bytes'][name] / 1e6:,.1f}" for name in ("floor", OURS, "unfused")]
        rows.append([*cells, f"{row['results'][OURS]['floor_bytes_per_second'] / 1e9:,.1f}"])
    header = ["dtype", "kind", *"NDORK", "part", *names, "floor MB", "ours MB", "unfused MB", "GB/s"]
    where = f"torch {result['torch']}, {result['options']['device']}, {result['threads']} threads"
    lines = [f"{where}; milliseconds, in brackets as a multiple of ours", "", *aligned(header, rows)]
    for part in result["options"]["parts"]:
        ratios = [row["results"]["unfused"]["ratio"] for row in result["rows"] if row["part"] == part]
        mean = float(torch.tensor(ratios).log().mean().exp())
        lines.append(f"{part}: unfused takes {mean:.2f} times ours (geometric mean), {min(ratios):.2f} at least")
    return "\n".join(lines)


def wide_bytes(shape: Sequence[int], part: str, itemsize: int) -> dict[str, int]:
    """Bytes of wide tensors read and written; the floor reads and writes each of them once.

    Unfused, the forward writes the adapter's output, scales it and adds it; the backward scales the gradient first.
    """
    tokens, width, outputs = shape[:3]
    inner, outer = tokens * width * itemsize, tokens * outputs * itemsize
    found = {"floor": inner + 2 * outer, OURS: inner + 2 * outer, "unfused": inner + 6 * outer}
    if part == "full":  # reads the tokens again, writes their gradient
        backward = {"floor": outer, OURS: 2 * outer, "unfused": 4 * outer}
        found = {name: number + backward[name] + 2 * inner for name, number in found.items()}
    return found


def _row(dtype: str, shape: Sequence[int], kind: str, part: str, options: Options) -> dict[str, Any]:
    calls = contenders(getattr(torch, dtype), shape, kind, part, options)
    timings = alternate(calls, options.rounds, options.slice_seconds)
    counted = wide_bytes(shape, part, getattr(torch, dtype).itemsize)
    return {
        "dtype": dtype,
        "shape": dict(zip("NDORK", shape, strict=True)),
        "kind": kind,
        "part": part,
        "bytes": counted,
        "results": {
            name: {
                "median": timing.median,
                "ratio": timing.ratio(timings[OURS]),
                "floor_bytes_per_second": counted["floor"] / timing.median,
            }
            for name, timing in timings.items()
        },
    }


def contenders(
    dtype: torch.dtype, shape: Sequence[int], kind: str, part: str, options: Options
) -> dict[str, Callable[[], object]]:
    """One call per contender, on the same tensors. FlyLoRA's down-projection is frozen, as published."""
    tokens, width, outputs, ranks, chosen = shape
    g = torch.Generator().manual_seed(options.seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(options.device)

    x_ND, base_NO = draw(tokens, width).to(dtype), draw(tokens, outputs).to(dtype)
    a_RD, b_OR = (draw(ranks, width) / width**0.5).to(dtype), draw(outputs, ranks).to(dtype)
    gate_NR = draw(tokens, ranks).softmax(-1).to(dtype) if kind in ("gate", "smora") else None
    mix_TRR = (draw(TASKS, ranks, ranks) / ranks**0.5).to(dtype) if kind == "mtl-lora" else None
    tasks_G = torch.randint(TASKS, (tokens,), generator=g).to(options.device) if kind == "mtl-lora" else None
    bias_R = (0.01 * draw(ranks)).to(dtype) if kind in ("smora", "flylora") else None
    grad_NO = draw(tokens, outputs).to(dtype)
    number = chosen if bias_R is not None else None
    leaves = [t for t in (x_ND, b_OR, base_NO, gate_NR, mix_TRR) if t is not None]
    leaves += [a_RD] if kind != "flylora" else []

    def ours() -> Tensor:
        return rank_experts(
            x_ND,
            a_RD,
            b_OR,
            base_NO,
            scale=SCALE,
            gate_NP=gate_NR,
            num_selected=number,
            bias_P=bias_R,
            mix_TPR=mix_TRR,
            tasks_G=tasks_G,
        )

    def unfused() -> Tensor:
        h_NR = x_ND @ a_RD.t()
        if mix_TRR is not None:
            h_NR = (mix_TRR[tasks_G] @ h_NR.unsqueeze(-1)).squeeze(-1)
        if bias_R is not None:
            key_NR = (h_NR.abs() if gate_NR is None else gate_NR).detach() + bias_R
            h_NR = h_NR * torch.zeros_like(h_NR).scatter(1, key_NR.topk(chosen).indices, 1.0)
        if gate_NR is not None:
            h_NR = h_NR * gate_NR
        return base_NO + (h_NR @ b_OR.t()) * SCALE

    forwards = {OURS: ours, "unfused": unfused}
    if options.compiled:
        forwards["compiled"] = torch.compile(unfused)
    if part == "full":
        for leaf in leaves:
            leaf.requires_grad_()

    def timed(forward: Callable[[], Tensor]) -> Callable[[], object]:
        def call() -> object:
            with torch.set_grad_enabled(part == "full"):
                out_NO = forward()
                found = torch.autograd.grad(out_NO, leaves, grad_NO) if part == "full" else out_NO
            if out_NO.is_cuda:
                torch.cuda.synchronize()
            return found

        return call

    return {name: timed(forward) for name, forward in forwards.items()}
