"""What stands between the two layers of an expert: a name, with its derivative, or any function.

Shapes: `S` rows, `P` width of what enters (`2 H` where it is gated, else `H`), `H` hidden width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor], object]
_aten = torch.ops.aten


def _relu2_backward(grad_SH: Tensor, pre_SH: Tensor, out_SH: Tensor) -> object:
    return torch.mul(grad_SH, F.relu(pre_SH).mul_(2), out=out_SH)


# Each with its backward, which writes: gradient of what leaves, what entered, and where its gradient goes.
PLAIN: dict[str, tuple[Activation, Backward]] = {
    "relu": (F.relu, lambda grad, pre, out: _aten.threshold_backward(grad, pre, 0, grad_input=out)),
    "relu2": (lambda pre_SH: F.relu(pre_SH).square(), _relu2_backward),
    "gelu": (F.gelu, lambda grad, pre, out: _aten.gelu_backward(grad, pre, grad_input=out)),
    "gelu_tanh": (
        lambda pre_SH: F.gelu(pre_SH, approximate="tanh"),
        lambda grad, pre, out: _aten.gelu_backward(grad, pre, approximate="tanh", grad_input=out),
    ),
    "silu": (F.silu, lambda grad, pre, out: _aten.silu_backward(grad, pre, grad_input=out)),
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


def activate_backward(activation: str | Activation, pre_SP: Tensor, grad_SH: Tensor, out_SP: Tensor) -> Tensor:
    """Takes the gradient of what leaves back to what enters, which goes to `out_SP`. Returns what leaves, `[S, H]`."""
    if not isinstance(activation, str):
        with torch.enable_grad():
            entered_SP = pre_SP.detach().requires_grad_()
            left_SH = activation(entered_SP)
        out_SP.copy_(torch.autograd.grad(left_SH, entered_SP, grad_SH)[0])
        return left_SH.detach()
    if activation not in GATED:
        forward, backward = PLAIN[activation]
        backward(grad_SH, pre_SP, out_SP)
        return forward(pre_SP)
    forward, backward = PLAIN[GATED[activation]]
    gate_SH, up_SH = pre_SP.chunk(2, dim=-1)
    dgate_SH, dup_SH = out_SP.chunk(2, dim=-1)
    activated_SH = forward(gate_SH)
    torch.mul(grad_SH, activated_SH, out=dup_SH)
    backward(grad_SH * up_SH, gate_SH, dgate_SH)
    return activated_SH.mul_(up_SH)
