"""The measurement of models for images, where it is quick: what is predicted, what is counted, what is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_mtl.bench import vision
from moe_mtl.bench.vision import Options
from moe_mtl.cli import main as command

TINY: dict[str, Any] = {
    "models": ("tiny-64x64",),
    "batches": (1,),
    "tokens": 32,
    "width": 16,
    "hidden": 8,
    "experts": (4, 8),
    "selected": 2,
    "memory_size": "tiny",
    "rounds": 1,
    "slice_seconds": 0.0,
}


def test_one_task_and_all_are_compared(tmp_path: Path) -> None:
    result = vision.run(Options(**TINY, parts=("latency", "experts"), output=str(tmp_path)))
    assert json.loads((tmp_path / "vision.json").read_text()) == json.loads(json.dumps(result))
    (row,) = result["latency"]
    counts = row["multiply_adds"]
    assert row["predicted"] == counts["one"] / counts["all"] < 0.5
    assert row["apart"] == row["ratio"] / row["predicted"] - 1
    few, many = result["experts"]
    assert (few["copies_per_expert"], many["copies_per_expert"]) == (16, 8)
    assert few["ratio"] == 1
    told = vision.table(result)
    assert "tiny-64x64" in told
    assert "asked: at most 1.10" in told
    assert "memory" not in told


def test_memory_is_compared_with_what_the_experts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "_in_a_process", lambda folder, offload, threads: 40 * 2**20 if offload else 90 * 2**20)
    found = vision.memory(Options(**TINY))
    assert found["expert_bytes"] == 4 * 6 * 16 * (2 * 192 * 384 + 192 + 384)
    assert found["two_experts_bytes"] == found["expert_bytes"] // 48
    assert found["asked"] == found["expert_bytes"] - found["two_experts_bytes"] < found["model_bytes"]
    assert found["saved"] == 50 * 2**20
    assert found["below_model"] == found["model_bytes"] - 40 * 2**20
    body = 2 * 192 + (192 + 3 * 256) * 256 * 9 + 4 * 3 * 256  # of a head: norm, convolutions, their norms and biases
    heads = {task["name"]: 4 * (body + 257 * task.get("num_outputs", 1)) for task in vision.TASKS}
    assert found["heads_bytes"] == sum(heads.values())
    rest = found["model_bytes"] - found["expert_bytes"] + found["two_experts_bytes"]
    rest -= sum(heads.values()) - heads[vision.TASK]
    assert found["beyond_weights"] == {"held": 90 * 2**20 - found["model_bytes"], "offloaded": 40 * 2**20 - rest}
    told = vision.table({"torch": "", "options": {"threads": 1}, "memory": found})
    lines = {line[:30].strip(): line[30:].strip() for line in told.splitlines()}
    assert lines["peak, offloaded"] == "40.0"
    assert lines["below the model's size"] == f"{found['below_model'] / 2**20:,.1f}"
    for way, size in found["beyond_weights"].items():
        assert lines[f"peak beyond weights, {way}"] == f"{size / 2**20:,.1f}"


def test_where_peaks_cannot_be_measured_sizes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "_in_a_process", lambda folder, offload, threads: None)
    found = vision.memory(Options(**TINY))
    assert found["saved"] is found["below_model"] is None
    assert found["beyond_weights"] == {"held": None, "offloaded": None}
    assert "below the model's size" in vision.table({"torch": "", "options": {"threads": 1}, "memory": found})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parts": ("speed",)}, "parts: expected some of latency, experts, memory"),
        ({"models": ("base",)}, "models: expected some of tiny-64x64"),
        ({"batches": ()}, "batches: expected numbers of at least 1"),
        ({"experts": (2, 8), "selected": 4}, "experts: expected numbers of at least 4"),
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"memory_size": "large"}, "memory_size: expected one of tiny, small, base, found 'large'"),
        ({"slice_seconds": -0.1}, "slice_seconds: expected seconds, at least 0, found -0.1"),
        ({"slice_seconds": float("nan")}, "slice_seconds: expected seconds, at least 0, found nan"),
        ({"slice_seconds": float("inf")}, "slice_seconds: expected seconds, at least 0, found inf"),
        ({"seed": -1}, r"seed: expected an integer in \[0, 2\^63\), found -1"),
        ({"output": f"{__file__}/results"}, "output: expected a folder or none yet, found a file: .*test_bench_vision"),
    ],
)
def test_options_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**given)


def test_the_command_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    command(["bench", "vision", "--help"])
    assert "--memory-size" in capsys.readouterr().out
