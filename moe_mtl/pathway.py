"""What one task costs: counted while the model answers a row, so that a new model needs no new code.

Shapes: `B` rows, `F` columns of one kind, `L` items of a multi-hot or sequence cell.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .models import MultiTaskModel
from .tasks import check_task_names

# Operations that fetch rows of a table: what they return was read, not all of what they were given.
_LOOKUPS = (torch.ops.aten.embedding, torch.ops.aten.index_select, torch.ops.aten.index, torch.ops.aten.gather)
_FUSED = (torch.ops.aten.addcmul,)  # one multiply-add per element of the result
TRUNK, OTHER = "trunk", "other"


@dataclass(frozen=True)
class PartCost:
    """What a part of the path costs; the fields are those of `Cost`."""

    touched: int = 0
    active: int = 0
    multiply_adds: int = 0


@dataclass(frozen=True)
class Cost:
    """What answering `tasks` takes, through the model that `extract_task` gives.

    Attributes:
        tasks: the tasks answered.
        stored: parameters of the whole model.
        touched: parameters that the path can read: all of a table, though one row reads little of it.
        active: parameters that one row reads: of tables the rows looked up, of all else everything touched.
        table_rows: rows of tables looked up for one row of data; a multi-hot or sequence cell counts its `max_length`.
        multiply_adds: per row: matrix products (linear layers, experts, gates, mixtures, numeric embeddings) and fused
            element-wise ones. Lookups, activations, norms, softmax, biases and plain element-wise products count 0.
        parts: the same by part: `encoder`, `experts`, `gates`, `towers`, ...; `trunk` is the trunk's rest, as mixtures.
        share: `touched`, `active` and `multiply_adds` as fractions of what all tasks together take.
    """

    tasks: tuple[str, ...]
    stored: int
    touched: int
    active: int
    table_rows: int
    multiply_adds: int
    parts: dict[str, PartCost]
    share: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {"tasks": list(self.tasks)}


def cost(
    model: MultiTaskModel, task: str | Sequence[str] | None = None, inputs: Mapping[str, Tensor] | None = None
) -> Cost:
    """Counts what a task, several or all of them (None) take.

    The path is run in evaluation mode and every operation watched; nothing is known here of any architecture. What a
    task can save is the architecture's affair: with MMoE's dense gates every task needs every expert.

    Args:
        model: any model of the zoo; left as it is.
        task: a name, names, or None for all.
        inputs: one or more rows as the model takes them; by default one of zeros, made from the config's features.

    Raises:
        UnknownTaskError: a task that the model does not have.
    """
    names = check_task_names(task, model.tasks)
    inputs = one_row(model) if inputs is None else inputs
    full = _count(model.extract_task(model.tasks), inputs)  # not the model: that may hold what no task needs
    count = full if names == model.tasks else _count(model.extract_task(names), inputs)
    totals = {field: sum(count[field].values()) for field in PartCost.__dataclass_fields__}
    parts = {
        part: PartCost(**{field: count[field][part] for field in totals})
        for part in sorted({part for field in totals for part in count[field]}, key=_order)
    }
    whole = {field: sum(full[field].values()) for field in totals}
    return Cost(
        tasks=tuple(names),
        stored=sum(parameter.numel() for parameter in model.parameters()),
        **totals,
        table_rows=sum(count["table_rows"].values()),
        parts=parts,
        share={field: totals[field] / whole[field] if whole[field] else 1.0 for field in totals},
    )


def one_row(model: MultiTaskModel) -> dict[str, Tensor]:
    """A row of zeros, of the kinds and widths that the config's features declare; lists are full."""
    kinds = Counter(feature["kind"] for feature in model.config.features)
    lengths = [f["max_length"] for f in model.config.features if f["kind"] in ("multi_hot", "sequence")]
    row = {}
    if kinds["numeric"]:
        row["numeric"] = torch.zeros(1, kinds["numeric"], device=model.device)
    if kinds["categorical"]:
        row["categorical"] = torch.zeros(1, kinds["categorical"], dtype=torch.int64, device=model.device)
    if lengths:
        row["sequences"] = torch.zeros(1, len(lengths), max(lengths), dtype=torch.int64, device=model.device)
    return row


def part_of(name: str) -> str:
    """The part that a parameter or module belongs to, from its dotted name: the first component that says it."""
    components = name.split(".")
    for component in components:
        if component in ("encoder", "towers", "bottom") or component.endswith(("experts", "gates")):
            return component
    return TRUNK if components[0] == "trunk" else OTHER


def _order(part: str) -> tuple[int, str]:
    """Parts as a row meets them."""
    along = ("encoder", "bottom", "feature_gates", "experts", "gates", "self_gates", TRUNK, "towers")
    return (along.index(part) if part in along else len(along), part)


@torch.no_grad()  # not inference_mode: there composite operations would reach the counter undivided
def _count(model: MultiTaskModel, inputs: Mapping[str, Tensor]) -> dict[str, Counter[str]]:
    """Per field of the cost, the count by part."""
    counter = _Counter(model, rows=len(next(iter(inputs.values()))))
    was_training = model.training
    model.eval()
    try:
        with _current_module(model, counter), counter:
            model(**inputs)
    finally:
        model.train(was_training)
    return counter.result()


@contextmanager
def _current_module(model: nn.Module, counter: "_Counter") -> Iterator[None]:
    """Tells the counter, by hooks, which module's forward runs."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: counter.entered.append(name)))
        handles.append(module.register_forward_hook(lambda *_: counter.entered.pop() and None, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Counter(TorchDispatchMode):
    """Sees every operation after its decomposition, and knows parameters by their memory, so through any view."""

    def __init__(self, model: nn.Module, rows: int):
        super().__init__()
        self.rows = rows
        self.entered: list[str] = []
        self.places: dict[int, list[tuple[int, int, str]]] = {}
        self.sizes: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            start = int(parameter.storage_offset())
            place = (start, start + parameter.numel(), name)
            self.places.setdefault(parameter.untyped_storage()._cdata, []).append(place)
            self.sizes[name] = parameter.numel()
        self.read_whole: set[str] = set()
        self.looked_up: Counter[str] = Counter()  # elements, by parameter
        self.lookups: Counter[str] = Counter()  # rows, by part
        self.multiply_adds: Counter[str] = Counter()  # by part

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = func.overloadpacket
        if operation in flop_registry:  # two operations to a multiply-add
            self.multiply_adds[part_of(self.entered[-1])] += flop_registry[operation](*args, **kwargs, out_val=out) // 2
        elif operation in _FUSED:
            self.multiply_adds[part_of(self.entered[-1])] += out.numel()
        for i, tensor in enumerate(args):
            for one in tensor if isinstance(tensor, (list, tuple)) else (tensor,):
                if isinstance(one, Tensor) and (name := self._parameter(one)) is not None:
                    if operation in _LOOKUPS and i == 0:
                        self.looked_up[name] += out.numel()
                        self.lookups[part_of(name)] += out.numel() // max(1, one.numel() // len(one))
                    elif not _is_view(out, one):
                        self.read_whole.add(name)
        return out

    def _parameter(self, tensor: Tensor) -> str | None:
        offset = int(tensor.storage_offset())
        for start, end, name in self.places.get(tensor.untyped_storage()._cdata, ()):
            if start <= offset < end:
                return name
        return None

    def result(self) -> dict[str, Counter[str]]:
        touched: Counter[str] = Counter()
        active: Counter[str] = Counter()
        for name in self.read_whole | set(self.looked_up):
            touched[part_of(name)] += self.sizes[name]
            active[part_of(name)] += self.sizes[name] if name in self.read_whole else self.looked_up[name] // self.rows
        return {
            "touched": touched,
            "active": active,
            "multiply_adds": Counter({part: count // self.rows for part, count in self.multiply_adds.items()}),
            "table_rows": Counter({part: count // self.rows for part, count in self.lookups.items()}),
        }


def _is_view(out: Any, of: Tensor) -> bool:
    """A view only passes the memory on; whoever computes with it reads it."""
    first = out[0] if isinstance(out, (list, tuple)) and out else out
    return isinstance(first, Tensor) and first.untyped_storage()._cdata == of.untyped_storage()._cdata
