"""What a model returns.

Shapes: `B` rows, `T` tasks, `H` width of what the towers read, `C` outputs of a task, `E` experts that a gate sees, `K`
experts chosen by a router. Of sparse layers a row is a token: `N` tokens, those of one image one after the other.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass(frozen=True)
class Routing:
    """Who used which expert in one layer. Every block can return it; nothing recomputes it.

    Attributes:
        layer: name of the layer, for example `levels.0`.
        weights: per gate (a task's name, or `shared`, or a group's), the mixture weights `[B, E]`. HoME's self-gates,
            which add an output's own experts a second time, are not in them.
        experts: per gate, the names of the `E` experts it sees, in the order of the weights.
        dead_units: per expert, the share of its hidden units that are 0 for every row of the batch.
        indices: of a sparse layer, per gate the experts chosen, `[N, K]`; its `weights` are then the probabilities of
            all experts `[N, E]`, before the choice.
        grid: rows and columns of the patches of an image, where rows are tokens of images; what an image has beyond
            them, such as a class token, comes first.
    """

    layer: str
    weights: dict[str, Tensor]
    experts: dict[str, tuple[str, ...]]
    dead_units: dict[str, Tensor] = field(default_factory=dict)
    indices: dict[str, Tensor] = field(default_factory=dict)
    grid: tuple[int, int] | None = None

    def entropy(self) -> dict[str, Tensor]:
        """Mean entropy of a row's weights, in nats, per gate: scalars. ln(E) is undecided, 0 is one expert."""
        return {gate: torch.special.entr(w_BE.float()).sum(-1).mean() for gate, w_BE in self.weights.items()}

    def utilisation(self) -> dict[str, Tensor]:
        """Mean weight of each expert, per gate: `[E]`, summing to 1 for softmax gates. Of a sparse layer its share of
        the choices, summing to 1."""
        shares = {gate: w_BE.float().mean(0) for gate, w_BE in self.weights.items()}
        for gate, indices_NK in self.indices.items():
            counts_E = torch.bincount(indices_NK.flatten(), minlength=len(self.experts[gate]))
            shares[gate] = counts_E.float() / max(indices_NK.numel(), 1)
        return shares


@dataclass
class MultiTaskOutput(ModelOutput):
    """Output of every model here.

    Attributes:
        loss: scalar, sum over tasks of weight x task loss, plus `auxiliary_loss`; present when labels were given.
        last_hidden_state: `[B, T, H]`, what each task's tower reads.
        logits: task name -> `[B, C]`, for the tasks that were asked for.
        task_losses: task name -> scalar, unweighted.
        auxiliary_loss: scalar, what a gate's regulariser adds to the loss.
        routing: one record per expert layer, when `output_routing=True`.
        hidden_states: what enters each layer and the last one's output, when `output_hidden_states=True`.
    """

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    logits: dict[str, Tensor] | None = None
    task_losses: dict[str, Tensor] | None = None
    auxiliary_loss: Tensor | None = None
    routing: tuple[Routing, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
