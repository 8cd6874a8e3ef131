"""What a run shows while it goes on: the health of its experts, and a progress line.

Shapes: `B` rows, `E` experts that a gate sees.
"""

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..data.images import ImageTable
from ..data.tensors import TensorTable
from ..layers.experts import ExpertBank
from ..layers.gates import DSelectKGate
from ..outputs import Routing
from .evaluation import model_inputs

STARVED = 0.05  # of an even share, with every gate
POLARISED = 0.95  # of a gate's weight on one expert
DEAD = 0.5  # of an expert's units
IDENTICAL = 0.999  # cosine of two experts' first layers
ROWS, PICTURES = 1024, 32  # that the routing is read from

Problem = tuple[str, str]  # a key that names it once, and a sentence


class ExpertHealth(TrainerCallback):
    """After each evaluation, on one batch: entropy and utilisation per layer and gate, dead units per expert.

    The numbers go where the trainer reports to (`routing/<layer>/<gate>/entropy`, ...); collapse is a warning, once
    per case, and so are static DSelect-k gates that have not decided when training ends.

    Args:
        table: validation rows or pictures; the first `rows` of them are used.
        report: gets the numbers; by default they are only checked.
        rows: size of the batch; by default 1024, of pictures 32.
    """

    def __init__(
        self,
        table: TensorTable | ImageTable,
        report: Callable[[dict[str, float]], None] | None = None,
        rows: int | None = None,
    ):
        if rows is None:
            rows = PICTURES if isinstance(table, ImageTable) else ROWS
        self.batch, self.report = table[: min(rows, len(table))], report
        self.warned: set[str] = set()

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        routing = read_routing(model, self.batch)
        if self.report is not None:
            decided = {f"routing/{name}/saturated": share for name, share in saturation(model).items()}
            self.report(routing_numbers(routing) | decided)
        for key, message in (*routing_problems(routing), *identical_experts(model)):
            if key not in self.warned:
                self.warned.add(key)
                warnings.warn(f"step {state.global_step}: {message}", stacklevel=2)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        undecided = [name for name, share in saturation(model).items() if share < 1]
        if undecided:
            warnings.warn(
                f"{len(undecided)} of the DSelect-k gates have not decided ({', '.join(undecided[:4])}): a single task "
                "still needs experts that they hardly use; train longer or with a greater entropy_weight",
                stacklevel=2,
            )


def saturation(model: nn.Module) -> dict[str, float]:
    """Share of selector bits that are final, per static DSelect-k gate; 1 once it has chosen its experts for good."""
    gates = ((name, gate) for name, gate in model.named_modules() if isinstance(gate, DSelectKGate))
    return {name: float(gate.saturated()) for name, gate in gates if gate.static}


@torch.no_grad()
def read_routing(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Routing, ...]:
    """Who uses which expert on a batch, in evaluation mode; empty for models without experts."""
    was_training = model.training
    model.eval()
    try:
        return model(**model_inputs(batch, next(model.parameters()).device), output_routing=True).routing or ()
    finally:
        model.train(was_training)


def routing_numbers(routing: Sequence[Routing]) -> dict[str, float]:
    """Scalars for a log."""
    out = {}
    for record in routing:
        shares = record.utilisation()
        for gate, entropy in record.entropy().items():
            where = f"routing/{record.layer}/{gate}"
            out[f"{where}/entropy"] = float(entropy)
            out |= {
                f"{where}/{name}": share
                for name, share in zip(record.experts[gate], shares[gate].tolist(), strict=True)
            }
        out |= {f"routing/{record.layer}/{name}/dead_units": float(share) for name, share in record.dead_units.items()}
    return out


def routing_problems(routing: Sequence[Routing]) -> Iterator[Problem]:
    """Starved experts, polarised gates, dead units. Gates that select by design (weights of 0) are left alone; of a
    sparse layer an expert's share is that of the choices, and a task may keep to few experts."""
    for record in routing:
        layer = record.layer
        shares = {
            g: share_E
            for g, share_E in record.utilisation().items()
            if len(share_E) > 1 and (g in record.indices or not _selects(record.weights[g]))
        }
        received: dict[str, dict[str, float]] = {}
        for gate, share_E in shares.items():
            names = record.experts[gate]
            for name, share in zip(names, share_E.tolist(), strict=True):
                received.setdefault(name, {})[gate] = share
            top = int(share_E.argmax())
            if share_E[top] > POLARISED and gate not in record.indices:
                yield (
                    f"polarised {layer} {gate}",
                    f"the gate of {gate!r} in layer {layer!r} gives {share_E[top]:.1%} of its weight to "
                    f"{names[top]!r}, one of {len(names)} experts: it no longer mixes; raise "
                    "gate_dropout, lower the learning rate, or use fewer experts",
                )
        for name, by_gate in received.items():
            if all(share * len(record.experts[gate]) < STARVED for gate, share in by_gate.items()):
                parts = ", ".join(f"{share:.2%} of {gate!r}" for gate, share in by_gate.items())
                raised = "the weight of the balance loss" if record.indices else "gate_dropout"
                yield (
                    f"starved {layer} {name}",
                    f"expert {name!r} of layer {layer!r} receives {parts}: nothing trains it any more; raise "
                    f"{raised}, lower the learning rate, or use fewer experts",
                )
        for name, share in record.dead_units.items():
            if share > DEAD:
                yield (
                    f"dead {layer} {name}",
                    f"{float(share):.0%} of the units of expert {name!r} in layer {layer!r} are 0 for every row of the "
                    "batch: lower the learning rate, or use the activation silu",
                )


def identical_experts(model: nn.Module) -> Iterator[Problem]:
    """Experts of one bank whose first layers have become the same."""
    for place, bank in model.named_modules():
        if not isinstance(bank, ExpertBank) or bank.num_experts < 2:
            continue
        weight_EF = bank.weights[0].detach().flatten(1).float()
        weight_EF = weight_EF / weight_EF.norm(dim=1, keepdim=True).clamp_min(1e-12)
        twins = torch.triu(weight_EF @ weight_EF.T > IDENTICAL, diagonal=1).nonzero().tolist()
        for first, second in twins:
            yield (
                f"identical {place} {first} {second}",
                f"experts {first} and {second} of {place!r} have the same weights: they were initialised alike or "
                "received the same gradients; start from another seed, or raise gate_dropout",
            )


def _selects(weights_BE: Tensor) -> bool:
    return bool((weights_BE == 0).any())


class Progress(TrainerCallback):
    """A bar over the steps with each task's loss and the last validation metrics, on a terminal only."""

    def __init__(self, stream: Any = None):
        self.stream = sys.stderr if stream is None else stream
        self.bar: Any = None
        self.losses: dict[str, str] = {}
        self.scores: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            file=self.stream,
            disable=not self.stream.isatty(),
            leave=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        losses = {key.removeprefix("loss/"): f"{value:.4f}" for key, value in logs.items() if key.startswith("loss/")}
        scores = {key.removeprefix("eval_mean_"): value for key, value in logs.items() if key.startswith("eval_mean_")}
        self.losses = losses or self.losses
        self.scores = {key: f"{value:.4f}" for key, value in scores.items() if math.isfinite(value)} or self.scores
        if self.bar is not None:
            self.bar.set_postfix(self.losses | self.scores, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
