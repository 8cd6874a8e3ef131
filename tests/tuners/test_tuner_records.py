"""Who used which expert: records of the calls of a model with adapters."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from tuner_zoo import CONFIGS, PREFERENCES, TASKS, adapted, batch, config_of, tasks_for

from moe_mtl.ops import rank_experts
from moe_mtl.tuners import METHODS, RankConfig
from moe_mtl.tuners._base import RankLayer

ROWS = 15  # tokens of a batch
WITHOUT_A_GATE = {"LORI", "MTLORA"}
RECORDED = [config for config in CONFIGS if METHODS[config] not in WITHOUT_A_GATE]


def by_hand(adapter: Any, x_ND: Tensor) -> Tensor:
    """Weights of experts, `[N, E]`, of the methods that choose token by token."""
    c = adapter.config
    method = METHODS[type(c)]
    if method == "HYDRA_LORA":
        return (x_ND @ adapter.router_UD.t()).softmax(-1)
    if method == "MIXLORA":
        scores_NE = (x_ND @ adapter.router_ED.t()).softmax(-1)
    elif method == "SMORA":
        scores_NE = (x_ND @ adapter.router_RD.t()).sigmoid()
    else:
        scores_NE = (x_ND @ adapter.a_RD.t()).abs()
    chosen_NE = torch.zeros_like(scores_NE).scatter(1, scores_NE.topk(c.num_selected).indices, 1.0)
    kept_NE = chosen_NE if method == "FLYLORA" else scores_NE * chosen_NE
    return kept_NE / kept_NE.sum(-1, keepdim=True)


@pytest.mark.parametrize("config_class", RECORDED)
def test_a_record_per_layer_and_call(config_class: type[RankConfig]) -> None:
    model = adapted(config_class)
    entered: dict[str, Tensor] = {}
    gated = {}
    for module in model.modules():
        if isinstance(module, RankLayer) and type(module.adapter("default")).__name__ != "PlainLora":
            gated[module.name] = module.adapter("default")
            module.register_forward_pre_hook(lambda m, args: entered.__setitem__(m.name, args[0].flatten(0, 1)))
    told = tasks_for(config_class, ["code", "sql", "code"])
    expected = model(**batch(), **told).logits
    with model.base_model.record_routing() as records:
        found = model(**batch(), **told).logits
        assert len(records) == len(gated)
        model(**batch(), **told)
    assert torch.equal(found, expected)
    assert len(records) == 2 * len(gated)
    model(**batch(), **told)
    assert len(records) == 2 * len(gated)
    assert {record.layer for record in records} == set(gated)
    for record in records:
        adapter: Any = gated[record.layer]
        if config_class.adapter_class.by_task:
            assert list(record.weights) == ["sql", "code"]
            assert all(weights.shape[0] == 1 for weights in record.weights.values())
            assert not torch.equal(record.weights["sql"], record.weights["code"])
        elif config_class.adapter_class.by_preference:
            wanted = torch.tensor([PREFERENCES[task] for task in ("code", "sql", "code")])
            assert torch.equal(record.weights["preference"], wanted)
            assert record.experts["preference"] == tuple(TASKS)
        else:
            torch.testing.assert_close(record.weights["tokens"], by_hand(adapter, entered[record.layer]))
            assert record.weights["tokens"].shape[0] == ROWS
        for gate, weights in record.weights.items():
            assert not weights.requires_grad
            assert len(record.experts[gate]) == len(set(record.experts[gate])) == weights.shape[1]
            torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
            torch.testing.assert_close(record.utilisation()[gate].sum(), torch.tensor(1.0))
            assert 0 <= record.entropy()[gate] <= math.log(weights.shape[1]) + 1e-6


@pytest.mark.parametrize("config_class", [config for config in CONFIGS if METHODS[config] in WITHOUT_A_GATE])
def test_without_a_gate_there_is_no_record(config_class: type[RankConfig]) -> None:
    model = adapted(config_class)
    with model.base_model.record_routing() as records:
        model(**batch(), **tasks_for(config_class, TASKS))
    assert records == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_runs_again_in_a_backward_is_recorded_once(reentrant: bool) -> None:
    for config_class in RECORDED:
        model = adapted(config_class).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with model.base_model.record_routing() as records:
            loss = model(**batch(), **tasks_for(config_class, TASKS)).loss
            calls = len(records)
            loss.backward()
            assert len(records) == calls > 0


def test_the_chosen_ranks_of_the_function() -> None:
    x_ND, a_RD, b_OR = torch.randn(5, 6), torch.randn(4, 6), torch.randn(3, 4)
    chosen: list[Tensor] = []
    rank_experts(x_ND, a_RD, b_OR, num_selected=2, chosen=chosen)
    (chosen_NR,) = chosen
    assert torch.equal(chosen_NR.nonzero()[:, 1].view(5, 2), (x_ND @ a_RD.t()).abs().topk(2).indices.sort().values)
    with pytest.raises(ValueError, match="chosen: expected num_selected beside it"):
        rank_experts(x_ND, a_RD, b_OR, chosen=chosen)


def test_a_gate_that_is_uniform_has_the_largest_entropy() -> None:
    config_class = next(config for config, name in METHODS.items() if name == "MOE_LORA")
    assert config_of(config_class).num_experts == 3
    model = adapted(config_class)
    for name, parameter in model.named_parameters():
        if name.endswith("gate_EV"):
            parameter.data.zero_()
    with model.base_model.record_routing() as records:
        model(**batch(), tasks="chat")
    assert float(records[0].entropy()["chat"]) == pytest.approx(math.log(3))
    assert records[0].experts["chat"] == ("expert 0", "expert 1", "expert 2")
