"""HoME: the equations of facts both readers agreed on, row by row."""

from pathlib import Path

import pytest
import torch
from by_hand import FEATURES, bank, check_gradients, close, mlp, model_of, rows, softmax, weighted
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from moe_mtl.models import REGISTRY

TASKS = [
    {"name": "like", "kind": "binary", "group": "act"},
    {"name": "watch", "kind": "regression", "group": "time"},
    {"name": "share", "kind": "binary", "group": "act"},
    {"name": "alone", "kind": "binary"},
]
GROUPS = {"act": ["like", "share"], "time": ["watch"], "alone": ["alone"]}
SMALL = {"tasks": TASKS, "expert_dims": [4, 2], "feature_gate_rank": 2, "num_feature_gates": 2}


def gated(state: dict[str, Tensor], name: str, v: Tensor) -> Tensor:
    """v * sum_l softmax(W v)_l 2 sigmoid(v B_l A_l)."""
    shares = softmax(state[f"{name}.mixer.weight"] @ v)
    scale = torch.zeros_like(v)
    for share, down, up in zip(shares, state[f"{name}.down_LDR"], state[f"{name}.up_LRD"], strict=True):
        scale += share * 2 / (1 + torch.exp(-(v @ down @ up)))
    return v * scale


def self_gate(logits: Tensor) -> list[float]:
    return softmax(logits) if len(logits) > 1 else torch.sigmoid(logits).tolist()


def experts_of(state: dict[str, Tensor], layer: str, group: str, v: Tensor) -> list[Tensor]:
    """Swish(BN(MLP(FeatureGate(v))))."""
    return bank(
        state, f"trunk.{layer}.experts.{group}", gated(state, f"trunk.{layer}.feature_gates.{group}", v), "silu"
    )


def states_by_hand(state: dict[str, Tensor], v: Tensor) -> dict[str, Tensor]:
    def gate(layer: str, output: str, x: Tensor) -> list[float]:
        return softmax(state[f"trunk.{layer}.gates.{output}.linear.weight"] @ x)

    def own(layer: str, output: str, x: Tensor) -> list[float]:
        return self_gate(state[f"trunk.{layer}.self_gates.{output}.linear.weight"] @ x)

    meta = {group: experts_of(state, "meta", group, v) for group in [*GROUPS, "shared"]}
    z = {}
    for group in GROUPS:
        z[group] = weighted(gate("meta", group, v), meta[group] + meta["shared"])
        z[group] = z[group] + weighted(own("meta", group, v), meta[group])
    everyone = meta["shared"] + [hidden for group in GROUPS for hidden in meta[group]]
    z_shared = weighted(gate("meta", "shared", v), everyone) + weighted(own("meta", "shared", v), meta["shared"])

    out = {}
    for group, tasks in GROUPS.items():
        for task in tasks:
            private = experts_of(state, "task", task, z[group])
            local = experts_of(state, "task", f"{group}_local", z[group])
            everywhere = experts_of(state, "task", "globals", z_shared)
            weights = gate("task", task, torch.cat([z[group], z_shared]))
            out[task] = weighted(weights, private + local + everywhere)
            out[task] = out[task] + weighted(own("task", task, z[group]), private)
    return out


@pytest.mark.parametrize("num_experts", [1, 2])
def test_equations(num_experts: int) -> None:
    model = model_of("home", **SMALL, num_experts=num_experts)
    state, x = model.state_dict(), rows()
    out = model(numeric=x)
    for b, row in enumerate(x):
        states = states_by_hand(state, row)
        for number, task in enumerate(out.logits):
            close(out.last_hidden_state[b, number], states[task])
            close(out.logits[task][b], mlp(state, f"towers.{task}", states[task], "tanh"))


def test_routing_names_the_hierarchy() -> None:
    meta, task = model_of("home", **SMALL)(numeric=rows(), output_routing=True).routing
    assert (meta.layer, task.layer) == ("meta", "task")
    assert meta.experts["act"] == ("act.0", "act.1", "shared.0", "shared.1")
    assert len(meta.experts["shared"]) == 2 * 4
    assert task.experts["share"] == ("share.0", "share.1", "act_local.0", "act_local.1", "globals.0", "globals.1")
    assert set(task.experts) == {"like", "watch", "share", "alone"}


def test_the_hierarchy_masks_other_groups() -> None:
    """A task of one group reads another group's experts only through z_shared."""
    model = model_of("home", **SMALL)
    x = rows()
    before = model(numeric=x).logits
    for name, parameter in model.named_parameters():
        if ".task." in name and "act" in name:
            parameter.data.normal_()
    after = model(numeric=x).logits
    assert torch.equal(before["watch"], after["watch"])
    assert torch.equal(before["alone"], after["alone"])
    assert not torch.equal(before["like"], after["like"])


def test_experts_are_not_relu_experts() -> None:
    """The paper's complaint: with ReLU nine in ten activations are 0. With Swish none is."""
    record = model_of("home", **SMALL)(numeric=rows(), output_routing=True).routing
    assert all(share == 0 for layer in record for share in layer.dead_units.values())


def test_feature_gates_start_at_one() -> None:
    fields = {"features": FEATURES, "tasks": TASKS}
    model = REGISTRY["home"](REGISTRY["home"].config_class(**fields))
    for layer in (model.trunk.meta, model.trunk.task):
        for gate in layer.feature_gates.values():
            v = torch.randn(5, gate.down_LDR.shape[1])
            torch.testing.assert_close(gate(v), v, rtol=1e-6, atol=0)


def test_training_on_one_row_is_refused_and_evaluation_is_not() -> None:
    model = model_of("home", **SMALL)
    assert model(numeric=rows(1)).logits["like"].shape == (1, 1)
    with pytest.raises(ValueError, match="at least 2 rows in a batch, found 1"):
        model.train()(numeric=rows(1))
    model.fold_for_inference()
    assert model(numeric=rows(1)).logits["like"].shape == (1, 1)


def test_folding_keeps_the_outputs_and_survives_saving(tmp_path: Path) -> None:
    model = model_of("home", **SMALL)
    sibling = type(model)(model.config)
    x = rows()
    before = model(numeric=x).logits
    assert model.fold_for_inference() is model
    assert not [name for name in model.state_dict() if "norm" in name]
    for task, logits in model(numeric=x).logits.items():
        torch.testing.assert_close(logits, before[task], rtol=1e-10, atol=1e-12)
    assert sibling.config.batch_norm  # a model built from the same config has its own say
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not again.config.batch_norm
    assert torch.equal(again(numeric=x).logits["like"], model(numeric=x).logits["like"])
    alone = again.extract_task("share")
    assert torch.equal(alone(numeric=x).logits["share"], model(numeric=x).logits["share"])


def test_gradients() -> None:
    tasks = [{"name": "like", "kind": "binary", "group": "act"}, {"name": "watch", "kind": "regression"}]
    fields = {**SMALL, "tasks": tasks, "expert_dims": [2], "num_experts": 1, "tower_dims": []}
    labels = {
        "like": torch.tensor([1.0, float("nan"), 0.0], dtype=torch.float64),
        "watch": torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64),
    }
    check_gradients(model_of("home", **fields).train(), labels)
    check_gradients(model_of("home", **fields, batch_norm=False).train(), labels)


def test_extracted_task_keeps_the_meta_layer_and_its_own_groups() -> None:
    model = model_of("home", **SMALL)
    small = model.extract_task("share")
    assert set(small.trunk.meta.experts) == {"act", "time", "alone", "shared"}  # z_shared reads all of them
    assert set(small.trunk.meta.gates) == {"act", "shared"}
    assert set(small.trunk.task.experts) == {"share", "act_local", "globals"}
    assert set(small.trunk.task.gates) == {"share"}
    kept = sum(p.numel() for p in small.trunk.task.experts.parameters())
    full = sum(p.numel() for p in model.trunk.task.experts.parameters())
    assert kept / full == pytest.approx(3 / (4 + 3 + 1))  # tasks, groups, global


@pytest.mark.parametrize("name", ["act_local", "globals"])
def test_names_that_collide_are_refused(name: str) -> None:
    tasks = [{"name": name, "kind": "binary", "group": "other"}, {"name": "like", "kind": "binary", "group": "act"}]
    with pytest.raises(StrictDataclassError, match=f"'{name}' is taken twice"):
        model_of("home", tasks=tasks)
