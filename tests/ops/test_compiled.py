"""The kernels compiled ahead of time, without a GPU: no spills, shared memory within the limit, tensor cores in use."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Of one program: sm_80 163 KiB, the others 227 KiB.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PRODUCTS = {"first_layer_kernel", "linear_kernel", "hidden_grad_kernel", "outer_kernel"}
RANK_PRODUCTS = {"rank_down_kernel", "rank_up_kernel", "rank_back_kernel"}


@pytest.fixture(scope="module", params=sorted(SHARED))
def rows(request: pytest.FixtureRequest) -> list[dict]:
    # By itself: in this process Triton may have been told to interpret.
    command = [sys.executable, "-W", "ignore", "-m", "moe_mtl.cli", "bench", "compiled"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--capabilities", str(request.param), "--json"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


def test_nothing_spills_and_shared_memory_suffices(rows: list[dict]) -> None:
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED[row["capability"]], row


def test_every_kernel_of_a_forward_and_backward_was_compiled(rows: list[dict]) -> None:
    routing = {"count_kernel", "scan_kernel", "scatter_kernel", "tiles_kernel"}
    assert {row["kernel"] for row in rows} == PRODUCTS | RANK_PRODUCTS | routing | {"combine_kernel"}


def test_products_in_bfloat16_use_the_tensor_cores(rows: list[dict]) -> None:
    """On sm_90 by wgmma where tiles have at least 64 rows, which is what wgmma takes."""
    products = [row for row in rows if row["kernel"] in PRODUCTS | RANK_PRODUCTS and row["dtype"] == "bfloat16"]
    assert {row["kernel"] for row in products} == PRODUCTS | RANK_PRODUCTS
    assert {row["kernel"] for row in products if row["rows"] >= 64} == PRODUCTS | {"rank_up_kernel"}
    for row in products:
        assert row["tensor_core"] > 0, row
