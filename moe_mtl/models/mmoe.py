"""MMoE and OMoE: experts that all tasks share, mixed by one gate per task, or by one gate for all.

Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018, section 4,
equations 5 to 7. Any gate of `layers/gates.py` fits: the paper's softmax, with optional dropout, or DSelect-k.

Differs from the official code in: keras-mmoe's gates have a bias; the paper's and ours have none.

Shapes: `B` rows, `D` width of the encoded row, `E` experts, `H` expert output width, `T` tasks.
"""

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..layers.experts import ExpertBank, dead_units, expert_names, mix_chosen, mix_groups
from ..layers.gates import DSelectKGate, SoftmaxGate, gate_weights
from ..layers.joined import Joined
from ..outputs import Routing
from ..tasks import SHARED
from ._base import MultiTaskConfig, Reader, register
from ._tabular import MAX_COUNT, TabularConfig, TabularModel, TrunkOutput, check_count, check_dims, check_probability

GATES = ("softmax", "dselect_k")


@strict
class MMoEConfig(TabularConfig):
    """Fields of MMoE beyond those of every tabular model.

    Args:
        num_experts: `E`.
        expert_dims: widths of an expert's layers; the last is `H`.
        gate: `softmax` or `dselect_k`.
        gate_dropout: of the softmax gate.
        num_selected, gate_gamma, gate_static, entropy_weight, entropy_warmup_steps: of the DSelect-k gate.
        experts_kept: which of the `num_experts` are stored; the others are never chosen. Written by `extract_task`.
    """

    model_type = "mmoe"
    num_experts: int = 8
    expert_dims: list[int] = field(default_factory=lambda: [64])
    gate: str = "softmax"
    gate_dropout: float | int = 0.0
    num_selected: int = 2
    gate_gamma: float | int = 1.0
    gate_static: bool = True
    entropy_weight: float | int = 1e-6
    entropy_warmup_steps: int = 0
    experts_kept: list[int] | None = None

    def validate_experts(self) -> None:
        check_count("num_experts", self.num_experts)
        check_dims("expert_dims", self.expert_dims)
        if self.experts_kept is not None:
            kept = self.experts_kept
            if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.num_experts:
                raise ValueError(f"experts_kept must be increasing numbers below {self.num_experts}, found {kept}")
            if self.gate != "dselect_k" or not self.gate_static:
                raise ValueError("experts_kept: only a static DSelect-k gate lets experts be left out")

    def validate_gate(self) -> None:
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, found {self.gate!r}")
        check_probability("gate_dropout", self.gate_dropout)
        # Of a softmax gate it means nothing, and its default must not forbid a single expert.
        check_count("num_selected", self.num_selected, self.num_experts if self.gate == "dselect_k" else MAX_COUNT)
        check_count("entropy_warmup_steps", self.entropy_warmup_steps, 2**40, lowest=0)
        if not 0 < self.gate_gamma < 1e6:
            raise ValueError(f"gate_gamma must be positive, found {self.gate_gamma!r}")
        if not 0 <= self.entropy_weight < 1e6:
            raise ValueError(f"entropy_weight must be non-negative, found {self.entropy_weight!r}")

    def gate_names(self) -> list[str]:
        return self.tower_tasks

    def build_gate(self, input_dim: int) -> nn.Module:
        if self.gate == "softmax":
            return SoftmaxGate(input_dim, self.num_experts, self.gate_dropout)
        return DSelectKGate(
            input_dim,
            self.num_experts,
            self.num_selected,
            self.gate_gamma,
            self.gate_static,
            self.entropy_weight,
            self.entropy_warmup_steps,
        )

    def keep_tasks(self, config: "MMoEConfig", read: Reader | None) -> None:
        """A static DSelect-k gate names its experts; the rest have a weight of exactly 0 and are left out."""
        if self.gate != "dselect_k" or not self.gate_static or read is None:
            return
        used = set()
        for name in config.gate_names():
            gate: Any = self.build_gate(1)
            gate.bits.data = read(f"trunk.gates.{name}.bits").detach().double().cpu()
            gate.mixture.data = read(f"trunk.gates.{name}.mixture").detach().double().cpu()
            selectors_1SE, _ = gate.selectors(None)
            used |= set(selectors_1SE[0].sum(0).nonzero().flatten().tolist())
        stored = range(self.num_experts) if self.experts_kept is None else self.experts_kept
        # Gates that sit on codes without an expert use none; a bank holds at least one.
        kept = [expert for expert in stored if expert in used] or [stored[0]]
        config.experts_kept = None if len(kept) == self.num_experts else kept


class MMoETrunk(nn.Module):
    """`f_k(x) = sum_i g_k(x)_i f_i(x)`. A single task needs its own gate and, unless a static DSelect-k gate says
    otherwise, every expert."""

    def __init__(self, config: MMoEConfig, input_dim: int):
        super().__init__()
        self.kept = config.experts_kept
        self.static = config.gate == "dselect_k" and config.gate_static
        stored = config.num_experts if self.kept is None else len(self.kept)
        self.experts = ExpertBank(stored, input_dim, config.expert_dims, config.activation, config.dropout)
        self.gates = nn.ModuleDict({name: config.build_gate(input_dim) for name in config.gate_names()})
        self.output_dim = self.experts.output_dim

    def forward(self, x_BD: Tensor, tasks: Sequence[str], record: bool) -> TrunkOutput:
        hidden_EBH = self.experts(x_BD)
        gate_of = {task: task if task in self.gates else SHARED for task in tasks}
        weights, auxiliary = {}, None
        for gate in dict.fromkeys(gate_of.values()):
            weights_BE, loss = self.gates[gate](x_BD)
            if self.kept is not None:
                weights_BE = weights_BE[:, self.kept]
            weights[gate] = weights_BE
            if loss is not None:
                auxiliary = loss if auxiliary is None else auxiliary + loss
        sees = dict.fromkeys(weights, ("experts",))
        if self.static and not self.training and not torch.compiler.is_compiling():
            mixed = {gate: mix_chosen(weights_BE, hidden_EBH) for gate, weights_BE in weights.items()}
        else:
            mixed = mix_groups(weights, sees, {"experts": hidden_EBH}, together=self.training)
        routing: tuple[Routing, ...] = ()
        if record:
            names = expert_names("experts", len(hidden_EBH))
            if self.kept is not None:
                names = tuple(f"experts.{i}" for i in self.kept)
            routing = (Routing("experts", weights, dict.fromkeys(weights, names), dead_units(hidden_EBH, names)),)
        return TrunkOutput({task: mixed[gate_of[task]] for task in tasks}, (), routing, auxiliary)


class JoinedMMoE(Joined):
    """Experts, and the softmax gates of all tasks in one product. For evaluation without gradients."""

    def __init__(self, trunk: MMoETrunk):
        super().__init__()
        self.experts, self.num_gates = trunk.experts, len(trunk.gates)
        if {type(gate) for gate in trunk.gates.values()} != {SoftmaxGate}:
            raise ValueError("cannot fold a model with gates of its own: expected SoftmaxGate")
        self.gates = self.lay([gate.linear for gate in trunk.gates.values()], "weight")

    def __call__(self, x_BD: Tensor) -> Tensor:
        """`[B, D] -> [T, B, H]`."""
        weights_BTE = gate_weights(F.linear(x_BD, self.gates).view(len(x_BD), self.num_gates, -1)).to(x_BD.dtype)
        return torch.bmm(weights_BTE, self.experts(x_BD).transpose(0, 1)).transpose(0, 1)


@register
class MMoEForMultiTask(TabularModel):
    """MMoE for tables."""

    config: MMoEConfig
    config_class = MMoEConfig

    def build_trunk(self, input_dim: int) -> nn.Module:
        return MMoETrunk(self.config, input_dim)

    def join_trunk(self) -> list[Joined]:
        of_tasks = self.config.gate == "softmax" and self.config.gate_names() == self.config.tower_tasks
        return [JoinedMMoE(self.trunk)] if of_tasks else []

    def rows_kept(self, config: MultiTaskConfig, name: str) -> list[int] | None:
        assert isinstance(config, MMoEConfig)
        if config.experts_kept == self.config.experts_kept or not name.startswith("trunk.experts."):
            return None
        stored = self.config.experts_kept or list(range(self.config.num_experts))
        return [stored.index(expert) for expert in config.experts_kept or range(config.num_experts)]


@strict
class OMoEConfig(MMoEConfig):
    """MMoE with one gate for all tasks (section 4.1)."""

    model_type = "omoe"

    def gate_names(self) -> list[str]:
        return [SHARED]


@register
class OMoEForMultiTask(MMoEForMultiTask):
    """OMoE for tables."""

    config: OMoEConfig
    config_class = OMoEConfig
