"""HoME: a hierarchy of gated experts, after a layer that tells groups of tasks apart.

Wang et al., "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou", 2024, arXiv 2408.05430. The
body of the paper was not at hand: the equations are those two readers agreed on, and `layers/home.py` says where a
reading was chosen. The paper's numbers are on private data.

    z_g = sum Gate_g(v) {group_g, shared} + sum SelfGate_g(v) group_g           meta layer, per group of tasks
    z_s = sum Gate_s(v) {shared, every group} + sum SelfGate_s(v) shared
    y_k = sum Gate_k(z_g, z_s) {own_k(z_g), local_g(z_g), global(z_s)} + sum SelfGate_k(z_g) own_k(z_g)

with every expert Swish(BN(MLP(FeatureGate(input)))) and one feature gate per group of experts.

Differs from the official code in: there is none. A third-party one feeds the feature gate instead of the gated input
to the experts, and keeps a ReLU before the batch norm.

Shapes: `B` rows, `D` width of the encoded row, `H` expert output width.
"""

import copy
from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..layers.home import HoMELayer, fold_batch_norms
from ..layers.joined import Joined
from ..tasks import SHARED
from ._base import Reader, register
from ._tabular import (
    TabularConfig,
    TabularModel,
    TrunkOutput,
    check_count,
    check_dims,
    check_groups,
    check_probability,
)

GLOBAL = "globals"  # `global` is a keyword, which no exported program could name


@strict
class HoMEConfig(TabularConfig):
    """Fields of HoME beyond those of every tabular model.

    Args:
        num_experts: of each group of experts, in both layers.
        expert_dims: widths of an expert's layers.
        feature_gate_rank: `R` of each low-rank gate.
        num_feature_gates: low-rank gates that a feature gate sums.
        gate_dropout: of the softmax gates.
        batch_norm: False once folded into the experts, see `fold_for_inference`.
        meta_groups: groups of tasks that the meta layer tells apart; the tasks' groups, unless `extract_task` wrote it.

    A task without a group is a group of its own.
    """

    model_type = "home"
    num_experts: int = 2
    expert_dims: list[int] = field(default_factory=lambda: [64])
    feature_gate_rank: int = 8
    num_feature_gates: int = 2
    gate_dropout: float | int = 0.0
    batch_norm: bool = True
    meta_groups: list[str] | None = None
    activation: str = "silu"

    def validate_layers(self) -> None:
        for name in ("num_experts", "feature_gate_rank", "num_feature_gates"):
            check_count(name, getattr(self, name))
        check_dims("expert_dims", self.expert_dims)
        check_probability("gate_dropout", self.gate_dropout)
        if self.meta_groups is not None:
            check_groups("meta_groups", self.meta_groups, self.group_of.values())
        for group in self.groups:
            if not group.isidentifier() or group in (SHARED, GLOBAL):
                raise ValueError(
                    f"group must be letters, digits and '_', other than '{SHARED}' and '{GLOBAL}'; found {group!r}"
                )
        experts = [*self.group_of, *(f"{group}_local" for group in self.groups), GLOBAL]
        for name in experts:
            if experts.count(name) > 1:
                raise ValueError(
                    f"HoME's task layer has a group of experts per task, '<group>_local' per group, and '{GLOBAL}': "
                    f"{name!r} is taken twice; rename the task"
                )
        named = {task.group for task in self.parsed_tasks}
        for task in self.parsed_tasks:
            if task.group is None and task.product_of is None and task.name in named:
                raise ValueError(
                    f"task {task.name!r} has no group, so it is a group of its own, which must not be called like "
                    f"the group of another task: expected a group for {task.name!r} or another name for that group"
                )

    @property
    def group_of(self) -> dict[str, str]:
        """Task -> its group, for tasks with a tower."""
        return {task.name: task.group or task.name for task in self.parsed_tasks if task.product_of is None}

    @property
    def groups(self) -> list[str]:
        return self.meta_groups or list(dict.fromkeys(self.group_of.values()))

    @property
    def num_hidden_layers(self) -> int:
        return 2

    def keep_tasks(self, config: "HoMEConfig", read: Reader | None) -> None:
        """The shared gate of the meta layer reads every group's experts, so those stay."""
        kept = list(dict.fromkeys(config.group_of.values()))
        config.meta_groups = None if kept == self.groups else self.groups


class HoMETrunk(nn.Module):
    """Meta layer, then task layer.

    A single task needs the whole meta layer but for other groups' gates, and of the task layer its own, its group's and
    the global experts.
    """

    def __init__(self, config: HoMEConfig, input_dim: int):
        super().__init__()
        self.group_of = config.group_of
        width = config.expert_dims[-1]
        kept = list(dict.fromkeys(self.group_of.values()))
        meta = [*config.groups, SHARED]
        options: dict[str, Any] = {
            "dims": config.expert_dims,
            "rank": config.feature_gate_rank,
            "num_gates": config.num_feature_gates,
            "dropout": config.dropout,
            "gate_dropout": config.gate_dropout,
            "batch_norm": config.batch_norm,
        }
        self.meta = HoMELayer(
            "meta",
            input_dims=dict.fromkeys(meta, input_dim),
            num_experts=dict.fromkeys(meta, config.num_experts),
            sees={group: (group, SHARED) for group in kept} | {SHARED: (SHARED, *config.groups)},
            gate_dim=input_dim,
            self_gate_dim=input_dim,
            **options,
        )
        experts = [*self.group_of, *(f"{group}_local" for group in kept), GLOBAL]
        self.task = HoMELayer(
            "task",
            input_dims=dict.fromkeys(experts, width),
            num_experts=dict.fromkeys(experts, config.num_experts),
            sees={task: (task, f"{group}_local", GLOBAL) for task, group in self.group_of.items()},
            gate_dim=2 * width,
            self_gate_dim=width,
            **options,
        )
        self.output_dim = width

    def forward(self, x_BD: Tensor, tasks: Sequence[str], record: bool) -> TrunkOutput:
        if self.training and len(x_BD) == 1 and any(isinstance(m, nn.BatchNorm1d) for m in self.modules()):
            raise ValueError("HoME normalises over the batch: training needs at least 2 rows in a batch, found 1")
        groups = list(dict.fromkeys(self.group_of[task] for task in tasks))
        meta_outputs = [*groups, SHARED]
        same = dict.fromkeys(self.meta.experts, x_BD)
        z, meta_routing = self.meta(same, same, same, meta_outputs, record)

        inputs = {GLOBAL: z[SHARED]}
        gate_inputs, self_gate_inputs = {}, {}
        for task in tasks:
            group = self.group_of[task]
            inputs[task] = inputs[f"{group}_local"] = self_gate_inputs[task] = z[group]
            gate_inputs[task] = torch.cat([z[group], z[SHARED]], dim=-1)
        states, task_routing = self.task(inputs, gate_inputs, self_gate_inputs, tasks, record)
        hidden = (torch.stack([z[name] for name in meta_outputs], dim=1),)
        routing = tuple(r for r in (meta_routing, task_routing) if r is not None)
        return TrunkOutput(states, hidden, routing)


@register
class HoMEForMultiTask(TabularModel):
    """HoME for tables."""

    config: HoMEConfig
    config_class = HoMEConfig

    def build_trunk(self, input_dim: int) -> nn.Module:
        return HoMETrunk(self.config, input_dim)

    def join_trunk(self) -> list[Joined]:
        """Absorbs the experts' batch norms, in place; training afterwards goes on without them."""
        fold_batch_norms(self)
        self.config = copy.deepcopy(self.config)  # other models may have been built from the same one
        self.config.batch_norm = False
        return []
