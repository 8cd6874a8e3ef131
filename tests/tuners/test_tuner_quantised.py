"""Adapters on quantised base models: they run, train and ship a task; a merge that could not be exact is refused."""

import functools
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from tuner_zoo import CONFIGS, MERGEABLE, TASKS, batch, choose, config_of, llama, one_task, targets_of, tasks_for

from moe_mtl.tuners import RankConfig, extract_task


class Int8Linear(nn.Module):
    """Knows its sizes and holds integers, as quantised layers of many libraries do, and is no `nn.Linear`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


class Float8Linear(nn.Linear):
    """Its weight counts as floating point."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


class Int8SubLinear(nn.Linear):
    """As `bitsandbytes` has it: an `nn.Linear` whose weight is none of floats."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        held = Int8Linear(linear)
        self.scale, self.weight = held.scale, held.weight

    forward = Int8Linear.forward


def of_bitsandbytes(linear: nn.Linear, bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    sizes = (linear.in_features, linear.out_features)
    if bits == 4:
        layer = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
    layer.weight = type(layer.weight)(linear.weight.detach().clone(), requires_grad=False)
    return layer.to("cpu")


KINDS: dict[str, Any] = {
    "int8": Int8Linear,
    "int8, a Linear": Int8SubLinear,
    "float8": Float8Linear,
    "bitsandbytes, 4 bits": functools.partial(of_bitsandbytes, bits=4),
    "bitsandbytes, 8 bits": functools.partial(of_bitsandbytes, bits=8),
}


def quantised(kind: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    base = llama(hidden_size=64, intermediate_size=128)
    for layer in base.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, KINDS[kind](linear))
    return base.eval()  # the new layers too: an integer product of bitsandbytes in training is another one


def adapted(config_class: type[RankConfig], kind: str) -> PeftModel:
    config = config_of(config_class, target_modules=targets_of(config_class), task_type="CAUSAL_LM")
    base = quantised(kind)
    torch.manual_seed(1)
    return get_peft_model(base, config).eval()


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_and_trains(config_class: type[RankConfig], kind: str) -> None:
    model = adapted(config_class, kind).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    out = model(**batch(), **tasks_for(config_class, TASKS))
    out.loss.backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    plain = quantised(kind)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model.eval()(**batch()).logits, plain(**batch()).logits)
    assert not torch.allclose(out.logits, plain(**batch()).logits, atol=2e-2)


def test_an_adapter_is_not_rounded_to_the_type_of_its_base() -> None:
    for config_class in CONFIGS:
        for name, tensor in adapted(config_class, "float8").named_parameters():
            if "moe_adapters" in name and tensor.std() > 0:
                rounded = tensor.detach().to(torch.float8_e4m3fn).float()
                assert not torch.equal(tensor, rounded) or tensor.unique().tolist() == [0.0, 1.0], name


def test_a_layer_that_hides_its_weight_is_refused() -> None:
    """As those of `torch.ao.quantization` do, which have no backward either."""

    class Hidden(nn.Module):
        in_features, out_features = 16, 16

        def weight(self) -> Tensor:
            raise NotImplementedError

    base = llama()
    base.model.layers[0].self_attn.q_proj = Hidden()
    with pytest.raises(ValueError, match=r"expected linear layers, found model\.layers\.0\.self_attn\.q_proj of type"):
        get_peft_model(base, config_of(CONFIGS[0], target_modules=["q_proj"]))


@pytest.mark.parametrize("config_class", MERGEABLE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_refused(config_class: type[RankConfig], kind: str) -> None:
    model = adapted(config_class, kind)
    choose(model, config_class, "chat")
    expected = model(**batch()).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"expected a weight of float.* to merge into, found .*Linear"):
            merge()
    torch.testing.assert_close(model(**batch()).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("config_class", MERGEABLE)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int8"])  # PEFT's LoRA wants a known layer
def test_a_task_is_extracted(config_class: type[RankConfig], kind: str) -> None:
    model = adapted(config_class, kind)
    ids = batch()["input_ids"]
    expected = model(input_ids=ids, **tasks_for(config_class, ["chat"] * 3)).logits
    lora = extract_task(model, **one_task(config_class, "chat"))
    torch.testing.assert_close(lora(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)
    pairs = [p for name, p in lora.named_parameters() if "lora_" in name]
    assert pairs
    assert all(p.dtype == torch.float32 for p in pairs)
