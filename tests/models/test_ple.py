"""PLE and CGC: sections 4.1 and 4.2 of Tang et al. 2020 row by row."""

import pytest
import torch
from by_hand import bank, check_gradients, close, mlp, model_of, rows, softmax, weighted
from torch import Tensor

TASKS = [
    {"name": "b", "kind": "binary"},
    {"name": "a", "kind": "regression", "num_outputs": 2},
    {"name": "c", "kind": "binary"},
]
SMALL = {"tasks": TASKS, "num_specific_experts": 2, "num_shared_experts": 3, "expert_dims": [4, 2]}


def extracted(state: dict[str, Tensor], levels: int, x: Tensor) -> dict[str, Tensor]:
    """x^k = sum softmax(W^k x^k) {experts of k, shared}; x^s the same over all experts of the
    level, on all but the last level. Every stream starts as x."""
    streams = dict.fromkeys(["b", "a", "c", "shared"], x)
    for level in range(levels):
        name = f"trunk.levels.{level}"
        hidden = {group: bank(state, f"{name}.experts.{group}", streams[group]) for group in streams}
        next_streams = {}
        for task in ("b", "a", "c"):
            weights = softmax(state[f"{name}.gates.{task}.linear.weight"] @ streams[task])
            next_streams[task] = weighted(weights, hidden[task] + hidden["shared"])
        if level < levels - 1:
            everyone = hidden["b"] + hidden["a"] + hidden["c"] + hidden["shared"]
            weights = softmax(state[f"{name}.gates.shared.linear.weight"] @ streams["shared"])
            next_streams["shared"] = weighted(weights, everyone)
        streams = next_streams
    return streams


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_equations(levels: int) -> None:
    model = model_of("ple", **SMALL, num_levels=levels)
    state, x = model.state_dict(), rows()
    out = model(numeric=x, output_routing=True)
    for b, row in enumerate(x):
        streams = extracted(state, levels, row)
        for number, task in enumerate(["b", "a", "c"]):
            close(out.last_hidden_state[b, number], streams[task])
            close(out.logits[task][b], mlp(state, f"towers.{task}", streams[task]))
    assert [record.layer for record in out.routing] == [f"levels.{level}" for level in range(levels)]


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_shared_gate_sees_every_expert_of_its_level_and_the_last_level_has_none(levels: int) -> None:
    """FuxiCTR's sees the shared experts only, and is there on the last level too; LibMTL has no shared stream."""
    model = model_of("ple", **SMALL, num_levels=levels)
    for number, level in enumerate(model.trunk.levels):
        widths = {gate: len(module.linear.weight) for gate, module in level.gates.items()}
        assert widths == dict.fromkeys("bac", 2 + 3) | ({"shared": 3 * 2 + 3} if number < levels - 1 else {})


def test_ple_with_one_level_is_cgc() -> None:
    ple, cgc = model_of("ple", **SMALL, num_levels=1), model_of("cgc", **SMALL)
    cgc.load_state_dict(ple.state_dict())
    x = rows()
    for task, logits in ple(numeric=x).logits.items():
        assert torch.equal(cgc(numeric=x).logits[task], logits)


@pytest.mark.parametrize(("model_type", "levels"), [("cgc", 1), ("ple", 2)])
def test_gradients(model_type: str, levels: int) -> None:
    tasks = [TASKS[0], TASKS[1]]
    model = model_of(model_type, **{**SMALL, "tasks": tasks, "num_shared_experts": 1}, num_levels=levels, tower_dims=[])
    labels = {
        "b": torch.tensor([1.0, 0.0, float("nan")], dtype=torch.float64),
        "a": torch.tensor([[0.5, -2.0], [float("nan"), 1.0], [1.0, 1.0]], dtype=torch.float64),
    }
    check_gradients(model.train(), labels)


def expert_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 6])
def test_extracted_task_keeps_the_share_of_experts_that_the_formula_says(levels: int, num_tasks: int) -> None:
    """Equal groups: CGC 2 / (T + 1); PLE ((L - 1)(T + 1) + 2) / (L (T + 1)). Experts are 3 wide, in and out."""
    tasks = [{"name": f"t{i}", "kind": "binary"} for i in range(num_tasks)]
    fields = {"tasks": tasks, "num_levels": levels, "expert_dims": [3], "num_specific_experts": 2}
    model = model_of("cgc" if levels == 1 else "ple", **fields, num_shared_experts=2)
    small = model.extract_task(f"t{num_tasks - 1}")
    groups = num_tasks + 1
    share = ((levels - 1) * groups + 2) / (levels * groups)
    assert expert_parameters(small) == pytest.approx(share * expert_parameters(model), rel=1e-12)
    gates = [len(level.gates) for level in small.trunk.levels]
    # The task's own gate last; one level below, its own and the shared one; below that all, as all streams are needed.
    assert gates == [num_tasks + 1] * max(0, levels - 2) + [2] * (levels > 1) + [1]
    assert list(small.towers) == [f"t{num_tasks - 1}"]
