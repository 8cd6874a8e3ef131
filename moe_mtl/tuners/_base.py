"""What all LoRA experts share: one adapter layer, made a PEFT method.

    y = W_0 x + s B(t) diag(g(t, x)) M_t A x

A method is one file: a config, and a `RankAdapter` that says which of gate, mix and choice it uses. `register` makes it
known to PEFT, whose `get_peft_model`, `save_pretrained` and `from_pretrained` then work as with its own.

Shapes: `N` tokens, `D` width, `R` ranks of the down-projection, `P` ranks that reach the up-projection, `O` output
width, `T` tasks.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops.ranks import rank_experts
from ._tasks import CurrentTasks, Tasks, number

SCALINGS = ("alpha/r", "alpha/sqrt(r)", "alpha")


@dataclass
class RankConfig(PeftConfig):
    """Fields of every method.

    Attributes:
        r: rank; of one expert where a method has several.
        alpha: the scale's numerator.
        scaling: `alpha/r` (LoRA), `alpha/sqrt(r)` (rsLoRA, Kalajdzievski 2023), or `alpha` as it is (MTLoRA).
        dropout: of what enters the down-projection, in training.
        target_modules: names, or a pattern, of the layers to adapt; by default those that PEFT's LoRA would take.
        exclude_modules: of these, the ones to leave alone.
        layers_to_transform, layers_pattern: as in PEFT's LoRA.
        modules_to_save: layers to train in full and to save with the adapter.
        bias: none, or all: train the biases of the base model too.
        tasks: names, for a method that tells tasks apart.
        init_weights: False starts the up-projection at random instead of at 0, for tests.
    """

    r: int = 8
    alpha: float = 16.0
    scaling: str = "alpha/r"
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
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
        if self.adapter_class.by_task:
            if not self.tasks or isinstance(self.tasks, str):
                raise ValueError(
                    f"tasks: expected a list of those that {self.peft_type} tells apart, found {self.tasks!r}"
                )
            if len(set(self.tasks)) < len(self.tasks):
                raise ValueError(f"tasks: expected different names, found {self.tasks}")

    @property
    def scale(self) -> float:
        """`s`."""
        return self.alpha / {"alpha/r": self.r, "alpha/sqrt(r)": math.sqrt(self.r), "alpha": 1}[self.scaling]


class RankAdapter(nn.Module):
    """One adapter of one layer. Its trained tensors are parameters, the frozen ones buffers.

    Attributes:
        by_task: whether it tells tasks apart.
        depends_on_input: why it cannot be merged, None where it can.
    """

    by_task: ClassVar[bool] = False
    depends_on_input: ClassVar[str | None] = None

    def __init__(self, in_features: int, out_features: int, config: Any):
        super().__init__()
        self.config = config
        self.a_RD: Tensor
        self.b_OP: Tensor

    def options(self, x_ND: Tensor, tasks_B: Tensor | None) -> dict[str, Any]:
        """What `rank_experts` is to do between the projections."""
        return {}

    def up(self) -> Tensor:
        """`[O, P]`."""
        return self.b_OP

    def as_lora(self, task: int | None) -> tuple[Tensor, Tensor]:
        """The pair `A [R, D]` and `B [O, R]` that computes the same for one task, without the scale.

        Raises:
            NotImplementedError: what it computes depends on the input; says how.
        """
        raise NotImplementedError(f"{self.config.peft_type} cannot be merged: {self.depends_on_input}")

    def update_balance(self) -> None:
        """Once per optimiser step, of methods that balance something."""

    def forward(self, x: Tensor, base: Tensor, tasks_B: Tensor | None) -> Tensor:
        """`base` with the adapter's output added, `[..., O]`."""
        x_ND, base_NO = x.to(base.dtype).flatten(0, -2), base.flatten(0, -2)
        options = self.options(x_ND, tasks_B)
        if self.config.dropout and self.training:
            x_ND = nn.functional.dropout(x_ND, self.config.dropout)
        return rank_experts(x_ND, self.a_RD, self.up(), base_NO, scale=self.config.scale, **options).view_as(base)


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

    def __init__(self, base_layer: nn.Module, current_tasks: CurrentTasks):
        super().__init__()
        self.base_layer = base_layer
        self.moe_adapters = nn.ModuleDict()
        self.current_tasks = current_tasks
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.merged_tasks: dict[str, str | None] = {}
        self._turned = isinstance(self.get_base_layer(), Conv1D)  # which stores [D, O]
        sizes: Any = _get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = sizes

    def update_layer(self, adapter_name: str, config: RankConfig) -> None:
        """Makes, or makes anew, an adapter."""
        self.moe_adapters[adapter_name] = config.adapter_class(self.in_features, self.out_features, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Frozen tensors keep their dtype: rounded to the base's they would never be exact again."""
        adapter = self.adapter(adapter_name)
        frozen = dict(adapter.named_buffers())
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for name, buffer in frozen.items():
            setattr(adapter, name, buffer.to(adapter.get_buffer(name).device))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            for task in self.merged_tasks.values():
                if task is not None:
                    self.current_tasks.check_merged(task, x)
            return result
        for name in self.active_adapters:
            if name in self.moe_adapters:
                adapter = self.adapter(name)
                tasks_B = self.current_tasks.of_samples(adapter.config.tasks, x) if adapter.by_task else None
                result = adapter(x, result, tasks_B)
        return result

    def lora_of(self, adapter_name: str, task: str | None) -> tuple[Tensor, Tensor]:
        """`A [R, D]` and `B [O, R]` of one adapter for one task, in float32 at least, the scale left out."""
        adapter = self.adapter(adapter_name)
        if not adapter.by_task:
            return adapter.as_lora(None)
        if task is None:
            known = ", ".join(adapter.config.tasks)
            raise ValueError(f"tasks: expected one of {known} to merge; choose it with set_task")
        return adapter.as_lora(number(task, adapter.config.tasks))

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str, task: str | None = None) -> Tensor:
        """`s B A` of a task, by default of the one that is set, as the base layer stores its weight."""
        always = self.current_tasks.always
        a_RD, b_OR = self.lora_of(adapter_name, always if task is None and isinstance(always, str) else task)
        adapter = self.adapter(adapter_name)
        delta_OD = adapter.config.scale * (b_OR @ a_RD)
        return delta_OD.t() if self._turned else delta_OD

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base weight.

        Raises:
            NotImplementedError: an adapter depends on the input, or the base weight is quantised.
            ValueError: no task is set for adapters that tell tasks apart; or, where `safe_merge`, a weight would become
                infinite or NaN.
        """
        always = self.current_tasks.always
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.moe_adapters]
        tasks = {name: always if self.adapter(name).by_task else None for name in names}
        told = {task for task in (*tasks.values(), *self.merged_tasks.values()) if task is not None}
        if len(told) > 1:
            raise ValueError(
                f"tasks: expected one for all that is merged, found {' and '.join(sorted(map(str, told)))}"
            )
        weight = self._weight()
        merged = weight.data
        for name in names:
            merged = merged + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        weight.data = merged
        for name in names:
            self.merged_adapters.append(name)
            self.merged_tasks[name] = None if tasks[name] is None else str(tasks[name])

    def unmerge(self) -> None:
        """Takes merged adapters out again, up to rounding."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight = self._weight()
            weight.data = weight.data - self.get_delta_weight(name, self.merged_tasks.pop(name)).to(weight.dtype)

    def adapter(self, name: str) -> "RankAdapter":
        """The adapter of that name."""
        return cast(RankAdapter, self.moe_adapters[name])

    def _weight(self) -> nn.Parameter:
        base: Any = self.get_base_layer()
        if not isinstance(base, (nn.Linear, Conv1D)) or not base.weight.is_floating_point():
            raise NotImplementedError(f"expected a weight of floats to merge into, found {type(base).__name__}")
        return cast(nn.Parameter, base.weight)


class RankTuner(BaseTuner):
    """Puts adapters into a base model, and tells them the tasks of a call."""

    prefix = "moe_"
    tuner_layer_cls = RankLayer
    peft_config: dict[str, Any]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if hasattr(self, "current_tasks"):
            return
        for hook in list(model._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, CurrentTasks) and owner.merged is not None:  # of adapters that are weights by now
                remove_hooks(model, owner)
        found = (layer.current_tasks for layer in model.modules() if isinstance(layer, RankLayer))
        self.current_tasks = next(found, None) or CurrentTasks()
        if not any(hook == self.current_tasks.enter for hook in model._forward_pre_hooks.values()):
            model.register_forward_pre_hook(self.current_tasks.enter, with_kwargs=True)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **_: Any,
    ) -> None:
        if isinstance(target, RankLayer):
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"target_modules: expected layers that are called, found {current_key}, whose weight is read"
            )
        if not isinstance(base, (nn.Linear, Conv1D)) and not hasattr(base, "in_features"):
            raise ValueError(
                f"target_modules: expected linear layers, found {current_key} of type {type(base).__name__}"
            )
        layer = RankLayer(target, self.current_tasks)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def set_task(self, task: str | None) -> None:
        """The task of calls that name none, and of a merge; None takes it back.

        Raises:
            ValueError: a name that no adapter knows.
        """
        known: list[Any] = [
            c.tasks for c in self.peft_config.values() if isinstance(c, RankConfig) and c.adapter_class.by_task
        ]
        if task is not None and known and not any(task in names for names in known):
            number(task, [name for names in known for name in names])
        self.current_tasks.always = task

    @contextlib.contextmanager
    def tasks(self, tasks: Tasks) -> Iterator[None]:
        """The tasks of the calls inside, one per sample."""
        with self.current_tasks.set(tasks):
            yield

    def generate(self, *args: Any, tasks: Tasks | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, with one task per prompt; beams and several answers to one prompt share it."""
        if tasks is None:
            tasks = self.current_tasks.always
        names = ("inputs", "input_ids", "inputs_embeds", "input_features", "pixel_values")
        prompts = next((t for t in (*args[:1], *map(kwargs.get, names)) if isinstance(t, Tensor)), None)
        if tasks is not None and not isinstance(tasks, str) and prompts is not None and len(tasks) != len(prompts):
            raise ValueError(f"tasks: expected {len(prompts)}, one per prompt, found {len(tasks)}")
        with self.current_tasks.set(tasks, repeats=True):
            return self.model.generate(*args, **kwargs)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT asks here before every call."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: expected none, these methods take one task per sample, not one adapter")
        yield

    def update_balance(self) -> None:
        """Moves the biases of adapters that choose ranks: once per optimiser step, which `BalanceRanks` sees to."""
        for layer in self.model.modules():
            if isinstance(layer, RankLayer):
                for name in layer.active_adapters:
                    if name in layer.moe_adapters:
                        layer.adapter(name).update_balance()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        always = self.current_tasks.always
        layers = [layer for layer in self.model.modules() if isinstance(layer, RankLayer)]
        told = {task for layer in layers for task in layer.merged_tasks.values() if task is not None}
        if merge and not told and any(config.adapter_class.by_task for config in self.peft_config.values()):
            told = {str(always)}
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if told:
            self.current_tasks.merged = told.pop()  # the hook stays, to refuse other tasks
        else:
            remove_hooks(model, self.current_tasks)
        return model


def remove_hooks(model: nn.Module, current_tasks: CurrentTasks) -> None:
    """Lets a model be called as before it had adapters."""
    hooks: Any = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook == current_tasks.enter]:
        del hooks[key], model._forward_pre_hooks_with_kwargs[key]


class _Method(str):
    """Stands where PEFT expects a member of its enumeration of methods, which is closed."""

    @property
    def value(self) -> str:
        return str(self)

    name = value


METHODS: dict[type[RankConfig], _Method] = {}


def register(name: str, adapter_class: type[RankAdapter]) -> Callable[[type[RankConfig]], type[RankConfig]]:
    """Makes a config, and with it a method, known to PEFT under a name."""

    def decorate(config_class: type[RankConfig]) -> type[RankConfig]:
        method: Any = _Method(name)
        config_class.adapter_class = adapter_class
        METHODS[config_class] = method
        PEFT_TYPE_TO_CONFIG_MAPPING[method] = config_class
        PEFT_TYPE_TO_TUNER_MAPPING[method] = RankTuner
        PEFT_TYPE_TO_PREFIX_MAPPING[method] = RankTuner.prefix
        return config_class

    return decorate
