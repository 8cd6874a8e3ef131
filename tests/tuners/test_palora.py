"""PaLoRA: the preference of a call, on its way to the adapters; and a base model that is trained too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tuner_zoo import PREFERENCES, TASKS, adapted, batch, llama

from moe_mtl.tuners import MTLLoraConfig, PaLoRAConfig, extract_task, load_adapter

NAMED = {"sql": 0.7, "chat": 0.1, "code": 0.2}


@pytest.mark.parametrize(
    "preference",
    [
        dict(reversed(NAMED.items())),
        [0.7, 0.1, 0.2],
        torch.tensor([0.7, 0.1, 0.2]),
        torch.tensor([[0.7, 0.1, 0.2]] * 3, dtype=torch.float64),
    ],
)
def test_one_preference_however_it_is_said(preference: Any) -> None:
    model = adapted(PaLoRAConfig)
    expected = model(**batch(), preference=NAMED).logits
    torch.testing.assert_close(model(**batch(), preference=preference).logits, expected)
    with model.base_model.preference(preference):
        torch.testing.assert_close(model(**batch()).logits, expected)
    with pytest.raises(ValueError, match="found none"):
        model(**batch())
    model.set_preference(preference)
    torch.testing.assert_close(model(**batch()).logits, expected)


def test_each_sample_has_its_own_whatever_lies_beside_it() -> None:
    model = adapted(PaLoRAConfig)
    ids = batch()["input_ids"]
    together = model(input_ids=ids, preference=torch.tensor([PREFERENCES[task] for task in TASKS])).logits
    for row, task in enumerate(TASKS):
        alone = model(input_ids=ids[row : row + 1], preference=PREFERENCES[task]).logits
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        (None, "expected a weight for each of sql, chat, code, found none"),
        ({"sql": 0.5, "caht": 0.5}, "found 'caht'; did you mean 'chat'"),
        ({"sql": 0.5, "chat": 0.5}, r"found none for \['code'\]"),
        ([0.5, 0.5], r"expected floats of shape \[3\] or \[B, 3\]"),
        (torch.tensor([1, 0, 0]), "found torch.int64"),
        ([1.2, -0.2, 0.0], "expected weights of 0 or more"),
        ([float("nan"), 0.5, 0.5], "expected weights of 0 or more"),
        ([0.5, 0.4, 0.2], "expected weights that sum to 1"),
        (torch.full((2, 3), 1 / 3), "expected 3, one per sample, found 2"),
    ],
)
def test_bad_preferences(preference: Any, message: str) -> None:
    model = adapted(PaLoRAConfig)
    with pytest.raises(ValueError, match=message):
        model(**batch(), preference=preference)
    if preference is not None and len(preference) == 3:
        with pytest.raises(ValueError, match=message):
            model.set_preference(preference)


def test_other_methods_leave_the_keyword_to_the_base_model() -> None:
    model = adapted(MTLLoraConfig)
    seen = []
    model.get_base_model().register_forward_pre_hook(lambda m, a, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    model(**batch(), tasks="sql", preference=[1.0])
    assert "preference" in seen[0]
    assert "tasks" not in seen[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    preference = torch.tensor([PREFERENCES[task] for task in TASKS])

    def gradients(checkpointing: bool) -> list[Tensor]:
        model = adapted(PaLoRAConfig).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(**batch(), preference=preference).loss
        with torch.no_grad():
            model(**batch(), preference=NAMED)
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert plain
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    model = adapted(PaLoRAConfig).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(**batch(), preference=NAMED).loss + model(**batch(), preference=[1.0, 0.0, 0.0]).loss
    with pytest.raises(RuntimeError, match="a backward must come before the next call"):
        loss.backward()


def test_generate() -> None:
    model = adapted(PaLoRAConfig)
    for name, parameter in model.named_parameters():
        if name.endswith("b_OP"):
            parameter.data.mul_(20)
    ids = batch()["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    options["eos_token_id"] = 39
    each = torch.tensor([PREFERENCES[task] for task in TASKS])
    together = model.generate(input_ids=ids, preference=each, **options)
    for row in range(3):
        alone = model.generate(input_ids=ids[row : row + 1], preference=each[row], **options)
        width = min(alone.shape[1], together.shape[1])
        assert torch.equal(together[row, :width], alone[0, :width])


def test_a_weight_of_one_is_a_task_alone() -> None:
    model = adapted(PaLoRAConfig)
    lora = extract_task(model, preference={"sql": 0.0, "chat": 1.0, "code": 0.0})
    ids = batch()["input_ids"]
    torch.testing.assert_close(
        lora(input_ids=ids).logits, model(input_ids=ids, preference=[0.0, 1.0, 0.0]).logits, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="preference: expected a weight for each of sql, chat, code, found none"):
        extract_task(model)
    with pytest.raises(ValueError, match=r"expected one of shape \[3\], found \[2, 3\]"):
        extract_task(model, preference=torch.full((2, 3), 1 / 3))


def test_the_base_model_is_trained_and_saved_where_asked(tmp_path: Path) -> None:
    model = adapted(PaLoRAConfig, train_base=True).train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch(), preference=NAMED).loss.backward()
    optimiser.step()
    model.eval().save_pretrained(tmp_path)
    expected = model(**batch(), preference=NAMED).logits
    loaded = load_adapter(tmp_path, llama())
    assert torch.equal(loaded(**batch(), preference=NAMED).logits, expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = load_adapter(tmp_path, llama(), is_trainable=True)
    assert all(parameter.requires_grad for parameter in again.parameters())
    lora = extract_task(model, preference=NAMED)
    torch.testing.assert_close(lora(**batch()).logits, expected, rtol=1e-4, atol=1e-5)
    model.set_preference(NAMED)
    torch.testing.assert_close(model.merge_and_unload()(**batch()).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_task_stands_for_all_of_the_weight_on_it() -> None:
    model = adapted(PaLoRAConfig)
    ids = batch()["input_ids"]
    lora = extract_task(model, "chat")
    torch.testing.assert_close(lora(ids).logits, model(ids, preference={"sql": 0, "chat": 1, "code": 0}).logits)
    with pytest.raises(ValueError, match="caht"):
        extract_task(model, "caht")
