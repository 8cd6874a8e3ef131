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


def empty_gradients(w: ExpertWeights, needs: PerInput[bool]) -> PerInput[Tensor | None]:
    """Tensors to write the parameters' gradients to, where they are needed; None for the rest."""

    def empty(parameter: Tensor | None, needed: bool) -> Tensor | None:
        return parameter.new_empty(parameter.shape) if parameter is not None and needed else None

    return PerInput(
        x=None,
        weights=None,
        up=empty(w.up_EPD, needs.up),
        down=empty(w.down_EOH, needs.down),
        gate=empty(w.gate_EHD, needs.gate),
        b_up=empty(w.b_up_EP, needs.b_up),
        b_down=empty(w.b_down_EO, needs.b_down),
        b_gate=empty(w.b_gate_EH, needs.b_gate),
    )
