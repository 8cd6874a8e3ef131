"""Models for tables folded for inference: the same answers in fewer products, and nothing else changes."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from moe_mtl.models import MultiTaskModel

all_variants = pytest.mark.parametrize("variant", zoo.VARIANTS)
# Rows that go through at once, and more than that.
all_rows = pytest.mark.parametrize("rows", [1, 70, 1100])
# Whose trunk answers for all tasks at once.
JOINED = {"cgc", "mmoe", "ple"}


def precise(variant: str) -> MultiTaskModel:
    return zoo.variant_of(variant).double().eval()


def inputs_of(model: MultiTaskModel, rows: int = 70) -> dict[str, Tensor]:
    inputs = zoo.inputs_of(model.config, rows=rows)
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


@torch.no_grad()
def answers(model: Any, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    output = model(**inputs, **options)
    return {**output.logits, "last_hidden_state": output.last_hidden_state}


def count_linears(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Towers' linear layers that run one by one."""
    called = []
    hooks = [
        module.register_forward_hook(lambda *seen: called.append(seen))
        for module in model.get_submodule("towers").modules()
        if isinstance(module, nn.Linear)
    ]
    answers(model, inputs)
    for hook in hooks:
        hook.remove()
    return len(called)


@all_rows
@all_variants
def test_a_folded_model_answers_the_same(variant: str, rows: int) -> None:
    model = precise(variant)
    inputs = inputs_of(model, rows)
    before, names = answers(model, inputs), list(model.state_dict())
    unfolded = count_linears(model, inputs)
    assert model.fold_for_inference() is model
    after = answers(model, inputs)
    assert list(after) == list(before)
    assert after["last_hidden_state"].is_contiguous()
    for name, expected in before.items():
        torch.testing.assert_close(
            after[name], expected, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert count_linears(model, inputs) < unfolded  # the towers' hidden layers have answered together
    if "norm" not in " ".join(names):
        assert list(model.state_dict()) == names
    for task in zoo.TASK_NAMES:
        torch.testing.assert_close(answers(model, inputs, tasks=task)[task], before[task], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("model_type", sorted(JOINED))
def test_its_trunk_answers_for_all_tasks_at_once(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = precise(model_type).fold_for_inference()
    inputs = inputs_of(model)
    answers(model, inputs)

    def one_by_one(*args: object) -> None:
        raise AssertionError("the trunk was computed task by task")

    monkeypatch.setattr(type(model.trunk), "forward", one_by_one)
    answers(model, inputs)
    with pytest.raises(AssertionError, match="task by task"):
        answers(model, inputs, tasks=zoo.TOWER_TASKS[0])


@all_variants
def test_it_trains_saves_and_extracts_as_before(variant: str, tmp_path: Path) -> None:
    model = precise(variant).fold_for_inference()
    inputs = inputs_of(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = answers(model, inputs)
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path).double()
    assert all(torch.equal(tensor, state[name]) for name, tensor in read.state_dict().items())
    task = zoo.TOWER_TASKS[0]
    small = model.extract_task(task)
    torch.testing.assert_close(answers(small, inputs)[task], before[task], rtol=1e-9, atol=1e-10)
    folded = answers(small.fold_for_inference(), inputs)  # of PLE with groups of experts that no tower is left for
    torch.testing.assert_close(folded[task], before[task], rtol=1e-9, atol=1e-10)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(logits.square().mean() for logits in model(**inputs).logits.values()).backward()
    optimizer.step()
    plain = copy.deepcopy(model)  # which is not joined
    trained = answers(model, inputs)
    assert not torch.allclose(trained[task], before[task])
    for name, expected in answers(plain, inputs).items():
        torch.testing.assert_close(trained[name], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("model_type", ["mmoe", "ple"])
def test_what_saves_by_memory_saves_all_of_it(model_type: str, tmp_path: Path) -> None:
    model = precise(model_type)
    with torch.inference_mode():
        model.fold_for_inference().fold_for_inference()
    state = model.state_dict()
    save_model(model, str(tmp_path / "model.safetensors"))
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    model(**inputs_of(model)).last_hidden_state.sum().backward()


@pytest.mark.parametrize("model_type", ["mmoe", "ple"])
def test_a_gate_of_its_own_is_refused(model_type: str) -> None:
    model = precise(model_type)
    gates = (model.trunk.levels[0] if model_type == "ple" else model.trunk).gates
    gates["view"].__class__ = type("Warmer", (type(gates["view"]),), {})
    with pytest.raises(ValueError, match="SoftmaxGate"):
        model.fold_for_inference()


@pytest.mark.parametrize("variant", ["mmoe", "home-batch_norm=True"])
def test_a_fold_that_is_refused_changes_nothing(variant: str) -> None:
    model = precise(variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.towers["view"].float()
    with pytest.raises(ValueError, match="differ in dtype"):
        model.fold_for_inference()
    after = model.double().state_dict()
    assert set(after) == set(before)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-7)


def test_dropout_that_trains_strikes_in_a_folded_model_too() -> None:
    model = zoo.variant_of("mmoe", dropout=0.5).double().eval().fold_for_inference()
    model.towers.train()
    inputs = inputs_of(model)
    assert not torch.equal(answers(model, inputs)["price"], answers(model, inputs)["price"])


def exchange_a_layer(model: Any) -> None:
    layer = model.towers["view"].layers[0]
    model.towers["view"].layers[0] = nn.Sequential(layer, nn.Hardtanh(-0.01, 0.01))


def assign_a_parameter(model: Any) -> None:
    layer = model.towers["view"].layers[0]
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def load_assigned(model: Any) -> None:
    state = {name: tensor * 2 if "towers" in name else tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [exchange_a_layer, assign_a_parameter, load_assigned, nn.Module.float])
@pytest.mark.parametrize("model_type", ["mmoe", "ple", "shared_bottom"])
def test_what_parts_it_is_noticed(model_type: str, change: Any) -> None:
    model, plain = precise(model_type).fold_for_inference(), precise(model_type)
    change(model)
    change(plain)
    inputs = inputs_of(model)
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    expected = answers(plain, inputs)
    for name, found in answers(model, inputs).items():
        torch.testing.assert_close(found, expected[name])
    if change is exchange_a_layer:
        with pytest.raises(ValueError, match="cannot fold a model with a layer of type Sequential"):
            model.fold_for_inference()
    else:
        model.fold_for_inference()
    for name, found in answers(model, inputs).items():
        torch.testing.assert_close(found, expected[name])


@pytest.mark.parametrize("model_type", ["mmoe", "ple"])
def test_a_tower_without_numbers_spoils_its_own_task_alone(model_type: str) -> None:
    model = precise(model_type).fold_for_inference()
    for parameter in model.towers["price"].parameters():
        parameter.data.fill_(float("nan"))
    assert model._joined.holds()
    found = answers(model, inputs_of(model))
    assert {name for name in zoo.TASK_NAMES if found[name].isnan().any()} == {"price"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["mmoe", "ple"])
def test_half_precision_and_autocast(model_type: str, dtype: torch.dtype) -> None:
    model = zoo.variant_of(model_type).eval()
    inputs = zoo.inputs_of(model.config, rows=9)
    folded = copy.deepcopy(model).fold_for_inference()
    with torch.autocast("cpu", dtype):
        expected, found = answers(model, inputs), answers(folded, inputs)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.05)
    halves = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    expected = answers(model.to(dtype), halves)
    for name, value in answers(folded.to(dtype).fold_for_inference(), halves).items():
        assert value.dtype == expected[name].dtype
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("model_type", ["mmoe", "ple"])
def test_a_copy_answers_by_its_own_parameters(model_type: str, copied: Any) -> None:
    model = precise(model_type).fold_for_inference()
    inputs = inputs_of(model)
    before = answers(model, inputs)
    other = copied(model)
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    plain = precise(model_type)
    for parameter in plain.parameters():
        parameter.data.mul_(0.5)
    expected = answers(plain, inputs)
    for name, found in answers(other, inputs).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-10)
    assert all(torch.equal(found, before[name]) for name, found in answers(model, inputs).items())
