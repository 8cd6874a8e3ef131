"""How many parameters an adapter trains, and how many of them one token of one task meets."""

from dataclasses import dataclass

from peft import PeftModel

from ._base import RankLayer


@dataclass(frozen=True)
class Count:
    """Numbers of parameters, over all layers of one adapter.

    Attributes:
        trained: what an optimiser moves; of a mask, what it leaves.
        active: of these, what one token of one task is multiplied with.
        stored: what is saved with the adapter, frozen tensors and biases of a choice too.
    """

    trained: int
    active: int
    stored: int


def count(model: PeftModel, adapter_name: str | None = None) -> Count:
    """Counts one adapter, by default the active one; models on the meta device too.

    Raises:
        ValueError: an unknown adapter.
    """
    name = adapter_name or model.active_adapter
    if name not in model.peft_config:
        raise ValueError(f"adapter_name: expected one of {', '.join(model.peft_config)}, found {name!r}")
    layers = [layer for layer in model.modules() if isinstance(layer, RankLayer) and name in layer.moe_adapters]
    adapters = [layer.adapter(name) for layer in layers]
    return Count(
        trained=sum(adapter.num_trained() for adapter in adapters),
        active=sum(adapter.num_active() for adapter in adapters),
        stored=sum(tensor.numel() for adapter in adapters for tensor in adapter.state_dict().values()),
    )
