"""The kernels compiled ahead of time, without a GPU: registers, spills, shared memory, tensor-core instructions.

Every launch of a forward and backward is recorded on tensors without data and handed to Triton's compiler and NVIDIA's
assembler, which come in Triton's wheel.

Shapes: `N` tokens, `D` width, `H` hidden width, `E` experts, `K` experts or ranks chosen per token, `R` and `P` ranks
before and after the mix, `T` tasks, `O` output width.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:
    raise ImportError("bench compiled: Triton is not installed; it comes with the extra moe_mtl[triton]") from error

from ..ops import triton_experts, triton_ranks
from ..ops.routing import make_plan
from ..ops.triton_launch import INTERPRETED, Launch, recorded
from ..ops.weights import ExpertWeights, PerInput
from .report import aligned, require_known, to_stderr, write

# Shared memory of one program, and the instruction of its tensor cores for tiles of at least 64 rows, per compute
# capability; lower tiles go through HMMA everywhere.
TARGETS = {80: (163 * 1024, "HMMA"), 90: (227 * 1024, "HGMMA"), 100: (227 * 1024, "UTC.MMA|HMMA")}
# E, N, D, H, K: the experts of Qwen3-30B; few tokens per expert; rows that start off 16 bytes.
SHAPES = ((128, 32768, 2048, 768, 8), (64, 256, 256, 512, 1), (8, 4096, 97, 47, 2))
# N, D, O, K, T of the rank kernels, and R per dtype; float32, whose tiles differ less, at one: compiling takes seconds.
RANK_SHAPE = (4096, 4096, 4096, 8, 4)
RANKS = {"bfloat16": (32, 128), "float16": (32, 128), "float32": (32,)}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of one launch.

    Attributes:
        capability: compute capability times ten.
        registers: per thread.
        spilled: bytes of a thread's stack.
        shared: bytes of a program's shared memory.
        tensor_core: instructions of the tensor cores, of the kind `TARGETS` names for tiles of that many rows.
    """

    kernel: str
    capability: int
    dtype: str
    rows: int
    cols: int
    num_warps: int
    registers: int
    spilled: int
    shared: int
    tensor_core: int


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles `launch` for one architecture."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        # None and 1 as the launcher specialises.
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        # The disassembler takes half a second for the smallest program; without products in PTX there are none below.
        code = _tool("nvdisasm", cubin.name) if "mma" in compiled.asm["ptx"] else ""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    data = next(value for value in launch.arguments.values() if isinstance(value, Tensor))
    rows = launch.arguments.get("ROWS", 0)
    return Compiled(
        kernel=launch.kernel.fn.__name__,
        capability=capability,
        dtype=str(data.dtype).removeprefix("torch."),
        rows=rows,
        cols=launch.arguments.get("COLS", 0),
        num_warps=launch.num_warps,
        registers=registers,
        spilled=stack + local,
        shared=compiled.metadata.shared,
        tensor_core=len(re.findall(TARGETS[capability][1] if rows >= 64 else "HMMA", code)),
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def launches(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, activation: str = "swiglu", biased: bool = False
) -> list[Launch]:
    """Of a forward and a backward, router's gradient included, at `E, N, D, H, K`."""
    experts, tokens, width, hidden, selected = shape

    def empty(*sizes: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(*sizes, dtype=of, device="meta")

    wide = hidden * (2 if activation in triton_experts.GATED else 1)
    w = ExpertWeights(empty(experts, wide, width), empty(experts, width, hidden))
    if biased:
        w.b_up_EP, w.b_down_EO = empty(experts, wide), empty(experts, width)
    x_ND, weights_NK = empty(tokens, width), empty(tokens, selected, of=torch.float32)
    needs = PerInput(*[True] * 4, False, biased, biased, False)
    with recorded() as found:
        plan = make_plan(empty(tokens, selected, of=torch.int64), experts, "triton")
        _, kept = triton_experts.forward(x_ND, weights_NK, w, plan, activation, True)
        triton_experts.backward(empty(tokens, width), x_ND, kept, weights_NK, w, plan, activation, needs)
    return found


def rank_launches(ranks: int, dtype: torch.dtype) -> list[Launch]:
    """Of an adapter's down-projection, bare and with all there is, then of up-projection and backward."""
    tokens, width, outputs, selected, tasks = RANK_SHAPE

    def empty(*sizes: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*sizes, dtype=of, device="meta")

    x_ND, a_RD = empty(tokens, width, of=dtype), empty(ranks, width, of=dtype)
    b_OP, base_NO = empty(outputs, ranks, of=dtype), empty(tokens, outputs, of=dtype)
    gate_NP, mix_TPR, bias_P = empty(tokens, ranks), empty(tasks, ranks, ranks), empty(ranks)
    tasks_N = empty(tokens, of=torch.int64)
    with recorded() as found:
        triton_ranks.down(x_ND, a_RD, None, None, None, None, 0.5, 0, False)
        u_NP, z_NP, chosen_NP = triton_ranks.down(x_ND, a_RD, gate_NP, mix_TPR, bias_P, tasks_N, 0.5, selected, True)
        triton_ranks.up(z_NP, b_OP, base_NO)
        triton_ranks.back(base_NO, b_OP, u_NP, gate_NP, chosen_NP, 0.5, True)
    return found


@dataclass(frozen=True)
class Options:
    """What to compile.

    Attributes:
        parts: of experts (with their routing), ranks.
        capabilities: compute capabilities times ten.
        dtypes: of float32, bfloat16, float16.
        shapes: places in the experts' list of shapes, counted from 0; all by default.
        output: folder for compiled.json.
    """

    parts: tuple[str, ...] = ("experts", "ranks")
    capabilities: tuple[int, ...] = tuple(TARGETS)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    shapes: tuple[int, ...] = tuple(range(len(SHAPES)))
    output: str | None = None

    def __post_init__(self) -> None:
        parts, dtypes = ("experts", "ranks"), ("float32", "bfloat16", "float16")
        known = {"parts": parts, "capabilities": TARGETS, "dtypes": dtypes, "shapes": range(len(SHAPES))}
        require_known(self, known)


def run(options: Options, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Compiles every different launch.

    Returns:
        as JSON types: a row per launch and target; see `Compiled`.

    Raises:
        RuntimeError: Triton interprets instead of compiling.
    """
    if INTERPRETED:
        raise RuntimeError("Triton's interpreter is on, which compiles nothing: unset TRITON_INTERPRET")
    found: list[Launch] = []
    for dtype in options.dtypes:
        if "experts" in options.parts:
            for place in options.shapes:
                found += launches(SHAPES[place], getattr(torch, dtype))
        if "ranks" in options.parts:
            for ranks in RANKS[dtype]:
                found += rank_launches(ranks, getattr(torch, dtype))
    different: dict[Any, Launch] = {}
    for launch in found:
        different.setdefault(_identity(launch), launch)
    rows = []
    for capability in options.capabilities:
        for launch in different.values():
            made = compile_launch(launch, capability)
            rows.append(asdict(made))
            progress(f"sm_{capability} {made.kernel}: {made.registers} registers, {made.spilled} bytes spilled")
    result = {"bench": "compiled", "options": asdict(options), "triton": triton.__version__, "rows": rows}
    write(result, options.output)
    return result


def main(options: Options) -> dict[str, Any]:
    """`run`, with steps on standard error and the table on standard output."""
    result = run(options, to_stderr)
    print(table(result))
    return result


def table(result: Mapping[str, Any]) -> str:
    """One line per launch, then what the assembler had to spill."""
    rows = [[f"{value:,}" if isinstance(value, int) else value for value in row.values()] for row in result["rows"]]
    spilled = [row["kernel"] for row in result["rows"] if row["spilled"]]
    return "\n".join(
        [
            *aligned([field.name.replace("_", " ") for field in fields(Compiled)], rows),
            f"triton {result['triton']}; {len(rows)} launches, spilled by {', '.join(spilled) or 'none'}",
        ]
    )


def _identity(launch: Launch) -> tuple[Any, ...]:
    """What makes two launches one compilation, as far as the shapes here differ."""
    arguments = tuple(
        (name, value.dtype if isinstance(value, Tensor) else value)
        for name, value in launch.arguments.items()
        if name.isupper() or value is None or isinstance(value, Tensor)
    )
    return launch.kernel.fn.__name__, arguments, launch.num_warps
