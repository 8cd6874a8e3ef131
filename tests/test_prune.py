"""Pruning by usage: rules by hand, nothing changes where nothing used is lost, the report says what did."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moe_mtl.models import AutoModelForMultiTask
from moe_mtl.models.m3vit import M3ViTConfig, M3ViTForMultiTask
from moe_mtl.models.mod_squad import ModSquadConfig, ModSquadForMultiTask
from moe_mtl.models.vit import MultiTaskViT, MultiTaskViTConfig
from moe_mtl.pathway import cost, prune
from moe_mtl.pathway._prune import keep_mass, mod_squad
from moe_mtl.tasks import UnknownTaskError

TASKS = [
    {"name": "parts", "kind": "segmentation", "num_outputs": 4},
    {"name": "scene", "kind": "multiclass", "num_outputs": 3},
]
SIZES: dict[str, Any] = {
    "image_size": [16, 24],
    "patch_size": 8,
    "hidden_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "decoder_dim": 6,
    "decoder_stages": 2,
    "initializer_range": 0.3,
    "tasks": TASKS,
}


def build(**fields: Any) -> M3ViTForMultiTask:
    """Experts 1 and 4 of block 3 are never chosen by `parts`, as no other gate's logits are as low."""
    torch.manual_seed(0)
    model = M3ViTForMultiTask(M3ViTConfig(**(SIZES | {"num_experts": 6, "num_selected": 2, "expert_dim": 10} | fields)))
    block = model.blocks[3]
    with torch.no_grad():
        block.norm2.bias[0] = 50.0
        for task, unused in (("parts", [1, 4]), ("scene", [0])):
            gate_ED = block.mlp.router.gates[task]
            gate_ED[:, 0] = 0.0
            gate_ED[unused, 0] = -1.0
    return model.eval()


def build_mod_squad() -> ModSquadForMultiTask:
    """Heads 2, 4 and 6 of block 2 are never chosen by `parts`."""
    torch.manual_seed(0)
    config = ModSquadConfig(
        **SIZES,
        num_experts=6,
        num_selected=2,
        expert_dim=10,
        attention_experts=7,
        attention_selected=3,
        attention_head_dim=8,
        zero_start=False,
    )
    model = ModSquadForMultiTask(config)
    block = model.blocks[2]
    with torch.no_grad():
        block.norm1.bias[0] = 50.0
        gate_ED = block.attention.router.gates["parts"]
        gate_ED[:, 0] = 0.0
        gate_ED[[2, 4, 6], 0] = -1.0
    return model.eval()


def batch(rows: int = 4, seed: int = 1, labels: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {"pixel_values": torch.randn(rows, 3, 16, 24, generator=generator)}
    if labels:
        found["labels"] = {
            "parts": torch.randint(4, (rows, 16, 24), generator=generator),
            "scene": torch.randint(3, (rows,), generator=generator),
        }
    return found


class Pictures(Dataset):
    """A table that gives batches for slices."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, rows: slice) -> dict[str, Tensor]:
        return {"pixel_values": batch(5)["pixel_values"][rows]}


def test_keep_mass_by_hand() -> None:
    counts_E = torch.tensor([5, 0, 50, 5, 40])
    assert keep_mass(counts_E, 1, 0.5) == [2]
    assert keep_mass(counts_E, 1, 0.51) == [2, 4]
    assert keep_mass(counts_E, 1, 0.91) == [2, 4, 0]  # of equals the lower number
    assert keep_mass(counts_E, 1, 1.0) == [2, 4, 0, 3]
    assert keep_mass(counts_E, 3, 0.1) == [2, 4, 0]


def test_mod_squads_rule_by_hand() -> None:
    """More than 3 percent of the tokens: of K = 4 choices each, 0.75 percent of the choices."""
    counts_E = torch.tensor([9926, 74, 0, 0, 0, 0])
    assert mod_squad(counts_E, 4, 3.0) == [0, 1, 2, 3]  # never fewer than K
    assert mod_squad(torch.tensor([75, 2500, 2475, 2475, 76, 2399]), 4, 3.0) == [1, 2, 3, 5, 4]


def test_without_experts_that_are_never_chosen_nothing_changes() -> None:
    model = build()
    data = [batch(), batch(3, seed=2)]
    small, report = prune(model, "parts", data, keep=1.0)
    assert small.tasks == ["parts"]
    assert report.kept["blocks.3"] == [0, 2, 3, 5]
    assert small.config.experts_kept["3"] == [0, 2, 3, 5]
    assert small.blocks[3].mlp.experts.w_up.equal(model.blocks[3].mlp.experts.w_up[[0, 2, 3, 5]])
    for inputs in data:
        assert small(**inputs).logits["parts"].equal(model(**inputs, tasks="parts").logits["parts"])
    assert report.difference == {"parts": (0.0, 0.0)}
    assert report.choices_lost == {"blocks.1": {"parts": 0.0}, "blocks.3": {"parts": 0.0}}
    assert report.rows == 7
    assert report.stored == {"blocks.1": 6, "blocks.3": 6}
    assert report.loss == {}


def test_the_report_is_what_changed() -> None:
    model = build()
    data = [batch(labels=True), batch(3, seed=2, labels=True)]
    small, report = prune(model, ["parts", "scene"], data, keep=0.6)
    assert any(len(kept) < 6 for kept in report.kept.values())
    apart = {task: torch.zeros(0) for task in model.tasks}
    losses = {task: ([], []) for task in model.tasks}
    for inputs in data:
        before, after = model(**inputs), small(**inputs)
        for task in model.tasks:
            apart[task] = torch.cat([apart[task], (before.logits[task] - after.logits[task]).abs().flatten()])
            losses[task][0].append(before.task_losses[task].item())
            losses[task][1].append(after.task_losses[task].item())
    for task in model.tasks:
        assert report.difference[task] == pytest.approx((apart[task].max().item(), apart[task].mean().item()), rel=1e-5)
        assert report.loss[task] == pytest.approx([sum(values) / 2 for values in losses[task]], rel=1e-5)
    # A layer's lost choices, from the routing of the model that has them all.
    chosen: dict[str, list[Tensor]] = {}
    for inputs in data:
        for record in model(**inputs, output_routing=True).routing:
            chosen.setdefault(record.layer, []).append(record.indices["scene"].flatten())
    for layer, indices in chosen.items():
        lost = ~torch.isin(torch.cat(indices), torch.tensor(report.kept[layer]))
        assert report.choices_lost[layer]["scene"] == pytest.approx(lost.double().mean().item(), abs=1e-12)
        assert report.choices_lost[layer]["scene"] <= 0.4
    assert report.parameters == (model.num_parameters(), small.num_parameters())
    assert report.parameters[0] > report.parameters[1]
    assert json.loads(json.dumps(report.to_dict()))["tasks"] == ["parts", "scene"]


def test_mod_squad_prunes_by_its_rule() -> None:
    small, report = prune(build(), "parts", Pictures(), rule="mod_squad", theta=40.0, batch_size=2)
    assert report.rows == 5
    assert report.rule == "mod_squad theta=40"
    indices = {r.layer: r.indices["parts"].flatten() for r in build()(**Pictures()[:], output_routing=True).routing}
    for layer, kept in report.kept.items():
        tokens = len(indices[layer]) / 2
        serves = torch.bincount(indices[layer], minlength=6) / tokens
        expected = serves.sort(descending=True, stable=True).indices[: max(2, int((serves > 0.4).sum()))]
        assert kept == sorted(expected.tolist())
    assert any(len(kept) < 6 for kept in report.kept.values())
    # The whole model touches what somebody chose; in the small one all that is left was chosen.
    expert = 2 * 12 * 10 + 12 + 10
    touched = {m: cost(m, "parts", Pictures()[:]).parts["experts"].touched for m in (build(), small)}
    assert list(touched.values()) == [
        expert * sum(len(i.unique()) for i in indices.values()),
        expert * sum(len(kept) for kept in report.kept.values()),
    ]


def test_without_attention_experts_that_are_never_chosen_nothing_changes(tmp_path: Path) -> None:
    model = build_mod_squad()
    data = [batch(), batch(3, seed=2)]
    small, report = prune(model, "parts", data, keep=1.0)
    assert report.kept["blocks.2"] == small.config.experts_kept["2"] == [0, 1, 3, 5]
    assert list(report.stored.values()) == [7, 6, 7, 6]
    for name, weight in small.blocks[2].attention.experts.named_parameters():
        assert weight.equal(model.blocks[2].attention.experts.get_parameter(name)[[0, 1, 3, 5]])
    small.save_pretrained(tmp_path)
    loaded = AutoModelForMultiTask.from_pretrained(tmp_path)
    for inputs in data:
        whole = model(**inputs, tasks="parts").logits["parts"]
        assert small(**inputs).logits["parts"].equal(whole)
        assert loaded(**inputs).logits["parts"].equal(whole)
    assert report.difference == {"parts": (0.0, 0.0)}


@pytest.mark.parametrize(("rule", "value"), [("keep_mass", 0.6), ("mod_squad", 50.0)])
def test_rules_on_attention_experts_by_hand(rule: str, value: float) -> None:
    model, data = build_mod_squad(), [batch(), batch(3, seed=2)]
    given = {"keep" if rule == "keep_mass" else "theta": value}
    small, report = prune(model, ["parts", "scene"], data, rule=rule, **given)
    dropped = 0
    for layer, experts, selected in (("blocks.0", 7, 3), ("blocks.2", 7, 3), ("blocks.1", 6, 2), ("blocks.3", 6, 2)):
        expected = set()
        for task in model.tasks:
            counts, tokens = [0] * experts, 0
            for inputs in data:
                record = next(r for r in model(**inputs, output_routing=True).routing if r.layer == layer)
                tokens += len(record.indices[task])
                for chosen in record.indices[task].tolist():
                    for e in chosen:
                        counts[e] += 1
            order = sorted(range(experts), key=lambda e: -counts[e])
            number = selected
            if rule == "keep_mass":
                while sum(counts[e] for e in order[:number]) < value * tokens * selected:
                    number += 1
            else:
                number = max(number, sum(count > value / 100 * tokens for count in counts))
            expected |= set(order[:number])
            lost = sum(counts[e] for e in range(experts) if e not in report.kept[layer]) / (tokens * selected)
            assert report.choices_lost[layer][task] == pytest.approx(lost, abs=1e-12)
        assert report.kept[layer] == small.config.experts_kept[layer[-1]] == sorted(expected)
        dropped += experts - len(expected)
        block = small.blocks[int(layer[-1])]
        stored = block.attention.experts.w_query if experts == 7 else block.mlp.experts.w_up
        assert len(stored) == len(expected)
    assert dropped
    assert len(report.kept["blocks.0"]) < 7
    assert report.parameters[1] < report.parameters[0]


@pytest.mark.parametrize("gate", ["multi_gate", "task_conditioned"])
def test_a_pruned_model_is_a_model(tmp_path: Path, gate: str) -> None:
    """It saves, loads, extracts and prunes again; the kept experts are those of the first model throughout."""
    model = build(gate=gate) if gate == "multi_gate" else M3ViTForMultiTask(_conditioned()).eval()
    first, _ = prune(model, ["parts", "scene"], [batch()], keep=0.9)
    first.save_pretrained(tmp_path)
    loaded = AutoModelForMultiTask.from_pretrained(tmp_path)
    assert loaded(**batch()).logits["parts"].equal(first(**batch()).logits["parts"])
    for alone in (AutoModelForMultiTask.from_pretrained(tmp_path, tasks="scene"), loaded.extract_task("scene")):
        torch.testing.assert_close(alone(**batch()).logits["scene"], first(**batch()).logits["scene"])
    second, report = prune(loaded, "scene", [batch()], keep=0.7)
    for block in ("1", "3"):
        kept = second.config.experts_kept[block]
        assert set(kept) <= set(first.config.experts_kept[block])
        w_up = second.blocks[int(block)].mlp.experts.w_up
        assert w_up.equal(model.blocks[int(block)].mlp.experts.w_up[kept])
        assert report.stored[f"blocks.{block}"] == len(first.config.experts_kept[block])
    assert any(len(kept) < report.stored[layer] for layer, kept in report.kept.items())


def _conditioned() -> M3ViTConfig:
    torch.manual_seed(0)
    return M3ViTConfig(**SIZES, num_experts=6, num_selected=2, expert_dim=10, gate="task_conditioned", condition_dim=8)


def test_an_expert_that_is_gone_cannot_come_back() -> None:
    model = build(experts_kept={"3": [0, 2, 5]})
    config = M3ViTConfig(
        **(SIZES | {"num_experts": 6, "num_selected": 2, "expert_dim": 10}), experts_kept={"3": [0, 1]}
    )
    with pytest.raises(ValueError, match=r"expected some of \[0, 2, 5\] for block 3, found \[1\]"):
        model.reduced(config)


def test_an_iterator_and_a_data_set_will_do() -> None:
    model = build()
    of_list = prune(model, "parts", [batch()])[1]
    assert prune(model, "parts", iter([batch()]))[1] == of_list
    assert prune(model, "parts", Pictures(), batch_size=5)[1].rows == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "most"}, "rule: expected one of keep_mass, mod_squad, found 'most'"),
        ({"keep": 0.0}, "keep: expected a share"),
        ({"keep": 99}, "keep: expected a share"),
        ({"theta": -1.0}, "theta: expected a percentage"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"data": []}, "expected at least one row, found none"),
        ({"data": [torch.zeros(1, 3, 16, 24)]}, "expected mappings with 'pixel_values', found Tensor"),
        ({"data": [{"pixels": 1}]}, "expected mappings with 'pixel_values', found pixels"),
    ],
)
def test_what_cannot_be_pruned(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(build(), "parts", **({"data": [batch()]} | arguments))


def test_what_has_no_experts_or_no_such_task() -> None:
    with pytest.raises(ValueError, match="found a multi_task_vit"):
        prune(MultiTaskViT(MultiTaskViTConfig(**SIZES)), "parts", [batch()])
    with pytest.raises(UnknownTaskError, match="unknown task 'part'"):
        prune(build(), "part", [batch()])
