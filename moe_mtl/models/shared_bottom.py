"""Shared bottom: one network for all tasks, one tower each. With one task, the single-task baseline.

Caruana, "Multitask Learning", Machine Learning 28, 1997; the baseline of Ma et al., KDD 2018, figure 1(a).
"""

from collections.abc import Sequence
from dataclasses import field

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..layers.experts import ExpertBank
from ._base import register
from ._tabular import TabularConfig, TabularModel, TrunkOutput, check_dims


@strict
class SharedBottomConfig(TabularConfig):
    """Fields of the shared bottom beyond those of every tabular model.

    Args:
        bottom_dims: widths of the layers that all tasks share.
    """

    model_type = "shared_bottom"
    bottom_dims: list[int] = field(default_factory=lambda: [512])

    def validate_bottom(self) -> None:
        check_dims("bottom_dims", self.bottom_dims)


class SharedBottomTrunk(nn.Module):
    """The bottom: every task reads its output. A single task saves the other towers only.

    It is a bank of one expert, so that a comparison with models of many is one of architectures, not of how their
    layers start.
    """

    def __init__(self, config: SharedBottomConfig, input_dim: int):
        super().__init__()
        self.bottom = ExpertBank(1, input_dim, config.bottom_dims, config.activation, config.dropout)
        self.output_dim = self.bottom.output_dim

    def forward(self, x_BD: Tensor, tasks: Sequence[str], record: bool) -> TrunkOutput:
        (bottom_BH,) = self.bottom(x_BD)
        return TrunkOutput(dict.fromkeys(tasks, bottom_BH))


@register
class SharedBottomForMultiTask(TabularModel):
    """Shared bottom for tables."""

    config: SharedBottomConfig
    config_class = SharedBottomConfig

    def build_trunk(self, input_dim: int) -> nn.Module:
        return SharedBottomTrunk(self.config, input_dim)
