"""Balancing tasks: how several losses become one update. The methods are TorchJD's; this file connects them.

Loss balancing turns the losses into one scalar, then differentiates once. Gradient balancing differentiates each loss
with respect to the shared parameters and combines the rows of that Jacobian; parameters of one task get that task's
plain gradient. Both see weighted losses (`Task.weight`). A task of weight 0 takes no part; a task without a counted row
in the batch contributes zero.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torchjd.aggregation
import torchjd.scalarization
from torch import Tensor, nn
from torchjd.autojac import backward, jac_to_grad

from ..naming import nearest
from ..tasks import SHARED
from .recipe import RecipeError

# Why a method of TorchJD cannot be had.
_REFUSED = {
    "FAMO": "it needs the losses of every batch a second time, after the optimiser's step; DWA and UW come nearest",
}
# A zero row changes what these return (or only scales it): they get the tasks of the batch alone. The others keep a
# row of zeros per absent task.
_ONLY_PRESENT = {"AlignedMTL", "CAGrad", "ConFIG", "DualProj", "FairGrad", "IMTLG", "MGDA", "PCGrad", "UPGrad"}


def _methods(module: Any, base: type) -> dict[str, type]:
    found = {name: vars(module)[name] for name in module.__all__}
    return {
        name: cls
        for name, cls in found.items()
        if issubclass(cls, base) and not inspect.isabstract(cls) and name not in _REFUSED
    }


def scalarizers() -> dict[str, type]:
    """TorchJD's scalarizers that can be used, by class name."""
    return _methods(torchjd.scalarization, torchjd.scalarization.Scalarizer)


def aggregators() -> dict[str, type]:
    """TorchJD's aggregators that can be used, by class name."""
    bases = ("WeightedAggregator", "GramianWeightedAggregator")
    return {
        name: cls
        for name, cls in _methods(torchjd.aggregation, torchjd.aggregation.Aggregator).items()
        if name not in bases
    }


def build_method(kind: str, name: str, options: Mapping[str, Any], num_tasks: int) -> nn.Module:
    """A scalarizer (`kind` "loss_balancing") or aggregator ("gradient_balancing") from its name and options.

    Lists become tensors; the number of tasks is filled in where the method asks for it.

    Raises:
        RecipeError: an unknown method or option, an option missing or refused by the method, a solver that is not
            installed.
    """
    where = f"train.{kind}"
    known = scalarizers() if kind == "loss_balancing" else aggregators()
    if name in _REFUSED:
        raise RecipeError(f"{where}: {name} is not supported: {_REFUSED[name]}")
    if name not in known:
        raise RecipeError(f"{where}: unknown method {name!r}{nearest(name, known)}")
    parameters = inspect.signature(known[name]).parameters
    arguments = dict(options)
    for option in arguments:
        if option not in parameters:
            raise RecipeError(
                f"{where}: {name} has no option {option!r}{nearest(option, parameters) if parameters else ''}"
            )
    for size in ("shape", "n_tasks"):
        if size in parameters:
            arguments.setdefault(size, num_tasks)
    for option, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and option not in arguments:
            raise RecipeError(
                f"{where}: {name} needs the option {option!r}; write it as a mapping {{name: {name}, {option}: ...}}"
            )
    arguments = {
        key: torch.tensor(value, dtype=torch.float32) if isinstance(value, list) else value
        for key, value in arguments.items()
    }
    try:
        return known[name](**arguments)
    except ImportError as error:
        raise RecipeError(
            f'{where}: {name} needs a solver that is not installed: pip install "moe-mtl[balancing]" ({error})'
        ) from None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {name} refuses its options: {error}") from None


class LossBalancer(nn.Module):
    """One loss from several through a scalarizer, whose own parameters, if any, are trained along (UW, IMTLL).

    Args:
        name, options: see `build_method`.
        tasks: names of the tasks of positive weight, in order.
    """

    def __init__(self, name: str, options: Mapping[str, Any], tasks: Sequence[str]):
        super().__init__()
        self.name, self.tasks = name, list(tasks)
        self.method = build_method("loss_balancing", name, options, len(self.tasks))
        self._present = torch.ones(len(self.tasks), dtype=torch.bool)
        for parameter in self.method.parameters():
            # The weight of a task that the batch has no label of must stay where it is.
            parameter.register_hook(lambda gradient: gradient * self._present.to(gradient))

    def forward(self, losses: Mapping[str, Tensor], present: Iterable[str]) -> Tensor:
        """Weighted losses by task, and the tasks that have a counted row in the batch -> one scalar."""
        present = [task for task in self.tasks if task in set(present)]
        self._present = torch.tensor([task in present for task in self.tasks])
        if self.name == "GeometricMean":  # log(0) of an absent task would erase the others
            if not present:
                return torch.stack([losses[task] for task in self.tasks]).sum()
            return self.method(torch.stack([losses[task] for task in present]))
        return self.method(torch.stack([losses[task] for task in self.tasks]))

    def end_epoch(self) -> None:
        """DWA compares epochs."""
        if isinstance(self.method, torchjd.scalarization.DWA):
            self.method.step()


class GradientBalancer(nn.Module):
    """Fills `.grad` from several losses through an aggregator over the Jacobian of the shared parameters.

    Args:
        name, options: see `build_method`.
        tasks: names of the tasks of positive weight, in order.
        parameters: `model.task_parameters()`: which parameters serve several tasks (`shared`) and which one.

    Raises:
        RecipeError: no trainable parameter is shared.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        tasks: Sequence[str],
        parameters: Mapping[str, Sequence[nn.Parameter]],
    ):
        super().__init__()
        self.name, self.tasks = name, list(tasks)
        self.method = build_method("gradient_balancing", name, options, len(self.tasks))
        self._only_present = name in _ONLY_PRESENT and not any(isinstance(value, list) for value in options.values())
        # Tuples inside a dict: these parameters belong to the model and must not be registered here.
        self._parameters_of = {
            SHARED: tuple(p for p in parameters[SHARED] if p.requires_grad),
            "specific": tuple(
                p for key, group in parameters.items() if key != SHARED for p in group if p.requires_grad
            ),
        }
        if not self._parameters_of[SHARED]:
            raise RecipeError(
                f"train.gradient_balancing: {name} balances parameters that tasks share; none of them is trained"
            )

    def backward(self, losses: Mapping[str, Tensor], present: Iterable[str], auxiliary: Tensor | None) -> None:
        """Adds to `.grad`. A parameter that no loss of the batch reaches keeps what it had, None included.

        Args:
            losses: weighted losses by task.
            present: the tasks that have a counted row in the batch.
            auxiliary: a regulariser of the model, added without balancing.
        """
        present = set(present)
        tasks = [task for task in self.tasks if task in present] if self._only_present else self.tasks
        total = torch.stack([losses[task] for task in self.tasks]).sum()
        extra = [] if auxiliary is None or not auxiliary.requires_grad else [auxiliary]
        specific, shared = self._parameters_of["specific"], self._parameters_of[SHARED]
        if specific:
            torch.autograd.backward([total, *extra], inputs=specific, retain_graph=True)
        if extra:
            torch.autograd.backward(extra, inputs=shared, retain_graph=True)
        rows = [losses[task] for task in tasks]
        # TorchJD would give unreached parameters a gradient of zeros, which weight decay and momentum turn into a
        # movement.
        reached = _leaves(rows)
        inputs = [parameter for parameter in shared if parameter in reached]
        if rows and inputs:
            # Row by row: vmap, the default, fails on custom autograd functions and on compiled ones.
            backward(rows, inputs=inputs, parallel_chunk_size=1)
            jac_to_grad(inputs, self.method)  # type: ignore[call-overload]


def _leaves(tensors: Iterable[Tensor]) -> set[Tensor]:
    """The leaf tensors that the graphs of `tensors` reach."""
    leaves: set[Tensor] = set()
    seen: set[Any] = set()
    queue = [tensor.grad_fn for tensor in tensors]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.add(node.variable)  # type: ignore[attr-defined]
        queue.extend(following for following, _ in node.next_functions)
    return leaves


# --- state, for checkpoints ---

_PLAIN = (bool, int, float, str, type(None), Tensor, torch.dtype, torch.device)


def balancer_state(balancer: LossBalancer | GradientBalancer) -> dict[str, dict[str, Any]] | None:
    """What the method remembers between steps, by module; None where a checkpoint cannot hold it (NashMTL)."""
    out = {}
    for name, module in _stateful(balancer):
        attributes = {key: value for key, value in vars(module).items() if key not in _INHERITED}
        if not all(_is_plain(value) for value in attributes.values()):
            return None
        tensors = {**module._parameters, **module._buffers}
        out[name] = {
            "attributes": attributes,
            "tensors": {key: None if value is None else value.detach().clone() for key, value in tensors.items()},
        }
    return out


def load_balancer_state(balancer: LossBalancer | GradientBalancer, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts `balancer_state` back. Raises ValueError for the state of another method."""
    modules = dict(_stateful(balancer))
    if set(modules) != set(state):
        raise ValueError(f"expected the state of {balancer.name}, found that of another method")
    for name, module in modules.items():
        vars(module).update(state[name]["attributes"])
        for key, value in state[name]["tensors"].items():
            parameter = module._parameters.get(key)
            if parameter is not None:
                with torch.no_grad():
                    parameter.copy_(value)
            else:
                module._buffers[key] = value


_INHERITED = set(vars(nn.Module()))


def _stateful(balancer: LossBalancer | GradientBalancer) -> list[tuple[str, nn.Module]]:
    modules: list[tuple[str, nn.Module]] = list(balancer.method.named_modules())
    return [(name, module) for name, module in modules if issubclass(type(module), torchjd.Stateful)]


def _is_plain(value: Any) -> bool:
    return all(_is_plain(item) for item in value) if isinstance(value, (list, tuple)) else isinstance(value, _PLAIN)
