"""Costs held to formulas written out per architecture, and to torch's own counter."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_mtl.models import REGISTRY, model_class
from moe_mtl.models._tabular import TabularConfig, TabularModel, TrunkOutput
from moe_mtl.pathway import Cost, cost, part_of
from moe_mtl.tasks import UnknownTaskError

TABULAR = sorted(name for name, model in REGISTRY.items() if issubclass(model, TabularModel))
EMBEDDING = 3
TABLE = (10 + 7 + 5) * EMBEDDING
FEATURES = [
    {"name": "age", "kind": "numeric"},
    {"name": "hours", "kind": "numeric"},
    {"name": "city", "kind": "categorical", "num_categories": 10},
    {"name": "job", "kind": "categorical", "num_categories": 7},
    {"name": "tags", "kind": "multi_hot", "num_categories": 5, "pooling": "mean", "max_length": 4},
]
ROWS = 1 + 1 + 4  # looked up for one row: two categories and four tags
D = 3 * EMBEDDING + 2
H, TOWER = 6, 4
TASKS = [
    {"name": "click", "kind": "binary"},
    {"name": "kind", "kind": "multiclass", "num_outputs": 5},
    {"name": "price", "kind": "regression"},
]
OUTPUTS = {"click": 1, "kind": 5, "price": 1}
COMMON = {"features": FEATURES, "tasks": TASKS, "embedding_dim": EMBEDDING, "tower_dims": [TOWER]}


def build(model_type: str, **fields: object) -> TabularModel:
    torch.manual_seed(0)
    cls = model_class(model_type)
    return cls(cls.config_class(**(COMMON | fields))).eval()


def towers(names: list[str]) -> tuple[int, int]:
    """Parameters and multiply-adds."""
    multiply_adds = sum(H * TOWER + TOWER * OUTPUTS[name] for name in names)
    return multiply_adds + sum(TOWER + OUTPUTS[name] for name in names), multiply_adds


def expect(found: Cost, parameters: int, multiply_adds: int) -> None:
    assert found.touched == TABLE + parameters
    assert found.active == ROWS * EMBEDDING + parameters
    assert found.table_rows == ROWS
    assert found.multiply_adds == multiply_adds


@pytest.mark.parametrize("names", [list(OUTPUTS), ["kind"], ["click", "price"]])
def test_shared_bottom_costs_its_bottom_and_towers(names: list[str]) -> None:
    model = build("shared_bottom", bottom_dims=[8, H])
    parameters, multiply_adds = towers(names)
    expect(cost(model, names), D * 8 + 8 + 8 * H + H + parameters, D * 8 + 8 * H + multiply_adds)


@pytest.mark.parametrize("names", [list(OUTPUTS), ["kind"], ["click", "price"]])
def test_mmoe_needs_every_expert_for_any_task(names: list[str]) -> None:
    experts, tasks = 4, len(names)
    found = cost(build("mmoe", num_experts=experts, expert_dims=[8, H]), names)
    parameters, multiply_adds = towers(names)
    expect(
        found,
        experts * (D * 8 + 8 + 8 * H + H) + tasks * D * experts + parameters,
        experts * (D * 8 + 8 * H) + tasks * (D * experts + experts * H) + multiply_adds,
    )
    assert found.parts["experts"].multiply_adds == experts * (D * 8 + 8 * H)
    assert found.parts["experts"].touched == experts * (D * 8 + 8 + 8 * H + H)
    assert found.parts["gates"].multiply_adds == tasks * D * experts
    assert found.parts["trunk"].multiply_adds == tasks * experts * H


@pytest.mark.parametrize("names", [list(OUTPUTS), ["kind"]])
def test_omoe_has_one_gate(names: list[str]) -> None:
    parameters, multiply_adds = towers(names)
    found = cost(build("omoe", num_experts=4, expert_dims=[H]), names)
    expect(found, 4 * (D * H + H) + D * 4 + parameters, 4 * D * H + D * 4 + 4 * H + multiply_adds)


@pytest.mark.parametrize("names", [list(OUTPUTS), ["kind"], ["click", "price"]])
def test_cgc_leaves_the_other_tasks_experts_out(names: list[str]) -> None:
    own, shared, tasks = 2, 3, len(names)
    found = cost(build("cgc", num_specific_experts=own, num_shared_experts=shared, expert_dims=[H]), names)
    parameters, multiply_adds = towers(names)
    experts = tasks * own + shared
    expect(
        found,
        experts * (D * H + H) + tasks * D * (own + shared) + parameters,
        experts * D * H + tasks * (D + H) * (own + shared) + multiply_adds,
    )


@pytest.mark.parametrize("names", [list(OUTPUTS), ["kind"], ["click", "price"]])
def test_ple_keeps_all_experts_below_the_last_level(names: list[str]) -> None:
    own, shared, tasks = 2, 3, len(names)
    model = build("ple", num_levels=2, num_specific_experts=own, num_shared_experts=shared, expert_dims=[H])
    parameters, multiply_adds = towers(names)
    below, last, seen = 3 * own + shared, tasks * own + shared, own + shared
    expect(
        cost(model, names),
        below * (D * H + H) + D * (tasks * seen + below) + last * (H * H + H) + tasks * H * seen + parameters,
        below * D * H + (D + H) * (tasks * seen + below) + last * H * H + 2 * tasks * H * seen + multiply_adds,
    )


@pytest.mark.parametrize("names", [list(OUTPUTS), ["kind"]])
def test_home_costs_its_two_layers(names: list[str]) -> None:
    n, rank, low_rank, tasks = 2, 3, 2, len(names)
    model = build("home", num_experts=n, expert_dims=[H], feature_gate_rank=rank, num_feature_gates=low_rank)
    groups = 3  # each task is a group of its own; the meta layer keeps all of them

    def gated(width: int) -> tuple[int, int]:
        """A feature gate and its group of experts, with batch norm."""
        gate = low_rank * 2 * width * rank + width * low_rank
        return gate + n * (width * H + H) + 2 * n * H, gate + low_rank * width + n * width * H

    meta = [gated(D)[i] * (groups + 1) for i in (0, 1)]
    task = [gated(H)[i] * (2 * tasks + 1) for i in (0, 1)]
    meta_gates = tasks * D * 2 * n + D * (groups + 1) * n + (tasks + 1) * D * n
    task_gates = tasks * (2 * H * 3 * n + H * n)
    # The self-gates' weights are added to the gates': their experts are summed once.
    mixing = (tasks * 2 * n + (groups + 1) * n) * H + tasks * 3 * n * H
    parameters, multiply_adds = towers(names)
    expect(
        cost(model, names),
        meta[0] + task[0] + meta_gates + task_gates + parameters,
        meta[1] + task[1] + meta_gates + task_gates + mixing + multiply_adds,
    )


def test_saturated_static_dselect_k_needs_the_experts_it_chose() -> None:
    model = build("dselect_k", num_experts=8, expert_dims=[H], num_selected=2)
    everything = cost(model)
    with torch.no_grad():
        for i, gate in enumerate(model.trunk.gates.values()):
            gate.bits.copy_(torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]]) if i == 0 else torch.ones(2, 3))
    assert cost(model, "click").parts["experts"].touched == 2 * (D * H + H)
    assert cost(model, "kind").parts["experts"].touched == D * H + H
    assert cost(model, "kind").stored == everything.stored == cost(model).stored
    assert cost(model, "kind").parts["experts"].multiply_adds == D * H


def test_esmm_product_needs_both_towers() -> None:
    cls = model_class("esmm")
    model = cls(cls.config_class(features=FEATURES, embedding_dim=EMBEDDING, tower_dims=[TOWER]))
    tower = D * TOWER + TOWER
    assert cost(model, "ctr").multiply_adds == tower
    assert cost(model, "ctcvr").multiply_adds == cost(model).multiply_adds == 2 * tower
    assert cost(model, "ctr").share["multiply_adds"] == 0.5


@pytest.mark.parametrize("kind", ["piecewise_linear", "periodic"])
def test_numeric_embeddings_count(kind: str) -> None:
    features = [{"name": f"n{i}", "kind": "numeric", "bins": [-1.0, 0.0, 0.5, 2.0]} for i in range(4)]
    model = build("mmoe", features=features, numeric_embedding=kind, numeric_embedding_dim=5)
    encoder = cost(model).parts["encoder"]
    assert encoder.touched == encoder.active == sum(p.numel() for p in model.encoder.parameters())
    if kind == "piecewise_linear":  # 3 bins to a column: the encoding, the linear part, the bends
        assert encoder.multiply_adds == 4 * 3 + 4 * 5 + 4 * 3 * 5
    else:
        frequencies = model.encoder.numeric.periodic.weight.shape[1]
        assert encoder.multiply_adds == 4 * 2 * frequencies * 5


@pytest.mark.parametrize("model_type", TABULAR)
def test_every_model_agrees_with_torchs_counter(model_type: str) -> None:
    tasks = {} if model_type != "esmm" else {"tasks": model_class("esmm").config_class().tasks}
    model = build(model_type, **tasks)
    for names in (None, *([task] for task in model.tasks)):
        path = model if names is None else model.extract_task(names)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            path(**path.example_inputs())
        found = cost(model, names)
        assert counter.get_total_flops() == 2 * found.multiply_adds > 0
        assert found.stored == sum(parameter.numel() for parameter in model.parameters())
        assert found.touched == sum(parameter.numel() for parameter in path.parameters())  # nothing is held unread
        for field in ("touched", "active", "multiply_adds"):
            assert sum(vars(part)[field] for part in found.parts.values()) == vars(found)[field]


def test_rows_of_a_batch_share_the_count() -> None:
    model = build("mmoe")
    batch = {name: tensor.repeat(7, *[1] * (tensor.dim() - 1)) for name, tensor in model.example_inputs().items()}
    assert cost(model, "kind", batch) == cost(model, "kind")


def test_the_model_is_left_as_it_was() -> None:
    model = build("mmoe").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost(model, "click")
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unknown_task() -> None:
    with pytest.raises(UnknownTaskError, match="unknown task 'clicks'"):
        cost(build("mmoe"), "clicks")


class TopTrunk(nn.Module):
    """Each row fetches its own 2 of 8 experts: nothing in `pathway` was written for it."""

    def __init__(self, input_dim: int):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(8, input_dim, H))
        self.output_dim = H

    def forward(self, x_BD: torch.Tensor, tasks: list[str], record: bool) -> TrunkOutput:
        chosen_BK = torch.zeros(len(x_BD), 2, dtype=torch.int64)
        hidden = torch.einsum("bd,bkdh->bh", x_BD, self.experts[chosen_BK])
        return TrunkOutput(dict.fromkeys(tasks, hidden))


class TopModel(TabularModel):
    config_class = TabularConfig

    def build_trunk(self, input_dim: int) -> nn.Module:
        return TopTrunk(input_dim)


def test_a_sparse_model_reads_only_what_it_chose() -> None:
    found = cost(TopModel(TabularConfig(**COMMON)))
    assert found.parts["experts"].touched == 8 * D * H
    assert found.parts["experts"].active == 2 * D * H
    assert found.table_rows == ROWS + 2


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("encoder.embedding.weight", "encoder"),
        ("trunk.levels.0.experts.shared.weights.0", "experts"),
        ("trunk.meta.feature_gates.a.mixer.weight", "feature_gates"),
        ("trunk.levels.1", "trunk"),
        ("towers.ctr.output.weight", "towers"),
        ("blocks.3.mlp.router.gates.edges", "gates"),
        ("blocks.3.mlp.router", "gates"),
        ("blocks.3.mlp.experts.w_up", "experts"),
        ("blocks.0.attention.experts.w_out", "experts"),
        ("blocks.2.attention.qkv.weight", "attention"),
        ("blocks.2.norm1.weight", "blocks"),
        ("decoder.memory", "decoder"),
        ("", "other"),
    ],
)
def test_parts_are_told_from_names(name: str, part: str) -> None:
    assert part_of(name) == part
