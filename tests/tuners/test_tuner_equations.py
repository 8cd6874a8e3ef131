"""Every method against its equation, written as plainly as it stands, in float64; and where training starts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tuner_zoo import CONFIGS, PREFERENCES, TASKS, adapted, batch, config_of, llama, tasks_for

from moe_mtl.tuners import METHODS, RankConfig
from moe_mtl.tuners._base import RankLayer
from moe_mtl.tuners._tasks import CurrentTasks


def mtl_lora(p: dict[str, Tensor], c: Any, x_D: Tensor, task: int) -> Tensor:
    lambda_RR = p["lambda_T"][task].diag() if c.diagonal else p["lambda_T"][task]
    weights_U = (p["logits_TU"][task] / c.temperature).softmax(-1)
    ups = p["b_OP"].split(c.r, dim=1)
    return sum(weights_U[i] * up_OR @ lambda_RR @ p["a_RD"] @ x_D for i, up_OR in enumerate(ups))


def hydra_lora(p: dict[str, Tensor], c: Any, x_D: Tensor, task: int) -> Tensor:
    weights_U = (p["router_UD"] @ x_D).softmax(-1)
    return sum(weights_U[i] * up_OR @ p["a_RD"] @ x_D for i, up_OR in enumerate(p["b_OP"].split(c.r, dim=1)))


def moe_lora(p: dict[str, Tensor], c: Any, x_D: Tensor, task: int) -> Tensor:
    weights_E = (p["gate_EV"] @ p["embedding_TV"][task]).softmax(-1)
    experts = zip(p["a_RD"].split(c.r), p["b_OP"].split(c.r, dim=1), strict=True)
    return sum(weights_E[e] * b_OR @ a_RD @ x_D for e, (a_RD, b_OR) in enumerate(experts))


def largest(key_R: Tensor, number: int) -> Tensor:
    return torch.zeros_like(key_R).scatter(0, key_R.argsort(descending=True, stable=True)[:number], 1.0)


def smora(p: dict[str, Tensor], c: Any, x_D: Tensor, task: int) -> Tensor:
    logits_R = p["router_RD"] @ x_D
    scores_R = logits_R.sigmoid() if c.scores == "sigmoid" else logits_R.softmax(-1)
    gate_R = scores_R * largest(scores_R.detach() + p["bias_P"], c.num_selected)
    if c.renormalise:
        gate_R = gate_R / gate_R.sum()
    return p["b_OP"] @ (gate_R * (p["a_RD"] @ x_D))


def flylora(p: dict[str, Tensor], c: Any, x_D: Tensor, task: int) -> Tensor:
    u_R = p["a_RD"] @ x_D
    return p["b_OP"] @ (u_R * largest(u_R.detach().abs() + p["bias_P"], c.num_selected))


def lori(p: dict[str, Tensor], c: Any, x_D: Tensor, task: int) -> Tensor:
    b_OR = p["b_OP"] * p["mask_OR"] if c.masked else p["b_OP"]
    return b_OR @ p["a_RD"] @ x_D


def lora(p: dict[str, Tensor], c: Any, x_D: Tensor, task: int) -> Tensor:
    return p["b_OP"] @ p["a_RD"] @ x_D


def mtlora(p: dict[str, Tensor], c: Any, x_D: Tensor, task: int) -> Tensor:
    shared = p["b_OP"] @ p["a_RD"] @ x_D if c.shared_in_tasks else 0.0
    task_scale = 3.0 / {"alpha/r": 2, "alpha/sqrt(r)": 2**0.5, "alpha": 1}[c.scaling]
    return shared + task_scale / c.scale * p["b_TOR"][task] @ p["a_TRD"][task] @ x_D


def palora(p: dict[str, Tensor], c: Any, x_D: Tensor, task: int) -> Tensor:
    lambda_T = PREFERENCES[TASKS[task]]
    pairs = zip(p["a_RD"].split(c.r), p["b_OP"].split(c.r, dim=1), strict=True)
    return sum(weight * b_OR @ a_RD @ x_D for weight, (a_RD, b_OR) in zip(lambda_T, pairs, strict=True))


EQUATIONS: dict[str, Callable[..., Tensor]] = {
    "MTL_LORA": mtl_lora,
    "HYDRA_LORA": hydra_lora,
    "MOE_LORA": moe_lora,
    "SMORA": smora,
    "FLYLORA": flylora,
    "LORI": lori,
    "MIXLORA": lora,
    "MTLORA": mtlora,
    "PALORA": palora,
}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"diagonal": True},
    {"masked": True},
    {"task_rank": 2, "task_alpha": 3.0},
    {"task_rank": 2, "task_alpha": 3.0, "shared_in_tasks": False},
    {"scores": "softmax", "renormalise": True},
]


# Where there is no default that an equation could be written for, the options come first.
CASES = [
    (c, options)
    for c in CONFIGS
    for options in OPTIONS
    if all(hasattr(c, name) for name in options) and (options or not hasattr(c, "task_rank"))
]


@pytest.mark.parametrize(("config_class", "options"), CASES)
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)", "alpha"])
def test_equation(config_class: type[RankConfig], scaling: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = config_of(config_class, scaling=scaling, **options)
    base = nn.Linear(6, 5)
    layer = RankLayer(base, CurrentTasks())
    layer.update_layer("default", config)
    layer.double()
    adapter: Any = layer.moe_adapters["default"]
    with torch.no_grad():
        for tensor in (*adapter.parameters(), *adapter.buffers()):
            if tensor.dtype == torch.bool:
                tensor.copy_(torch.rand(tensor.shape) < 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor))
    x_BLD = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    preference = torch.tensor([PREFERENCES[task] for task in ("code", "sql", "code")], dtype=torch.float64)
    with layer.current_tasks.set(["code", "sql", "code"], preference):
        layer.current_tasks.enter(layer, (x_BLD,), {})
        found = layer(x_BLD)
    parameters, buffers = dict(adapter.named_parameters()), dict(adapter.named_buffers())
    scale = {"alpha/r": 2.0, "alpha/sqrt(r)": 4.0, "alpha": 8.0}[scaling]
    rows = []
    for sample_LD, task in zip(x_BLD, (2, 0, 2), strict=True):
        for x_D in sample_LD:
            delta_O = EQUATIONS[config.peft_type](parameters | buffers, config, x_D, task)
            rows.append(base.weight @ x_D + base.bias + scale * delta_O)
    expected = torch.stack(rows).view(3, 2, 5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [x_BLD, *parameters.values()]
    grad = torch.linspace(-1, 1, 30, dtype=torch.float64).view(3, 2, 5)
    for got, wanted in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_every_method_has_its_equation() -> None:
    assert set(EQUATIONS) == {str(name) for name in METHODS.values()}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MOE_LORA", {"num_experts": 1}),
        ("HYDRA_LORA", {"num_up_projections": 1}),
        ("PALORA", {"tasks": ["sql"]}),
        ("MTLORA", {"scaling": "alpha/r", "task_modules": ["layers.1.mlp.down_proj"]}),
        ("MTLORA", {"scaling": "alpha/r", "tasks": ["sql"], "task_rank": 4, "shared_in_tasks": False}),
    ],
)
def test_one_expert_is_lora_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    config_class = next(config for config, method in METHODS.items() if method == name)
    ours = adapted(config_class, **options)
    targets = ["q_proj", "v_proj", "down_proj"]
    lora = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()
    layers = dict(lora.named_modules())
    for key, layer in ours.named_modules():
        if isinstance(layer, RankLayer):
            adapter: Any = layer.moe_adapters["default"]
            if getattr(adapter, "has_pairs", False) and adapter.has_shared:
                adapter.b_TOR.data.zero_()  # of the one layer that has them
            pair = (adapter.a_RD, adapter.b_OP) if hasattr(adapter, "b_OP") else (adapter.a_TRD[0], adapter.b_TOR[0])
            for side, tensor in zip(("lora_A", "lora_B"), pair, strict=True):
                getattr(layers[key], side)["default"].weight.data = tensor.data
    told = {"preference": [1.0]} if config_class.adapter_class.by_preference else tasks_for(config_class, ["sql"] * 3)
    with torch.no_grad():
        assert torch.equal(ours(**batch(), **told).logits, lora(**batch()).logits)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_training_starts_at_the_base_model(config_class: type[RankConfig]) -> None:
    model = adapted(config_class, init_weights=True)
    with torch.no_grad():
        found, expected = model(**batch(), **tasks_for(config_class, TASKS)).logits, llama()(**batch()).logits
    if config_class.layer_class is RankConfig.layer_class:
        assert torch.equal(found, expected)
    else:  # weights of several copies of a block sum to 1 up to rounding
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_only_the_adapter_is_trained(config_class: type[RankConfig]) -> None:
    model = adapted(config_class).train()
    model(**batch(), **tasks_for(config_class, TASKS)).loss.backward()
    for name, parameter in model.named_parameters():
        if ".moe_adapters." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        else:
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name


def test_flylora_is_sparse_and_frozen() -> None:
    config_class = next(config for config, name in METHODS.items() if name == "FLYLORA")
    for row_norm, expected in (("paper", 128**0.5 / 8), ("unit", 1.0)):
        torch.manual_seed(0)
        adapter: Any = config_class.adapter_class(512, 4, config_class(r=8, num_selected=2, row_norm=row_norm))
        assert (adapter.a_RD != 0).sum(1).tolist() == [128] * 8
        assert float(adapter.a_RD.norm(dim=1).mean()) == pytest.approx(expected, rel=0.1)
        assert [name for name, _ in adapter.named_parameters()] == ["b_OP"]
