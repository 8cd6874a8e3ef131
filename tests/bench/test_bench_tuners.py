"""The measurement of LoRA experts at toy size: every method does the same work, none is left out in silence."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PolyConfig
from torch import Tensor

from moe_mtl.bench import tuners
from moe_mtl.bench.timing import Timing
from moe_mtl.bench.tuners import ASKED, PEERS, TARGETS, Options, adapted, base_model, batch_of, known_methods, settings
from moe_mtl.cli import main as command
from moe_mtl.ops import expert_linear, make_plan
from moe_mtl.tuners import METHODS, RankConfig
from moe_mtl.tuners._base import RankAdapter, RankLayer
from moe_mtl.tuners._tuner import RankTuner

NAMES = [str(name) for name in METHODS.values()]
BY_TASK = [str(name) for config, name in METHODS.items() if config.adapter_class.by_task]
MERGED = [str(name) for config, name in METHODS.items() if not config.adapter_class.depends_on_input]
TINY = Options(
    width=16, layers=1, batch=6, length=4, r=4, tasks=3, rounds=2, slice_seconds=0, device="cpu", dtype="float32"
)
TIMED = ("step", "mixed", "more", "forward")


def tiny(**options: Any) -> Options:
    return dataclasses.replace(TINY, **options).resolved()


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return tuners.run(dataclasses.replace(TINY, parts=TIMED))


def test_every_method_is_measured_or_told_to_be_left_out(result) -> None:
    rows = [row["method"] for row in result["rows"]]
    assert rows[0] == "LORA"
    assert sorted([*rows, *result["left_out"]]) == sorted([*PEERS, *NAMES])
    assert all(result["left_out"].values())
    known = {"FLYLORA", "HYDRA_LORA", "LORI", "MOE_LORA", "MTL_LORA", "SMORA"}
    assert known <= set(rows)


def test_each_row_holds_what_its_method_is_compared_with(result) -> None:
    for row in result["rows"]:
        tasks = {"mixed", "more"} if {"tasks", "task_ids"} & set(row["call"]) else set()
        wide = {"step_all_ranks"} if row["ranks"] and max(row["ranks"].values()) > 4 else set()
        assert set(row["ratios"]) == {"step"} | tasks | wide, row["method"]
        assert row["peer"] == (row["method"] in PEERS)
        forward = row["forward"]
        merged = {"merged"} if forward["why_not_merged"] is None else set()
        assert set(forward["ratios"]) == {"again", "lora", "adapter"} | merged
        for found in (*row["ratios"].values(), *forward["ratios"].values()):
            assert 0 < found["low"] <= found["ratio"] <= found["high"]
        if row["method"] in NAMES:
            assert bool(merged) == (row["method"] in MERGED), forward["why_not_merged"]
            assert bool(tasks) == (row["method"] in BY_TASK)


def test_a_merged_task_has_the_parameters_of_the_base(result) -> None:
    found = {row["method"]: row["forward"]["merged_parameters"] for row in result["rows"]}
    assert {name for name, number in found.items() if number == result["base_parameters"]} == {"LORA", *MERGED}
    assert set(found.values()) == {None, result["base_parameters"]}


def test_operations_of_a_step(result) -> None:
    """Of LoRA by hand: base and adapter forward, and the gradients of what is trained or lies after it."""
    row = {row["method"]: row for row in result["rows"]}
    tokens, r, width, inner, head = 24, 4, 16, 44, 512
    adapter = sum(r * (i + o) for i, o in [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)])
    base = 4 * width * width + 3 * width * inner
    # Nothing reaches q, k and v's input, the embeddings: they are frozen.
    reached = base - 3 * width * width + width * head
    unreached = 3 * r * width
    products = 2 * tokens * (base + width * head + reached + 3 * adapter - unreached)
    attention = row["LORA"]["operations"]["lora"] - products
    assert 0 <= attention < 0.1 * products
    assert row["LORA"]["ratios"]["step"]["operations"] == 1
    assert row["MOE_LORA"]["ratios"]["step_all_ranks"]["operations"] == pytest.approx(1, abs=0.05)  # its gate is small
    assert row["LORI"]["ratios"]["step"]["operations"] < 1  # its down-projection is frozen


def test_operations_are_not_told_where_kernels_hide_some() -> None:
    x_ND, w_EDO = torch.randn(16, 8, requires_grad=True), torch.randn(4, 8, 32)
    assert tuners.operations_of(lambda: x_ND @ w_EDO[0]) == 2 * 16 * 8 * 32
    plan = make_plan(torch.arange(16).view(16, 1) % 4, 4)

    def step() -> None:
        (expert_linear(x_ND, w_EDO.transpose(1, 2), plan).sum() + (x_ND @ w_EDO[0]).sum()).backward()

    assert tuners.operations_of(step) is None


def test_the_worst_are_of_the_package(result) -> None:
    assert set(result["criteria"]) == set(ASKED)
    for part, found in result["criteria"].items():
        own = [tuners.ratio_of(row, part) for row in result["rows"] if not row["peer"]]
        assert found["worst"] == max(ratio["ratio"] for ratio in own if ratio)
        assert found["method"] in NAMES
        assert found["asked"] == ASKED[part]
    rows = [
        {"method": "A", "peer": False, "ratios": {"step": {"ratio": 1.2}}},
        {"method": "B", "peer": False, "ratios": {"step": {"ratio": 1.3}}, "forward": {"ratios": {}}},
        {"method": "C", "peer": True, "ratios": {"step": {"ratio": 9.0}}},
    ]
    assert tuners.criteria(rows) == {"step": {"worst": 1.3, "method": "B", "asked": 1.25}}


def test_table(result) -> None:
    told = tuners.table(result)
    for name in ("LORA", "POLY", *NAMES):
        assert f"\n{name} " in told
    assert "worst: step / LoRA " in told
    assert "not merged: SMORA cannot be merged: its ranks are chosen token by token" in told
    assert "beside itself LoRA " in told
    assert "left out" not in told


def test_result_on_disk_and_memory(tmp_path, capsys) -> None:
    options = dataclasses.replace(TINY, methods=("LORA",), parts=("memory",), output=str(tmp_path))
    found = tuners.main(options)
    assert json.loads((tmp_path / "tuners.json").read_text())["rows"] == found["rows"]
    (row,) = found["rows"]
    assert "seconds" not in row
    assert row["memory"] is None or row["memory"] >= 0
    out, err = capsys.readouterr()
    assert "peak" in out
    assert "worst" not in out
    assert "LORA: memory measured" in err


@pytest.mark.parametrize("name", known_methods())
def test_methods_do_the_same_work(name: str) -> None:
    """One base, whose weights none has for itself; the same layers, rank, and scale; the same tokens."""
    options = tiny()
    base = base_model(options)
    config = settings(known_methods()[name], options, options.tasks)
    assert config.r == options.r
    if config.__class__.__name__ == "MixLoraConfig":
        with pytest.raises(ValueError, match="target_modules: expected a feed-forward block"):
            adapted(base, config)
        return  # it gets other layers, and LoRA beside it the same
    model = adapted(base, config)
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == set(TARGETS)
    assert len(model.targeted_module_names) == 7
    own = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    frozen = {id(parameter) for parameter in base.parameters()}
    assert own == frozen
    assert torch.equal(batch_of(options), batch_of(options))
    if isinstance(config, LoraConfig):
        assert config.lora_alpha / config.r == 2
    elif isinstance(config, RankConfig):
        assert config.scale == 2 or config.scaling == "alpha", "a scale that does not know the rank is as published"


def test_a_step_trains_and_balances() -> None:
    options = tiny()
    base = base_model(options)
    ids_BL = batch_of(options)
    config_class = known_methods()["SMORA"]
    model = adapted(base, settings(config_class, options, 3))
    assert settings(config_class, options, 3).num_selected == 1
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    bias = {name: buffer.clone() for name, buffer in model.named_buffers() if "bias_P" in name}
    tuners.step_of(model, ids_BL, {})()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert "b_OP" not in name or not torch.equal(parameter, before[name]), name
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name
    assert bias
    assert any(not torch.equal(buffer, bias[name]) for name, buffer in model.named_buffers() if name in bias)


def test_calls_are_of_tasks_in_turns_or_of_one() -> None:
    options = tiny()
    assert tuners.keywords(["tasks"], options, 4)["tasks"] == [f"task_{i}" for i in (0, 1, 2, 3, 0, 1)]
    assert tuners.keywords(["tasks"], options, 4, single=True)["tasks"] == ["task_0"] * 6
    assert tuners.keywords(["task_ids"], options, 3)["task_ids"].tolist() == [0, 1, 2, 0, 1, 2]
    assert tuners.keywords([], options, 3) == {}


def test_a_method_that_computes_something_else_stops_the_run(monkeypatch) -> None:
    true = RankAdapter.forward
    monkeypatch.setattr(RankAdapter, "forward", lambda self, *inputs: 1.1 * true(self, *inputs))
    with pytest.raises(RuntimeError, match="LORI before training computes something else: its output is off by"):
        tuners.run(dataclasses.replace(TINY, methods=("LORI",), parts=("step",)))


def test_a_merge_that_computes_something_else_stops_the_run(monkeypatch) -> None:
    true = RankLayer.lora_of
    monkeypatch.setattr(RankLayer, "lora_of", lambda self, *of: (true(self, *of)[0], 2 * true(self, *of)[1]))
    with pytest.raises(RuntimeError, match="LoRIConfig, merged, computes something else"):
        tuners.run(dataclasses.replace(TINY, methods=("LORI",), parts=("forward",)))


# Methods of other shapes: what they need is found out, or they are left out with the reason.


def extended(monkeypatch: pytest.MonkeyPatch, config_class: type[PeftConfig]) -> dict[str, Any]:
    monkeypatch.setitem(METHODS, config_class, METHODS[next(c for c, name in METHODS.items() if name == "LORI")])
    known = {"LORA": LoraConfig, "OTHER": config_class}
    monkeypatch.setattr(tuners, "known_methods", lambda: known)
    return tuners.run(dataclasses.replace(TINY, parts=("step",)))


def lori() -> type[RankConfig]:
    return next(config for config, name in METHODS.items() if name == "LORI")


def test_a_config_that_needs_something_unknown(monkeypatch) -> None:
    @dataclass
    class Config(lori()):
        mesh: str = dataclasses.field(kw_only=True)

    found = extended(monkeypatch, Config)
    assert found["left_out"] == {"OTHER": "its config needs mesh, of which nothing is known here"}
    assert "left out: OTHER, its config needs mesh" in tuners.table(found)


def test_a_config_that_refuses(monkeypatch) -> None:
    @dataclass
    class Config(lori()):
        def __post_init__(self) -> None:
            raise ValueError("mesh: expected one, found none")

    found = extended(monkeypatch, Config)
    assert found["left_out"] == {"OTHER": "its config refuses what is known here: mesh: expected one, found none"}


def test_a_config_that_asks_for_tasks(monkeypatch) -> None:
    @dataclass
    class Config(lori()):
        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.tasks:
                raise ValueError("tasks: expected names, found none")

    assert extended(monkeypatch, Config)["left_out"] == {}
    assert settings(Config, tiny(), 3).tasks == ["task_0", "task_1", "task_2"]


def test_a_method_that_takes_other_layers(monkeypatch) -> None:
    @dataclass
    class Config(lori()):
        pass

    true = RankTuner._create_and_replace

    def replace(self: RankTuner, config: Any, name: str, target: Any, target_name: str, *rest: Any, **more: Any) -> Any:
        if isinstance(config, Config) and target_name == "k_proj":
            raise ValueError("target_modules: expected no keys, found k_proj")
        return true(self, config, name, target, target_name, *rest, **more)

    monkeypatch.setattr(RankTuner, "_create_and_replace", replace)
    found = extended(monkeypatch, Config)
    row = found["rows"][1]
    assert row["targets"] == ["q_proj", "v_proj"]
    # LoRA beside it adapts no more: what it trains besides are the gradients of the down-projections.
    assert 0 < row["operations"]["lora"] - row["operations"]["step"] < 2 * 24 * (4 * 16 * 2) + 1
    assert row["operations"]["lora"] < found["rows"][0]["operations"]["lora"]
    assert "not all linear layers: OTHER adapts q_proj, v_proj, LoRA beside it the same" in tuners.table(found)


@pytest.mark.parametrize("keyword", ["preference", "mesh"])
def test_a_call_that_needs_a_keyword(monkeypatch, keyword: str) -> None:
    @dataclass
    class Config(lori()):
        pass

    asked: list[Any] = []
    true = PeftModel.__call__

    def call(self: PeftModel, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(self.peft_config["default"], Config):
            if keyword not in kwargs:
                raise ValueError(f"{keyword}: expected a weight per task, found none")
            asked.append(kwargs.pop(keyword))
        return true(self, *args, **kwargs)

    monkeypatch.setattr(PeftModel, "__call__", call)
    found = extended(monkeypatch, Config)
    if keyword == "preference":
        assert found["left_out"] == {}
        assert found["rows"][1]["call"] == ["preference"]
        assert asked[0] == [1 / 3] * 3
    else:
        reason = "a call is refused: mesh: expected a weight per task, found none"
        assert found["left_out"] == {"OTHER": reason}


def test_peers_that_refuse_are_left_out(monkeypatch) -> None:
    def refuse(self: PolyConfig) -> None:
        raise ValueError("no")

    monkeypatch.setattr(PolyConfig, "__post_init__", refuse)
    found = tuners.run(dataclasses.replace(TINY, methods=("POLY",), parts=("step",)))
    assert found["left_out"] == {"POLY": "its config refuses what is known here: no"}


def test_compared() -> None:
    found = tuners.compared(Timing((2.0, 6.0, 4.0)), Timing((1.0, 2.0, 4.0)))
    assert found == {"ratio": 2.0, "low": 1.5, "high": 2.5}
    assert tuners.compared(Timing((3.0,)), Timing((2.0,))) == {"ratio": 1.5, "low": 1.5, "high": 1.5}


def test_plot(result) -> None:
    pytest.importorskip("matplotlib")
    drawn = tuners.plot(result)
    assert drawn is not None
    assert b"asked: 1.25" in drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("LORA", "MOLE")}, "methods"),
        ({"methods": ()}, "methods"),
        ({"parts": ("speed",)}, "parts"),
        ({"device": "tpu"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"r": 0}, "r"),
        ({"tasks": 1}, "tasks"),
        ({"batch": 1}, "batch"),
        ({"width": 18}, "width"),
        ({"layers": 0}, "layers"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}: expected"):
        Options(**options)


def test_on_the_command_line(capsys) -> None:
    sizes = "--width 16 --layers 1 --batch 2 --length 4 --rounds 1 --slice-seconds 0 --device cpu --parts step"
    assert command(["bench", "tuners", "--methods", "LORI", *sizes.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["methods"] == ["LORA", "LORI"]
    assert found["options"]["dtype"] == "float32"
    assert command(["bench", "tuners", "--methods", "MOLE"]) != 0
    assert "methods: expected some of LORA, POLY" in capsys.readouterr().err
