"""A plain vision transformer with one head per task: the dense multi-task baseline, and with one task the single-task
one.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; its heads are those of `layers/heads.py`. All tasks
share every block, so that one pass over the backbone answers them all.
"""

from huggingface_hub.dataclasses import strict

from ._base import register
from ._vision import VisionConfig, VisionModel


@strict
class MultiTaskViTConfig(VisionConfig):
    """Fields of `VisionConfig`; a name of its own keeps it apart from transformers' `vit`."""

    model_type = "multi_task_vit"


@register
class MultiTaskViT(VisionModel):
    """A dense vision transformer for several tasks."""

    config: MultiTaskViTConfig
    config_class = MultiTaskViTConfig
