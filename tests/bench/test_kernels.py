"""The measurement of sparse experts at toy size: every contender does the same work."""

import json
import os

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_mtl.bench import kernels
from moe_mtl.bench.kernels import GRID, OURS, SMALL, TRANSFORMERS, Options, contenders, main
from moe_mtl.bench.memory import peak_of_call, process_that_gives_back

TOY = (4, 12, 8, 16, 2)


@pytest.mark.parametrize("part", ["forward", "full"])
@pytest.mark.parametrize("balanced", [False, True])
def test_contenders_agree(part: str, balanced: bool) -> None:
    calls = contenders(torch.float32, TOY, part, Options(balanced=balanced, device="cpu"))
    assert set(calls) == {OURS, *TRANSFORMERS, "dense"}
    expected = calls["eager"]()
    for name in (OURS, *TRANSFORMERS):
        torch.testing.assert_close(calls[name](), expected, rtol=1e-4, atol=1e-6, msg=name)
    calls["dense"]()


def test_what_would_not_fit_is_left_out() -> None:
    big = (64, 4096, 256, 512, 1)
    assert big in GRID
    assert set(contenders(torch.bfloat16, big, "forward", Options(device="cpu"))) == {
        OURS,
        "eager",
        "grouped_mm",
        "dense",
    }


def test_result_and_table(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(kernels, "GRID", (TOY,))
    result = main(Options(("float32",), device="cpu", shapes=(0,), rounds=2, memory=True, output=str(tmp_path)))
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == result["rows"]
    assert [row["part"] for row in result["rows"]] == ["forward", "full"]
    assert result["rows"][1]["operations"] == 3 * 2 * 12 * 2 * 3 * 8 * 16
    assert all(row["results"][OURS]["ratio"] == 1 for row in result["rows"])
    for row in result["rows"]:
        ours = row["results"][OURS]
        assert ours["operations_per_second"] == row["operations"] / ours["median"]
        assert ours["peak"] is None or ours["peak"] >= 0
    out = capsys.readouterr().out
    assert "the best peer takes" in out
    assert ("peak memory of a call" in out) == (result["rows"][0]["results"][OURS]["peak"] is not None)


def test_a_contender_that_computes_something_else_stops_the_run(monkeypatch) -> None:
    true = Qwen3MoeExperts.forward
    monkeypatch.setattr(
        Qwen3MoeExperts,
        "forward",
        lambda self, *inputs: true(self, *inputs) * (2 if self.config._experts_implementation == "batched_mm" else 1),
    )
    with pytest.raises(RuntimeError, match="batched_mm computes something else: its output is off by"):
        contenders(torch.float32, TOY, "forward", Options(device="cpu"))


def test_the_least_bytes() -> None:
    """By hand for one expert, one token: x, three matrices and y; then gradients, and what the activation was given."""
    assert kernels.least_bytes((1, 1, 2, 3, 1), "forward", 4) == 4 * (2 + 18 + 2)
    assert kernels.least_bytes((1, 1, 2, 3, 1), "full", 4) == 4 * (3 * 2 + 3 * 2 + 3 * 18 + 2 * 6)


def test_a_cpu_measures_the_small_shapes() -> None:
    assert Options(device="cpu").grid == list(SMALL)
    assert Options(device="cpu", shapes=(9,)).grid == [GRID[9]]


def test_a_process_that_gives_back_is_told_so_when_it_starts() -> None:
    before = dict(os.environ)
    with process_that_gives_back() as pool:
        assert pool.submit(os.getenv, "MALLOC_MMAP_THRESHOLD_").result() == "65536"
    assert dict(os.environ) == before


def test_peak_of_call() -> None:
    found = peak_of_call(lambda: torch.ones(2**22).sum(), "cpu")
    assert found is None or 0.95 * 2**24 <= found < 2**25  # Linux counts pages a few dozen at a time


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": ("int8",)}, "dtypes"),
        ({"parts": ()}, "parts"),
        ({"shapes": (99,)}, "shapes"),
        ({"rounds": 0}, "rounds"),
        ({"device": "tpu"}, "device"),
        ({"device": "cpu", "tune": True}, "tune"),
    ],
)
def test_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}: expected"):
        Options(**options)
