"""Models for tables: a feature encoder, a trunk of experts, one tower per task. A paper's file adds its trunk.

Shapes: `B` rows, `D` width of the encoded row, `T` tasks, `H` width of what a tower reads, `C` outputs of a task.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from ..data.processor import TabularProcessor
from ..layers.experts import ACTIVATIONS, ExpertBank
from ..layers.features import NUMERIC_EMBEDDINGS, POOLINGS, FeatureEncoder
from ..layers.gates import DSelectKGate
from ..layers.home import FeatureGate
from ..layers.joined import Joined, JoinedModel
from ..layers.towers import MLP, JoinedTowers
from ..outputs import MultiTaskOutput, Routing
from ..tasks import SHARED, UnknownTaskError, check_name, check_task_names
from ._base import MultiTaskConfig, MultiTaskModel

MAX_WIDTH, MAX_COUNT = 65_536, 4_096
# Without gradients a large batch goes through in pieces whose hidden activations stay in the cache.
ROWS_AT_ONCE = 1_024
_FEATURE_KEYS = {
    "numeric": {"name", "kind", "bins"},
    "categorical": {"name", "kind", "num_categories"},
    "multi_hot": {"name", "kind", "num_categories", "pooling", "max_length"},
    "sequence": {"name", "kind", "num_categories", "pooling", "max_length"},
}


@strict
class TabularConfig(MultiTaskConfig):
    """Fields of every tabular model.

    Args:
        features: one dict per column: `{"name", "kind": "numeric", "bins"}`, `{"name", "kind": "categorical",
            "num_categories"}`, `{"name", "kind": "multi_hot" or "sequence", "num_categories", "pooling",
            "max_length"}`; `TabularProcessor.features` makes them.
        embedding_dim: width of a categorical embedding.
        numeric_embedding: `scaled`, `piecewise_linear` or `periodic`.
        numeric_embedding_dim: width of a numeric embedding.
        tower_dims: hidden widths of each task's tower.
        dropout: after each hidden activation of experts and towers.
        embedding_dropout: of the encoded row.
        activation: of experts and towers.
        initializer_range: standard deviation of the embeddings at the start.
    """

    model_type = "moe_mtl_tabular"

    features: list[dict] = field(default_factory=lambda: [{"name": "x", "kind": "numeric"}])
    embedding_dim: int = 8
    numeric_embedding: str = "piecewise_linear"
    numeric_embedding_dim: int = 8
    tower_dims: list[int] = field(default_factory=lambda: [32])
    dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    activation: str = "relu"
    initializer_range: float | int = 0.05

    def validate_features(self) -> None:
        names = set()
        for feature in self.features:
            kind, name = feature.get("kind"), feature.get("name")
            if kind not in _FEATURE_KEYS:
                raise ValueError(f"feature {name!r}: kind must be one of {', '.join(_FEATURE_KEYS)}, found {kind!r}")
            if not isinstance(name, str) or not name or name in names:
                raise ValueError(f"features: each needs its own name, found {name!r}")
            names.add(name)
            if unknown := set(feature) - _FEATURE_KEYS[kind]:
                raise ValueError(f"feature {name!r}: unknown field {sorted(unknown)[0]!r}")
            if kind == "numeric":
                _check_bins(name, feature.get("bins"))
                continue
            check_count(f"feature {name!r}: num_categories", feature.get("num_categories"), 2**31)
            if kind != "categorical":
                check_count(f"feature {name!r}: max_length", feature.get("max_length"), MAX_WIDTH)
                if feature.get("pooling") not in POOLINGS:
                    raise ValueError(f"feature {name!r}: pooling must be one of {', '.join(POOLINGS)}")

    def validate_widths(self) -> None:
        check_count("embedding_dim", self.embedding_dim, MAX_WIDTH)
        check_count("numeric_embedding_dim", self.numeric_embedding_dim, MAX_WIDTH)
        check_dims("tower_dims", self.tower_dims, empty=True)
        for name in ("dropout", "embedding_dropout"):
            check_probability(name, getattr(self, name))
        if not 0 <= self.initializer_range < 1e6:
            raise ValueError(f"initializer_range must be in [0, 1e6), found {self.initializer_range!r}")
        if self.numeric_embedding not in NUMERIC_EMBEDDINGS:
            raise ValueError(
                f"numeric_embedding must be one of {', '.join(NUMERIC_EMBEDDINGS)}, found {self.numeric_embedding!r}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, found {self.activation!r}")

    @property
    def tower_tasks(self) -> list[str]:
        """Tasks with a tower: all but the products."""
        return [task.name for task in self.parsed_tasks if task.product_of is None]

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the trunk."""
        return 1


def check_count(name: str, value: Any, highest: int = MAX_COUNT, lowest: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise ValueError(f"{name} must be an integer in [{lowest}, {highest}], found {value!r}")


def check_dims(name: str, dims: list[int], empty: bool = False) -> None:
    if len(dims) > 64 or (not dims and not empty):
        raise ValueError(f"{name} must have {'0' if empty else '1'} to 64 widths, found {len(dims)}")
    for dim in dims:
        check_count(name, dim, MAX_WIDTH)


def check_probability(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), found {value!r}")


def check_groups(name: str, groups: list[str], needed: Iterable[str]) -> None:
    """A list that a config holds: names fit for modules, each once, with all that are needed."""
    for group in groups:
        check_name(f"{name}: a name", group)
        if group == SHARED:
            raise ValueError(f"{name}: {SHARED!r} is taken: it names the shared experts")
    if len(set(groups)) < len(groups) or not set(needed) <= set(groups):
        raise ValueError(f"{name} must hold {', '.join(sorted(set(needed)))}, and no name twice; found {groups}")


def _check_bins(name: str, bins: Any) -> None:
    if bins is None:
        return
    if not isinstance(bins, list) or not 2 <= len(bins) <= MAX_COUNT:
        raise ValueError(f"feature {name!r}: bins must be a list of 2 to {MAX_COUNT} edges")
    if not all(isinstance(edge, (int, float)) and abs(edge) < 1e30 for edge in bins):
        raise ValueError(f"feature {name!r}: bins must be finite numbers")
    edges = torch.tensor(bins, dtype=torch.float32, device="cpu")
    if not bool((edges[1:] > edges[:-1]).all()):
        raise ValueError(f"feature {name!r}: bins must increase (as float32)")


@dataclass
class TrunkOutput:
    """What a trunk makes of a row.

    Attributes:
        states: task -> `[B, H]`.
        hidden: output of each layer but the last, `[B, streams, H]`.
        routing: one record per layer, if asked for.
        auxiliary: regulariser of the gates, a scalar, in training.
    """

    states: dict[str, Tensor]
    hidden: tuple[Tensor, ...] = ()
    routing: tuple[Routing, ...] = ()
    auxiliary: Tensor | None = None


class TabularModel(MultiTaskModel):
    """Feature encoder, trunk, towers.

    A subclass gives `build_trunk(input_dim)`: a module whose `forward(x_BD, tasks, record)` returns a `TrunkOutput` for
    those tasks, computing nothing that they do not need, and whose `output_dim` is `H`.
    """

    config: TabularConfig
    processor_class = TabularProcessor
    main_input_name = "numeric"
    trunk: Any

    def __init__(self, config: TabularConfig):
        super().__init__(config)
        self.encoder = FeatureEncoder(
            config.features, config.embedding_dim, config.numeric_embedding, config.numeric_embedding_dim
        )
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.trunk = self.build_trunk(self.encoder.output_dim)
        self._parsed_tasks = config.parsed_tasks
        self._task_names, self._tower_names = config.task_names, config.tower_tasks
        self.towers = nn.ModuleDict(
            {
                task.name: MLP(
                    self.trunk.output_dim, config.tower_dims, task.num_outputs, config.activation, config.dropout
                )
                for task in self._parsed_tasks
                if task.product_of is None
            }
        )
        self._joined: JoinedModel | None = None
        self.post_init()

    def build_trunk(self, input_dim: int) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} must build its trunk")

    def join_trunk(self) -> list[Joined]:
        """Calls that compute the trunk for all tasks at once, one after another: `[B, D] -> [T, B, H]`.

        By default none: the trunk is computed as ever.
        """
        return []

    def fold_for_inference(self) -> Self:
        """Lays the parameters of towers, gates and experts that work alike side by side in memory, in place.

        Without gradients the model then answers all its tasks in a few products instead of several per task: the same
        outputs to rounding, sooner where rows are few and tasks are many. Names, files and training are as before,
        but for the batch norms of experts: they are absorbed, and training goes on without them.

        It lasts until the model is moved, converted or altered, and copies do without; then the model answers as it did
        before, and may be folded again. Hooks and changed attributes of layers that answer together are not seen.

        Raises:
            ValueError: a layer is no longer the model's own: an adapter, say.
        """
        towers = JoinedTowers([self.towers[name] for name in self._tower_names])
        self._joined = JoinedModel(self, self.join_trunk(), towers)
        return self

    def example_inputs(self) -> dict[str, Tensor]:
        """A row of zeros, of the kinds and widths that the config's features declare; lists are full."""
        kinds = Counter(feature["kind"] for feature in self.config.features)
        lengths = [f["max_length"] for f in self.config.features if f["kind"] in ("multi_hot", "sequence")]
        row = {}
        if kinds["numeric"]:
            row["numeric"] = torch.zeros(1, kinds["numeric"], device=self.device)
        if kinds["categorical"]:
            row["categorical"] = torch.zeros(1, kinds["categorical"], dtype=torch.int64, device=self.device)
        if lengths:
            row["sequences"] = torch.zeros(1, len(lengths), max(lengths), dtype=torch.int64, device=self.device)
        return row

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.BatchNorm1d):
            state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            for name, tensor in state.items():
                (init.ones_ if name in ("weight", "running_var") else init.zeros_)(tensor)
        elif isinstance(module, (nn.Linear, FeatureEncoder, ExpertBank, DSelectKGate, FeatureGate)):
            module.reset_parameters()

    def forward(
        self,
        numeric: Tensor | None = None,
        categorical: Tensor | None = None,
        sequences: Tensor | None = None,
        labels: Mapping[str, Tensor] | None = None,
        sample_weights: Mapping[str, Tensor] | None = None,
        groups: Tensor | None = None,
        tasks: str | Sequence[str] | None = None,
        output_routing: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MultiTaskOutput | tuple:
        """Answers `tasks` (all by default).

        Args:
            numeric: float `[B, columns]`, finite.
            categorical: int64 `[B, columns]`, ids in range.
            sequences: int64 `[B, columns, L]`, padded with -1.
            labels: task -> labels as `Task` describes; NaN or -100 is missing. Tasks without labels give no loss.
            sample_weights: task -> `[B]`, non-negative. The processor's `groups` are for metrics, and not read here.
            tasks: names of the tasks to compute; nothing else is.
            output_routing: also return who used which expert.

        Raises:
            UnknownTaskError: a task that the model does not have, in `tasks`, `labels` or `sample_weights`.
            ValueError: inputs that do not fit, naming the column.
        """
        names = self._task_names
        wanted = names if tasks is None else check_task_names(tasks, names)
        for what, given in (("labels", labels), ("sample_weights", sample_weights)):
            if given is None:
                continue
            if not isinstance(given, Mapping):
                raise ValueError(f"{what}: expected a mapping from task to tensor, found {type(given).__name__}")
            if unknown := [name for name in given if name not in names]:
                raise UnknownTaskError(unknown, names)
        computed = [task for task in self._parsed_tasks if task.name in wanted]
        factors = {factor for task in computed for factor in task.product_of or ()}
        towers = [name for name in self._tower_names if name in wanted or name in factors]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        self.encoder.check(numeric, categorical, sequences)
        inputs = (numeric, categorical, sequences)
        rows = next(columns for columns in inputs if columns is not None).shape[0]
        keeps_all = torch.is_grad_enabled() or self.training or output_routing or output_hidden_states
        x_BD, trunk = None, TrunkOutput({})
        if torch.compiler.is_compiling() or keeps_all:
            x_BD = self._encode(inputs)
            trunk = self.trunk(x_BD, towers, output_routing)
            logits, last_BTH = self._answer(trunk, towers)
        else:
            whole = towers == self._tower_names and self._joined is not None and self._joined.holds()
            joined = self._joined if whole else None
            parts = []
            for start in range(0, rows, ROWS_AT_ONCE):
                chunk = tuple(None if x is None else x[start : start + ROWS_AT_ONCE] for x in inputs)
                parts.append(self._without_gradients(chunk, towers, joined))
            logits = {name: _cat([part[0][name] for part in parts]) for name in towers}
            last_BTH = _cat([part[1] for part in parts])
        for task in computed:
            if task.product_of is not None:
                logits[task.name] = product_logit([logits[factor] for factor in task.product_of])
        logits = {name: logits[name] for name in wanted}

        loss, losses = None, None
        if labels is not None:
            losses = self._task_losses(logits, labels, sample_weights or {})
            terms = [task.weight * losses[task.name] for task in computed if task.name in losses]
            if trunk.auxiliary is not None:
                terms.append(trunk.auxiliary)
            if terms:
                loss = torch.stack([term if term.dtype == torch.float64 else term.float() for term in terms]).sum()
        output = MultiTaskOutput(
            loss=loss,
            last_hidden_state=last_BTH,
            logits=logits,
            task_losses=losses,
            auxiliary_loss=trunk.auxiliary,
            routing=trunk.routing if output_routing else None,
            hidden_states=(x_BD, *trunk.hidden, last_BTH) if x_BD is not None and output_hidden_states else None,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _encode(self, inputs: tuple[Tensor | None, ...]) -> Tensor:
        x_BD = self.encoder(*inputs, checked=True)
        return self.embedding_dropout(x_BD) if self.training else x_BD

    def _answer(self, trunk: TrunkOutput, towers: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Logits of each tower `[B, C]`, and what the towers read `[B, T, H]`."""
        logits = {name: self.towers[name](trunk.states[name]) for name in towers}
        return logits, torch.stack([trunk.states[name] for name in towers], dim=1)

    def _without_gradients(
        self, inputs: tuple[Tensor | None, ...], towers: Sequence[str], joined: JoinedModel | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """As `_answer`, from checked inputs."""
        x = self._encode(inputs)
        if joined is None:
            return self._answer(self.trunk(x, towers, False), towers)
        for step in joined.steps:
            x = step(x)
        if not joined.steps:
            states = self.trunk(x, towers, False).states
            x = torch.stack([states[name] for name in towers])
        return dict(zip(towers, joined.towers(x), strict=True)), x.transpose(0, 1).contiguous()

    def _task_losses(
        self, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        losses = {}
        for task in self._parsed_tasks:
            if task.name not in logits or task.name not in labels:
                continue
            mask_B = None
            if task.space is not None:
                if task.space not in labels:
                    raise ValueError(
                        f"labels of task {task.name!r} count where task {task.space!r} is 1: expected its labels too"
                    )
                space = next(other for other in self._parsed_tasks if other.name == task.space)
                space.check_labels(logits[task.name][:, :1], labels[task.space])
                mask_B = labels[task.space] == 1
            losses[task.name] = task.loss(logits[task.name], labels[task.name], weights.get(task.name), mask_B)
        return losses

    def set_training_step(self, step: int) -> None:
        for module in self.modules():
            if isinstance(module, DSelectKGate):
                module.training_step = step


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def product_logit(logits: Sequence[Tensor]) -> Tensor:
    """Logit of a product of probabilities: `sigma(z) = prod_i sigma(z_i)`, shapes `[B, 1]`.

    1 / prod sigma(z_i) = prod (1 + exp(-z_i)), so for two factors z = -logsumexp(-a, -b, -a-b): no probability is ever
    formed, and nothing cancels. Taken in float32 at least; exact in the tails, where 1 - p q rounds to 1.
    """
    product, *rest = (z if z.dtype == torch.float64 else z.float() for z in logits)
    for logit in rest:
        product = -torch.logsumexp(torch.stack([-product, -logit, -product - logit]), dim=0)
    return product.to(logits[0].dtype)
