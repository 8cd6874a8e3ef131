"""ESMM: click and conversion over the entire space of impressions.

Ma et al., "Entire Space Multi-Task Model: An Effective Approach for Estimating Post-Click Conversion Rate", SIGIR 2018.
Two towers over shared embeddings give pCTR and pCVR; the loss is that of click and of click-and-conversion, with
pCTCVR = pCTR x pCVR, over all impressions (equation 2). pCVR has no loss of its own.

The product is a task like any other (`product_of`), so it also combines with every trunk here: give an MMoE the same
three tasks and it is "ESMM on MMoE".

Differs from the official code in: the product is taken between logits (`product_logit`), which is exact where 1 - p q
rounds to 1 and stays so in half precision.
"""

from collections.abc import Sequence
from dataclasses import field

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ._base import register
from ._tabular import TabularConfig, TabularModel, TrunkOutput


@strict
class ESMMConfig(TabularConfig):
    """Fields of every tabular model; the tasks are the paper's by default. Any tasks fit: what makes it ESMM is a task
    that is a `product_of` others, and weight 0 for a factor that is not to be trained by its own label."""

    model_type = "esmm"
    tower_dims: list[int] = field(default_factory=lambda: [360, 200, 80])
    tasks: list[dict] = field(
        default_factory=lambda: [
            {"name": "ctr", "kind": "binary"},
            {"name": "cvr", "kind": "binary", "weight": 0.0, "space": "ctr"},
            {"name": "ctcvr", "kind": "binary", "product_of": ["ctr", "cvr"]},
        ]
    )


class Identity(nn.Module):
    """No trunk: every tower reads the encoded row. Click needs one tower, conversion one, their product both."""

    def __init__(self, input_dim: int):
        super().__init__()
        self.output_dim = input_dim

    def forward(self, x_BD: Tensor, tasks: Sequence[str], record: bool) -> TrunkOutput:
        return TrunkOutput(dict.fromkeys(tasks, x_BD))


@register
class ESMMForMultiTask(TabularModel):
    """ESMM for tables."""

    config: ESMMConfig
    config_class = ESMMConfig

    def build_trunk(self, input_dim: int) -> nn.Module:
        return Identity(input_dim)
