"""One level of Customized Gate Control, the brick of PLE.

Shapes: `B` rows, `D` input width, `E` experts, `H` expert output width.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ..outputs import Routing
from ..tasks import SHARED
from .experts import ExpertBank, mix_groups, routing_of
from .gates import SoftmaxGate


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
