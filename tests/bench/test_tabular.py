"""Tiny runs of the benchmark, its floor, its timing and its files. Nothing here looks at how long something took."""

import dataclasses
import importlib
import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_mtl import cli
from moe_mtl.bench import memory, tabular
from moe_mtl.bench.contenders import Ours, contenders
from moe_mtl.bench.report import aligned, table
from moe_mtl.bench.rows import CATEGORIES, first, generated_rows
from moe_mtl.bench.timing import Timing, alternate
from moe_mtl.bench.work import Shape, floor_calls
from moe_mtl.cli import bench
from moe_mtl.cli._arguments import Parser

SMALL = {"num_numeric": 3, "expert_dims": (4, 5), "tower_dims": (6,)}


def test_multiply_adds_of_mmoe_are_those_counted_by_hand():
    shape = Shape(0, 2, num_experts=2, **SMALL)
    experts = 2 * (3 * 4 + 4 * 5)
    gates = 2 * (3 * 2)
    towers = 2 * (5 * 6 + 6 * 1)
    assert shape.multiply_adds() == experts + gates + towers == 148


def test_multiply_adds_of_ple_are_those_counted_by_hand():
    shape = Shape(2, 2, num_specific=3, num_shared=1, **SMALL)
    first_level = 7 * (3 * 4 + 4 * 5) + 2 * 3 * (3 + 1) + 3 * 7  # experts, task gates, shared gate
    last_level = 7 * (5 * 4 + 4 * 5) + 2 * 5 * (3 + 1)  # no shared gate
    assert shape.multiply_adds() == first_level + last_level + 72


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_our_model_holds_the_counted_weights(levels):
    shape = Shape(levels, 3, categories=(5, 7), **SMALL)
    model = Ours().build(shape)
    weights = [p.numel() for name, p in model.named_parameters() if "bias" not in name and "embedding" not in name]
    assert sum(weights) == shape.multiply_adds()
    assert shape.input_dim == model.encoder.output_dim == 3 + 2 * 8


@pytest.mark.parametrize("levels", [0, 2])
def test_both_forms_of_the_floor_do_the_counted_work(levels):
    shape, batch = Shape(levels, 2, **SMALL), 8
    for call in floor_calls(shape, batch).values():
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == 2 * batch * shape.multiply_adds()


def test_contenders_take_turns_and_the_order_rotates():
    calls = []
    timings = alternate({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    assert calls == list("abc") + list("abc") + list("bca") + list("cab")
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3, 3]


def test_ratio_is_the_median_of_ratios_side_by_side():
    ours, theirs = Timing((1.0, 10.0, 2.0)), Timing((3.0, 20.0, 2.0))
    assert theirs.ratio(ours) == 2.0
    assert (ours.median, ours.best) == (2.0, 1.0)


def test_generated_rows_are_in_range_and_depend_on_the_seed():
    rows, categories = generated_rows(200, seed=1)
    assert rows["categorical"].shape == (200, len(CATEGORIES))
    assert (rows["categorical"] < torch.tensor(categories)).all()
    assert (rows["categorical"] >= 0).all()
    assert set(rows["labels"].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(rows["numeric"], generated_rows(200, seed=1)[0]["numeric"])
    assert not torch.equal(rows["numeric"], generated_rows(200, seed=2)[0]["numeric"])
    assert len(first(rows, 7)["labels"]) == 7


@pytest.mark.parametrize("contender", contenders()[0], ids=lambda c: c.name)
def test_every_contender_answers_every_task_and_learns(contender):
    rows, categories = generated_rows(96, seed=0)
    shape = Shape(2, 2, 7, categories, expert_dims=(4,), tower_dims=(3,))
    torch.manual_seed(0)
    model = contender.build(shape)
    before = [p.detach().clone() for p in model.parameters()]
    contender.epoch(model, shape, rows, 32)()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    answer = contender.forward(model, shape, rows)()
    shapes = [value.shape for value in answer.logits.values()] if isinstance(contender, Ours) else [answer.shape]
    assert sum(s[-1] for s in shapes) == 2
    assert all(s[0] == 96 for s in shapes)


def test_absent_peers_are_said_to_be(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found, versions = contenders()
    assert [c.name for c in found] == ["moe_mtl"]
    assert versions["torch-rechub"] == versions["deepctr-torch"] == "not installed"


def test_a_run_gives_a_file_and_a_table(tmp_path, capsys):
    options = tabular.Options(
        parts=("latency", "training"),
        models=("mmoe", "ple-2"),
        tasks=(2,),
        batches=(2,),
        training_batches=(32,),
        rows=64,
        rounds=1,
        training_rounds=1,
        output=str(tmp_path / "out"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tabular, "SLICE_SECONDS", 0.0)
        result = tabular.main(options)
    assert json.loads((tmp_path / "out" / "tabular.json").read_text()) == result
    for part in ("latency", "training"):
        assert [(row["model"], row["tasks"]) for row in result[part]] == [("mmoe", 2), ("ple-2", 2)]
        for row in result[part]:
            assert "moe_mtl" in row["results"]
            ours = row["results"]["moe_mtl (folded)" if part == "latency" else "moe_mtl"]
            assert ours["ratio_to_ours"] == 1.0
            assert row["floor"] == min(row["floors"].values()) > 0
            assert {"parameters", "median", "best", "ratio_to_floor", "seconds"} <= set(ours)
    assert result["training"][0]["results"]["moe_mtl"]["rows_per_second"] > 0
    printed = capsys.readouterr().out
    assert printed == table(result) + "\n"
    for text in ("latency:", "training:", "floor", "parameters of each", "moe_mtl"):
        assert text in printed


def test_peak_memory_comes_from_a_process_that_trains(monkeypatch):
    shape = Shape(0, 2, 7, CATEGORIES, expert_dims=(4,), tower_dims=(3,))

    def here(command, **options):  # the same work without the seconds that a new process takes to import
        assert command[1:3] == ["-m", "moe_mtl.bench.memory"]
        return subprocess.CompletedProcess(
            command, 0, "noise\n" + json.dumps(memory._measure(json.loads(command[3]))), ""
        )

    monkeypatch.setattr(subprocess, "run", here)
    found = memory.peak_memory("moe_mtl", shape, rows=128, batch_size=64, seed=0, threads=torch.get_num_threads())
    assert found["peak"] > found["above_imports"] >= 0
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "why"))
    with pytest.raises(RuntimeError, match="memory of moe_mtl failed: why"):
        memory.peak_memory("moe_mtl", shape, rows=128, batch_size=64, seed=0, threads=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("parts", ("speed",)), ("models", ("moe",)), ("tasks", (1,)), ("batches", (0,)), ("rounds", 0), ("threads", 0)],
)
def test_options_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        tabular.Options(**{field: value})


def test_columns_are_aligned():
    lines = aligned(["a", "long"], [["xyz", "1"], ["b", "22"]])
    assert lines == ["a    long", "---  ----", "xyz     1", "b      22"]
    assert aligned(["a", "b"], [["x", ""]]) == ["a  b", "-  -", "x"]  # nothing trails


def test_the_commands_of_the_page_reach_their_measurement(monkeypatch):
    """What BENCHMARKS.md tells to type needs no other way in: `main`, with --json `run`, gets those options."""
    page = Path(__file__).parents[2] / "BENCHMARKS.md"
    lines = [line for line in page.read_text().splitlines() if line.startswith("moe-mtl bench ")]
    assert {shlex.split(line)[2] for line in lines} >= {"tabular", "trees"}
    for line in lines:
        name, *options = shlex.split(line, comments=True)[2:]
        measurement = importlib.import_module(f"moe_mtl.bench.{name}")
        called = []
        monkeypatch.setattr(measurement, "main", called.append)
        monkeypatch.setattr(measurement, "run", lambda options, say, called=called: called.append(options))
        assert cli.main(["bench", name, *options]) == 0, line
        assert type(called[0]) is measurement.Options
        if name == "tabular":
            assert called[0].data == "census-income.test.gz"
            assert called[0].parts == ("latency", "training")


def test_wrapped_help_of_an_option_is_whole(capsys):
    @dataclasses.dataclass(frozen=True)
    class Options:
        """What.

        Attributes:
            first: begins here
                and goes on over
                100 % of three lines.
            second: alone.

        Raises:
            third: no option.
        """

        first: int = 1
        second: str | None = None
        third: bool = False

    parser = Parser(prog="x")
    bench.declare(parser, Options)
    told = {action.dest: action.help for action in parser._actions}
    assert told["first"] == "begins here and goes on over 100 %% of three lines."
    assert told["second"] == "alone."
    assert told["third"] == ""


@pytest.mark.parametrize("name", bench.benches())
def test_every_option_of_every_measurement_has_its_help(name):
    options = importlib.import_module(f"moe_mtl.bench.{name}").Options
    parser = Parser(prog=name)
    bench.declare(parser, options)
    told = {action.dest: action.help or "" for action in parser._actions}
    for field in dataclasses.fields(options):
        assert told[field.name].endswith("."), field.name
