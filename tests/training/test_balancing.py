"""Balancing against gradients combined by hand."""

import pytest
import torch
import torchjd.aggregation
import torchjd.scalarization

from moe_mtl.training.balancing import (
    GradientBalancer,
    LossBalancer,
    aggregators,
    balancer_state,
    build_method,
    load_balancer_state,
    scalarizers,
)
from moe_mtl.training.metrics import counted_rows
from moe_mtl.training.recipe import RecipeError, TaskSampling

# What a method cannot do without.
OPTIONS = {
    "Constant": {"weights": [1.0, 2.0]},
    "COSMOS": {"lambda_": 1.0, "weights": [1.0, 1.0]},
    "PBI": {"theta": 1.0, "weights": [1.0, 1.0]},
    "STCH": {"mu": 0.5},
    "CAGrad": {"c": 0.5},
    "FairGrad": {"alpha": 1.0},
    "Krum": {"n_byzantine": 0},
    "TrimmedMean": {"trim_number": 0},
}
NEEDS_SOLVER = {"CAGrad": "clarabel", "DualProj": "quadprog", "NashMTL": "ecos", "UPGrad": "quadprog"}


def gradients_by_task(model, batch):
    """Plain autograd: task -> name -> gradient of that task's weighted loss."""
    output, out = model(**batch), {}
    named = dict(model.named_parameters())
    for task in model.config.parsed_tasks:
        loss = task.weight * output.task_losses[task.name]
        grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        out[task.name] = {
            name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads, strict=True)
        }
    return out


def flat(gradients, names):
    return torch.cat([gradients[name].flatten() for name in names])


def balanced_gradients(model, name, batch, options=None):
    parameters = model.task_parameters()
    balancer = GradientBalancer(name, options or OPTIONS.get(name, {}), model.tasks, parameters)
    output = model(**batch)
    tasks = {task.name: task for task in model.config.parsed_tasks}
    losses = {name: tasks[name].weight * loss for name, loss in output.task_losses.items()}
    present = [name for name, task in tasks.items() if bool(counted_rows(task, batch["labels"]).any())]
    balancer.backward(losses, present, output.auxiliary_loss)
    shared = {id(parameter) for parameter in parameters["shared"]}
    return {n: p.grad for n, p in model.named_parameters()}, [n for n, p in model.named_parameters() if id(p) in shared]


def test_pcgrad_of_two_tasks_by_hand(make_model, make_table):
    model = make_model(tasks=[{"name": "a", "kind": "binary"}, {"name": "b", "kind": "binary", "weight": 3.0}])
    batch = make_table(32)[:32]
    # In conflict: opposite labels, answered by equal gates and towers.
    batch["labels"]["b"] = 1 - batch["labels"]["a"]
    state = model.state_dict()
    model.load_state_dict({name: state[name.replace(".b.", ".a.")] for name in state})
    by_task = gradients_by_task(model, batch)
    found, shared = balanced_gradients(model, "PCGrad", batch)
    a, b = (flat(by_task[task], shared) for task in "ab")
    assert a @ b < 0
    expected = (a - (a @ b) / (b @ b) * b) + (b - (a @ b) / (a @ a) * a)
    torch.testing.assert_close(flat(found, shared), expected, rtol=1e-4, atol=1e-6)
    for name in found:
        if name not in shared:
            torch.testing.assert_close(found[name], by_task["a"][name] + by_task["b"][name])


def test_mgda_of_two_tasks_by_hand(make_model, make_table):
    model, batch = make_model(), make_table(32)[:32]
    by_task = gradients_by_task(model, batch)
    found, shared = balanced_gradients(model, "MGDA", batch, {"epsilon": 1e-7, "max_iters": 10_000})
    a, b = (flat(by_task[task], shared) for task in "ab")
    share = ((b - a) @ b / ((a - b) @ (a - b))).clamp(0, 1)  # Sener and Koltun 2018, the closed form for two
    torch.testing.assert_close(flat(found, shared), share * a + (1 - share) * b, rtol=1e-3, atol=1e-5)


def test_sum_is_plain_training(make_model, make_table, make_trainer):
    states = []
    for extra in ({}, {"gradient_balancing": "Sum"}, {"loss_balancing": "Sum"}):
        model = make_model("mmoe", gate="dselect_k", entropy_weight=0.1)  # with an auxiliary loss
        make_trainer(model, make_table(), epochs=2, gradient_accumulation=2, seed=2, **extra).train()
        states.append(model.state_dict())
    for other in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", sorted(aggregators()))
def test_every_aggregator_trains(make_model, make_table, make_trainer, name):
    if name in NEEDS_SOLVER:
        pytest.importorskip(NEEDS_SOLVER[name])
    table, tasks = make_table(), ["a", "b"]
    if name == "Krum":  # is for 3 tasks and more
        tasks = ["a", "b", "c"]
        table.tensors["labels"]["c"] = 1 - table.tensors["labels"]["a"]
    model = make_model(tasks=[{"name": task, "kind": "binary"} for task in tasks])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = make_trainer(model, table, max_steps=2, gradient_balancing="Sum")
    trainer.gradient_balancer = GradientBalancer(name, OPTIONS.get(name, {}), model.tasks, model.task_parameters())
    trainer.train()
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", sorted(NEEDS_SOLVER))
def test_a_solver_that_is_not_installed_is_named_with_the_extra(name, monkeypatch):
    monkeypatch.setattr("torchjd._mixins.find_spec", lambda package: None)
    with pytest.raises(RecipeError) as error:
        build_method("gradient_balancing", name, OPTIONS.get(name, {}), 2)
    assert f"train.gradient_balancing: {name} needs a solver that is not installed" in str(error.value)
    assert "moe-mtl[balancing]" in str(error.value)
    assert NEEDS_SOLVER[name] in str(error.value)


@pytest.mark.parametrize("name", sorted(scalarizers()))
def test_every_scalarizer_trains(make_model, make_table, make_trainer, name):
    model = make_model()
    trainer = make_trainer(model, make_table(), max_steps=3)
    trainer.loss_balancer = LossBalancer(name, OPTIONS.get(name, {}), model.tasks)
    trainer.train()
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    for parameter in trainer.loss_balancer.parameters():
        assert bool((parameter != 0).all()), "the method's own parameters must be trained"


def test_uncertainty_weighting_by_hand(make_model, make_table, make_trainer):
    table = make_table(16)
    model = make_model(tasks=[{"name": "a", "kind": "binary"}, {"name": "b", "kind": "binary", "weight": 2.0}])
    trainer = make_trainer(model, table, max_steps=1, loss_balancing="UW", logging_steps=1)
    with torch.no_grad():
        trainer.loss_balancer.method.log_var.copy_(torch.tensor([0.3, -0.2]))
        losses = model(**table[:16]).task_losses
    trainer.train()
    a, b = losses["a"].item(), 2.0 * losses["b"].item()
    s = torch.tensor([0.3, -0.2])
    expected = 0.5 * (torch.exp(-s) * torch.tensor([a, b]) + s).sum()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_dwa_weighs_by_the_ratio_of_two_epochs():
    balancer = LossBalancer("DWA", {"temperature": 1.0}, ["a", "b"])
    for epoch in ([1.0, 4.0], [0.5, 4.0]):
        for _ in range(3):
            total = balancer(dict(zip("ab", map(torch.tensor, epoch), strict=True)), ["a", "b"])
            assert total.item() == pytest.approx(sum(epoch))
        balancer.end_epoch()
    weights = 2 * torch.softmax(torch.tensor([0.5, 1.0]), 0)
    total = balancer({"a": torch.tensor(1.0), "b": torch.tensor(10.0)}, ["a", "b"])
    assert total.item() == pytest.approx((weights * torch.tensor([1.0, 10.0])).sum().item())


@pytest.mark.parametrize("name", ["AlignedMTL", "ConFIG", "IMTLG", "MGDA", "PCGrad", "Sum", "Mean"])
def test_a_task_without_labels_in_the_batch_adds_nothing(make_model, make_table, name):
    model, batch = make_model(), make_table(32)[:32]
    batch["labels"]["b"] = torch.full_like(batch["labels"]["b"], float("nan"))
    alone = gradients_by_task(model, batch)["a"]
    found, shared = balanced_gradients(model, name, batch)
    left, right = flat(found, shared), flat(alone, shared)
    assert bool(left.isfinite().all())
    assert torch.nn.functional.cosine_similarity(left, right, dim=0) > 0.999
    assert left.norm() > 0.3 * right.norm(), "the absent task must not shrink the others' gradient to nothing"


@pytest.mark.parametrize("name", sorted(scalarizers()))
def test_an_absent_task_moves_no_weight_of_its_own(name):
    balancer = LossBalancer(name, OPTIONS.get(name, {}), ["a", "b"])
    losses = {"a": torch.tensor(0.7, requires_grad=True), "b": torch.tensor(0.0, requires_grad=True)}
    balancer(losses, ["a"]).backward()
    assert bool(losses["a"].grad.isfinite())
    for parameter in balancer.parameters():
        assert parameter.grad[0] != 0
        assert parameter.grad[1] == 0


def test_parameters_that_no_loss_reaches_keep_no_gradient(make_model, make_table):
    model = make_model("ple", num_levels=1, num_specific_experts=1, num_shared_experts=1, expert_dims=[4])
    idle = torch.nn.Parameter(torch.ones(3))
    model.register_parameter("idle", idle)
    parameters = _with_idle(model, idle)
    balancer = GradientBalancer("PCGrad", {}, model.tasks, parameters)
    output = model(**make_table(16)[:16])
    balancer.backward(dict(output.task_losses), ["a", "b"], None)
    assert idle.grad is None
    assert all(p.grad is not None for p in parameters["shared"] if p is not idle)
    assert not any("jac" in vars(p) for p in model.parameters())


def _with_idle(model, idle):
    """`task_parameters` of a model without its idle parameter, which is then called shared."""
    del model._parameters["idle"]
    parameters = model.task_parameters()
    model.register_parameter("idle", idle)
    return {**parameters, "shared": [*parameters["shared"], idle]}


def test_a_task_of_weight_0_takes_no_part(make_model, make_table, make_trainer):
    tasks = [{"name": "a", "kind": "binary"}, {"name": "b", "kind": "binary", "weight": 0}]
    model = make_model(tasks=tasks)
    before = {name: value.clone() for name, value in model.towers.b.state_dict().items()}
    trainer = make_trainer(model, make_table(), max_steps=2, loss_balancing="UW", weight_decay=0.0)
    assert trainer.loss_balancer.tasks == ["a"]
    trainer.train()
    for name, value in model.towers.b.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("kind", "name", "options", "message"),
    [
        ("loss_balancing", "UWW", {}, "unknown method 'UWW'; did you mean 'UW'"),
        ("loss_balancing", "FAMO", {}, "FAMO is not supported: it needs the losses of every batch a second time"),
        ("loss_balancing", "STCH", {}, "STCH needs the option 'mu'"),
        ("loss_balancing", "STCH", {"muu": 1.0}, "STCH has no option 'muu'; did you mean 'mu'"),
        ("loss_balancing", "STCH", {"mu": -1.0}, "STCH refuses its options"),
        ("gradient_balancing", "PCGard", {}, "unknown method 'PCGard'; did you mean 'PCGrad'"),
        ("gradient_balancing", "MoDoWeighting", {}, "unknown method 'MoDoWeighting'"),
        ("gradient_balancing", "CAGrad", {}, "CAGrad needs the option 'c'"),
    ],
)
def test_errors_of_methods(kind, name, options, message):
    with pytest.raises(RecipeError) as error:
        build_method(kind, name, options, 2)
    assert message in str(error.value)


def test_what_cannot_work_together_is_refused(make_model, make_table, make_trainer, monkeypatch):
    model, table = make_model(), make_table()
    with pytest.raises(RecipeError, match="weigh the tasks twice"):
        make_trainer(model, table, loss_balancing="UW", gradient_balancing="PCGrad")
    with pytest.raises(RecipeError, match="nothing to balance"):
        make_trainer(model, table, loss_balancing="UW", task_sampling=TaskSampling())
    trainer = make_trainer(model, table)
    for change, message in [
        ({"fp16": True}, "gradient scaler"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "re-entrant"),
        ({"torch_compile": True}, "compiled model"),
    ]:
        with monkeypatch.context() as patch:
            for key, value in change.items():
                patch.setattr(trainer.args, key, value)
            with pytest.raises(RecipeError, match=message):
                trainer._check(None, ("PCGrad", {}))
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.accelerator), "num_processes", 2)
        for pair in ((("UW", {}), None), (None, ("PCGrad", {}))):
            with pytest.raises(RecipeError, match="in one process, found 2"):
                trainer._check(*pair)
    for parameter in model.task_parameters()["shared"]:
        parameter.requires_grad_(False)
    with pytest.raises(RecipeError, match="none of them is trained"):
        make_trainer(model, table, gradient_balancing="PCGrad")


@pytest.mark.parametrize("name", ["DWA", "UW", "IMTLL"])
def test_the_state_of_a_scalarizer_can_be_put_back(name):
    balancer, other = (LossBalancer(name, {}, ["a", "b"]) for _ in range(2))
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(3.0)}
    for _ in range(2):
        balancer(losses, ["a", "b"])
        balancer.end_epoch()
        losses = {"a": torch.tensor(0.5), "b": torch.tensor(2.9)}
    with torch.no_grad():
        for parameter in balancer.parameters():
            parameter.add_(0.5)
    load_balancer_state(other, balancer_state(balancer))
    assert torch.equal(balancer(losses, ["a", "b"]), other(losses, ["a", "b"]))


@pytest.mark.parametrize("name", ["GradVac", "PCD", "ExcessMTL"])
def test_the_state_of_an_aggregator_can_be_put_back(name, make_model):
    parameters = make_model().task_parameters()
    balancer, other = (GradientBalancer(name, {}, ["a", "b"], parameters) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        balancer.method(torch.randn(2, 5, generator=generator))
    load_balancer_state(other, balancer_state(balancer))
    matrix = torch.randn(2, 5, generator=generator)
    torch.manual_seed(0)
    expected = balancer.method(matrix)
    torch.manual_seed(0)
    assert torch.equal(other.method(matrix), expected)
    assert isinstance(balancer.method, torchjd.aggregation.Aggregator)
    with pytest.raises(ValueError, match="another method"):
        load_balancer_state(LossBalancer("UW", {}, ["a", "b"]), balancer_state(balancer))
