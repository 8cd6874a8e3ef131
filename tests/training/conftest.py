"""Small models and rows for the trainer's tests."""

import pytest
import torch

from moe_mtl.data.tensors import TensorTable
from moe_mtl.models import model_class
from moe_mtl.training.recipe import TrainSection
from moe_mtl.training.run import training_arguments
from moe_mtl.training.trainer import MultiTaskTrainer

FEATURES = [
    {"name": "n0", "kind": "numeric"},
    {"name": "n1", "kind": "numeric"},
    {"name": "c0", "kind": "categorical", "num_categories": 5},
]
BINARY = [{"name": "a", "kind": "binary"}, {"name": "b", "kind": "binary"}]


@pytest.fixture
def make_model():
    """A small model of a type: `make_model("mmoe", tasks, **config)`."""

    def make(model_type="mmoe", tasks=None, seed=0, **config):
        torch.manual_seed(seed)
        cls = model_class(model_type)
        if model_type in ("mmoe", "omoe"):
            config = {"num_experts": 3, "expert_dims": [4]} | config
        config = {"numeric_embedding": "scaled", "embedding_dim": 3, "tower_dims": [4]} | config
        return cls(cls.config_class(features=FEATURES, tasks=tasks or BINARY, **config))

    return make


@pytest.fixture
def make_table():
    """Rows with labels for tasks `a` and `b` that can be learnt: `make_table(n, seed)`."""

    def make(n=64, seed=0, **tensors):
        generator = torch.Generator().manual_seed(seed)
        numeric = torch.randn(n, 2, generator=generator)
        categorical = torch.randint(0, 5, (n, 1), generator=generator)
        noise = 0.3 * torch.randn(n, generator=generator)
        labels = {
            "a": (numeric[:, 0] + 0.5 * categorical[:, 0] - 1 + noise > 0).float(),
            "b": (numeric[:, 1] - numeric[:, 0] > 0).float(),
        }
        return TensorTable({"numeric": numeric, "categorical": categorical, "labels": labels} | tensors)

    return make


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer on the CPU: recipe fields of the train section, and what the trainer itself takes."""

    def make(model, train, validation=None, folder=None, **options):
        fields = {key: options.pop(key) for key in list(options) if key in TrainSection.__dataclass_fields__}
        own = {key: fields.pop(key) for key in ("early_stopping", "task_sampling") if key in fields}
        balancing = {key: (fields.pop(key), {}) for key in ("loss_balancing", "gradient_balancing") if key in fields}
        fields = {"batch_size": 16, "learning_rate": 1e-2, "save_steps": 0, "schedule": "constant"} | fields
        own["one_cycle"] = fields["schedule"] == "one_cycle"
        args = training_arguments(TrainSection(**fields), folder or tmp_path / "run")
        if validation is None:
            args.eval_strategy = "no"
        return MultiTaskTrainer(model, args, train, validation, **own, **balancing, **options)

    return make
