"""The kernels of the rank experts, compiled ahead of time for GPUs that need not be there: registers and shared memory.

Run by itself, this file compiles and prints what each kernel takes, as JSON. The tests run it in a process of its own:
where triton interprets, it has nothing to compile.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

KB = 1024
SHARED_BYTES = {80: 163 * KB, 90: 227 * KB, 100: 227 * KB}
DTYPES = {"bfloat16": "*bf16", "float32": "*fp32"}
TOKENS, WIDTH, OUTPUTS, CHOSEN, TASKS = 4096, 4096, 4096, 8, 4
CASES = [(arch, "bfloat16", ranks) for arch in SHARED_BYTES for ranks in (32, 128)]
CASES += [(90, "float32", 32), (90, "float32", 128)]
PARTS = ("down", "down all", "up", "back all")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compile_all() -> dict[str, dict[str, int]]:
    found = {}
    for arch, dtype, ranks in CASES:
        for part in PARTS:
            found[f"sm_{arch} {dtype} {ranks} {part}"] = compile_one(arch, dtype, ranks, part)
    return found


def compile_one(arch: int, dtype: str, ranks: int, part: str) -> dict[str, int]:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    from moe_mtl.ops import triton_ranks as kernels

    like, full = DTYPES[dtype], part.endswith("all")
    name = part.split()[0]
    kernel = {"down": kernels._down_kernel, "up": kernels._up_kernel, "back": kernels._back_kernel}[name]
    tiles = (kernels.expansion if name == "up" else kernels.projection)(TOKENS, ranks, getattr(torch, dtype))
    block = kernels.block(ranks)
    values: dict[str, Any] = {
        "D": WIDTH,
        "O": OUTPUTS,
        "R": ranks,
        "P": ranks,
        "T": TASKS if full else 0,
        "K": min(CHOSEN, ranks) if full else 0,
        "RENORMALISE": full,
        "BLOCK_R": block,
        "BLOCK_P": block,
        "PRECISION": "ieee",
        "UPCAST": False,
        **tiles,
    }
    if not full:
        values |= dict.fromkeys(("gate_ptr", "mix_ptr", "bias_ptr", "tasks_ptr", "chosen_ptr"))
        if name == "down":
            values.pop("chosen_ptr")
    pointers = dict.fromkeys(("x_ptr", "a_ptr", "z_ptr", "b_ptr", "base_ptr", "out_ptr", "grad_ptr"), like)
    pointers |= dict.fromkeys(("gate_ptr", "mix_ptr", "bias_ptr", "h_ptr", "u_ptr", "du_ptr", "dgate_ptr"), "*fp32")
    types = pointers | {"tasks_ptr": "*i64", "chosen_ptr": "*u8", "scale": "fp32", "N": "i32"}
    constants = {key: values[key] for key in kernel.arg_names if key in values}
    signature = {key: "constexpr" if key in constants else types[key] for key in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, key in enumerate(kernel.arg_names)
        if key == "N" or signature[key].startswith("*")
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    options = {key: tiles[key] for key in ("num_warps", "num_stages")}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        done = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    tensor_cores = bool(re.search(r"\b(mma\.sync|wgmma|tcgen05\.mma)", compiled.asm["ptx"]))
    return {key: int(value) for key, value in usage.items()} | {
        "shared": compiled.metadata.shared,
        "tensor_cores": int(tensor_cores),
    }


@pytest.fixture(scope="module")
def usage() -> dict[str, dict[str, int]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("arch", "dtype", "ranks"), CASES)
def test_fits(usage: dict[str, dict[str, int]], arch: int, dtype: str, ranks: int) -> None:
    for part in PARTS:
        name = f"sm_{arch} {dtype} {ranks} {part}"
        assert usage[name]["STACK"] == usage[name]["LOCAL"] == 0, f"{name} spills: {usage[name]}"
        assert usage[name]["shared"] <= SHARED_BYTES[arch], f"{name}: {usage[name]}"
        if dtype == "bfloat16":
            assert usage[name]["tensor_cores"], name


if __name__ == "__main__":
    print(json.dumps(compile_all()))
