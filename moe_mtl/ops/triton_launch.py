"""How every Triton kernel is started: in one place, so that what would be launched can be compiled without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# The interpreter of Triton (TRITON_INTERPRET=1, read when kernels are defined) computes on the CPU: for tests.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Launch:
    """What one kernel would be started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """For the compiler. Left alone the assembler spills two registers of a small kernel to save ten."""
        registers = {"maxnreg": 255} if self.num_warps <= 4 else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **registers}


_recorded: list[Launch] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], *, num_warps: int = 4, num_stages: int = 3
) -> None:
    """Starts `kernel` on the device of its tensors."""
    one = Launch(kernel, grid, arguments, num_warps, num_stages)
    if _recorded is not None:
        _recorded.append(one)
    elif INTERPRETED:
        kernel[grid](**arguments)
    else:
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device(device):
            kernel[grid](**arguments, **one.options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block nothing is launched; yields what would have been. Tensors may be on the meta device."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def numerics(dtype: torch.dtype) -> dict[str, object]:
    """How products are taken: single precision as torch is told to; the interpreter cannot multiply bfloat16."""
    return {
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
    }


def why_not(tensor: Tensor) -> str | None:
    """What keeps a kernel from working on `tensor`, if anything does."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels compute in float32, bfloat16 and float16, found {tensor.dtype}"
    if tensor.device.type != "cuda" and not INTERPRETED:
        return f"Triton needs a CUDA device, found tensors on {tensor.device}"
    return None
