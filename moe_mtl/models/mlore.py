"""MLoRE: a dense backbone, and a decoder whose experts are convolutions of low rank that all tasks choose from.

Yang et al., "Multi-Task Dense Prediction via Mixture of Low-Rank Experts", CVPR 2024 (arXiv 2403.17749), section 3. At
a few layers each task's feature goes through a 3 x 3 convolution that all tasks share, through a path of low rank of
its own, and through the experts that its gate chose for the image: 9 of 15, of ranks 16 to 128.

All paths are linear. `fold_for_inference` merges the shared path, the task's own and its batch norm ahead of time.
Which experts join depends on the image: their kernels are added up when it is known, to one convolution per image and
task.

Differs from the official code in: only the chosen experts are computed, where the code computes all and masks; folding
merges what each image chose. Ours are: the gate, linear in the mean of a feature; levels in equal steps, each reading
what the one before gave; GELU; and the heads, those of `layers/heads.py`.
"""

import copy
from dataclasses import field
from typing import Self

from huggingface_hub.dataclasses import strict
from torch import nn

from ..layers.low_rank_experts import LowRankDecoder, LowRankMixture
from ._base import register
from ._tabular import MAX_WIDTH, check_count
from ._vision import VisionConfig, VisionModel


@strict
class MLoREConfig(VisionConfig):
    """Fields of MLoRE beyond those of every model for images.

    Args:
        num_levels: at how many layers the decoder reads the backbone.
        expert_ranks: of each expert of a level; the paper's are 16, 24, ..., 128.
        num_selected: experts that a task chooses for an image, 9 in the paper.
        task_rank: of a task's own path, 72 in the paper.
        balance_weight: of the balance loss, 3e-4 in the paper.
        latency_aware: whether that makes even what experts cost, which is as their ranks, so that those of low rank get
            more images (You et al., "ShiftAddViT", NeurIPS 2023); else how many images they get, as in the paper.
        folded: True once `fold_for_inference` merged what is linear.
    """

    model_type = "mlore"

    num_levels: int = 4
    expert_ranks: list[int] = field(default_factory=lambda: list(range(16, 129, 8)))
    num_selected: int = 9
    task_rank: int = 72
    balance_weight: float | int = 3e-4
    latency_aware: bool = False
    folded: bool = False

    def validate_decoder(self) -> None:
        check_count("num_levels", self.num_levels, self.num_hidden_layers)
        check_count("the number of expert_ranks", len(self.expert_ranks))
        for rank in self.expert_ranks:
            check_count("expert_ranks", rank, MAX_WIDTH)
        check_count("num_selected", self.num_selected, len(self.expert_ranks))
        check_count("task_rank", self.task_rank, MAX_WIDTH)
        if not 0 <= self.balance_weight < 1e6:
            raise ValueError(f"balance_weight must be in [0, 1e6), found {self.balance_weight!r}")
        if self.latency_aware and not self.balance_weight:
            raise ValueError("latency_aware: expected a balance_weight above 0 for it to tell, found 0")


@register
class MLoREForMultiTask(VisionModel):
    """MLoRE for several tasks on one image."""

    config: MLoREConfig
    config_class = MLoREConfig

    def build_decoder(self) -> nn.Module:
        c = self.config
        return LowRankDecoder(
            c.levels(c.num_levels),
            c.hidden_size,
            c.decoder_dim,
            c.grid,
            c.layer_norm_eps,
            ranks=c.expert_ranks,
            num_selected=c.num_selected,
            task_rank=c.task_rank,
            tasks=c.task_names,
            balance_weight=c.balance_weight,
            latency_aware=c.latency_aware,
            folded=c.folded,
        )

    def fold_for_inference(self) -> Self:
        """Merges each level's shared path, task path and batch norm into one convolution per task, in place; outputs
        in evaluation mode stay the same to rounding.

        A model of many tasks grows by it. Training afterwards goes on without the norms.
        """
        for module in self.modules():
            if isinstance(module, LowRankMixture):
                module.fold()
        self.config = copy.deepcopy(self.config)  # other models may have been built from the same one
        self.config.folded = True
        return self
