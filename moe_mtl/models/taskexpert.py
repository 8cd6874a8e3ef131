"""TaskExpert: a dense backbone, and a decoder whose experts take features apart for all tasks at once.

Ye and Xu, "TaskExpert: Dynamically Assembling Multi-Task Representations with Memorial Mixture-of-Experts", ICCV 2023,
section 3. At a few layers `N` expert networks decompose the backbone's feature; each task's gates, one set of weights
per patch, assemble it again from the experts and from the task's feature memory, which then takes the result up. Heads
read the memory after the last layer. Experts are dense: every task needs all of them, but no other task's gates,
memory, or head.

The official code was never released. Ours are: experts of one 3 x 3 convolution with GELU; gates that are linear in the
projected feature; memories that start as a linear map of the first layer's feature; layers in equal steps; and the
heads, those of `layers/heads.py`.
"""

from huggingface_hub.dataclasses import strict
from torch import nn

from ..layers.feature_memory import MemoryDecoder
from ._base import register
from ._tabular import check_count
from ._vision import VisionConfig, VisionModel


@strict
class TaskExpertConfig(VisionConfig):
    """Fields of TaskExpert beyond those of every model for images.

    Args:
        num_experts: `N`, of each level.
        num_levels: at how many layers the decoder reads the backbone.
    """

    model_type = "taskexpert"

    num_experts: int = 5
    num_levels: int = 4

    def validate_decoder(self) -> None:
        check_count("num_experts", self.num_experts)
        check_count("num_levels", self.num_levels, self.num_hidden_layers)


@register
class TaskExpertForMultiTask(VisionModel):
    """TaskExpert for several tasks on one image."""

    config: TaskExpertConfig
    config_class = TaskExpertConfig

    def build_decoder(self) -> nn.Module:
        c = self.config
        levels = c.levels(c.num_levels)
        return MemoryDecoder(
            levels, c.hidden_size, c.decoder_dim, c.num_experts, c.task_names, c.grid, c.layer_norm_eps
        )
