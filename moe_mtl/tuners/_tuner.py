"""The model that PEFT makes of a base model and LoRA experts; how a method becomes known to PEFT."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..outputs import Routing
from ._base import METHODS, Method, RankAdapter, RankConfig, RankLayer
from ._tasks import CurrentTasks, Preference, Tasks, number, weights_of


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
            if isinstance(owner, CurrentTasks) and owner.merged:  # of adapters that are weights by now
                remove_hooks(model, owner)
        found = (layer.current_tasks for layer in model.modules() if isinstance(layer, RankLayer))
        self.current_tasks = next(found, None) or CurrentTasks()
        if not any(hook == self.current_tasks.enter for hook in model._forward_pre_hooks.values()):
            model.register_forward_pre_hook(self.current_tasks.enter, with_kwargs=True)
            model.register_forward_pre_hook(self.current_tasks.losses.enter)
            model.register_forward_hook(self.current_tasks.losses.leave)
            model.register_forward_hook(self.current_tasks.leave, always_call=True)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> PeftConfig:
        named = peft_config.target_modules is not None
        prepared: Any = super()._prepare_adapter_config(peft_config, model_config)
        if not named and isinstance(prepared.target_modules, set):
            prepared.target_modules = prepared.default_targets(self.model, prepared.target_modules)
        return prepared

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        names = [name for name, _ in model.named_modules() if name]
        peft_config.check_targets(model, [name for name in names if self._is_target(peft_config, name)])

    def _is_target(self, config: PeftConfig, name: str) -> bool:
        found = self._check_target_module_exists(config, name)
        return bool(found) and not isinstance(found, _ExcludedModule)

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
        from ._parameters import ParamWrapper  # which is a RankLayer

        nested = isinstance(target, ParamWrapper) and target.parameter_name != parameter_name
        if isinstance(target, RankLayer) and not nested:
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"target_modules: expected layers that are called, found {current_key}, whose weight is read"
            )
        layer_class = peft_config.layer_class(base)
        if parameter_name is not None:
            layer: RankLayer = ParamWrapper(target, self.current_tasks, current_key, parameter_name)
        elif layer_class is None:
            raise ValueError(
                f"target_modules: expected linear layers, found {current_key} of type "
                f"{type(base).__module__}.{type(base).__qualname__}"
            )
        else:
            layer = layer_class(target, self.current_tasks, current_key)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, RankLayer) and child.get_base_layer() is new_module:
            setattr(parent, child_name, new_module)  # PEFT hands over a weight, which a block has not
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        configs = [self.peft_config[name] for name in self.active_adapters]
        if not any(config.trains_base() and not config.inference_mode for config in configs):
            return
        aside = [m for m in model.modules() if isinstance(m, (RankAdapter, AuxiliaryTrainingWrapper))]
        kept = {id(parameter) for module in aside for parameter in module.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in kept and parameter.is_floating_point():
                parameter.requires_grad = True

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.trains_base():
            aside = tuple(name for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
            found |= {key: tensor for key, tensor in state_dict.items() if not key.startswith(aside)}
        return found

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

    def set_preference(self, preference: Preference | None) -> None:
        """The preference of calls that bring none, and of a merge; None takes it back.

        Args:
            preference: weights of the tasks of 0 or more that sum to 1: by name, or in the order of the config's tasks.

        Raises:
            ValueError: weights that fit no adapter.
        """
        configs = [c for c in self.peft_config.values() if isinstance(c, RankConfig) and c.adapter_class.by_preference]
        errors = []
        for config in configs if preference is not None else ():
            try:
                weights_of(preference, config.tasks)  # type: ignore[arg-type]
            except ValueError as error:
                errors.append(error)
        if errors and len(errors) == len(configs):
            raise errors[0]
        self.current_tasks.always_preference = preference

    @contextlib.contextmanager
    def preference(self, preference: Preference) -> Iterator[None]:
        """The preference of the calls inside: one for the batch, or one per sample."""
        with self.current_tasks.set(preference=preference):
            yield

    @contextlib.contextmanager
    def tasks(self, tasks: Tasks) -> Iterator[None]:
        """The tasks of the calls inside, one per sample."""
        with self.current_tasks.set(tasks):
            yield

    @contextlib.contextmanager
    def record_routing(self) -> Iterator[list[Routing]]:
        """Records of the calls inside: one per layer with a gate, or a choice, and call.

        with model.base_model.record_routing() as records:
            model(**batch)
        records[0].utilisation()

        The gate `tokens` has a row per token, in the order of the batch; `preference` a row per sample; a task's gate
        one row. Rows sum to 1: of chosen ranks, their weights are divided by the sum. Nothing is computed again.
        """
        before, self.current_tasks.records = self.current_tasks.records, []
        try:
            yield self.current_tasks.records
        finally:
            self.current_tasks.records = before

    def generate(
        self, *args: Any, tasks: Tasks | None = None, preference: Preference | None = None, **kwargs: Any
    ) -> Any:
        """The base model's `generate`, with one task, or preference, per prompt, which its beams and answers share."""
        if tasks is None:
            tasks = self.current_tasks.always
        names = ("inputs", "input_ids", "inputs_embeds", "input_features", "pixel_values")
        prompts = next((t for t in (*args[:1], *map(kwargs.get, names)) if isinstance(t, Tensor)), None)
        if tasks is not None and not isinstance(tasks, str) and prompts is not None and len(tasks) != len(prompts):
            raise ValueError(f"tasks: expected {len(prompts)}, one per prompt, found {len(tasks)}")
        with self.current_tasks.set(tasks, preference, repeats=True):
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
        layers = [layer for layer in self.model.modules() if isinstance(layer, RankLayer)]
        told = {value for layer in layers for value in layer.merged_for.values() if value is not None}
        if merge and not told:
            always = [layer.always(name) for layer in layers for name in layer.moe_adapters]
            told = {value for value in always if value is not None}
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if told:
            self.current_tasks.merged = told  # the hook stays, to refuse other tasks
        else:
            remove_hooks(model, self.current_tasks)
        return model


def remove_hooks(model: nn.Module, current_tasks: CurrentTasks) -> None:
    """Lets a model be called as before it had adapters."""
    losses = current_tasks.losses
    ours = (current_tasks.enter, losses.enter, losses.leave, current_tasks.leave)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in ours]:
            del hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)


def register(name: str, adapter_class: type[RankAdapter]) -> Callable[[type[RankConfig]], type[RankConfig]]:
    """Makes a config, and with it a method, known to PEFT under a name."""

    def decorate(config_class: type[RankConfig]) -> type[RankConfig]:
        method: Any = Method(name)
        config_class.adapter_class = adapter_class
        METHODS[config_class] = method
        PEFT_TYPE_TO_CONFIG_MAPPING[method] = config_class
        PEFT_TYPE_TO_TUNER_MAPPING[method] = RankTuner
        PEFT_TYPE_TO_PREFIX_MAPPING[method] = RankTuner.prefix
        return config_class

    return decorate
