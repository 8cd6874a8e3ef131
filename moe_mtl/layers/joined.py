"""Parameters of modules that work alike, laid side by side in memory, so that one product serves them all.

A row that is answered for many tasks passes through many small products, and to call each takes as long as to compute
it. Joined, the products of all tasks are one. Their sums may round differently, so a model does it only when asked to
(`fold_for_inference`).
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn


class Joined:
    """Modules that answer together. For evaluation without gradients.

    Their parameters stay theirs, each a view of its part of the joined memory: names, files, optimisers and changes in
    place are as before. What gives a parameter other memory parts them again: `holds` tells.
    """

    def __init__(self) -> None:
        self._laid: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter, int, tuple[int, ...]]] = []

    def lay(self, modules: Sequence[Any], name: str) -> Tensor:
        """Joins the parameter `name` of all `modules` along its first dimension; returns the joined memory.

        Raises:
            ValueError: one of them does more than hold it (an adapter, a quantised or parametrised layer), or they
                differ in dtype or device.
        """
        for module in modules:
            if type(module) not in (nn.Linear, nn.ParameterList):
                raise ValueError(f"cannot fold a model with a layer of type {type(module).__name__}: merge it first")
        parameters = [getattr(module, name) for module in modules]
        if len({(parameter.dtype, parameter.device) for parameter in parameters}) > 1:
            raise ValueError("cannot fold a model whose layers differ in dtype or device")
        with torch.inference_mode(False), torch.no_grad():  # else no gradient could ever reach them again
            joined = torch.cat([parameter.detach() for parameter in parameters])
            parts = joined.split([len(parameter) for parameter in parameters])
            for module, parameter, part in zip(modules, parameters, parts, strict=True):
                parameter.data = part
                self._laid.append((module._parameters, name, parameter, part.data_ptr(), part.stride()))
        return joined

    def holds(self) -> bool:
        """Whether every parameter still lies where it was laid."""
        return all(
            held.get(name) is known and known.data_ptr() == at and known.stride() == stride
            for held, name, known, at, stride in self._laid
        )


class JoinedModel:
    """What answers for all tasks of a model, in the order of the tasks: steps of the trunk, if it has any, and towers.

    A copy of a model is not joined: it has None where the original has this.
    """

    def __init__(self, model: nn.Module, steps: Sequence[Any], towers: Any):
        self.steps, self.towers = list(steps), towers
        if apart not in model._state_dict_hooks.values():
            model.register_state_dict_post_hook(apart)
        self._tree = [(m._modules, name, c) for m in model.modules() for name, c in m._modules.items() if c is not None]

    def holds(self) -> bool:
        """Whether no module was exchanged and no parameter moved since, and none of them trains."""
        together = all(held.get(name) is child and not child.training for held, name, child in self._tree)
        return together and all(part.holds() for part in (*self.steps, self.towers))

    def __deepcopy__(self, memo: dict[int, object]) -> Self | None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def apart(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Hook of `state_dict`: what is a view of joined memory leaves as a copy.

    What saves weights takes tensors of one memory for the same tensor, and leaves all but one out.
    """
    for name, tensor in state.items():
        view = isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() > tensor.nbytes
        if view and not isinstance(tensor, nn.Parameter):
            state[name] = tensor.clone()
