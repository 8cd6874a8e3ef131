"""transformers' own tests of a model, over every registered one. `test_transformers_suite.py` runs this file.

`upstream` is a package made of transformers' test files, see there.
"""

import contextlib
import copy
import functools
import tempfile
import unittest
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import save_file
from upstream.test_configuration_common import ConfigTester
from upstream.test_modeling_common import ModelTesterMixin

from moe_mtl.files import CheckpointError
from moe_mtl.models import REGISTRY

ROWS = 5
# Every parameter tensor costs upstream's tests time: two tasks, two groups; the other contract tests have seven tasks.
TASKS = [task for task in zoo.TASKS if task["name"] in ("view", "colour")]


@functools.cache
def _config(model_type: str) -> Any:
    config = zoo.config_of(model_type, tasks=TASKS)
    if config.num_hidden_layers > 2:  # upstream insists on small models
        config = zoo.config_of(model_type, tasks=TASKS, num_levels=2)
    return config


def config_of(model_type: str) -> Any:
    return copy.deepcopy(_config(model_type))


@functools.cache
def encoded_width(model_type: str) -> int:
    return REGISTRY[model_type](config_of(model_type)).encoder.output_dim


class ModelTester:
    """What upstream asks of the object that makes configs and inputs."""

    __test__ = False
    batch_size = seq_length = ROWS  # the states of a table are [rows, width]; upstream looks for [.., length, width]
    is_training = True

    def __init__(self, model_type: str):
        self.model_type = model_type
        self.num_hidden_layers = _config(model_type).num_hidden_layers
        self.hidden_size = encoded_width(model_type)

    def get_config(self) -> Any:
        return config_of(self.model_type)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        config = self.get_config()
        return config, zoo.inputs_of(config, ROWS)


class StrictConfigTester(ConfigTester):
    def create_and_test_config_with_num_labels(self) -> None:
        """Upstream hands any config a `num_labels`; here the tasks say it, and an unknown field is an error."""
        with pytest.raises(ValueError, match="unknown field 'num_labels'"):
            self.config_class(num_labels=5)


class CommonTests(ModelTesterMixin):
    model_type: str
    has_attentions = False
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True  # else upstream skips what has no line of copyright

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = ModelTester(self.model_type)
        config = _config(self.model_type)
        self.config_tester = StrictConfigTester(
            self,
            config_class=type(config),
            has_text_modality=False,
            common_properties=["num_hidden_layers"],
            **{field.name: getattr(config, field.name) for field in zoo.own_fields(type(config))},
        )

    def subTest(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
        """One report per test: upstream opens a sub-test per parameter, and pytest reports each."""
        return contextlib.nullcontext()

    def _prepare_for_class(self, inputs: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = copy.deepcopy(inputs)
        if return_labels:
            inputs["labels"] = zoo.labels_of(self.model_tester.get_config(), ROWS)
        return inputs

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self) -> None:
        self.skipTest("a table has no token embedding to resize or tie")

    def test_model_weights_reload_no_missing_tied_weights(self) -> None:
        """Upstream wants a report of what is missing; here weights that do not fit the model are an error."""
        model = self.all_model_classes[0](config_of(self.model_type))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            save_file({"tensor": torch.tensor([1, 2])}, f"{folder}/model.safetensors", metadata={"format": "pt"})
            with pytest.raises(CheckpointError, match=r"missing: .*unexpected: tensor"):
                type(model).from_pretrained(folder)


for _model_type in zoo.MODEL_TYPES:
    _model_class = REGISTRY[_model_type]
    _members = {"all_model_classes": (_model_class,), "model_type": _model_type}
    globals()[f"Test_{_model_type}"] = type(f"Test_{_model_type}", (CommonTests, unittest.TestCase), _members)
