"""What one task costs: counted while the model answers a row, so that a new model needs no new code.

Shapes: `B` rows, `F` columns of one kind, `L` items of a multi-hot or sequence cell, `N` tokens, `E` experts, `K`
experts chosen per token.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..layers.attention_experts import HeadExperts
from ..layers.low_rank_experts import LowRankMixture
from ..layers.moe import SparseExperts
from ..models import MultiTaskModel
from ..tasks import check_task_names

# Operations that fetch rows of a table: what they return was read, not all of what they were given.
_LOOKUPS = (torch.ops.aten.embedding, torch.ops.aten.index_select, torch.ops.aten.index, torch.ops.aten.gather)
_FUSED = (torch.ops.aten.addcmul,)  # one multiply-add per element of the result
OTHER = "other"
_BODY = ("attention", "mlp", "experts", "gates", "self_gates", "trunk", "blocks")
ALONG = ("encoder", "bottom", "feature_gates", "patches", "conditions", *_BODY, "decoder", "towers", "heads")


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
        touched: parameters that the path can read: all of a table, though one row reads little of it. Of sparse experts
            those that at least one token of `inputs` chose: of many tokens there is nearly always one.
        active: parameters that one row reads: of tables the rows looked up, of all else everything touched. Of sparse
            experts those of one token of one task: `K` of each layer.
        table_rows: rows of tables looked up for one row of data; a multi-hot or sequence cell counts its `max_length`.
        multiply_adds: per row, which may be an image: matrix products (linear layers, convolutions, attention, experts,
            gates, mixtures, numeric embeddings) and fused element-wise ones. Lookups, activations, norms, softmax,
            biases, up-sampling and plain element-wise products count 0.
        parts: the same by part, as a row meets them: `encoder`, `attention`, `experts`, `gates`, `towers`, `heads`,
            ...; `trunk`, `blocks` or `decoder` is the rest of those, as mixtures or norms.
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
    task can save is the architecture's affair: with MMoE's dense gates every task needs every expert; M³ViT's saving of
    88 % is one task without the other decoders, against models with one encoder per task (see `models/m3vit.py`).

    A model on the meta device is counted from its shapes alone, in no time, however large. There no token's choice is
    known: `K` experts compute for each, and all that are stored count as touched. Where experts differ, as MLoRE's do
    by rank, each counts by the share `K / E` that an average choice has of it.

    Args:
        model: any model of the zoo; left as it is.
        task: a name, names, or None for all.
        inputs: one or more rows as the model takes them; by default one of zeros.

    Raises:
        UnknownTaskError: a task that the model does not have.
        ValueError: a folded MLoRE on the meta device.
    """
    names = check_task_names(task, model.tasks)
    inputs = model.example_inputs() if inputs is None else inputs
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


def part_of(name: str) -> str:
    """The part that a parameter or module belongs to, from its dotted name: the first component that says it, experts
    and gates before what they are in; else the name's start."""
    components = name.split(".")
    for component in components:
        if component in ("encoder", "towers", "bottom") or component.endswith(("experts", "gates")):
            return component
    if "router" in components:
        return "gates"
    return next((one for one in components if one in ("attention", "mlp")), components[0] or OTHER)


def _order(part: str) -> tuple[int, str]:
    """Parts as a row meets them."""
    return (ALONG.index(part) if part in ALONG else len(ALONG), part)


@torch.no_grad()  # not inference_mode: there composite operations would reach the counter undivided
def _count(model: MultiTaskModel, inputs: Mapping[str, Tensor]) -> dict[str, Counter[str]]:
    """Per field of the cost, the count by part. The model is the caller's own and changed."""
    for module in model.modules():
        if hasattr(module, "backend"):  # the plain way of sparse experts: one product each, of just its copies
            module.backend = "torch"  # type: ignore[assignment]
    counter = _Counter(model, rows=len(next(iter(inputs.values()))))
    with _current_module(model, counter), sdpa_kernel(SDPBackend.MATH), counter:  # attention as two products
        out = model.eval()(**inputs, output_routing=True, return_dict=True)
    chosen = {record.layer: next(iter(record.indices.values())).shape[-1] for record in out.routing if record.indices}
    return counter.result(chosen)


@contextmanager
def _current_module(model: nn.Module, counter: "_Counter") -> Iterator[None]:
    """Tells the counter, by hooks, which module's forward runs."""

    def leave(*_: Any) -> None:  # a hook that returned something would change the output
        counter.entered.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: counter.entered.append(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
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
        self.shapes: dict[str, torch.Size] = {}
        for name, parameter in model.named_parameters():
            start = int(parameter.storage_offset())
            place = (start, start + parameter.numel(), name)
            self.places.setdefault(parameter.untyped_storage()._cdata, []).append(place)
            self.shapes[name] = parameter.shape
        # Of sparse experts, one after the other in each parameter; experts of other kinds are read whole.
        banks = [name for name, module in model.named_modules() if isinstance(module, (SparseExperts, HeadExperts))]
        self.stacked = {name for name in self.shapes if name.rpartition(".")[0] in banks}
        # Of experts that differ all compute on the meta device, each for the share of an average choice.
        self.averaged = {
            f"{name}.experts.": (module.router.num_selected, module.router.num_experts)
            for name, module in model.named_modules()
            if isinstance(module, LowRankMixture) and model.device.type == "meta"
        }
        self.read: dict[str, Tensor] = {}  # which elements, by parameter
        self.looked_up: Counter[str] = Counter()  # elements, by parameter
        self.lookups: Counter[str] = Counter()  # rows, by part
        self.multiply_adds: Counter[str] = Counter()  # by part

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = func.overloadpacket
        if operation in flop_registry:  # two operations to a multiply-add
            name = self.entered[-1]
            count = flop_registry[operation](*args, **kwargs, out_val=out) // 2
            self.multiply_adds[part_of(name)] += self._average(name, count)
        elif operation in _FUSED:
            self.multiply_adds[part_of(self.entered[-1])] += out.numel()
        for i, tensor in enumerate(args):
            for one in tensor if isinstance(tensor, (list, tuple)) else (tensor,):
                if isinstance(one, Tensor) and (place := self._parameter(one)) is not None:
                    start, _, name = place
                    if operation in _LOOKUPS and i == 0:
                        self.looked_up[name] += out.numel()
                        self.lookups[part_of(name)] += out.numel() // max(1, one.numel() // len(one))
                    elif not _is_view(out, one) and not _is_empty(out):
                        self._mark(name, one, int(one.storage_offset()) - start)
        return out

    def _average(self, name: str, count: int) -> int:
        """What an average choice has of a count of one expert; elsewhere all of it."""
        selected, experts = next((k for start, k in self.averaged.items() if name.startswith(start)), (1, 1))
        return count * selected // experts

    def _parameter(self, tensor: Tensor) -> tuple[int, int, str] | None:
        """The parameter whose memory this is, after where that starts and ends."""
        offset = int(tensor.storage_offset())
        places = self.places.get(tensor.untyped_storage()._cdata, ())
        return next((place for place in places if place[0] <= offset < place[1]), None)

    def _mark(self, name: str, view: Tensor, offset: int) -> None:
        """Notes that the elements of a view of a parameter were read."""
        if name not in self.read:
            self.read[name] = torch.zeros(self.shapes[name].numel(), dtype=torch.bool, device="cpu")
        dimensions = [(size, step) for size, step in zip(view.shape, view.stride(), strict=True) if step]
        self.read[name].as_strided([d[0] for d in dimensions], [d[1] for d in dimensions], offset).fill_(True)

    def result(self, chosen: Mapping[str, int]) -> dict[str, Counter[str]]:
        """The counts; `chosen` are the experts of a token, by layer of sparse experts."""
        touched: Counter[str] = Counter()
        active: Counter[str] = Counter()
        for name in self.read.keys() | set(self.looked_up):
            part, size = part_of(name), self.shapes[name].numel()
            read = int(self.read[name].sum()) if name in self.read else 0
            touched[part] += size if name in self.looked_up else read
            of_token = [k for layer, k in chosen.items() if name.startswith(f"{layer}.")]
            if name in self.stacked and of_token:
                active[part] += size // self.shapes[name][0] * of_token[0]
            else:
                active[part] += self._average(name, read) or self.looked_up[name] // self.rows
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


def _is_empty(out: Any) -> bool:
    """As what an expert makes of no token, for which it is not read."""
    return isinstance(out, Tensor) and not out.numel()
