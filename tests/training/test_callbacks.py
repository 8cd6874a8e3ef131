import io
import warnings
from types import SimpleNamespace

import pytest
import torch

from moe_mtl.layers.gates import DSelectKGate
from moe_mtl.outputs import Routing
from moe_mtl.training.callbacks import (
    ExpertHealth,
    Progress,
    identical_experts,
    read_routing,
    routing_numbers,
    routing_problems,
    saturation,
)


def record(rows, names=("e0", "e1", "e2", "e3"), gate="income", dead=()):
    weights = torch.tensor(rows, dtype=torch.float32)
    return Routing("experts_1", {gate: weights}, {gate: names}, dict(dead))


def keys(*records):
    return [key for key, _ in routing_problems(records)]


def test_an_even_gate_is_healthy():
    assert keys(record([[0.25, 0.25, 0.25, 0.25]])) == []


def test_a_starved_expert_is_named_with_its_share_and_a_remedy():
    problems = list(routing_problems([record([[0.4, 0.3, 0.298, 0.002]])]))
    assert [key for key, _ in problems] == ["starved experts_1 e3"]
    message = problems[0][1]
    assert "expert 'e3' of layer 'experts_1' receives 0.20% of 'income'" in message
    assert "raise gate_dropout" in message


def test_an_expert_that_one_gate_uses_is_not_starved():
    names = ("e0", "e1")
    weights = {"a": torch.tensor([[0.99, 0.01]]), "b": torch.tensor([[0.5, 0.5]])}
    found = keys(Routing("experts", weights, {"a": names, "b": names}))
    assert found == ["polarised experts a"]


def test_selection_by_design_is_no_collapse():
    assert keys(record([[1.0, 0.0, 0.0, 0.0]])) == []


def test_a_sparse_layer_is_told_by_its_choices():
    names = ("e0", "e1", "e2")
    weights = {"edges": torch.tensor([[0.9, 0.1, 0.0]] * 4), "depth": torch.tensor([[0.4, 0.3, 0.3]] * 4)}
    indices = {"edges": torch.tensor([[0]] * 4), "depth": torch.tensor([[0]] * 3 + [[1]])}
    problems = list(routing_problems([Routing("blocks.1", weights, dict.fromkeys(weights, names), {}, indices)]))
    assert [key for key, _ in problems] == ["starved blocks.1 e2"]  # a task may keep to one expert
    assert "receives 0.00% of 'edges', 0.00% of 'depth'" in problems[0][1]
    assert "raise the weight of the balance loss" in problems[0][1]


def test_dead_units():
    assert keys(record([[0.25] * 4], dead={"e1": torch.tensor(0.6), "e2": torch.tensor(0.4)})) == ["dead experts_1 e1"]


def test_numbers_of_a_real_model(make_model, make_table):
    model = make_model()
    batch = make_table()[:8]
    model.train()
    numbers = routing_numbers(read_routing(model, batch))
    assert model.training
    for gate in "ab":
        shares = [numbers[f"routing/experts/{gate}/experts.{i}"] for i in range(3)]
        assert sum(shares) == pytest.approx(1)
        assert 0 < numbers[f"routing/experts/{gate}/entropy"] <= torch.log(torch.tensor(3.0)) + 1e-6
    assert any(key.endswith("/dead_units") for key in numbers)
    assert routing_numbers(read_routing(make_model("shared_bottom", bottom_dims=[4]), batch)) == {}


def test_identical_experts_are_named(make_model):
    model = make_model()
    assert list(identical_experts(model)) == []
    with torch.no_grad():
        model.trunk.experts.weights[0][2] = model.trunk.experts.weights[0][0]
    [(key, message)] = identical_experts(model)
    assert key == "identical trunk.experts 0 2"
    assert "experts 0 and 2 of 'trunk.experts' have the same weights" in message


def test_health_warns_once_and_reports_every_time(make_model, make_table):
    model, reported = make_model(), []
    health = ExpertHealth(make_table(), reported.append, rows=8)
    with torch.no_grad():
        model.trunk.experts.weights[0][1] = model.trunk.experts.weights[0][0]
    state = SimpleNamespace(global_step=7)
    with pytest.warns(UserWarning, match="step 7: experts 0 and 1"):
        health.on_evaluate(None, state, None, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        health.on_evaluate(None, state, None, model=model)
    assert len(reported) == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_losses_on_a_terminal_and_nothing_elsewhere(make_model, make_table, make_trainer):
    for stream in (Terminal(), io.StringIO()):
        trainer = make_trainer(make_model(), make_table(), make_table(), epochs=2, logging_steps=1)
        trainer.add_callback(Progress(stream))
        trainer.train()
        shown = stream.getvalue()
        if stream.isatty():
            assert "8/8" in shown
            assert "a=0." in shown
            assert "auc=0." in shown
        else:
            assert shown == ""


def test_gates_that_have_not_decided_are_told_of_at_the_end(make_model, make_table):
    model = make_model("mmoe", gate="dselect_k")
    seen = []
    health = ExpertHealth(make_table(), seen.append)
    state = SimpleNamespace(global_step=7)
    names = [name for name, module in model.named_modules() if isinstance(module, DSelectKGate)]
    assert saturation(model) == dict.fromkeys(names, 0.0)
    with pytest.warns(UserWarning, match=f"{len(names)} of the DSelect-k gates have not decided .{names[0]}"):
        health.on_train_end(None, state, None, model=model)
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).bits.fill_(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        health.on_train_end(None, state, None, model=model)
        health.on_evaluate(None, state, None, model=model)
    assert {seen[0][f"routing/{name}/saturated"] for name in names} == {1.0}
