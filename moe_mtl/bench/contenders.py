"""The libraries that are measured: each builds the same model, answers the same rows and trains an epoch its own way.

Peers are imported only when they take part; one that is not installed is left out and said so. Each runs at the fastest
settings it documents: no regularisation (ours has none here), numeric columns as one dense feature, no metrics while
training, no loader processes (they do not help), fused Adam for all.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .work import Shape

ADAM = {"lr": 1e-3, "fused": True}

Rows = Mapping[str, Tensor]
"""`numeric` float32 `[N, F]`, `categorical` int64 `[N, F]` where the shape has any, `labels` float32 `[N, T]`."""


class Contender(Protocol):
    """One library."""

    name: str
    package: str

    def build(self, shape: Shape) -> nn.Module:
        """The model."""
        ...

    def forward(self, model: nn.Module, shape: Shape, rows: Rows) -> Callable[[], object]:
        """A call that answers all rows at once, every task, without gradients."""
        ...

    def epoch(self, model: nn.Module, shape: Shape, rows: Rows, batch_size: int) -> Callable[[], object]:
        """A call that trains one epoch with the library's own loader and trainer."""
        ...


class Ours:
    """moe_mtl, optionally with the forward pass compiled, or folded for inference."""

    package = "moe_mtl"

    def __init__(self, compiled: bool = False, folded: bool = False):
        self.compiled, self.folded = compiled, folded
        self.name = "moe_mtl" + (" (compiled)" if compiled else "") + (" (folded)" if folded else "")

    def build(self, shape: Shape) -> nn.Module:
        from ..models import model_class

        features: list[dict[str, Any]] = [{"name": f"n{i}", "kind": "numeric"} for i in range(shape.num_numeric)]
        for i, size in enumerate(shape.categories):
            features.append({"name": f"c{i}", "kind": "categorical", "num_categories": size})
        experts: dict[str, Any] = {"num_experts": shape.num_experts}
        if shape.levels:
            experts = {
                "num_levels": shape.levels,
                "num_specific_experts": shape.num_specific,
                "num_shared_experts": shape.num_shared,
            }
        model = model_class("ple" if shape.levels else "mmoe")
        config = model.config_class(
            features=features,
            tasks=[{"name": name, "kind": "binary"} for name in shape.task_names],
            embedding_dim=shape.embedding_dim,
            numeric_embedding="scaled",
            expert_dims=list(shape.expert_dims),
            tower_dims=list(shape.tower_dims),
            **experts,
        )
        return model(config)

    def forward(self, model: Any, shape: Shape, rows: Rows) -> Callable[[], object]:
        inputs = {key: rows[key] for key in ("numeric", "categorical") if key in rows}
        model.eval()
        if self.folded:
            model.fold_for_inference()
        return _inference(torch.compile(model, dynamic=False) if self.compiled else model, **inputs)

    def epoch(self, model: nn.Module, shape: Shape, rows: Rows, batch_size: int) -> Callable[[], object]:
        from transformers import TrainingArguments

        from ..data import TensorTable
        from ..training.trainer import MultiTaskTrainer

        labels = dict(zip(shape.task_names, rows["labels"].t().contiguous(), strict=True))
        table = TensorTable({key: rows[key] for key in ("numeric", "categorical") if key in rows} | {"labels": labels})

        def call() -> None:
            with tempfile.TemporaryDirectory() as folder:
                arguments = TrainingArguments(
                    output_dir=folder,
                    num_train_epochs=1,
                    per_device_train_batch_size=batch_size,
                    learning_rate=ADAM["lr"],
                    lr_scheduler_type="constant",
                    max_grad_norm=0.0,
                    save_strategy="no",
                    logging_steps=50,
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                    torch_compile=self.compiled,
                )
                trainer = MultiTaskTrainer(model, arguments, table, optimizer_name="adam")
                with _quiet():
                    trainer.train()

        return call


class TorchRechub:
    """torch-rechub. Its MLPs, those of the gates included, hold a batch norm after every linear layer: no switch."""

    name = package = "torch-rechub"

    def build(self, shape: Shape) -> nn.Module:
        from torch_rechub.basic.features import DenseFeature, SparseFeature
        from torch_rechub.models.multi_task import MMOE, PLE

        features = [
            SparseFeature(f"c{i}", vocab_size=size, embed_dim=shape.embedding_dim)
            for i, size in enumerate(shape.categories)
        ]
        features.append(DenseFeature("numeric", embed_dim=shape.num_numeric))
        experts = {"dims": list(shape.expert_dims), "activation": "relu", "dropout": 0.0}
        towers = [{"dims": list(shape.tower_dims)} for _ in shape.task_names]
        kinds = ["classification"] * shape.num_tasks
        if shape.levels:
            return PLE(features, kinds, shape.levels, shape.num_specific, shape.num_shared, experts, towers)
        return MMOE(features, kinds, shape.num_experts, experts, towers)

    def forward(self, model: nn.Module, shape: Shape, rows: Rows) -> Callable[[], object]:
        inputs = _columns(shape, rows)
        model.eval()
        return _inference(model, inputs)

    def epoch(self, model: nn.Module, shape: Shape, rows: Rows, batch_size: int) -> Callable[[], object]:
        from torch_rechub.trainers import MTLTrainer
        from torch_rechub.utils.data import DataGenerator

        columns = {name: values.numpy() for name, values in _columns(shape, rows).items()}
        labels = rows["labels"].numpy()
        loader = DataGenerator(columns, labels).generate_dataloader(
            x_val=columns, y_val=labels, x_test=columns, y_test=labels, batch_size=batch_size, num_workers=0
        )[0]

        def call() -> None:
            with _quiet():
                trainer = MTLTrainer(model, ["classification"] * shape.num_tasks, optimizer_params=dict(ADAM))
                trainer.train_one_epoch(loader)

        return call


class DeepCTR:
    """deepctr-torch. It builds as many shared experts as specific ones whatever was asked, and runs the shared gate of
    PLE's last level although nothing reads it."""

    name = package = "deepctr-torch"

    def build(self, shape: Shape) -> nn.Module:
        with _quiet():
            from deepctr_torch.inputs import DenseFeat, SparseFeat
            from deepctr_torch.models import MMOE, PLE
        features = [
            SparseFeat(f"c{i}", vocabulary_size=size, embedding_dim=shape.embedding_dim)
            for i, size in enumerate(shape.categories)
        ]
        features.append(DenseFeat("numeric", shape.num_numeric))
        options = {
            "expert_dnn_hidden_units": shape.expert_dims,
            "gate_dnn_hidden_units": (),
            "tower_dnn_hidden_units": shape.tower_dims,
            "l2_reg_linear": 0,
            "l2_reg_embedding": 0,
            # Its default of 0.0001 puts gradients near zero at the start; the time is the same.
            "init_std": 0.05,
            "task_types": ["binary"] * shape.num_tasks,
            "task_names": shape.task_names,
        }
        if shape.levels:
            return PLE(
                features,
                shared_expert_num=shape.num_shared,
                specific_expert_num=shape.num_specific,
                num_levels=shape.levels,
                **options,
            )
        return MMOE(features, num_experts=shape.num_experts, **options)

    def forward(self, model: nn.Module, shape: Shape, rows: Rows) -> Callable[[], object]:
        inputs = torch.cat([values.float().view(len(values), -1) for values in _columns(shape, rows).values()], dim=1)
        model.eval()
        return _inference(model, inputs)

    def epoch(self, model: nn.Module, shape: Shape, rows: Rows, batch_size: int) -> Callable[[], object]:
        columns = {name: values.numpy() for name, values in _columns(shape, rows).items()}
        labels = rows["labels"].numpy()

        def call() -> None:
            with _quiet():
                losses = ["binary_crossentropy"] * shape.num_tasks
                model.compile(torch.optim.Adam(model.parameters(), **ADAM), loss=losses)
                model.fit(dict(columns), labels, batch_size=batch_size, epochs=1, verbose=0)

        return call


_MODULES = {"torch-rechub": "torch_rechub", "deepctr-torch": "deepctr_torch"}


def contenders(compiled: bool = False) -> tuple[list[Contender], dict[str, str]]:
    """Ours, and the peers that are installed.

    Returns:
        the contenders, ours first; and by name the version, or `not installed`.
    """
    found: list[Contender] = [Ours()] + ([Ours(compiled=True)] if compiled else [])
    versions = {"moe_mtl": _own_version(), "torch": torch.__version__}
    for peer in (TorchRechub(), DeepCTR()):
        if importlib.util.find_spec(_MODULES[peer.package]) is None:
            versions[peer.name] = "not installed"
        else:
            versions[peer.name] = importlib.metadata.version(peer.package)
            found.append(peer)
    return found, versions


def _own_version() -> str:
    from .. import __version__

    return __version__


def _columns(shape: Shape, rows: Rows) -> dict[str, Tensor]:
    columns = {f"c{i}": rows["categorical"][:, i].contiguous() for i in range(len(shape.categories))}
    return columns | {"numeric": rows["numeric"]}


def _inference(model: nn.Module, *args: Any, **kwargs: Any) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return model(*args, **kwargs)

    return call


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Peers print and draw bars; what that costs is theirs, what it shows is not asked for."""
    with (
        open(os.devnull, "w", encoding="utf-8") as sink,
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        sys.stdout.flush()
        yield
