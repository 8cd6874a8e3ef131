"""One level of Customized Gate Control, the brick of PLE.

Shapes: `B` rows, `D` input width, `E` experts, `H` expert output width, `G` groups of specific experts, `S` specific
experts of a group, `O` width of their hidden layers, `T` tasks that are mixed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import Routing
from ..tasks import SHARED
from .experts import ExpertBank, mix, mix_groups, routing_of
from .gates import SoftmaxGate, gate_weights
from .joined import Joined


class CGCLevel(nn.Module):
    """Experts of each task and shared ones; each task's gate sees its own and the shared (Tang et al., RecSys 2020).

    Args:
        name: for the routing record.
        input_dim: `D`.
        groups: tasks whose specific experts live here.
        outputs: what is mixed here: task names, and `shared` for the shared gate, which sees the experts of every task
            and the shared ones (section 4.2). A level without the shared gate is the last one.
        num_specific: experts of each task.
        num_shared: shared experts.
        dims, activation, dropout: of the experts.
        gate_dropout: of the gates.
    """

    def __init__(
        self,
        name: str,
        input_dim: int,
        groups: Sequence[str],
        outputs: Sequence[str],
        num_specific: int,
        num_shared: int,
        dims: Sequence[int],
        activation: str,
        dropout: float,
        gate_dropout: float,
    ):
        super().__init__()
        self.name, self.groups, self.output_dim = name, tuple(groups), dims[-1]
        self.sees = {output: self.seen_by(output) for output in outputs}
        sizes = dict.fromkeys(groups, num_specific) | {SHARED: num_shared}
        self.experts = nn.ModuleDict(
            {group: ExpertBank(size, input_dim, dims, activation, dropout) for group, size in sizes.items()}
        )
        self.gates = nn.ModuleDict(
            {
                output: SoftmaxGate(input_dim, sum(sizes[group] for group in seen), gate_dropout)
                for output, seen in self.sees.items()
            }
        )

    def seen_by(self, output: str) -> tuple[str, ...]:
        """Whose experts a gate mixes, in the order of its weights."""
        return (*self.groups, SHARED) if output == SHARED else (output, SHARED)

    def forward(
        self, inputs: dict[str, Tensor], outputs: Sequence[str], record: bool
    ) -> tuple[dict[str, Tensor], Routing | None]:
        """Mixes what is asked for, computing only the experts that takes.

        Args:
            inputs: per task and for `shared`: `[B, D]`, what that stream's experts and gate read.
            outputs: which gates to run.
            record: whether to return the routing.

        Returns:
            Per output `[B, H]`, and the routing or None.
        """
        sees = {output: self.sees[output] for output in outputs}
        seen = {group for groups in sees.values() for group in groups}
        groups = [group for group in (*self.groups, SHARED) if group in seen]
        hidden = {group: self.experts[group](inputs[group]) for group in groups}
        weights = {output: self.gates[output](inputs[output])[0] for output in outputs}
        mixed = mix_groups(weights, sees, hidden, together=self.training)
        return mixed, routing_of(self.name, weights, sees, hidden) if record else None


class JoinedCGCLevel(Joined):
    """All experts and gates of a level, in products that serve every group. For evaluation without gradients.

    Args:
        level: whose parameters it joins.
        one_input: whether all streams are the same, as in the first level.
    """

    def __init__(self, level: CGCLevel, one_input: bool):
        super().__init__()
        banks: list[Any] = [level.experts[group] for group in (*level.groups, SHARED)]
        gates: list[Any] = [level.gates[output] for output in level.sees]
        if {type(bank) for bank in banks} != {ExpertBank} or {type(gate) for gate in gates} != {SoftmaxGate}:
            raise ValueError("cannot fold experts or gates of a model's own: expected ExpertBank and SoftmaxGate")
        own, self.shared = banks[0], banks[-1]
        self.num_groups, self.num_specific, self.activation = len(level.groups), own.num_experts, own.activation
        layers = [str(layer) for layer in range(len(own.dims))]
        weights = [self.lay([bank.weights for bank in banks], layer) for layer in layers]
        biases = [self.lay([bank.biases for bank in banks], layer) for layer in layers]
        self.everyone = None
        if one_input:
            with torch.device("meta"):
                self.everyone = ExpertBank(len(weights[0]), own.input_dim, own.dims)
            self.everyone.activation = own.activation
            for layer, (weight_EOI, bias_EO) in enumerate(zip(weights, biases, strict=True)):
                self.everyone.weights[layer] = nn.Parameter(weight_EOI, requires_grad=False)
                self.everyone.biases[layer] = nn.Parameter(bias_EO, requires_grad=False)
        groups = (self.num_groups, self.num_specific)
        specific = self.num_groups * self.num_specific
        self.weights = [weight_EOI[:specific].unflatten(0, groups) for weight_EOI in weights]
        self.biases = [bias_EO[:specific].unflatten(0, groups) for bias_EO in biases]

        tasks = [output for output in level.sees if output != SHARED]
        self.group_of = [level.groups.index(task) for task in tasks]
        self.num_seen = self.num_specific + self.shared.num_experts
        weights_of_gates = self.lay([gate.linear for gate in gates], "weight")
        self.task_gates, self.shared_gate = weights_of_gates.tensor_split([len(tasks) * self.num_seen])

    def __call__(self, x: Tensor) -> Tensor:
        """Streams to mixtures: `[B, D]` that all share, or `[G + 1, B, D]`, `-> [T, B, H]`, or `[T + 1, B, H]` with the
        shared gate's last."""
        if self.everyone is not None:
            hidden_EBH = self.everyone(x)
            specific_GSBH = hidden_EBH[: -self.shared.num_experts].unflatten(0, (self.num_groups, self.num_specific))
            specific, shared = list(specific_GSBH.unbind(1)), hidden_EBH[-self.shared.num_experts :]
            logits_TBE = F.linear(x, self.task_gates).view(len(x), -1, self.num_seen).transpose(0, 1)
            own, everyone = x, [hidden_EBH]
        else:
            own = x[-1]
            specific, shared = self._specific(x[:-1]), self.shared(own)
            gates_TED = self.task_gates.view(-1, self.num_seen, x.shape[-1])
            logits_TBE = torch.bmm(self._of_tasks(x[:-1]), gates_TED.transpose(1, 2))
            everyone = [torch.stack(specific, dim=1).flatten(0, 1), shared]
        weights_TBE = gate_weights(logits_TBE).to(x.dtype)
        hidden = [*(self._of_tasks(hidden_GBH) for hidden_GBH in specific), *shared]
        mixed_TBH = hidden[0] * weights_TBE[..., :1]
        for expert, hidden_TBH in enumerate(hidden[1:], start=1):
            mixed_TBH = mixed_TBH.addcmul_(hidden_TBH, weights_TBE[..., expert : expert + 1])
        mixed_TBH = mixed_TBH.to(shared[0].dtype)
        if not len(self.shared_gate):
            return mixed_TBH
        weights_BE = gate_weights(F.linear(own, self.shared_gate)).to(x.dtype)
        return torch.cat([mixed_TBH, mix(weights_BE, everyone).unsqueeze(0)])

    def _specific(self, x_GBD: Tensor) -> list[Tensor]:
        """Every group's experts on its own stream: `S` tensors `[G, B, H]`."""
        (weight_GSOI, *weights), (bias_GSO, *biases) = self.weights, self.biases
        hidden_GBO = torch.bmm(x_GBD, weight_GSOI.flatten(1, 2).transpose(1, 2)).add_(bias_GSO.flatten(1).unsqueeze(1))
        found = list(self.activation(hidden_GBO).chunk(self.num_specific, dim=-1))
        for weight_GSOI, bias_GSO in zip(weights, biases, strict=True):
            for expert, hidden_GBI in enumerate(found):
                product_GBO = torch.bmm(hidden_GBI, weight_GSOI[:, expert].transpose(1, 2))
                found[expert] = self.activation(product_GBO.add_(bias_GSO[:, expert].unsqueeze(1)))
        return found

    def _of_tasks(self, of_groups: Tensor) -> Tensor:
        """`[G, ...] -> [T, ...]`: the groups of the tasks that are mixed."""
        return of_groups if self.group_of == list(range(self.num_groups)) else of_groups[self.group_of]
