"""The measurement of sparse experts at toy size: every contender does the same work."""

import json

import pytest
import torch

from moe_mtl.bench import kernels
from moe_mtl.bench.kernels import GRID, OURS, PEERS, Options, contenders, main

TOY = (4, 12, 8, 16, 2)


@pytest.mark.parametrize("part", ["forward", "full"])
@pytest.mark.parametrize("balanced", [False, True])
def test_contenders_agree(part: str, balanced: bool) -> None:
    calls = contenders(torch.float32, TOY, part, Options(balanced=balanced))
    assert set(calls) == {OURS, *PEERS, "dense"}
    expected = calls["eager"]()
    for name in (OURS, *PEERS):
        torch.testing.assert_close(calls[name](), expected, rtol=1e-4, atol=1e-6, msg=name)
    calls["dense"]()


def test_what_would_not_fit_is_left_out() -> None:
    big = (64, 4096, 256, 512, 1)
    assert big in GRID
    assert set(contenders(torch.bfloat16, big, "forward", Options())) == {OURS, "eager", "grouped_mm", "dense"}


def test_result_and_table(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(kernels, "GRID", (TOY,))
    result = main(Options(dtypes=("float32",), shapes=(0,), rounds=2, slice_seconds=0.0, output=str(tmp_path)))
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == result["rows"]
    assert [row["part"] for row in result["rows"]] == ["forward", "full"]
    assert result["rows"][1]["operations"] == 3 * 2 * 12 * 2 * 3 * 8 * 16
    assert all(row["results"][OURS]["ratio"] == 1 for row in result["rows"])
    assert "the best of transformers takes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": ("int8",)}, "dtypes"),
        ({"parts": ()}, "parts"),
        ({"shapes": (99,)}, "shapes"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}: expected"):
        Options(**options)
