"""PEFT's own tests of a method, over every registered one. `test_peft_suite.py` runs this file.

`upstream` is a package made of PEFT's test files, see there.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from upstream import testing_common

from moe_mtl.tuners import METHODS, RankConfig, _tuner
from moe_mtl.tuners._tasks import CurrentTasks

TASKS = ["sql", "chat"]
# What upstream's tests take beside the model and the config: one test for each value.
VALUES: dict[str, list[Any]] = {
    "dtype": [torch.float16, torch.bfloat16],
    "raises_err": [False],
    "safe_serialization": [True],
    "test_name": ["embeds"],
    "use_reentrant": [True, False],
}


@functools.cache
def base_model() -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    folder = tempfile.mkdtemp(prefix="tiny-llama-")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def options_of(config_class: type[RankConfig]) -> dict[str, Any]:
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "init_weights": False}
    if config_class.layer_class is not RankConfig.layer_class:
        options["target_modules"].append("mlp")  # a block, which such a method must have
    if config_class.adapter_class.by_task or config_class.adapter_class.by_preference:
        options["tasks"] = TASKS
    return options


class TaskChosen(CurrentTasks):
    """Upstream knows no tasks and no preferences: one is chosen for all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.always = TASKS[0]
        self.always_preference = [0.25, 0.75]


_tuner.CurrentTasks = TaskChosen  # type: ignore[misc]


class CommonTests(testing_common.PeftCommonTester):
    transformers_class = AutoModelForCausalLM

    def prepare_inputs_for_testing(self) -> dict[str, Any]:
        ids = torch.tensor([[1, 2, 1], [3, 4, 5]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def case_of(name: str, config_class: type[RankConfig], given: dict[str, Any]) -> Callable[..., None]:
    """One upstream test of one method. A merge that cannot be must be refused."""
    refused = config_class.adapter_class.depends_on_input and "merge" in name

    def test(self: CommonTests) -> None:
        options = options_of(config_class)
        with pytest.raises(NotImplementedError, match="cannot be merged") if refused else contextlib.nullcontext():
            getattr(self, name)(model_id=base_model(), config_cls=config_class, config_kwargs=options, **given)

    return test


for _config_class, _method in METHODS.items():
    _members: dict[str, Any] = {}
    for _name in dir(CommonTests):
        if not _name.startswith("_test_"):
            continue
        _code = getattr(CommonTests, _name).__code__
        _taken = _code.co_varnames[: _code.co_argcount]
        if "config_cls" not in _taken:
            continue  # a part of another test
        _more = [name for name in _taken if name in VALUES]
        for _value in VALUES[_more[0]] if _more else [None]:
            _given = {_more[0]: _value} if _more else {}
            _label = f"_{_value}".replace("torch.", "") if _more else ""
            _members[_name[1:] + _label] = case_of(_name, _config_class, _given)
    globals()[f"Test_{_method}"] = type(f"Test_{_method}", (CommonTests,), _members)
