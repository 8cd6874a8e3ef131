"""MixLoRA: a feed-forward block against its equation, what it computes once, its loss, and what it takes as a block."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PhiConfig, PhiForCausalLM
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP
from tuner_zoo import adapted, batch, config_of, llama

from moe_mtl.tuners import MixLoraConfig, extract_task
from moe_mtl.tuners._tasks import CurrentTasks
from moe_mtl.tuners.mixlora import MixLayer, MixLora


def block_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaMLP(llama().config)
    return PhiMLP(PhiConfig(hidden_size=16, intermediate_size=24))


def layer_of(kind: str, **options: Any) -> tuple[MixLayer, MixLora]:
    config = config_of(MixLoraConfig, **({"num_experts": 5} | options))
    layer = MixLayer(block_of(kind), CurrentTasks(), "mlp")
    layer.update_layer("default", config)
    layer.double()
    adapter: Any = layer.moe_adapters["default"]
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return layer, adapter


def a_of(adapter: nn.Module, name: str) -> Tensor:
    return adapter.get_parameter(f"a_{name}_ERD")


def b_of(adapter: nn.Module, name: str) -> Tensor:
    return adapter.get_parameter(f"b_{name}_EOR")


def plainly(layer: MixLayer, adapter: MixLora, x_ND: Tensor) -> Tensor:
    """Every chosen expert is a whole feed-forward block with weights of its own."""
    base, config = layer.base_layer, adapter.config
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if "gate" not in adapter.names:
        names = {"up": "fc1", "down": "fc2"}

    def linear(name: str, expert: int, x_D: Tensor) -> Tensor:
        module = base.get_submodule(names[name])
        delta = config.scale * b_of(adapter, name)[expert] @ a_of(adapter, name)[expert]
        return nn.functional.linear(x_D, module.weight + delta, module.bias)

    rows = []
    for x_D in x_ND:
        scores_E = (adapter.router_ED @ x_D).softmax(-1)
        chosen = scores_E.argsort(descending=True)[: config.num_selected]
        weights_K = scores_E[chosen] / scores_E[chosen].sum()
        row = 0.0
        for weight, expert in zip(weights_K, chosen.tolist(), strict=True):
            up_H = linear("up", expert, x_D)
            if "gate" in names:
                hidden_H = nn.functional.silu(linear("gate", expert, x_D)) * up_H
            else:
                hidden_H = base.activation_fn(up_H)
            row = row + weight * linear("down", expert, hidden_H)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["llama", "phi"])
@pytest.mark.parametrize("num_selected", [1, 2, 5])
def test_equation(kind: str, num_selected: int) -> None:
    layer, adapter = layer_of(kind, num_selected=num_selected)
    x_BLD = torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True)
    found, expected = layer(x_BLD), plainly(layer, adapter, x_BLD.flatten(0, 1)).view(2, 4, 16)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.linspace(-1, 1, 128, dtype=torch.float64).view(2, 4, 16)
    leaves = [x_BLD, *adapter.parameters()]
    for got, wanted in zip(
        torch.autograd.grad(found, leaves, grad, allow_unused=num_selected == 1),
        torch.autograd.grad(expected, leaves, grad, allow_unused=num_selected == 1),
        strict=True,
    ):
        if wanted is None:  # one weight is 1 whatever the router says
            assert got is None or not got.any()
            continue
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("change", ["ops.hidden.BYTES", "tuners.mixlora.FEW_RANKS", "tuners.mixlora._on_cpu"])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_however_it_is_computed(kind: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy at a time, experts apart, and as on a GPU."""
    layer, adapter = layer_of(kind, num_selected=2)
    x_BLD = torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x_BLD, *adapter.parameters()]

    def computed() -> list[Tensor]:
        y = layer(x_BLD)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    expected = computed()
    monkeypatch.setattr(f"moe_mtl.{change}", (lambda t: False) if change.endswith("cpu") else 0)
    torch.testing.assert_close(computed(), expected, rtol=1e-12, atol=1e-10)


def test_an_activation_that_is_trained_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = layer_of("phi", num_selected=2)
    slope = nn.PReLU(dtype=torch.float64)
    layer.base_layer.activation_fn = slope
    x_BLD = torch.randn(2, 4, 16, dtype=torch.float64)
    (found,) = torch.autograd.grad(layer(x_BLD).square().sum(), slope.weight)
    monkeypatch.setattr("moe_mtl.tuners.mixlora._on_cpu", lambda t: False)
    (expected,) = torch.autograd.grad(layer(x_BLD).square().sum(), slope.weight)
    torch.testing.assert_close(found, expected)
    assert found.any()


def test_one_expert_is_lora_bit_for_bit() -> None:
    linears = ["gate_proj", "up_proj", "down_proj"]
    ours = adapted(MixLoraConfig, num_experts=1, num_selected=1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", *linears])
    lora = get_peft_model(llama(), config).eval()
    theirs = dict(lora.named_modules())

    def take(key: str, a_RD: Tensor, b_OR: Tensor) -> None:
        theirs[key].lora_A["default"].weight.data = a_RD
        theirs[key].lora_B["default"].weight.data = b_OR

    for key, layer in ours.named_modules():
        adapter: Any = layer.moe_adapters["default"] if hasattr(layer, "moe_adapters") else None
        if isinstance(layer, MixLayer):
            for name in adapter.names:
                take(
                    f"{key}.{name}_proj",
                    a_of(adapter, name)[0].data,
                    b_of(adapter, name)[0].data,
                )
        elif adapter is not None:
            take(key, adapter.a_RD.data, adapter.b_OP.data)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch()).logits, lora(**batch()).logits, rtol=0, atol=0)


def test_what_is_shared_computes_once_per_token() -> None:
    layer, _ = layer_of("llama")
    rows = []
    for module in layer.base_layer.children():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, out: rows.append(args[0].numel() // args[0].shape[-1]))
    layer(torch.randn(2, 4, 16, dtype=torch.float64))
    assert rows == [8, 8, 8]


def test_a_sample_does_not_hear_of_those_beside_it() -> None:
    layer, _ = layer_of("llama")
    x_BLD = torch.randn(5, 4, 16, dtype=torch.float64)
    together = layer(x_BLD)
    for row in range(5):
        torch.testing.assert_close(layer(x_BLD[row : row + 1])[0], together[row], rtol=1e-12, atol=1e-12)
    assert layer(x_BLD[:0]).shape == (0, 4, 16)


def test_the_start_is_as_published() -> None:
    torch.manual_seed(0)
    adapter = MixLora(256, 512, 256, True, MixLoraConfig())
    assert float(adapter.router_ED.std()) == pytest.approx(0.02, rel=0.1)
    for name, width in (("gate", 256), ("up", 256), ("down", 512)):
        assert float(a_of(adapter, name).abs().max()) == pytest.approx(width**-0.5, rel=0.05)  # Kaiming-uniform
        assert not b_of(adapter, name).any()


def test_its_operations_are_counted() -> None:
    model = adapted(MixLoraConfig).train()
    with FlopCounterMode(display=False) as counter:
        model(**batch()).loss.backward()
    assert counter.get_total_flops() > 0


# --- the loss that evens out the experts' use ---


def balance(model: PeftModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Recomputed from what enters each block, without padding."""
    terms: list[Tensor] = []

    def hook(layer: nn.Module, args: tuple[Tensor]) -> None:
        adapter: Any = layer.moe_adapters["default"]
        x_ND = args[0].flatten(0, 1) if mask is None else args[0][mask.bool()]
        scores_NE = nn.functional.linear(x_ND, adapter.router_ED).softmax(-1)
        chosen_NK = scores_NE.topk(2).indices
        used_E = torch.stack([(chosen_NK == e).float().mean() for e in range(3)])
        terms.append(3 * (used_E * scores_NE.mean(0)).sum())

    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, MixLayer)]
    model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return torch.stack(terms).mean()


def test_the_balance_is_added_in_training_alone() -> None:
    model = adapted(MixLoraConfig, balance_coef=0.5)
    inputs = batch()
    plain = model(**inputs).loss
    model.train()
    expected = plain + 0.5 * balance(model, inputs["input_ids"])
    torch.testing.assert_close(model(**inputs).loss, expected)
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], expected)
    without = adapted(MixLoraConfig, balance_coef=0.0).train()
    assert torch.equal(without(**inputs).loss, plain)
    assert not torch.equal(model(**inputs).loss, plain)
    assert model(input_ids=inputs["input_ids"]).loss is None
    assert not model.base_model.current_tasks.losses.terms


def padded(lengths: list[int]) -> dict[str, Tensor]:
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    return batch(len(lengths)) | {"attention_mask": mask}


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_padding_has_no_part_in_the_balance(reentrant: bool | None) -> None:
    inputs = padded([5, 1, 3])
    plain = adapted(MixLoraConfig, balance_coef=0.0).train()
    total = plain(**inputs).loss + 0.5 * balance(plain, inputs["input_ids"], inputs["attention_mask"])
    expected = torch.autograd.grad(total, [p for p in plain.parameters() if p.requires_grad])
    model = adapted(MixLoraConfig, balance_coef=0.5).train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        model.zero_grad()
        loss = model(**inputs).loss
        with torch.no_grad():
            model(**padded([2, 2, 2]))
        torch.testing.assert_close(loss, total)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        torch.testing.assert_close(gradients, list(expected), rtol=1e-4, atol=1e-7)
    nothing = model(**inputs | {"attention_mask": torch.zeros(3, 5)}).loss
    assert nothing.isfinite()
    if reentrant is not None:
        loss = model(**inputs).loss + model(**padded([2, 2, 2])).loss
        with pytest.raises(RuntimeError, match=r"padding: .* found calls whose padding differs"):
            loss.backward()


def test_without_padding_a_mask_changes_no_bit() -> None:
    model = adapted(MixLoraConfig, balance_coef=0.5).train()
    found = []
    for mask in (None, torch.ones(3, 5)):
        model.zero_grad()
        loss = model(**batch(), attention_mask=mask).loss
        loss.backward()
        found.append([loss.detach(), *[p.grad.clone() for p in model.parameters() if p.requires_grad]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_the_balance_has_its_gradient_under_checkpointing_too(reentrant: bool | None, factor: float) -> None:
    model = adapted(MixLoraConfig, balance_coef=0.5).train()
    inputs = batch()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = adapted(MixLoraConfig, balance_coef=0.0).train()
    plain_parameters = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    total = factor * (plain(**inputs).loss + 0.5 * balance(plain, inputs["input_ids"]))
    expected = torch.autograd.grad(total, list(plain_parameters.values()))
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):  # nothing of one step is left in the next
        model.zero_grad()
        (factor * model(**inputs).loss).backward()
        for parameter, wanted in zip(parameters.values(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_calls_and_one_backward(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = adapted(MixLoraConfig, balance_coef=0.5).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        first, second = model(**batch(2)).loss, model(**batch(3)).loss
        (first + 0.25 * second).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_calls_side_by_side_have_each_their_own() -> None:
    """As the replicas of a data-parallel model have."""
    model = adapted(MixLoraConfig, balance_coef=0.5).train()
    inputs = [batch(samples) for samples in (1, 2, 3, 4)]
    expected = [model(**each).loss for each in inputs]
    all_there = threading.Barrier(len(inputs))

    def wait(*_: Any) -> None:
        all_there.wait(60)

    model.get_base_model().model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(len(inputs)) as pool:
        found = list(pool.map(lambda each: model(**each).loss, inputs))
    torch.testing.assert_close(found, expected)


# --- targets ---


def test_by_default_the_targets_of_lora_and_all_blocks() -> None:
    model = adapted(MixLoraConfig, target_modules=None)
    assert {type(m).__name__ for m in model.modules() if hasattr(m, "moe_adapters")} == {"MixLayer", "RankLayer"}
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj", "mlp"}
    torch.manual_seed(0)
    config = PhiConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    phi = get_peft_model(PhiForCausalLM(config).eval(), config_of(MixLoraConfig))  # LoRA's are fc1 and fc2 too
    assert "mlp" in phi.peft_config["default"].target_modules
    assert not {"fc1", "fc2"} & phi.peft_config["default"].target_modules
    phi.train()(**batch()).loss.backward()
    assert all(p.grad is not None for p in phi.parameters() if p.requires_grad)


def test_targets_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a feed-forward block such as mlp among them, found .*q_proj"):
        adapted(MixLoraConfig, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"expected the block model.layers.0.mlp or its part .*up_proj, found both"):
        adapted(MixLoraConfig, target_modules=["mlp", "up_proj"])


def test_a_block_that_does_more_is_refused() -> None:
    config = Gemma3nTextConfig(
        hidden_size=16, intermediate_size=[24, 24], num_hidden_layers=2, activation_sparsity_pattern=[0.9, 0.0]
    )

    class Wrapped(nn.Module):
        def __init__(self, layer: int) -> None:
            super().__init__()
            self.mlp = Gemma3nTextMLP(config, layer_idx=layer)

    with pytest.raises(ValueError, match="found mlp of type Gemma3nTextMLP, which does more"):
        get_peft_model(Wrapped(0), config_of(MixLoraConfig, target_modules=["mlp"]))
    get_peft_model(Wrapped(1), config_of(MixLoraConfig, target_modules=["mlp"]))


def test_one_adapter_is_active_in_a_block() -> None:
    model = adapted(MixLoraConfig)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="expected one active in a feed-forward block, found default, second"):
        model(**batch())


def test_it_is_not_merged_and_nothing_is_half_merged() -> None:
    model = adapted(MixLoraConfig)
    expected = model(**batch()).logits
    for refused in (model.merge_adapter, model.merge_and_unload, lambda: extract_task(model)):
        with pytest.raises(NotImplementedError, match="cannot be merged: a router chooses its experts token by token"):
            refused()
        assert torch.equal(model(**batch()).logits, expected)


def test_without_its_adapters_a_model_is_as_before() -> None:
    base = adapted(MixLoraConfig).unload().train()
    assert not base._forward_hooks
    assert not base._forward_pre_hooks
    assert torch.equal(base(**batch()).loss, llama()(**batch()).loss)


def test_bad_fields() -> None:
    for options, message in (
        ({"num_experts": 0}, "num_experts: expected at least 1"),
        ({"num_selected": 4}, "num_selected: expected 1 to 3, the experts, found 4"),
        ({"balance_coef": -1.0}, "balance_coef: expected 0 or more"),
        ({"router_std": float("nan")}, "router_std: expected 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(MixLoraConfig, **options)
