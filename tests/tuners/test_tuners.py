"""LoRA experts as PEFT methods: the equations, PEFT's whole life cycle, tasks, merges, and what goes wrong silently."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from moe_mtl.tuners import METHODS, BalanceRanks, RankConfig, extract_task, load_adapter
from moe_mtl.tuners._balance import BalancedAdapter, BalancedConfig
from moe_mtl.tuners._base import RankLayer
from moe_mtl.tuners._tasks import CurrentTasks
from moe_mtl.tuners.lori import sparsify

TASKS = ["sql", "chat", "code"]
CONFIGS = sorted(METHODS, key=lambda config: config.__name__)
BY_TASK = [config for config in CONFIGS if config.adapter_class.by_task]
MERGEABLE = [config for config in CONFIGS if not config.adapter_class.depends_on_input]


def config_of(config_class: type[RankConfig], **options: Any) -> RankConfig:
    tasks = {"tasks": TASKS} if config_class.adapter_class.by_task else {}
    selected = {"num_selected": 2} if issubclass(config_class, BalancedConfig) else {}
    return config_class(**({"r": 4, "alpha": 8.0, "init_weights": False} | tasks | selected | options))


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        tie_word_embeddings=False,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def adapted(config_class: type[RankConfig], **options: Any) -> PeftModel:
    config = config_of(config_class, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    base = llama()
    torch.manual_seed(1)
    return get_peft_model(base, config).eval()


def batch(samples: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(0, 40, (samples, 5), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids}


def tasks_for(config_class: type[RankConfig], tasks: list[str]) -> dict[str, Any]:
    return {"tasks": tasks} if config_class.adapter_class.by_task else {}


# --- the equations, written as plainly as they stand ---


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


EQUATIONS: dict[str, Callable[..., Tensor]] = {
    "MTL_LORA": mtl_lora,
    "HYDRA_LORA": hydra_lora,
    "MOE_LORA": moe_lora,
    "SMORA": smora,
    "FLYLORA": flylora,
    "LORI": lori,
}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"diagonal": True},
    {"masked": True},
    {"scores": "softmax", "renormalise": True},
]
CASES = [(c, options) for c in CONFIGS for options in OPTIONS if all(hasattr(c, name) for name in options)]


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
    with layer.current_tasks.set(["code", "sql", "code"]):
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


@pytest.mark.parametrize("one", [("MOE_LORA", "num_experts"), ("HYDRA_LORA", "num_up_projections")])
def test_one_expert_is_lora_bit_for_bit(one: tuple[str, str]) -> None:
    config_class = next(config for config, name in METHODS.items() if name == one[0])
    ours = adapted(config_class, **{one[1]: 1})
    lora = get_peft_model(
        llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    ).eval()
    layers = dict(lora.named_modules())
    for name, layer in ours.named_modules():
        if isinstance(layer, RankLayer):
            adapter: Any = layer.moe_adapters["default"]
            layers[name].lora_A["default"].weight.data = adapter.a_RD.data
            layers[name].lora_B["default"].weight.data = adapter.b_OP.data
    with torch.no_grad():
        found = ours(**batch(), **tasks_for(config_class, ["sql"] * 3)).logits
        assert torch.equal(found, lora(**batch()).logits)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_training_starts_at_the_base_model(config_class: type[RankConfig]) -> None:
    model = adapted(config_class, init_weights=True)
    with torch.no_grad():
        found = model(**batch(), **tasks_for(config_class, TASKS)).logits
        assert torch.equal(found, llama()(**batch()).logits)


# --- PEFT's life cycle ---


@pytest.mark.parametrize("config_class", CONFIGS)
def test_saved_and_loaded(config_class: type[RankConfig], tmp_path: Path) -> None:
    model = adapted(config_class)
    model.save_pretrained(tmp_path)
    inputs = batch() | tasks_for(config_class, ["chat", "sql", "code"])
    expected = model(**inputs).logits
    loaded = load_adapter(tmp_path, llama())
    assert torch.equal(loaded(**inputs).logits, expected)
    assert type(loaded.peft_config["default"]) is config_class
    assert not [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    assert torch.equal(again.eval()(**inputs).logits, expected)
    assert [name for name, parameter in again.named_parameters() if parameter.requires_grad]


def test_a_fresh_process_loads_it(tmp_path: Path) -> None:
    adapted(BY_TASK[0]).save_pretrained(tmp_path)
    code = f"import moe_mtl.tuners, peft; print(peft.PeftConfig.from_pretrained({str(tmp_path)!r}).tasks)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(TASKS)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == METHODS[BY_TASK[0]]


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load_adapter(tmp_path, llama())


@pytest.mark.parametrize("config_class", CONFIGS)
def test_two_adapters_and_none(config_class: type[RankConfig]) -> None:
    model = adapted(config_class)
    inputs = batch() | tasks_for(config_class, ["chat", "sql", "code"])
    first = model(**inputs).logits
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    second = model(**inputs).logits
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, llama()(**batch()).logits)
    model.set_adapter("default")
    assert torch.equal(model(**inputs).logits, first)
    model.delete_adapter("second")
    assert torch.equal(model(**inputs).logits, first)


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


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_bfloat16_base(config_class: type[RankConfig]) -> None:
    config = config_of(config_class, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama().bfloat16(), config).train()
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    out = model(**batch(), **tasks_for(config_class, TASKS))
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_is_frozen_stays_float32_on_a_bfloat16_base(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    for config_class in CONFIGS:
        config = config_of(config_class, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(llama().bfloat16(), config).eval()
        model.save_pretrained(tmp_path / config.peft_type)
        loaded = PeftModel.from_pretrained(
            llama().bfloat16(), tmp_path / config.peft_type, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        inputs = batch() | tasks_for(config_class, TASKS)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        floats = [b for name, b in loaded.named_buffers() if "moe_adapters" in name and b.is_floating_point()]
        assert all(buffer.dtype == torch.float32 for buffer in floats), config_class


def test_layers_that_store_their_weight_turned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)).eval()
    config = config_of(BY_TASK[0], target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    ids = batch()["input_ids"]
    expected = model(input_ids=ids, tasks="chat").logits
    model.set_task("chat")
    merged = model.merge_and_unload()
    assert not [module for module in merged.modules() if isinstance(module, RankLayer)]
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged(input_ids=ids, tasks="chat").logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected 'chat', which is merged"):
        merged(input_ids=ids, tasks="sql")


# --- tasks ---


@pytest.mark.parametrize("config_class", BY_TASK)
def test_each_sample_has_its_own_task_whatever_lies_beside_it(config_class: type[RankConfig]) -> None:
    model = adapted(config_class)
    ids = batch()["input_ids"]
    together = model(input_ids=ids, tasks=["code", "sql", "code"]).logits
    assert torch.equal(together, model(input_ids=ids, tasks=torch.tensor([2, 0, 2])).logits)
    for row, task in enumerate(["code", "sql", "code"]):
        alone = model(input_ids=ids[row : row + 1], tasks=[task]).logits
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together, model(input_ids=ids, tasks="chat").logits, atol=1e-4)


@pytest.mark.parametrize("config_class", BY_TASK)
@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, "expected one of sql, chat, code per sample, found none"),
        (["sql", "caht", "code"], "found 'caht'; did you mean 'chat'"),
        (["sql"], "expected 3, one per sample, found 1"),
        (torch.tensor([0, 1, 3]), r"expected numbers in \[0, 3\)"),
        (torch.tensor([0.0, 1.0, 2.0]), "expected int64"),
    ],
)
def test_a_missing_or_unknown_task_is_an_error(config_class: type[RankConfig], tasks: Any, message: str) -> None:
    model = adapted(config_class)
    with pytest.raises(ValueError, match=message):
        model(**batch(), tasks=tasks)


def test_a_task_set_for_all_calls_and_inside_a_block() -> None:
    model = adapted(BY_TASK[0])
    ids = batch()["input_ids"]
    sql, chat = (model(input_ids=ids, tasks=task).logits for task in ("sql", "chat"))
    model.set_task("sql")
    assert torch.equal(model(input_ids=ids).logits, sql)
    with model.base_model.tasks(["chat"] * 3):
        assert torch.equal(model(input_ids=ids).logits, chat)
    assert torch.equal(model(input_ids=ids).logits, sql)
    with pytest.raises(ValueError, match="did you mean 'sql'"):
        model.set_task("sqll")
    model.set_task(None)
    with pytest.raises(ValueError, match="found none"):
        model(input_ids=ids)


def test_a_plain_peft_model_hears_of_tasks_too() -> None:
    """Its forward calls the base model, not the tuner."""
    config = config_of(BY_TASK[0], target_modules=["q_proj"])
    model = get_peft_model(llama(), config).eval()
    ids = batch()["input_ids"]
    assert type(model) is PeftModel
    assert not torch.equal(model(input_ids=ids, tasks="sql").logits, model(input_ids=ids, tasks="chat").logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generate(options: dict[str, Any]) -> None:
    model = adapted(BY_TASK[0])
    for layer in model.modules():
        if isinstance(layer, RankLayer):
            adapter: Any = layer.moe_adapters["default"]
            adapter.b_OP.data.mul_(20)
    ids = batch()["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 39} | options
    together = model.generate(input_ids=ids, tasks=["sql", "chat", "code"], **options)
    each = together.shape[0] // 3
    for row, task in enumerate(TASKS):
        alone = model.generate(input_ids=ids[row : row + 1], tasks=task, **options)
        width = min(alone.shape[1], together.shape[1])
        assert torch.equal(together[row * each : (row + 1) * each, :width], alone[:, :width])
    with pytest.raises(ValueError, match="found none"):
        model.generate(input_ids=ids, **options)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    inputs = batch() | {"tasks": ["sql", "chat", "code"]}

    def gradients(checkpointing: bool) -> list[Tensor]:
        model = adapted(BY_TASK[0]).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert plain
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_runs_again_in_a_backward_has_the_task_of_its_call(reentrant: bool) -> None:
    model = adapted(BY_TASK[0]).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = batch()

    def gradients() -> list[Tensor]:
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    model(**inputs, tasks="sql").loss.backward()
    expected = gradients()
    loss = model(**inputs, tasks="sql").loss
    with torch.no_grad():
        model(**inputs, tasks="code")
    loss.backward()
    torch.testing.assert_close(gradients(), expected)
    loss = model(**inputs, tasks="sql").loss + model(**inputs, tasks="chat").loss
    with pytest.raises(RuntimeError, match="found calls for sql and for chat"):
        loss.backward()
    model.zero_grad()
    model(**inputs, tasks="sql").loss.backward()  # the error is over
    torch.testing.assert_close(gradients(), expected)


def test_calls_leave_nothing_behind() -> None:
    model = adapted(BY_TASK[0])
    for row in range(20):
        model(input_ids=batch()["input_ids"], tasks=[TASKS[row % 3], TASKS[row // 3 % 3], TASKS[row // 9]])
    kept = model.base_model.current_tasks._with_gradients
    assert sum(map(len, kept.values())) == 2


def test_a_call_without_tensors_has_its_own_tasks() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 5)

        def forward(self, batch: dict[str, Tensor] | Tensor) -> Tensor:
            return self.linear(batch["x"] if isinstance(batch, dict) else batch)

    model = get_peft_model(Wrapped(), config_of(BY_TASK[0], target_modules=["linear"])).eval()
    x = torch.randn(3, 6)
    sql, code = (model(x, tasks=task) for task in ("sql", "code"))
    assert not torch.equal(sql, code)
    assert torch.equal(model({"x": x}, tasks="sql"), sql)


def test_the_encoder_of_generate_has_the_tasks_too() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    config = config_of(BY_TASK[0], target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, config).eval()
    options = {"input_ids": batch()["input_ids"], "max_new_tokens": 3, "output_scores": True}
    options |= {"return_dict_in_generate": True, "do_sample": False}
    first = model.generate(**options, tasks="chat").scores[0]
    model(input_ids=options["input_ids"], labels=options["input_ids"], tasks="sql")
    assert torch.equal(model.generate(**options, tasks="chat").scores[0], first)
    assert not torch.equal(model.generate(**options, tasks="sql").scores[0], first)


def test_generate_wants_one_task_per_prompt() -> None:
    with pytest.raises(ValueError, match="expected 3, one per prompt, found 1"):
        adapted(BY_TASK[0]).generate(input_ids=batch()["input_ids"], tasks=["sql"], max_new_tokens=2)


def test_one_adapter_per_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="adapter_names: expected none"):
        adapted(BY_TASK[0])(**batch(), tasks="sql", adapter_names=["default"] * 3)


def test_a_task_of_one_adapter_of_two() -> None:
    model = adapted(BY_TASK[0])
    model.add_adapter("second", config_of(BY_TASK[0], target_modules=["q_proj"], tasks=["maths"]))
    model.set_task("maths")
    with pytest.raises(ValueError, match="found 'math'"):
        model.set_task("math")


# --- one task alone ---


@pytest.mark.parametrize("config_class", MERGEABLE)
def test_merged_weights_answer_for_one_task(config_class: type[RankConfig]) -> None:
    model = adapted(config_class)
    ids = batch()["input_ids"]
    expected = model(input_ids=ids, **tasks_for(config_class, ["chat"] * 3)).logits
    if config_class.adapter_class.by_task:
        with pytest.raises(ValueError, match="choose it with set_task"):
            model.merge_adapter()
        model.set_task("chat")
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    if config_class.adapter_class.by_task:
        with pytest.raises(ValueError, match="expected 'chat', which is merged"):
            model(input_ids=ids, tasks="sql")
        model.set_task(None)
    with model.disable_adapter():  # which takes it out of the weights
        torch.testing.assert_close(model(input_ids=ids).logits, llama()(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    found = model(input_ids=ids, **tasks_for(config_class, ["chat"] * 3)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config_class", sorted(set(CONFIGS) - set(MERGEABLE), key=lambda c: c.__name__))
def test_what_depends_on_the_input_is_not_merged(config_class: type[RankConfig]) -> None:
    model = adapted(config_class)
    before = copy.deepcopy(llama().state_dict())
    with pytest.raises(NotImplementedError, match="token by token"):
        model.merge_adapter()
    with pytest.raises(NotImplementedError, match="token by token"):
        extract_task(model)
    assert torch.equal(model.get_base_model().lm_head.weight, before["lm_head.weight"])


@pytest.mark.parametrize("config_class", MERGEABLE)
def test_extracted_task_is_a_lora_of_peft(config_class: type[RankConfig], tmp_path: Path) -> None:
    model = adapted(config_class)
    ids = batch()["input_ids"]
    for task in TASKS:
        lora = extract_task(model, task if config_class.adapter_class.by_task else None)
        expected = model(input_ids=ids, **tasks_for(config_class, [task] * 3)).logits
        torch.testing.assert_close(lora(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert lora.get_base_model().lm_head.weight is model.get_base_model().lm_head.weight
    lora.save_pretrained(tmp_path)
    llama().save_pretrained(tmp_path / "base")
    code = (
        "import sys, torch, peft, transformers\n"
        f"base = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"model = peft.PeftModel.from_pretrained(base, {str(tmp_path)!r})\n"
        f"logits = model(input_ids=torch.tensor({ids.tolist()})).logits\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
        "assert not [name for name in sys.modules if name.startswith('moe_mtl')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-5)


def test_extracting_leaves_the_model_as_it_was() -> None:
    model = adapted(BY_TASK[0], modules_to_save=["lm_head"], bias="all")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert before["base_model.model.lm_head.modules_to_save.default.weight"]
    extract_task(model, "chat")
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_extracting_takes_along_what_was_trained_in_full(tmp_path: Path) -> None:
    model = adapted(BY_TASK[0], modules_to_save=["lm_head"])
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    ids = batch()["input_ids"]
    for name in ("default", "second"):
        model.base_model.model.lm_head.modules_to_save[name].weight.data.normal_()
    for name in ("second", "default"):
        model.set_adapter(name)
        expected = model(input_ids=ids, tasks="chat").logits
        model.set_adapter("default")
        lora = extract_task(model, "chat", name)
        torch.testing.assert_close(lora(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        lora.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(llama(), tmp_path / name).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_merged_adapters_are_not_extracted_and_belong_to_one_task() -> None:
    model = adapted(BY_TASK[0])
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    before = weight.detach().clone()
    model.set_task("sql")
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="unmerge_adapter first"):
        extract_task(model, "sql")
    model.set_task("chat")
    with pytest.raises(ValueError, match="expected one for all that is merged, found chat and sql"):
        model.merge_adapter(["second"])
    model.unmerge_adapter()
    torch.testing.assert_close(weight, before, rtol=1e-5, atol=1e-6)
    model.set_task("sql")
    model.merge_adapter(["default"])
    model.set_task(None)
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match="expected 'sql', which is merged"):
        merged(**batch(), tasks="chat")
    again = get_peft_model(merged, config_of(BY_TASK[0], target_modules=["q_proj"])).eval()
    assert not torch.equal(again(**batch(), tasks="chat").logits, again(**batch(), tasks="code").logits)


def test_extract_of_an_unknown_task_or_adapter() -> None:
    model = adapted(BY_TASK[0])
    with pytest.raises(ValueError, match="did you mean 'chat'"):
        extract_task(model, "chta")
    with pytest.raises(ValueError, match="expected one of default"):
        extract_task(model, "chat", "other")


def test_without_its_adapters_a_model_is_as_before() -> None:
    base = adapted(BY_TASK[0]).unload()
    assert not base._forward_pre_hooks
    assert not base._forward_pre_hooks_with_kwargs
    assert torch.equal(base(**batch()).logits, llama()(**batch()).logits)


# --- ranks chosen token by token ---

BALANCED = [config for config in CONFIGS if issubclass(config, BalancedConfig)]


def balanced_adapters(model: nn.Module) -> list[BalancedAdapter]:
    return [module for module in model.modules() if isinstance(module, BalancedAdapter)]


@pytest.mark.parametrize("config_class", BALANCED)
def test_a_rank_that_is_chosen_less_than_the_mean_gets_a_larger_bias(config_class: type[RankConfig]) -> None:
    model = adapted(config_class, balance_rate=0.25)
    model(**batch())
    assert not any(adapter.counts_P.any() for adapter in balanced_adapters(model))  # answering does not count
    model.train()
    model(**batch()).loss.backward()
    model(**batch()).loss.backward()
    for adapter in balanced_adapters(model):
        assert adapter.counts_P.sum() == 2 * 3 * 5 * 2  # calls, samples, tokens, ranks chosen
        assert not adapter.bias_P.any()
    counts = [adapter.counts_P.clone() for adapter in balanced_adapters(model)]
    model.base_model.update_balance()
    for adapter, counts_P in zip(balanced_adapters(model), counts, strict=True):
        expected = [0.25 if n < 15 else -0.25 if n > 15 else 0.0 for n in counts_P.tolist()]
        assert adapter.bias_P.tolist() == expected
        assert not adapter.counts_P.any()


@pytest.mark.parametrize("config_class", BALANCED)
def test_the_balance_is_saved_and_a_trainer_keeps_it(config_class: type[RankConfig], tmp_path: Path) -> None:
    model = adapted(config_class, balance_rate=0.25)
    rows = [{name: tensor[0] for name, tensor in batch(1).items()} for _ in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[BalanceRanks()]).train()
    biases = [adapter.bias_P.clone() for adapter in balanced_adapters(model)]
    assert all(bias_P.any() for bias_P in biases)
    assert all((bias_P.abs() <= 0.75).all() for bias_P in biases)  # once per step, not per batch
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter", llama())
    for adapter, bias_P in zip(balanced_adapters(loaded), biases, strict=True):
        assert torch.equal(adapter.bias_P, bias_P)


def test_flylora_is_sparse_and_frozen() -> None:
    config_class = next(config for config, name in METHODS.items() if name == "FLYLORA")
    for row_norm, expected in (("paper", 128**0.5 / 8), ("unit", 1.0)):
        torch.manual_seed(0)
        adapter: Any = config_class.adapter_class(512, 4, config_class(r=8, num_selected=2, row_norm=row_norm))
        assert (adapter.a_RD != 0).sum(1).tolist() == [128] * 8
        assert float(adapter.a_RD.norm(dim=1).mean()) == pytest.approx(expected, rel=0.1)
        assert [name for name, _ in adapter.named_parameters()] == ["b_OP"]


def test_lori_keeps_the_largest_entries_of_all_layers(tmp_path: Path) -> None:
    config_class = next(config for config, name in METHODS.items() if name == "LORI")
    model = adapted(config_class)
    adapters = [layer.adapter("default") for layer in model.modules() if isinstance(layer, RankLayer)]
    before = torch.cat([adapter.b_OP.detach().abs().flatten() for adapter in adapters])
    assert sparsify(model, 0.25) == pytest.approx(0.25, abs=0.01)
    masks = torch.cat([adapter.mask_OR.flatten() for adapter in adapters])
    assert before[masks].min() >= before[~masks].max()
    assert not any(adapter.b_OP.any() for adapter in adapters)
    model.train()
    model(**batch()).loss.backward()
    for adapter in adapters:
        assert not adapter.b_OP.grad[~adapter.mask_OR].any()
        adapter.b_OP.data.normal_()
    model.eval().save_pretrained(tmp_path)
    expected = model(**batch()).logits
    assert torch.equal(load_adapter(tmp_path, llama())(**batch()).logits, expected)
    with pytest.raises(ValueError, match="expected a share"):
        sparsify(model, 0.0)
    with pytest.raises(ValueError, match="expected a trained adapter"):
        sparsify(adapted(config_class, init_weights=True), 0.1)
    assert not config_of(config_class).masked
    with pytest.raises(ValueError, match="expected a LoRI adapter, found 'default'"):
        sparsify(adapted(BY_TASK[0]))


# --- arguments ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r: expected at least 1, found 0"),
        ({"scaling": "alpha*r"}, "scaling: expected one of"),
        ({"dropout": 1.0}, "dropout: expected a share"),
        ({"bias": "some"}, "bias: expected none or all"),
        ({"tasks": []}, "tasks: expected a list of those"),
        ({"tasks": "sql"}, "tasks: expected a list of those .* found 'sql'"),
        ({"tasks": ["a", "a"]}, "tasks: expected different names"),
    ],
)
def test_bad_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(BY_TASK[0], **options)


def test_an_embedding_is_no_target() -> None:
    config = config_of(BY_TASK[0], target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"expected linear layers, found model\.embed_tokens"):
        get_peft_model(llama(), config)
