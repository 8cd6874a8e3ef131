"""MMoE, OMoE, DSelect-k: equations 5 to 7 of Ma et al. 2018 row by row."""

import math

import pytest
import torch
from by_hand import FEATURES, bank, check_gradients, close, mlp, model_of, rows, softmax, weighted

from moe_mtl import pathway
from moe_mtl.models import REGISTRY

TASKS = [
    {"name": "b", "kind": "binary"},
    {"name": "a", "kind": "regression"},
    {"name": "c", "kind": "multiclass", "num_outputs": 3},
]
SMALL = {"tasks": TASKS, "num_experts": 4, "expert_dims": [5, 2]}
LABELS = {
    "b": torch.tensor([1.0, 0.0, float("nan")], dtype=torch.float64),
    "a": torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64),
    "c": torch.tensor([2, -100, 0]),
}


@pytest.mark.parametrize(("model_type", "gate_of"), [("mmoe", "{}"), ("omoe", "shared")])
def test_equations(model_type: str, gate_of: str) -> None:
    """f_k(x) = sum_i softmax(W_k x)_i f_i(x); y_k = h_k(f_k(x)). OMoE has one W for all tasks."""
    model = model_of(model_type, **SMALL)
    state, x = model.state_dict(), rows()
    out = model(numeric=x, output_routing=True)
    assert list(out.logits) == ["b", "a", "c"]
    for number, task in enumerate(out.logits):
        gate = gate_of.format(task)
        for b, row in enumerate(x):
            weights = softmax(state[f"trunk.gates.{gate}.linear.weight"] @ row)
            mixed = weighted(weights, bank(state, "trunk.experts", row))
            close(out.last_hidden_state[b, number], mixed)
            close(out.logits[task][b], mlp(state, f"towers.{task}", mixed))
            assert out.routing[0].weights[gate][b].tolist() == pytest.approx(weights)
    assert not [name for name in state if "gates" in name and not name.endswith("linear.weight")]  # no bias, no norm


def test_mmoe_with_equal_gates_is_omoe() -> None:
    omoe = model_of("omoe", **SMALL)
    mmoe = model_of("mmoe", **SMALL)
    state = {
        name: omoe.state_dict()[f"trunk.gates.shared.{name.split('.', 3)[3]}" if ".gates." in name else name]
        for name in mmoe.state_dict()
    }
    mmoe.load_state_dict(state)
    x = rows()
    for task, logits in omoe(numeric=x).logits.items():
        assert torch.equal(mmoe(numeric=x).logits[task], logits)


@pytest.mark.parametrize("model_type", ["mmoe", "omoe"])
@pytest.mark.parametrize("gate", ["softmax", "dselect_k"])
def test_gradients(model_type: str, gate: str) -> None:
    model = model_of(model_type, **SMALL, gate=gate, entropy_weight=0.1, gate_gamma=8.0)
    check_gradients(model.train(), LABELS)


# --- DSelect-k --------------------------------------------------------------------------------------------------------


def step(t: float) -> float:
    return -2 * t**3 + 1.5 * t + 0.5


def selected(state: dict[str, torch.Tensor], task: str, x: torch.Tensor, gamma: float, experts: int) -> list[float]:
    """q = sum_j softmax(w)_j r_j, r_j the product over bits of S(z) or 1 - S(z)."""
    name = f"trunk.gates.{task}"
    if f"{name}.bits" in state:
        z, w = state[f"{name}.bits"], state[f"{name}.mixture"]
    else:
        z = (state[f"{name}.bits.weight"] @ x + state[f"{name}.bits.bias"]).view(2, -1)
        w = state[f"{name}.mixture.weight"] @ x + state[f"{name}.mixture.bias"]
    q = [0.0] * experts
    for a, bits in zip(softmax(w), z.tolist(), strict=True):
        steps = [min(1.0, max(0.0, step(max(-0.5, min(0.5, t / gamma))))) for t in bits]
        for i in range(experts):
            q[i] += a * math.prod(s if i >> bit & 1 else 1 - s for bit, s in enumerate(steps))
    return q


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("experts", [4, 6])
def test_dselect_k_equations(static: bool, experts: int) -> None:
    model = model_of(
        "dselect_k", tasks=TASKS, num_experts=experts, expert_dims=[5, 2], gate_static=static, gate_gamma=3.0
    )
    state, x = model.state_dict(), rows()
    out = model(numeric=x)
    assert out.auxiliary_loss is None
    for number, task in enumerate(out.logits):
        for b, row in enumerate(x):
            mixed = weighted(selected(state, task, row, 3.0, experts), bank(state, "trunk.experts", row))
            close(out.last_hidden_state[b, number], mixed)
            close(out.logits[task][b], mlp(state, f"towers.{task}", mixed))


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("experts", [4, 6])
def test_dselect_k_regulariser_counts_every_task_and_moves_every_gate(static: bool, experts: int) -> None:
    """LibMTL's covers the last task only, and its gradient is erased before the step."""
    model = model_of(
        "dselect_k", tasks=TASKS, num_experts=experts, gate_static=static, gate_gamma=6.0, entropy_weight=0.3
    ).train()
    x = rows()
    out = model(numeric=x, labels={"a": torch.zeros(4, dtype=torch.float64)})
    alone = [model(numeric=x, tasks=[task]).auxiliary_loss for task in model.tasks]
    close(out.auxiliary_loss, torch.stack(alone).sum())
    close(out.loss, out.task_losses["a"] + out.auxiliary_loss)
    out.auxiliary_loss.backward()
    for task in model.tasks:
        bits = model.trunk.gates[task].bits
        gradient = bits.grad if static else bits.weight.grad
        assert gradient.abs().max() > 1e-4, task
        mixture = model.trunk.gates[task].mixture
        assert (mixture.grad if static else mixture.weight.grad) is None  # it does not enter the regulariser


@pytest.mark.parametrize("static", [True, False])
def test_dselect_k_gates_of_a_fresh_model_start_undecided(static: bool) -> None:
    """Within gamma / 100 of 0; upstream's initialisation must not go over them again as plain linear layers."""
    model_class = REGISTRY["dselect_k"]
    model = model_class(model_class.config_class(features=FEATURES, tasks=TASKS, gate_static=static, gate_gamma=2.0))
    for gate in model.trunk.gates.values():
        for parameter in gate.bits.parameters() if not static else [gate.bits]:
            assert 0 < parameter.abs().max() <= 0.02


def test_dselect_k_warm_up_follows_the_trainers_step() -> None:
    model = model_of("dselect_k", tasks=TASKS, entropy_weight=0.5, entropy_warmup_steps=4, gate_gamma=6.0).train()
    sizes = []
    for step in (0, 1, 4, 9):
        model.set_training_step(step)
        sizes.append(model(numeric=rows()).auxiliary_loss.item())
    assert sizes == pytest.approx([0, sizes[3] / 4, sizes[3], sizes[3]])
    assert sizes[3] > 0.1


def saturated(experts: int = 8) -> torch.nn.Module:
    """Task b chooses experts 1 and 6, a 6 twice, c 0 and 3."""
    model = model_of("dselect_k", tasks=TASKS, num_experts=experts, expert_dims=[5, 2])
    for task, chosen in {"b": (1, 6), "a": (6, 6), "c": (0, 3)}.items():
        bits = [[0.5 if i >> bit & 1 else -0.5 for bit in range(3)] for i in chosen]  # exactly gamma / 2
        model.trunk.gates[task].bits.data = torch.tensor(bits, dtype=torch.float64)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("tasks", "kept"), [(["b"], [1, 6]), (["a"], [6]), (["c"], [0, 3]), (["c", "a"], [0, 3, 6]), (["a", "b"], [1, 6])]
)
def test_saturated_static_gate_extracts_to_the_experts_it_chose(
    tasks: list[str], kept: list[int], dtype: torch.dtype
) -> None:
    model = saturated().to(dtype)
    small = model.extract_task(tasks)
    assert small.config.experts_kept == kept
    assert len(small.trunk.experts.weights[0]) == len(kept)
    full, x = sum(p.numel() for p in model.trunk.experts.parameters()), rows().to(dtype)
    assert sum(p.numel() for p in small.trunk.experts.parameters()) * 8 == full * len(kept)
    everything, alone = model(numeric=x), small(numeric=x, output_routing=True)
    for task in tasks:  # what is left out has a weight of exactly 0; only the order of a sum may differ
        torch.testing.assert_close(alone.logits[task], everything.logits[task], rtol=1e-6, atol=1e-6)
        assert alone.routing[0].experts[task] == tuple(f"experts.{e}" for e in kept)
    again = small.extract_task(tasks[-1])
    torch.testing.assert_close(again(numeric=x).logits[tasks[-1]], everything.logits[tasks[-1]], rtol=1e-6, atol=1e-6)
    assert len(again.config.experts_kept) <= 2


def test_unused_experts_may_hold_anything() -> None:
    model = saturated().float()
    before = model(numeric=rows().float()).logits["b"]
    for expert in (0, 2, 3, 4, 5, 7):
        for parameter in model.trunk.experts.parameters():
            parameter.data[expert] = float("nan")
    torch.testing.assert_close(model.extract_task("b")(numeric=rows().float()).logits["b"], before)


def test_a_gate_that_is_not_saturated_keeps_its_experts() -> None:
    model = saturated()
    model.trunk.gates["a"].bits.data[0, 0] = 0.49  # bit 0 undecided: expert 7 as well as 6
    assert model.extract_task("a").config.experts_kept == [6, 7]
    model.trunk.gates["a"].bits.data.zero_()
    assert model.extract_task("a").config.experts_kept is None


@pytest.mark.parametrize("model_type", ["mmoe", "omoe"])
def test_one_expert_is_a_shared_bottom(model_type: str) -> None:
    mixture = model_of(model_type, **SMALL | {"num_experts": 1})
    plain = model_of("shared_bottom", tasks=TASKS, bottom_dims=[5, 2])
    state = mixture.state_dict()
    plain.load_state_dict({name: state[name.replace(".bottom.", ".experts.")] for name in plain.state_dict()})
    for task, logits in plain(numeric=rows()).logits.items():
        close(mixture(numeric=rows()).logits[task][:, 0], logits[:, 0])


@pytest.mark.parametrize("task", ["b", "a"])
def test_gates_on_codes_without_an_expert_leave_a_model_that_still_extracts(tmp_path, task: str) -> None:
    model = model_of("mmoe", **SMALL | {"num_experts": 6}, gate="dselect_k", num_selected=1)
    with torch.no_grad():
        for gate in model.trunk.gates.values():
            gate.bits.fill_(5.0)  # expert 7 of 6
    alone = model.extract_task(task)
    assert torch.equal(alone(numeric=rows()).logits[task], model(numeric=rows()).logits[task])
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path, tasks=[task], dtype=torch.float64)
    assert read.config.experts_kept == alone.config.experts_kept == [0]


def test_the_cost_of_all_tasks_leaves_out_what_no_gate_chose() -> None:
    model = model_of("mmoe", **SMALL, gate="dselect_k", num_selected=1)
    with torch.no_grad():
        for gate in model.trunk.gates.values():
            gate.bits.fill_(5.0)  # all on expert 3
    one = sum(p.numel() for p in model.trunk.experts.parameters()) / 4
    assert pathway.cost(model).parts["experts"].touched == one
    assert pathway.cost(model, "b").share["touched"] < 1
    assert pathway.cost(model, model.tasks).share["touched"] == 1


def test_half_precision_regulariser_is_finite() -> None:
    model = model_of("mmoe", **SMALL | {"num_experts": 6}, gate="dselect_k", num_selected=1, gate_static=False)
    with torch.no_grad():
        for gate in model.trunk.gates.values():
            gate.bits.weight.zero_()
            gate.bits.bias.fill_(5.0)  # no expert has that code: the guard of the reciprocal, 1e6, is beyond float16
    for dtype in (torch.float16, torch.bfloat16):
        half = model.to(dtype).train()
        assert half(numeric=rows().to(dtype)).auxiliary_loss.isfinite()
