"""What all LoRA experts share: one adapter layer, made a PEFT method.

    y = W_0 x + s B(t) diag(g(t, x)) M_t A x

A method is one file: a config, and a `RankAdapter` that says which of gate, mix and choice it uses. `register` makes it
known to PEFT, whose `get_peft_model`, `save_pretrained` and `from_pretrained` then work as with its own. What a call
tells of its samples, their tasks or a preference, is "told" to the adapters.

Shapes: `N` tokens, `M` of them that are no padding, `D` width, `R` ranks of the down-projection, `P` ranks that reach
the up-projection, `O` output width, `T` tasks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops.ranks import rank_experts
from ..outputs import Routing
from ._tasks import CurrentTasks, Told, number, runs_again, weights_of

Record = Callable[[dict[str, Tensor], tuple[str, ...]], None]  # per gate the weights; and what it weighs

SCALINGS: dict[str, Callable[[int], float]] = {"alpha/r": float, "alpha/sqrt(r)": math.sqrt, "alpha": lambda r: 1.0}
EXACT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights that are not quantised


class Method(str):
    """Stands where PEFT expects a member of its enumeration of methods, which is closed."""

    @property
    def value(self) -> str:
        return str(self)

    name = value


METHODS: dict[type["RankConfig"], Method] = {}


@dataclass
class RankConfig(PeftConfig):
    """Fields of every method.

    Attributes:
        r: rank; of one expert where a method has several.
        alpha: the scale's numerator.
        scaling: `alpha/r` (LoRA), `alpha/sqrt(r)` (rsLoRA, Kalajdzievski 2023), or `alpha` as it is (MTLoRA).
        dropout: of what enters the down-projection, in training.
        target_modules: names, or a pattern, of the layers to adapt; by default those that PEFT's LoRA would take.
        target_parameters: names of tensors that are no layer of their own, as `experts.gate_up_proj`, the stacked
            experts of a mixture: each expert has an adapter then. For methods whose update is the same for all
            tokens of a task; a call is for one task, and there is no dropout.
        exclude_modules: of these, the ones to leave alone.
        layers_to_transform, layers_pattern: as in PEFT's LoRA.
        modules_to_save: layers to train in full and to save with the adapter.
        bias: none, or all: train the biases of the base model too.
        tasks: names, for a method that tells tasks apart.
        task_type: PEFT's. Without one its `generate` hands `tasks` on to the base model, which refuses them.
        init_weights: False starts the up-projection at random instead of at 0, for tests.
    """

    r: int = 8
    alpha: float = 16.0
    scaling: str = "alpha/r"
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    tasks: list[str] | None = None
    init_weights: bool = True

    adapter_class: ClassVar[type["RankAdapter"]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = METHODS[type(self)]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.r < 1:
            raise ValueError(f"r: expected at least 1, found {self.r}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling: expected one of {', '.join(SCALINGS)}, found {self.scaling!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a share in [0, 1), found {self.dropout}")
        if self.bias not in ("none", "all"):
            raise ValueError(f"bias: expected none or all, found {self.bias!r}")
        if self.adapter_class.by_task or self.adapter_class.by_preference:
            if not self.tasks or isinstance(self.tasks, str):
                raise ValueError(
                    f"tasks: expected a list of those that {self.peft_type} tells apart, found {self.tasks!r}"
                )
            if len(set(self.tasks)) < len(self.tasks):
                raise ValueError(f"tasks: expected different names, found {self.tasks}")
        if self.target_parameters:
            self._check_parameters()

    def _check_parameters(self) -> None:
        kind = self.adapter_class
        why = "it mixes tasks sample by sample" if kind.by_preference else kind.depends_on_input
        if why is not None:
            raise ValueError(
                f"target_parameters: expected none, as {self.peft_type} adds no fixed matrix to a weight: {why}; "
                f"found {self.target_parameters}"
            )
        if self.dropout:
            raise ValueError(f"dropout: expected 0 beside target_parameters, found {self.dropout}")

    @property
    def scale(self) -> float:
        """`s`."""
        return self.alpha / SCALINGS[self.scaling](self.r)

    def layer_class(self, base: nn.Module) -> "type[RankLayer] | None":
        """What wraps a target; None for one that cannot be."""
        known = isinstance(base, (nn.Linear, Conv1D)) or hasattr(base, "in_features")
        return RankLayer if known and not callable(getattr(base, "weight", None)) else None  # as torch.ao's are

    def default_targets(self, model: nn.Module, targets: set[str]) -> set[str]:
        """What is adapted where no targets are named, of which PEFT's LoRA would take these."""
        return targets

    def for_layer(self, name: str) -> "RankConfig":
        """The config as the layer of that name has it."""
        return self

    def trains_base(self) -> bool:
        """Whether the base model is trained, and saved, too."""
        return False

    def check_targets(self, model: nn.Module, names: list[str]) -> None:
        """Before anything is put into a model, of which these are the targets."""


class RankAdapter(nn.Module):
    """One adapter of one layer. Its trained tensors are parameters, the frozen ones buffers.

    Attributes:
        by_task: whether it tells tasks apart.
        by_preference: whether it mixes tasks by weights that the call brings.
        depends_on_input: why it cannot be merged, None where it can.
        counts_tokens: whether in training it counts which experts tokens chose, and so asks which are padding.
        expert: what its gate weighs, if it has one.
    """

    by_task: ClassVar[bool] = False
    by_preference: ClassVar[bool] = False
    depends_on_input: ClassVar[str | None] = None
    counts_tokens: ClassVar[bool] = False
    expert: ClassVar[str] = "expert"

    def __init__(self, in_features: int, out_features: int, config: Any):
        super().__init__()
        self.config = config
        self.a_RD: Tensor
        self.b_OP: Tensor

    def options(self, x_ND: Tensor, told: Tensor | None) -> dict[str, Any]:
        """What `rank_experts` is to do between the projections; told is each sample's task `[B]`, or preference.

        `weights`, which is for records alone, are those of experts: per token `[N, E]`, or per task `[T, E]`.
        """
        return {}

    def used(self, weights: Tensor | None, told: Tensor | None, chosen: Tensor | None) -> dict[str, Tensor]:
        """Per gate the weights of experts; of a task's gate one row, for the tasks of the call."""
        if weights is None:
            return {}
        if told is None or not self.by_task:
            return {"tokens": weights}
        return {self.config.tasks[task]: weights[task : task + 1] for task in sorted(set(told.tolist()))}

    def names_of_experts(self, number: int) -> tuple[str, ...]:
        """In the order of the weights."""
        return tuple(f"{self.expert} {n}" for n in range(number))

    def record(self, record: Record, used: dict[str, Tensor]) -> None:
        """Hands out what `used` found."""
        if used:
            found = {gate: weights.detach() for gate, weights in used.items()}
            record(found, self.names_of_experts(next(iter(found.values())).shape[-1]))

    def up(self) -> Tensor:
        """`[O, P]`."""
        return self.b_OP

    def as_lora(self, told: Any) -> tuple[Tensor, Tensor]:
        """The pair `A [R, D]` and `B [O, R]` that computes the same for one task, without the scale.

        Args:
            told: the number of the task, or the preference `[T]`; None of methods that hear of neither.

        Raises:
            NotImplementedError: what it computes depends on the input; says how.
        """
        raise NotImplementedError(f"{self.config.peft_type} cannot be merged: {self.depends_on_input}")

    def update_balance(self) -> None:
        """Once per optimiser step, of methods that balance something."""

    def num_trained(self) -> int:
        """Parameters that training moves."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active(self) -> int:
        """Of these, the ones that one token of one task is multiplied with."""
        return self.num_trained()

    def forward(
        self,
        x: Tensor,
        base: Tensor,
        told: Tensor | None,
        record: Record | None = None,
        counted_M: Tensor | None = None,
    ) -> Tensor:
        """`base` with the adapter's output added, `[..., O]`; of the tokens those are counted that are no padding."""
        x_ND, base_NO = x.to(base.dtype).flatten(0, -2), base.flatten(0, -2)
        options = self.options(x_ND, told)
        if self.counts_tokens:
            options["counted_M"] = counted_M
        weights = options.pop("weights", None)
        if record is not None and "num_selected" in options:
            options["chosen"] = []
        if self.config.dropout and self.training:
            x_ND = nn.functional.dropout(x_ND, self.config.dropout)
        y_NO = self.add(x_ND, base_NO, told, options)
        if record is not None:
            with torch.no_grad():  # a graph would keep tensors, which checkpointing counts
                self.record(record, self.used(weights, told, *options.get("chosen", [None])))
        return y_NO.view_as(base)

    def add(self, x_ND: Tensor, base_NO: Tensor, told: Tensor | None, options: dict[str, Any]) -> Tensor:
        """What of `forward` is between reshaping: `[N, O]`."""
        return rank_experts(x_ND, self.a_RD, self.up(), base_NO, scale=self.config.scale, **options)


def at_least_float32(t: Tensor) -> Tensor:
    """What is between the projections, and what is merged, is no coarser."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def down_projection(ranks: int, width: int) -> nn.Parameter:
    """LoRA's: Kaiming-uniform with a = sqrt(5), as PEFT has it."""
    a_RD = nn.Parameter(torch.empty(ranks, width))
    nn.init.kaiming_uniform_(a_RD, a=math.sqrt(5))
    return a_RD


def up_projection(width: int, ranks: int, config: RankConfig) -> nn.Parameter:
    """Zeros, so that training starts at the base model."""
    b_OP = nn.Parameter(torch.zeros(width, ranks))
    if not config.init_weights:
        nn.init.kaiming_uniform_(b_OP, a=math.sqrt(5))
    return b_OP


class RankLayer(nn.Module, BaseTunerLayer):
    """A linear layer with its adapters."""

    adapter_layer_names = ("moe_adapters",)

    def __init__(self, base_layer: nn.Module, current_tasks: CurrentTasks, name: str = ""):
        super().__init__()
        self.base_layer = base_layer
        self.moe_adapters = nn.ModuleDict()
        self.current_tasks = current_tasks
        self.name = name
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.merged_for: dict[str, Told | None] = {}
        self._read_sizes()

    def _read_sizes(self) -> None:
        self._turned = isinstance(self.get_base_layer(), Conv1D)  # which stores [D, O]
        sizes: Any = _get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = sizes

    def new_adapter(self, config: RankConfig) -> RankAdapter:
        """One for this layer."""
        return config.adapter_class(self.in_features, self.out_features, config)

    def update_layer(self, adapter_name: str, config: RankConfig) -> None:
        """Makes, or makes anew, an adapter."""
        self.moe_adapters[adapter_name] = adapter = self.new_adapter(config.for_layer(self.name))
        if adapter.by_preference:
            self.current_tasks.takes_preference = True
        if adapter.counts_tokens:
            self.current_tasks.takes_mask = True
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        """An adapter on a quantised layer keeps its own dtype: it would be rounded to eight bits."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        return device, dtype if dtype in EXACT_DTYPES else None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Frozen tensors keep their dtype: rounded to the base's they would never be exact again."""
        adapter = self.adapter(adapter_name)
        frozen = dict(adapter.named_buffers())
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for name, buffer in frozen.items():
            setattr(adapter, name, buffer.to(adapter.get_buffer(name).device))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self._without(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.moe_adapters:
                adapter = self.adapter(name)
                result = adapter(x, result, self._told(adapter, x), self._record(), self._counted(adapter, x))
        return result

    def _without(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer, with what is merged into it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        for told in self.merged_for.values():
            if told is not None:
                self.current_tasks.check_merged(told, x)
        return self.base_layer(x, *args, **kwargs)

    def _record(self) -> Record | None:
        records = self.current_tasks.records
        if records is None or runs_again():
            return None

        def record(weights: dict[str, Tensor], names: tuple[str, ...]) -> None:
            records.append(Routing(self.name, weights, dict.fromkeys(weights, names)))

        return record

    def _counted(self, adapter: RankAdapter, x: Tensor) -> Tensor | None:
        counts = adapter.counts_tokens and adapter.training and not runs_again()
        return self.current_tasks.counted(x) if counts else None

    def _told(self, adapter: RankAdapter, x: Tensor) -> Tensor | None:
        if adapter.by_task:
            return self.current_tasks.of_samples(adapter.config.tasks, x)
        return self.current_tasks.preferences(adapter.config.tasks, x) if adapter.by_preference else None

    def always(self, adapter_name: str) -> Told | None:
        """What calls that say nothing are for, if it is one task, or one preference; and the adapter asks."""
        adapter, current = self.adapter(adapter_name), self.current_tasks
        if adapter.by_task:
            return current.always if isinstance(current.always, str) else None
        if not adapter.by_preference or current.always_preference is None:
            return None
        weights = weights_of(current.always_preference, adapter.config.tasks)
        return tuple(zip(adapter.config.tasks, weights.tolist(), strict=True)) if weights.dim() == 1 else None

    def lora_of(self, adapter_name: str, told: Told | None) -> tuple[Tensor, Tensor]:
        """`A [R, D]` and `B [O, R]` of one adapter for one task, in float32 at least, the scale left out."""
        adapter = self.adapter(adapter_name)
        names = adapter.config.tasks
        if adapter.by_task:
            if not isinstance(told, str):
                raise ValueError(f"tasks: expected one of {', '.join(names)} to merge; choose it with set_task")
            return adapter.as_lora(number(told, names))
        if adapter.by_preference:
            if not isinstance(told, tuple):
                raise ValueError(
                    f"preference: expected one weight for each of {', '.join(names)} to merge; "
                    "choose them with set_preference"
                )
            return adapter.as_lora(weights_of(dict(told), names))
        return adapter.as_lora(None)

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str, told: Told | None = None) -> Tensor:
        """`s B A` of a task, by default of the one that is set, as the base layer stores its weight."""
        a_RD, b_OR = self.lora_of(adapter_name, self.always(adapter_name) if told is None else told)
        adapter = self.adapter(adapter_name)
        delta_OD = adapter.config.scale * (b_OR @ a_RD)
        return delta_OD.mT if self._turned else delta_OD

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base weight.

        Raises:
            NotImplementedError: an adapter depends on the input, or the base weight is quantised.
            ValueError: no task, or preference, is set for adapters that ask for one; or, where `safe_merge`, a weight
                would become infinite or NaN.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.moe_adapters]
        told = {name: self.always(name) for name in names}
        for what, kind in (("tasks", str), ("preference", tuple)):
            found = {value for value in (*told.values(), *self.merged_for.values()) if isinstance(value, kind)}
            if len(found) > 1:
                listed = " and ".join(sorted(map(str, found)))
                raise ValueError(f"{what}: expected one for all that is merged, found {listed}")
        weight = self._weight()
        merged = weight.data
        for name in names:
            merged = merged + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        weight.data = merged
        for name in names:
            self.merged_adapters.append(name)
            self.merged_for[name] = told[name]

    def unmerge(self) -> None:
        """Takes merged adapters out again, up to rounding."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight = self._weight()
            weight.data = weight.data - self.get_delta_weight(name, self.merged_for.pop(name)).to(weight.dtype)

    def adapter(self, name: str) -> "RankAdapter":
        """The adapter of that name."""
        return cast(RankAdapter, self.moe_adapters[name])

    def _weight(self) -> nn.Parameter:
        base: Any = self.get_base_layer()
        if not isinstance(base, (nn.Linear, Conv1D)) or base.weight.dtype not in EXACT_DTYPES:
            weight = getattr(base, "weight", None)
            dtype = f" of {weight.dtype}" if isinstance(weight, Tensor) else ""
            raise NotImplementedError(
                f"expected a weight of floats to merge into, found {type(base).__name__}{dtype}, whose sum with an "
                "adapter would be rounded; extract_task makes a LoRA beside it"
            )
        return cast(nn.Parameter, base.weight)
