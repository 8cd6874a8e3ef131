"""SAK: a stem, a path of adapters for each teacher along it, and routers that mix their representations for a task.

Lu et al., "Swiss Army Knife: Synergizing Biases in Knowledge from Vision Foundation Models for Multi-Task Learning",
ICLR 2025, section 3. After some layers each task's router weighs the stem's representation and those of the
teachers' paths for the whole image; the weights are dense, so that every task needs the stem and all paths, but no
other task's routers and head.

The paper first makes each path match its teacher (DINOv2, CLIP, SAM) by distillation. That stage is left out here: the
paths are trained with the tasks from the start. `decoder.path` gives what a distillation would compare.

Differs from the official code in: a path is one residual stream of corrections to the stem; routers stand at a few
levels in equal steps, whose mixtures are projected and added up; and the heads, those of `layers/heads.py`.
"""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from torch import nn

from ..layers.representations import RepresentationDecoder
from ..tasks import check_name
from ._base import register
from ._tabular import MAX_WIDTH, check_count
from ._vision import VisionConfig, VisionModel


@strict
class SAKConfig(VisionConfig):
    """Fields of SAK beyond those of every model for images.

    Args:
        num_levels: at how many layers tasks mix representations.
        teachers: names of the paths.
        adapter_dim: width inside an adapter; a quarter of `hidden_size` in the paper.
        noisy_gating: whether routers have noise in training.
    """

    model_type = "sak"

    num_levels: int = 4
    teachers: list[str] = field(default_factory=lambda: ["dinov2", "clip", "sam"])
    adapter_dim: int = 48
    noisy_gating: bool = True

    def validate_decoder(self) -> None:
        check_count("num_levels", self.num_levels, self.num_hidden_layers)
        check_count("adapter_dim", self.adapter_dim, MAX_WIDTH)
        check_count("the number of teachers", len(self.teachers))
        for name in self.teachers:
            check_name("a teacher's name", name)
        if len({"stem", *self.teachers}) <= len(self.teachers):
            raise ValueError(f"teachers: expected names of their own, none of them 'stem', found {self.teachers}")


@register
class SAKForMultiTask(VisionModel):
    """SAK for several tasks on one image."""

    config: SAKConfig
    config_class = SAKConfig

    def build_decoder(self) -> nn.Module:
        c = self.config
        return RepresentationDecoder(
            c.levels(c.num_levels),
            c.hidden_size,
            c.adapter_dim,
            c.decoder_dim,
            c.teachers,
            c.task_names,
            c.grid,
            c.noisy_gating,
            c.layer_norm_eps,
        )
