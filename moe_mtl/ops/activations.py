"""What stands between the two layers of an expert: a name, with its derivative, or any function.

Shapes: `S` rows, `P` width of what enters (`2 H` where it is gated, else `H`), `H` hidden width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
Backward = Callable[[Tensor, Tensor], Tensor]
_aten = torch.ops.aten

# Each with its backward: gradient of what leaves, and what entered, to the gradient of what entered.
PLAIN: dict[str, tuple[Activation, Backward]] = {
    "relu": (F.relu, lambda grad_SH, pre_SH: _aten.threshold_backward(grad_SH, pre_SH, 0)),
    "relu2": (lambda pre_SH: F.relu(pre_SH).square(), lambda grad_SH, pre_SH: 2 * grad_SH * F.relu(pre_SH)),
    "gelu": (F.gelu, lambda grad_SH, pre_SH: _aten.gelu_backward(grad_SH, pre_SH)),
    "gelu_tanh": (
        lambda pre_SH: F.gelu(pre_SH, approximate="tanh"),
        lambda grad_SH, pre_SH: _aten.gelu_backward(grad_SH, pre_SH, approximate="tanh"),
    ),
    "silu": (F.silu, lambda grad_SH, pre_SH: _aten.silu_backward(grad_SH, pre_SH)),
}
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


def gated(activation: Activation) -> Activation:
    """`act(gate) * up` of a first layer whose output is `[gate; up]`."""

    def apply(pre_SP: Tensor) -> Tensor:
        gate_SH, up_SH = pre_SP.chunk(2, dim=-1)
        return activation(gate_SH) * up_SH

    return apply


ACTIVATIONS: dict[str, Activation] = {name: activation for name, (activation, _) in PLAIN.items()} | {
    name: gated(PLAIN[inner][0]) for name, inner in GATED.items()
}


def activate(activation: str | Activation, pre_SP: Tensor) -> Tensor:
    """`[S, H]` of `[S, P]`."""
    return ACTIVATIONS[activation](pre_SP) if isinstance(activation, str) else activation(pre_SP)


def activate_for_backward(activation: str | Activation, pre_SP: Tensor) -> tuple[Tensor, Activation]:
    """What leaves, and what takes its gradient `[S, H]` back to that of `pre_SP`."""
    if not isinstance(activation, str):
        with torch.enable_grad():
            entered_SP = pre_SP.detach().requires_grad_()
            left_SH = activation(entered_SP)
        return left_SH.detach(), lambda grad_SH: torch.autograd.grad(left_SH, entered_SP, grad_SH)[0]
    if activation not in GATED:
        forward, backward = PLAIN[activation]
        return forward(pre_SP), lambda grad_SH: backward(grad_SH, pre_SP)
    forward, backward = PLAIN[GATED[activation]]
    gate_SH, up_SH = pre_SP.chunk(2, dim=-1)
    activated_SH = forward(gate_SH)

    def through_gate(grad_SH: Tensor) -> Tensor:
        dpre_SP = torch.empty_like(pre_SP)
        dgate_SH, dup_SH = dpre_SP.chunk(2, dim=-1)
        torch.mul(grad_SH, activated_SH, out=dup_SH)
        dgate_SH.copy_(backward(grad_SH * up_SH, gate_SH))
        return dpre_SP

    return activated_SH * up_SH, through_gate
