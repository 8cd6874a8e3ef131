"""Mod-Squad: the paper's size, what tells tasks apart, the running means, and configs that cannot be."""

import copy
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from moe_mtl.models.mod_squad import ModSquadConfig, ModSquadForMultiTask

TASKS = [
    {"name": "semseg", "kind": "segmentation", "num_outputs": 4},
    {"name": "depth", "kind": "depth"},
    {"name": "scene", "kind": "multiclass", "num_outputs": 3},
]
SMALL: dict[str, Any] = {
    "image_size": [16, 24],
    "hidden_size": 12,
    "num_hidden_layers": 4,
    "num_experts": 6,
    "num_selected": 2,
    "expert_dim": 10,
    "attention_experts": 5,
    "attention_selected": 3,
    "attention_head_dim": 8,
    "decoder_dim": 6,
    "decoder_stages": 2,
}


def build(**fields: Any) -> ModSquadForMultiTask:
    torch.manual_seed(0)
    start = {"tasks": TASKS, "initializer_range": 0.3, "zero_start": False}
    return ModSquadForMultiTask(ModSquadConfig(**(SMALL | start | fields))).eval()


def pixels(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def labels() -> dict[str, torch.Tensor]:
    return {"scene": torch.tensor([0, 2, 1]), "depth": pixels()[:, 0]}


def test_base_holds_the_papers_experts() -> None:
    """Six mixtures of 24 heads of 128 and six of 16 MLPs of 768, gates for 13 tasks."""
    tasks = [{"name": f"t{i}", "kind": "depth"} for i in range(13)]
    config = ModSquadConfig.of_size("base", image_size=[224, 224], tasks=tasks)
    with torch.device("meta"):
        model = ModSquadForMultiTask(config)
    d = 768
    sizes = {name: p.numel() for name, p in model.named_parameters()}

    def matrices(part: str) -> int:
        return sum(n for name, n in sizes.items() if part in name and model.get_parameter(name).dim() > 1 and ".b_" not in name)  # noqa: E501 # fmt: skip

    assert matrices("attention.experts") == 6 * 24 * 2 * d * 128
    assert matrices("mlp.experts") == 6 * 16 * 2 * d * 768
    assert matrices(".gates.") == 13 * 6 * (24 + 16) * d
    assert matrices("attention.kv") == 6 * 2 * d * 128
    blocks = sum(n for name, n in sizes.items() if name.startswith("blocks.") and ".gates." not in name)
    assert round(blocks / 1e6, 1) == 185.4
    assert round(matrices(".gates.") / 1e6, 1) == 2.4


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_a_token_costs_what_a_dense_mlp_does(size: str) -> None:
    config = ModSquadConfig.of_size(size, image_size=[128, 128])
    assert config.num_selected * config.expert_dim == config.mlp_ratio * config.hidden_size
    assert config.attention_selected * 2 == config.attention_experts
    assert config.attention_selected * config.attention_head_dim == 2 * config.hidden_size
    assert (config.attention_blocks, config.expert_blocks) == ([0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11])


def test_a_vector_per_task_is_added_before_every_block() -> None:
    model = build().double()
    entered, left = {}, {}
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda m, x, i=i: entered.update({i: x[0]}))
        block.register_forward_hook(lambda m, x, y, i=i: left.update({i: y.hidden}))
    model(pixels().double())
    left[-1] = model.patches(pixels().double()).unsqueeze(0)
    for i in range(4):
        for t, task in enumerate(model.tasks):
            before = left[i - 1][t if i else 0]
            torch.testing.assert_close(entered[i][t], before + model.conditions.embeddings[task])


def test_gates_start_at_zero_and_leave_it() -> None:
    model = build(zero_start=True).train()
    gates = {name: p for name, p in model.named_parameters() if ".gates." in name}
    assert len(gates) == 4 * 3
    assert all(not p.any() for p in gates.values())
    model(pixels(), labels=labels()).loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in gates.items() if not name.endswith("semseg"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_running_means_move_once_per_step(checkpointing: bool) -> None:
    """Gradient checkpointing runs a layer twice; its statistics are to be told once."""
    model = build(information_weight=0.1).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    first = model(pixels(), labels=labels(), tasks=["depth", "scene"], output_routing=True)
    first.loss.backward()
    seen = {name: b.clone() for name, b in model.named_buffers() if ".seen." in name}
    assert len(seen) == 4 * 3
    for record in first.routing:
        where = f"{record.layer}.{'attention' if int(record.layer[-1]) % 2 == 0 else 'mlp'}.router.statistics.seen"
        for task in ("depth", "scene"):
            torch.testing.assert_close(seen[f"{where}.{task}"], record.weights[task].mean(0))
        assert not seen[f"{where}.semseg"].any()
    second = model(pixels() + 1, labels=labels(), tasks=["depth"], output_routing=True)
    second.loss.backward()
    model.eval()(pixels())
    for record in second.routing:
        where = f"{record.layer}.{'attention' if int(record.layer[-1]) % 2 == 0 else 'mlp'}.router.statistics.seen"
        moved = 0.95 * seen[f"{where}.depth"] + 0.05 * record.weights["depth"].mean(0)
        torch.testing.assert_close(model.get_buffer(f"{where}.depth"), moved)
        assert torch.equal(model.get_buffer(f"{where}.scene"), seen[f"{where}.scene"])


@pytest.mark.parametrize("forwards", [1, 2])  # before a backward
@pytest.mark.parametrize("tasks", [[None] * 6, ["depth", "scene", "depth", None, "scene", "depth"]])
def test_checkpointing_changes_nothing(tasks: list[str | None], forwards: int) -> None:
    """The running means of a task that a batch lacks may have moved when its layers are computed again."""
    found = []
    for checkpointing in (False, True):
        model = build(noise_std=1.0, z_weight=0.1, balance_weight=0.1, information_weight=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        for start in range(0, len(tasks), forwards):
            batches = range(start, start + forwards)
            sum(model(pixels() + i, labels=labels(), tasks=tasks[i]).loss for i in batches).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((grads, dict(model.named_buffers())))
    for before, after in zip(*found, strict=True):
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_information_loss_is_taken_per_layer() -> None:
    model = build(information_weight=0.5).train()
    out = model(pixels(), output_routing=True)
    expected = 0.0
    for record in out.routing:
        joint = torch.stack([record.weights[task].mean(0) for task in model.tasks]) / 3
        task_T, expert_E = joint.sum(1, keepdim=True), joint.sum(0)
        expected -= 0.5 * (joint * (joint / (task_T * expert_E)).log()).sum()
    torch.testing.assert_close(out.auxiliary_loss, expected)
    assert model.eval()(pixels()).auxiliary_loss is None


def test_stored_experts_are_those_of_the_config() -> None:
    model = build(experts_kept={"2": [0, 1, 4], "3": [0, 2, 5]})
    assert [len(model.blocks[i].attention.experts.w_query) for i in (0, 2)] == [5, 3]
    assert [len(model.blocks[i].mlp.experts.w_up) for i in (1, 3)] == [6, 3]
    routing = {record.layer: record for record in model(pixels(), output_routing=True).routing}
    assert list(routing) == [f"blocks.{i}" for i in range(4)]
    assert all(set(i.flatten().tolist()) <= {0, 1, 4} for i in routing["blocks.2"].indices.values())
    assert all(w.shape[1] == 5 for w in routing["blocks.2"].weights.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_selected": 7}, "num_selected"),
        ({"attention_selected": 6}, "attention_selected"),
        ({"information_weight": -1.0}, "information_weight"),
        ({"experts_kept": {"4": [0, 1]}}, r"blocks with experts, \[1, 3\], found '4'"),
        ({"experts_kept": {"2": [0, 1, 5]}}, "increasing numbers below 5"),
        ({"experts_kept": {"2": [0, 1]}}, "leave 3 experts to choose"),
        ({"experts_kept": {"3": [0]}}, "leave 2 experts to choose"),
    ],
)
def test_configs_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        ModSquadConfig(**(copy.deepcopy(SMALL) | {"tasks": TASKS} | fields))


def test_unknown_size() -> None:
    with pytest.raises(ValueError, match="tiny, small, base, found 'huge'"):
        ModSquadConfig.of_size("huge")
