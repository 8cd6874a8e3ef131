"""Adapters of tensors that are no layer of their own: the stacked experts of a mixture, as transformers keeps them.

    W_e' = W_e + s B_e A_e        for every expert e

Each expert has an adapter of the method. What they add is a matrix per expert, computed before the mixture runs: so it
cannot depend on a token, and one call is for one task.

Shapes: `E` experts, `D` width, `R` ranks, `O` output width.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ._base import EXACT_DTYPES, RankAdapter, RankConfig, RankLayer


class StackedAdapter(RankAdapter):
    """An adapter per expert, their tensors stacked: each has `E` in front."""

    def __init__(self, experts: int, in_features: int, out_features: int, config: RankConfig):
        super().__init__(in_features, out_features, config)
        each = [config.adapter_class(in_features, out_features, config) for _ in range(experts)]
        self.by_task = config.adapter_class.by_task  # type: ignore[misc]
        self.experts = experts
        for name, _ in each[0].named_parameters():
            self.register_parameter(name, nn.Parameter(torch.stack([one.get_parameter(name).data for one in each])))
        for name, _ in each[0].named_buffers():
            self.register_buffer(name, torch.stack([one.get_buffer(name) for one in each]))
        like: Any = each[0]
        like._parameters, like._buffers = {}, {}
        self._like = (like,)  # in a tuple, as it is no part of this one

    def as_lora(self, told: Any) -> tuple[Tensor, Tensor]:
        """`A [E, R, D]` and `B [E, O, R]`."""
        return torch.vmap(lambda tensors: self._one(*tensors).as_lora(told))(
            (dict(self.named_parameters()), dict(self.named_buffers()))
        )

    def num_trained(self) -> int:
        return sum(self.of_expert(number).num_trained() for number in range(self.experts))

    def num_active(self) -> int:
        """Of one expert; how many a token meets the router of the mixture knows."""
        return self.of_expert(0).num_active()

    def of_expert(self, number: int) -> RankAdapter:
        """One expert's, on the same memory."""
        parameters = {name: parameter[number] for name, parameter in self.named_parameters()}
        return self._one(parameters, {name: buffer[number] for name, buffer in self.named_buffers()})

    def _one(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> RankAdapter:
        one: Any = copy.copy(self._like[0])
        one._parameters, one._buffers = parameters, buffers
        return one


class ParamWrapper(RankLayer):
    """A module with adapters on one of its parameters, `[E, O, D]`, or `[E, D, O]` where it says `is_transposed`.

    Of several parameters the wrappers are nested. PEFT knows them by the name of this class.
    """

    def __init__(self, base_layer: nn.Module, current_tasks: Any, name: str, parameter_name: str):
        self.parameter_name = parameter_name
        super().__init__(base_layer, current_tasks, name)

    def _read_sizes(self) -> None:
        shape = list(self._parameter().shape)
        if len(shape) != 3:
            raise ValueError(f"target_parameters: expected weights of shape [E, O, D], found {self.name} of {shape}")
        self._turned = bool(getattr(self.get_base_layer(), "is_transposed", False))
        self.experts, out_features, in_features = shape
        self.in_features, self.out_features = (
            (out_features, in_features) if self._turned else (in_features, out_features)
        )

    def new_adapter(self, config: RankConfig) -> RankAdapter:
        return StackedAdapter(self.experts, self.in_features, self.out_features, config)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        weight = self._parameter()
        return weight.device, weight.dtype if weight.dtype in EXACT_DTYPES else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.moe_adapters]
        if self.disable_adapters or self.merged or not names:
            return self._without(x, *args, **kwargs)
        weight: Tensor = self._weight()
        with torch.autocast(weight.device.type, enabled=False):
            for name in names:
                adapter = self.adapter(name)
                told = self.current_tasks.of_all(adapter.config.tasks, x) if adapter.by_task else None
                a_ERD, b_EOR = (side.to(weight.dtype) for side in adapter.as_lora(told))
                left, right = (a_ERD.mT, b_EOR.mT) if self._turned else (b_EOR, a_ERD)
                weight = torch.baddbmm(weight, left, right, alpha=adapter.config.scale)
        path, inner = self.parameter_name, self.base_layer
        while isinstance(inner, ParamWrapper):
            path, inner = f"base_layer.{path}", inner.base_layer
        return torch.func.functional_call(self.base_layer, {path: weight}, (x, *args), kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT asks here, as wrappers are nested."""
        if merge:
            self.merge(safe_merge, adapter_names)
            if isinstance(self.base_layer, ParamWrapper):
                self.base_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.get_base_layer()

    def _parameter(self) -> nn.Parameter:
        return self.get_base_layer().get_parameter(self.parameter_name)

    def _weight(self) -> nn.Parameter:
        weight = self._parameter()
        if weight.dtype not in EXACT_DTYPES:
            raise NotImplementedError(
                f"target_parameters: expected weights of floats, found {self.name} of {weight.dtype}, whose sum with "
                "an adapter would be rounded"
            )
        return weight
