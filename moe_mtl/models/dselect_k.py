"""DSelect-k: MMoE whose gates choose at most k experts, differentiably.

Hazimeh et al., "DSelect-k: Differentiable Selection in the Mixture of Experts with Applications to Multi-Task
Learning", NeurIPS 2021. The gate, its regulariser and its defaults are in `layers/gates.py`; the trunk is MMoE's. With
the static gate a task extracts to at most k experts, exactly, once its selectors have saturated.

Differs from the official code in: that is a TensorFlow gate without a model; towers and encoder are ours.
"""

from huggingface_hub.dataclasses import strict

from ._base import register
from .mmoe import MMoEConfig, MMoEForMultiTask


@strict
class DSelectKConfig(MMoEConfig):
    """MMoE's config with `gate="dselect_k"`."""

    model_type = "dselect_k"
    gate: str = "dselect_k"

    def validate_gate_kind(self) -> None:
        if self.gate != "dselect_k":
            raise ValueError(f"gate of a DSelect-k model must be 'dselect_k', found {self.gate!r}")


@register
class DSelectKForMultiTask(MMoEForMultiTask):
    """DSelect-k for tables."""

    config: DSelectKConfig
    config_class = DSelectKConfig
