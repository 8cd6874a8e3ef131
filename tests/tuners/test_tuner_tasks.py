"""One task per sample, from the call of a model to its adapters; through `generate` and gradient checkpointing."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from tuner_zoo import BY_TASK, TASKS, adapted, batch, config_of, llama

from moe_mtl.tuners import RankConfig
from moe_mtl.tuners._base import RankLayer


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


@pytest.mark.parametrize("config_class", BY_TASK)
def test_packed_samples_have_a_task_per_token(config_class: type[RankConfig]) -> None:
    model = adapted(config_class)
    ids = batch()["input_ids"]
    apart = model(input_ids=ids, tasks=["code", "sql", "code"], use_cache=False).logits
    packed = {"input_ids": ids.view(1, -1), "position_ids": torch.arange(5).repeat(3).unsqueeze(0), "use_cache": False}
    tasks = torch.tensor([2, 0, 2]).repeat_interleave(5).unsqueeze(0)
    together = model(**packed, tasks=tasks).logits
    torch.testing.assert_close(together.view_as(apart), apart, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"one per token of every layer, found \[1, 14\]"):
        model(**packed, tasks=tasks[:, :-1])


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
    assert sorted(map(len, kept.values())) == [1, 2]  # of padding, and of tasks


@pytest.mark.parametrize("config_class", BY_TASK)
def test_a_part_that_is_called_by_itself_has_no_task_of_the_call_before(config_class: type[RankConfig]) -> None:
    model = adapted(config_class)
    ids = batch()["input_ids"]
    decoder = model.get_base_model().model
    layer = next(module for module in model.modules() if isinstance(module, RankLayer))
    x_BLD = torch.randn(3, 5, 16)
    with model.base_model.tasks(["chat", "sql", "code"]):
        chosen = decoder(input_ids=ids).last_hidden_state, layer(x_BLD)
    model(input_ids=ids, tasks=["chat", "sql", "code"])
    for part in (lambda: decoder(input_ids=ids), lambda: layer(x_BLD)):
        with pytest.raises(ValueError, match="expected one of sql, chat, code per sample, found none"):
            part()
    with pytest.raises(ValueError, match="one per sample, found 1"):
        model(input_ids=ids, tasks=["chat"])
    with pytest.raises(ValueError, match="found none"):  # after a call that failed, too
        layer(x_BLD)
    model.set_task("sql")
    with model.base_model.tasks(["chat", "sql", "code"]):
        assert torch.equal(decoder(input_ids=ids).last_hidden_state, chosen[0])
        assert torch.equal(layer(x_BLD), chosen[1])
    assert not torch.equal(layer(x_BLD), chosen[1])
    assert not model.base_model.current_tasks._calls


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_part_called_before_the_backward_disturbs_no_recomputation(reentrant: bool) -> None:
    model = adapted(BY_TASK[0]).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layer = next(module for module in model.modules() if isinstance(module, RankLayer))
    found = []
    for between in (False, True):
        model.zero_grad()
        loss = model(**batch(), tasks=["sql", "chat", "code"]).loss
        if between:
            with pytest.raises(ValueError, match="found none"):
                layer(torch.randn(3, 5, 16))
            with torch.no_grad(), model.base_model.tasks("code"):
                layer(torch.randn(3, 5, 16))
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert found[0]
    torch.testing.assert_close(found[0], found[1])


def test_a_call_inside_a_call_has_its_own_tasks() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 5)

        def forward(self, x: Tensor, inner: str | None = None) -> tuple[Tensor, ...]:
            if inner is None:
                return (self.linear(x),)
            before = self.linear(x)
            return before, *self(x, tasks=inner), self.linear(x)  # type: ignore[call-arg]

    model = get_peft_model(Twice(), config_of(BY_TASK[0], target_modules=["linear"])).eval()
    x = torch.randn(3, 6)
    (sql,), (code,) = model(x, tasks="sql"), model(x, tasks="code")
    before, inner, after = model(x, inner="code", tasks="sql")
    assert torch.equal(before, sql)
    assert torch.equal(inner, code)
    assert torch.equal(after, sql)


def test_calls_side_by_side_have_each_their_own_tasks() -> None:
    """As the replicas of a data-parallel model have."""
    model = adapted(BY_TASK[0])
    calls = [{"input_ids": batch(n + 1)["input_ids"], "tasks": TASKS[n]} for n in range(3)]
    expected = [model(**call).logits for call in calls]
    all_there = threading.Barrier(len(calls))

    def wait(*_: Any) -> None:
        all_there.wait(60)

    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(len(calls)) as pool:
        found = list(pool.map(lambda call: model(**call).logits, calls))
    torch.testing.assert_close(found, expected)
    assert not model.base_model.current_tasks._calls


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
