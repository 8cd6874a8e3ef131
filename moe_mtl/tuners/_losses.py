"""What adapter layers add to a model's loss in training, through gradient checkpointing too.

A layer hands in a term with its graph, and a hook adds the mean over layers to the loss that the model returns. With
reentrant checkpointing a layer first runs without gradients, so that its term has no graph then, and once more in the
backward, where the loss is made already. There the term hangs on the layer's output instead: it adds nothing to it, but
receives the gradient of the loss, which by then is known.
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn


class AddedLosses:
    """Shared by all adapter layers of one model.

    Attributes:
        terms: of the layers that ran since the last call began, by thread: the replicas of a data-parallel model run
            side by side, each in its own.
        factor: of what is added: the share of one call, where the losses of several are summed up.
    """

    def __init__(self) -> None:
        self.terms: dict[int, list[Tensor]] = {}
        self.factor = 1.0
        self.scale: Tensor | None = None  # gradient of one term, in the backward

    def enter(self, *_: Any) -> None:
        """Forward pre-hook of the base model."""
        self.terms.pop(threading.get_ident(), None)

    def leave(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the base model: adds the terms to the loss, where the output has one."""
        terms = self.terms.pop(threading.get_ident(), [])
        loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
        if not terms or not isinstance(loss, Tensor) or loss.dim():
            return output
        mean = torch.stack([term.to(loss.device) for term in terms]).mean()
        total = _Added.apply(loss, mean * self.factor, self, len(terms))
        if isinstance(output, tuple):
            return (total, *output[1:])
        output["loss"] = total
        return output

    def add(self, term: Tensor, y: Tensor) -> Tensor:
        """Adds a term to the loss; returns `y`, which the layer must go on with."""
        if torch._C._current_graph_task_id() == -1:
            self.terms.setdefault(threading.get_ident(), []).append(term)
            return y
        return _Hung.apply(y, term, self)  # runs again, in a backward


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, mean: Tensor, losses: AddedLosses, number: int) -> Tensor:
        ctx.losses, ctx.share = losses, losses.factor / number
        return loss + mean.to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        ctx.losses.scale = grad * ctx.share
        return grad, grad.float(), None, None


class _Hung(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, term: Tensor, losses: AddedLosses) -> Tensor:
        ctx.losses, ctx.like = losses, (term.device, term.dtype)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        device, dtype = ctx.like
        scale = ctx.losses.scale
        return grad, torch.zeros((), device=device, dtype=dtype) if scale is None else scale.to(device, dtype), None
