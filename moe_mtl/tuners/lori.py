"""LoRI (Zhang et al., "LoRI: Reducing Cross-Task Interference in Multi-Task Low-Rank Adaptation", COLM 2025).

    y = W_0 x + s (B * M) A x

`A` is random and frozen. LoRI-D trains all of `B`; LoRI-S then keeps, over the whole model, the largest tenth of what D
found (`sparsify`), and trains those entries again from 0. Adapters of several tasks, each with a mask of its own, are
put together with PEFT's `add_weighted_adapter`, of the LoRA that `extract_task` makes.

Shapes: `D` width, `R` ranks, `O` output width.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ._base import RankAdapter, RankConfig, RankLayer, at_least_float32, down_projection, up_projection
from ._tuner import register


class LoRI(RankAdapter):
    """Differs from the official code in: the `A` under which a mask was found stays, and is saved with the adapter."""

    mask_OR: Tensor  # of LoRI-S alone

    def __init__(self, in_features: int, out_features: int, config: "LoRIConfig"):
        super().__init__(in_features, out_features, config)
        self.register_buffer("a_RD", down_projection(config.r, in_features).data)
        self.b_OP = up_projection(out_features, config.r, config)
        if config.masked:
            self.register_buffer("mask_OR", torch.ones(out_features, config.r, dtype=torch.bool))

    def up(self) -> Tensor:
        return self.b_OP * self.mask_OR if hasattr(self, "mask_OR") else self.b_OP

    def num_trained(self) -> int:
        return int(self.mask_OR.sum()) if hasattr(self, "mask_OR") else super().num_trained()

    def as_lora(self, told: Any) -> tuple[Tensor, Tensor]:
        return at_least_float32(self.a_RD), at_least_float32(self.up())


@register("LORI", LoRI)
@dataclass
class LoRIConfig(RankConfig):
    """LoRI.

    Attributes:
        masked: LoRI-S; `sparsify` sets it.
    """

    masked: bool = False


@torch.no_grad()
def sparsify(model: PeftModel, density: float = 0.1, adapter_name: str | None = None) -> float:
    """From LoRI-D to the start of LoRI-S, in place: one threshold for all layers, and `B` back at 0.

    Args:
        model: with a LoRI adapter that was trained.
        density: share of the entries of all `B` to keep.
        adapter_name: by default the active one.

    Returns:
        the share that is kept.

    Raises:
        ValueError: no LoRI adapter of that name, or a density out of range or above what was trained.
    """
    name = adapter_name or model.active_adapter
    config = model.peft_config.get(name)
    if not isinstance(config, LoRIConfig):
        raise ValueError(f"adapter_name: expected a LoRI adapter, found {name!r}")
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a share in (0, 1], found {density}")
    layers = [layer for layer in model.modules() if isinstance(layer, RankLayer) and name in layer.moe_adapters]
    adapters = [layer.adapter(name) for layer in layers]
    sizes = torch.cat([adapter.up().abs().flatten().float().cpu() for adapter in adapters])
    number = max(1, round(density * len(sizes)))
    if number > int((sizes > 0).sum()):
        raise ValueError(f"density: expected a trained adapter with as many entries that are not 0, found {density}")
    kept = torch.zeros(len(sizes), dtype=torch.bool)
    kept[sizes.topk(number).indices] = True
    model.peft_config[name] = config = dataclasses.replace(config, masked=True)
    for adapter, mask in zip(adapters, kept.split([adapter.b_OP.numel() for adapter in adapters]), strict=True):
        adapter.register_buffer("mask_OR", mask.view_as(adapter.b_OP).to(adapter.b_OP.device))
        adapter.config = config
        adapter.b_OP.zero_()
    return number / len(sizes)
