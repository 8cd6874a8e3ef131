"""Loading a model without holding its sparse experts, nor heads of tasks that are not asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from ..checkpoint import Checkpoint
from ..files import CheckpointError
from ..layers.attention_experts import HeadExperts
from ..layers.moe import SparseExperts
from ..layers.streaming import (
    ExpertStream,
    StoredHead,
    Streamed,
    StreamedExperts,
    StreamedHeads,
)

if TYPE_CHECKING:
    from ._base import MultiTaskConfig, MultiTaskModel

STREAMED: dict[type[nn.Module], type[Streamed]] = {SparseExperts: StreamedExperts, HeadExperts: StreamedHeads}


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """The tensors are in memory: a bar would only flicker."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_offloaded(
    full: "MultiTaskModel", config: "MultiTaskConfig", checkpoint: Checkpoint, options: dict[str, Any]
) -> "MultiTaskModel":
    """The model of `config`, in evaluation mode, whose sparse experts are read from the checkpoint as they are needed.

    So are its heads, where it has several.

    Args:
        full: the model of the whole checkpoint, on the meta device.
        config: of the model to load, which may have fewer tasks.
        checkpoint: compared with `full`.
        options: keywords of `from_pretrained` that are left; only `dtype` has a meaning here.

    Raises:
        ValueError: other options, or a model without sparse experts.
        CheckpointError: a value is NaN or infinite; integers where the model has floating-point numbers.
    """
    dtype = options.pop("dtype", None)
    if options:
        raise ValueError(f"offload_experts: expected no other option than dtype, found {', '.join(options)}")
    if dtype in (None, "auto"):  # the config's, whatever the file holds, as `PreTrainedModel.from_pretrained` does
        dtype = config.dtype
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in (None, torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float32, float64, bfloat16 or float16, found {dtype!r}")
    with torch.device("meta"):
        model = type(full)(config)
    for name, tensor in model.state_dict().items():
        found = checkpoint.stored(name).dtype
        if tensor.is_floating_point() != found.is_floating_point:
            expected = "floating-point numbers" if tensor.is_floating_point() else "integers"
            raise CheckpointError(f"offload_experts: expected {name} as {expected}, found {found}")
    layers = {name: module for name, module in model.named_modules() if type(module) in STREAMED}
    if not layers:
        raise ValueError(f"offload_experts: expected a model with sparse experts, found {type(model).__name__} without")
    stored = {
        layer: {name: checkpoint.stored(f"{layer}.{name}") for name, _ in module.named_parameters()}
        for layer, module in layers.items()
    }
    stream = ExpertStream(max(STREAMED[type(module)].slot_bytes(stored[layer]) for layer, module in layers.items()))
    for layer, module in layers.items():
        name, parameter = next(module.named_parameters())
        rows = full.rows_kept(config, f"{layer}.{name}")
        kind = STREAMED[type(module)]
        streamed = kind(stored[layer], range(len(parameter)) if rows is None else rows, stream)
        streamed.check()
        model.set_submodule(layer, streamed)
    if len(config.task_names) > 1:  # else the only head is always needed
        for head in (f"heads.{task}" for task in config.task_names):
            bare = model.get_submodule(head)
            for name in bare.state_dict():
                checkpoint.read(f"{head}.{name}")  # raises for values that are not finite
            stored_head = {name: checkpoint.stored(f"{head}.{name}") for name in bare.state_dict()}
            model.set_submodule(head, StoredHead(bare, stored_head))
    state = {name: checkpoint.read(name, full.rows_kept(config, name)) for name in model.state_dict()}
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def refuse_offloaded(model: "MultiTaskModel", what: str) -> None:
    """Raises ValueError for a model whose experts are not in memory."""
    if any(isinstance(module, Streamed) for module in model.modules()):
        raise ValueError(
            f"{what}: expected a model that holds its experts, found one that was loaded with offload_experts; load it "
            "without, or with tasks=[...] where only some are needed"
        )
