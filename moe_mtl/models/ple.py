"""PLE and CGC: experts of each task beside shared ones, extracted level by level.

Tang et al., "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for Personalized
Recommendations", RecSys 2020, sections 4.1 (CGC) and 4.2 (PLE). CGC is PLE with one level.

Differs from the official code in: there is none. Others' PLE mixes only shared experts in the shared gate (FuxiCTR), or
has no shared stream (LibMTL); the paper's shared gate sees all experts of its level, and the last level has none.

Shapes: `B` rows, `D` width of the encoded row, `H` expert output width.
"""

from collections.abc import Sequence
from dataclasses import field

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..layers.cgc import CGCLevel, JoinedCGCLevel
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


@strict
class PLEConfig(TabularConfig):
    """Fields of PLE beyond those of every tabular model.

    Args:
        num_levels: levels of extraction.
        num_specific_experts: of each task, at each level.
        num_shared_experts: at each level.
        expert_dims: widths of an expert's layers, the same at each level.
        gate_dropout: of the softmax gates.
        expert_groups: tasks whose experts the levels below the last hold; all tasks, unless `extract_task` wrote it.
    """

    model_type = "ple"
    num_levels: int = 2
    num_specific_experts: int = 3
    num_shared_experts: int = 2
    expert_dims: list[int] = field(default_factory=lambda: [64])
    gate_dropout: float | int = 0.0
    expert_groups: list[str] | None = None

    def validate_levels(self) -> None:
        check_count("num_levels", self.num_levels, 64)
        check_count("num_specific_experts", self.num_specific_experts)
        check_count("num_shared_experts", self.num_shared_experts)
        check_dims("expert_dims", self.expert_dims)
        check_probability("gate_dropout", self.gate_dropout)
        if self.expert_groups is not None:
            check_groups("expert_groups", self.expert_groups, self.tower_tasks)

    @property
    def groups(self) -> list[str]:
        return self.expert_groups or self.tower_tasks

    @property
    def num_hidden_layers(self) -> int:
        return self.num_levels

    def keep_tasks(self, config: "PLEConfig", read: Reader | None) -> None:
        """Below the last level the shared gates read every task's experts, so those stay."""
        config.expert_groups = self.groups if self.num_levels > 1 and self.groups != config.tower_tasks else None

    def outputs_of(self, level: int, tasks: Sequence[str]) -> list[str]:
        """What a level must mix so that the last one can answer `tasks`: gates, in order."""
        if level == self.num_levels - 1:
            return list(tasks)
        if level == self.num_levels - 2:
            return [*tasks, SHARED]
        return [*self.groups, SHARED]


class PLETrunk(nn.Module):
    """Levels of CGC. A single task needs two groups of experts at the last level and every group below it."""

    def __init__(self, config: PLEConfig, input_dim: int):
        super().__init__()
        self.outputs_of, self.groups = config.outputs_of, config.groups if config.num_levels > 1 else config.tower_tasks
        last = config.num_levels - 1
        dims = [input_dim] + [config.expert_dims[-1]] * last
        self.levels = nn.ModuleList(
            CGCLevel(
                name=f"levels.{level}",
                input_dim=dims[level],
                groups=config.tower_tasks if level == last else config.groups,
                outputs=config.outputs_of(level, config.tower_tasks),
                num_specific=config.num_specific_experts,
                num_shared=config.num_shared_experts,
                dims=config.expert_dims,
                activation=config.activation,
                dropout=config.dropout,
                gate_dropout=config.gate_dropout,
            )
            for level in range(config.num_levels)
        )
        self.output_dim = config.expert_dims[-1]

    def forward(self, x_BD: Tensor, tasks: Sequence[str], record: bool) -> TrunkOutput:
        streams = dict.fromkeys((*self.groups, SHARED), x_BD)
        hidden, routing = [], []
        for number, level in enumerate(self.levels):
            streams, seen = level(streams, self.outputs_of(number, tasks), record)
            if number < len(self.levels) - 1:
                hidden.append(torch.stack(list(streams.values()), dim=1))
            if seen is not None:
                routing.append(seen)
        return TrunkOutput(streams, tuple(hidden), tuple(routing))


@register
class PLEForMultiTask(TabularModel):
    """PLE for tables."""

    config: PLEConfig
    config_class = PLEConfig

    def build_trunk(self, input_dim: int) -> nn.Module:
        return PLETrunk(self.config, input_dim)

    def join_trunk(self) -> list[Joined]:
        return [JoinedCGCLevel(level, one_input=number == 0) for number, level in enumerate(self.trunk.levels)]


@strict
class CGCConfig(PLEConfig):
    """PLE with one level."""

    model_type = "cgc"
    num_levels: int = 1

    def validate_one_level(self) -> None:
        if self.num_levels != 1:
            raise ValueError(f"num_levels of CGC must be 1, found {self.num_levels}; PLE takes more")


@register
class CGCForMultiTask(PLEForMultiTask):
    """CGC for tables."""

    config: CGCConfig
    config_class = CGCConfig
