"""The parts of HoME: feature gates, self-gates, and its two layers of experts.

Wang et al., "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou", 2024, arXiv 2408.05430,
section 4. The body of the paper was not at hand; where two readings were possible the docstring says which was taken.

Shapes: `B` rows, `D` input width, `R` rank, `L` low-rank gates of a feature gate, `E` experts, `H` expert output width.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..outputs import Routing
from .experts import ExpertBank, mix_groups, routing_of
from .gates import SoftmaxGate


class FeatureGate(nn.Module):
    """Scales each input feature for one group of experts: `v * sum_l softmax(v W)_l * 2 sigmoid(v B_l A_l)`.

    `B` starts at 0, so the gate starts at exactly 1. Of two recollections of the paper's refinement (a gated sum of `L`
    low-rank gates, or several concatenated ones) this is the first.

    Differs from the third-party code in: that hands the gate itself, not the gated input, to the experts.
    """

    def __init__(self, dim: int, rank: int, num_gates: int):
        super().__init__()
        self.down_LDR = nn.Parameter(torch.empty(num_gates, dim, rank))
        self.up_LRD = nn.Parameter(torch.empty(num_gates, rank, dim))
        self.mixer = nn.Linear(dim, num_gates, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.down_LDR)
        bound = math.sqrt(3.0 / self.up_LRD.shape[1])
        init.uniform_(self.up_LRD, -bound, bound)

    def forward(self, v_BD: Tensor) -> Tensor:
        """`[B, D] -> [B, D]`."""
        gates_LBD = torch.bmm(v_BD.matmul(self.down_LDR), self.up_LRD).sigmoid()
        mixture_BL = torch.softmax(self.mixer(v_BD), dim=-1)
        return v_BD * torch.einsum("bl,lbd->bd", mixture_BL, gates_LBD) * 2


class SelfGate(nn.Module):
    """Weights of a group's own experts beside the shared mixture: sigmoid for one expert, softmax for more."""

    def __init__(self, dim: int, num_experts: int):
        super().__init__()
        self.linear = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        """`[B, D] -> [B, E]`."""
        logits_BE = self.linear(x_BD)
        return logits_BE.sigmoid() if logits_BE.shape[-1] == 1 else logits_BE.softmax(-1)


class HoMELayer(nn.Module):
    """Named groups of experts, each behind its feature gate; each output mixes some groups, plus its own by self-gate.

    Both layers of HoME are this one with other wiring. Experts are Swish(BN(MLP(x))) with a linear last layer.

    Args:
        name: for the routing record.
        input_dims: group -> width of what its experts read.
        num_experts: group -> `E` of that group.
        sees: output -> groups that its gate mixes, in order; the first is its own, which the self-gate adds again.
        gate_dim: width of what the gates read.
        self_gate_dim: width of what the self-gates read.
        dims: widths of the experts' layers.
        rank, num_gates: of the feature gates.
        batch_norm: False once the batch norms were folded into the experts' last linear layer.
    """

    def __init__(
        self,
        name: str,
        input_dims: Mapping[str, int],
        num_experts: Mapping[str, int],
        sees: Mapping[str, Sequence[str]],
        gate_dim: int,
        self_gate_dim: int,
        dims: Sequence[int],
        rank: int,
        num_gates: int,
        dropout: float,
        gate_dropout: float,
        batch_norm: bool,
    ):
        super().__init__()
        self.name, self.sees, self.output_dim = name, {o: tuple(groups) for o, groups in sees.items()}, dims[-1]
        self.feature_gates = nn.ModuleDict({g: FeatureGate(dim, rank, num_gates) for g, dim in input_dims.items()})
        self.experts = nn.ModuleDict(
            {
                group: ExpertBank(num_experts[group], dim, dims, "silu", dropout, batch_norm)
                for group, dim in input_dims.items()
            }
        )
        self.gates = nn.ModuleDict(
            {o: SoftmaxGate(gate_dim, sum(num_experts[g] for g in groups), gate_dropout) for o, groups in sees.items()}
        )
        self.self_gates = nn.ModuleDict({o: SelfGate(self_gate_dim, num_experts[g[0]]) for o, g in self.sees.items()})

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        gate_inputs: Mapping[str, Tensor],
        self_gate_inputs: Mapping[str, Tensor],
        outputs: Sequence[str],
        record: bool,
    ) -> tuple[dict[str, Tensor], Routing | None]:
        """Inputs per group `[B, D]`, gate inputs per output -> per output `[B, H]`, and the routing or None."""
        groups = [group for group in self.experts if any(group in self.sees[o] for o in outputs)]
        hidden = {group: self.experts[group](self.feature_gates[group](inputs[group])) for group in groups}
        weights = {output: self.gates[output](gate_inputs[output])[0] for output in outputs}
        # The self-gate's weights fall on the first experts that the gate sees: one sum serves both.
        summed = {}
        for output in outputs:
            own_BE = self.self_gates[output](self_gate_inputs[output])
            others = weights[output].shape[1] - own_BE.shape[1]
            summed[output] = weights[output] + F.pad(own_BE, (0, others))
        mixed = mix_groups(summed, self.sees, hidden, together=self.training)
        return mixed, routing_of(self.name, weights, self.sees, hidden) if record else None


def fold_batch_norms(module: nn.Module) -> None:
    """Absorbs the batch norm of every expert bank below `module` into its last linear layer."""
    for bank in module.modules():
        if isinstance(bank, ExpertBank):
            bank.fold_batch_norm()
