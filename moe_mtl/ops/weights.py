"""The parameters of a bank of two-layer experts, and the gradients of a call, under one name each.

Shapes: `E` experts, `D` width, `H` hidden width, `P` rows of the first layer (`2 H` where gate and up lie in one
tensor, else `H`), `O` output width.
"""

from dataclasses import dataclass, fields
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass
class ExpertWeights:
    """`up` holds the gate's rows too, first, unless `gate` is given. Any strides."""

    up_EPD: Tensor
    down_EOH: Tensor
    gate_EHD: Tensor | None = None
    b_up_EP: Tensor | None = None
    b_down_EO: Tensor | None = None
    b_gate_EH: Tensor | None = None

    @property
    def wide(self) -> int:
        """Width of what enters the activation."""
        return self.up_EPD.shape[1] * (1 if self.gate_EHD is None else 2)

    def named(self) -> dict[str, Tensor | None]:
        return {
            "w_up": self.up_EPD,
            "w_down": self.down_EOH,
            "w_gate": self.gate_EHD,
            "b_up": self.b_up_EP,
            "b_down": self.b_down_EO,
            "b_gate": self.b_gate_EH,
        }


@dataclass
class PerInput(Generic[T]):
    """One value for each differentiable input of a call, in the order in which the functions take them."""

    x: T
    weights: T
    up: T
    down: T
    gate: T
    b_up: T
    b_down: T
    b_gate: T

    def values(self) -> tuple[T, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def no_gradients() -> PerInput[Tensor | None]:
    return PerInput(None, None, None, None, None, None, None, None)


def gradient_of(found: PerInput[Tensor | None], name: str, parameter: Tensor | None) -> Tensor:
    """The tensor to write a parameter's gradient to; made when it is first asked for."""
    assert parameter is not None
    if getattr(found, name) is None:
        setattr(found, name, parameter.new_empty(parameter.shape))
    made: Tensor = getattr(found, name)
    return made
