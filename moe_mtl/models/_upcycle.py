"""A vision transformer of transformers (ViT, DeiT, DINOv2) into a model for images, its MLPs into experts.

Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", ICLR 2023, makes every
expert a copy of the dense MLP. Here an expert of width `H` takes `H` of the MLP's `F` hidden units, in turn: with
`G = F / H` slices expert `e` has slice `e mod G`, so that `K = G` experts cost a token what the dense MLP did. `H = F`
is the paper's copy.

A gate's weights are a softmax over all `E` experts and are not renormalised: even ones are `1 / E`. So that they give
the dense MLP again, an expert's output layer is scaled by `E G / K` and its bias by `E / K`: each slice is chosen
`K / G` times, and the bias comes in `K` times. That is exact where the gates are even and the chosen hold every slice
equally often, as gates that start at zero do; and for whole copies (`G = 1`) the answer is the dense one times
`E / K sum_k s_k`, whatever the gates. Gates that start at random are uneven, and may choose a slice twice: then the
dense MLP is what an even choice would give on average. Gates with `norm_topk_prob` have even weights of `1 / K`, and
`E / K` above becomes 1.

Shapes: `D` width, `E` experts, `K` chosen, `F` hidden width of the dense MLP, `H` of an expert, `L` tokens.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..layers.moe import SparseMLP
from ..layers.vit import MLP, SelfAttention

BACKBONES = ("vit", "deit", "dinov2")


def check_backbone(backbone: PreTrainedConfig, config: Any) -> None:
    """Raises ValueError for a backbone whose weights do not fit the config of a model for images."""
    kind = backbone.model_type
    if kind not in BACKBONES:
        raise ValueError(f"backbone: expected a model of type {', '.join(BACKBONES)}, found {kind!r}")
    width = backbone.hidden_size
    inner = int(width * backbone.mlp_ratio) if kind == "dinov2" else backbone.intermediate_size
    pairs = {
        "hidden_size": (config.hidden_size, width),
        "patch_size": (config.patch_size, backbone.patch_size),
        "num_channels": (config.num_channels, backbone.num_channels),
        "num_hidden_layers": (config.num_hidden_layers, backbone.num_hidden_layers),
        "num_attention_heads": (config.num_attention_heads, backbone.num_attention_heads),
        "qkv_bias": (config.qkv_bias, backbone.qkv_bias),
        "mlp_ratio * hidden_size": (int(config.mlp_ratio * config.hidden_size), inner),
        "a layer_scale": (config.layer_scale is not None, kind == "dinov2"),
        "hidden_act": ("gelu", backbone.hidden_act),
        "a gated MLP": (False, kind == "dinov2" and backbone.use_swiglu_ffn),
    }
    for name, (expected, found) in pairs.items():
        if expected != found:
            raise ValueError(f"backbone: expected {name} to be {expected}, as the model has it, found {found}")


def backbone_config(name_or_model: Any) -> PreTrainedConfig:
    """The config of a backbone given by name, folder or object, before any of its weights is read."""
    if isinstance(name_or_model, PreTrainedModel):
        return name_or_model.config
    if not isinstance(name_or_model, (str, Path)) or not str(name_or_model):
        raise ValueError(
            f"backbone: expected a folder, a name on the Hub or a model of transformers, found {name_or_model!r:.80}"
        )
    try:
        return AutoConfig.from_pretrained(name_or_model)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"backbone: expected a folder or a name on the Hub, found {name_or_model}: {reason}") from None


@torch.no_grad()
def copy_backbone(model: Any, backbone: Any) -> None:
    """Copies what fits, in place. Gates, task vectors, attention made of experts, decoders and heads stay as they are,
    but for the norm of heads that read the blocks, which becomes the backbone's last."""
    config = backbone.config
    embeddings = backbone.embeddings
    patches = model.patches
    _copy(patches.projection, embeddings.patch_embeddings.projection)
    extra = 2 if config.model_type == "deit" else 1  # DeiT's second token is for distillation: dropped, with its place
    position_LD = embeddings.position_embeddings[0]
    maps = _resized(position_LD[extra:], _grid(config), patches.grid)
    if patches.cls_token is not None:
        patches.cls_token.copy_(embeddings.cls_token)
        maps = torch.cat([position_LD[:1], maps])
    patches.position.copy_(maps.unsqueeze(0))
    dino = config.model_type == "dinov2"
    for block, layer in zip(model.blocks, backbone.encoder.layer if dino else backbone.layers, strict=True):
        _copy(block.norm1, layer.norm1 if dino else layer.layernorm_before)
        _copy(block.norm2, layer.norm2 if dino else layer.layernorm_after)
        if dino:
            block.scales[0].copy_(layer.layer_scale1.lambda1)
            block.scales[1].copy_(layer.layer_scale2.lambda1)
        if isinstance(block.attention, SelfAttention):
            old = layer.attention
            if hasattr(old, "q_proj"):
                parts, out = (old.q_proj, old.k_proj, old.v_proj), old.o_proj
            else:  # DINOv2 of transformers 5.17
                parts, out = (old.attention.query, old.attention.key, old.attention.value), old.output.dense
            block.attention.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            if block.attention.qkv.bias is not None:
                block.attention.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
            _copy(block.attention.out, out)
        if isinstance(block.mlp, MLP):
            _copy(block.mlp.up, layer.mlp.fc1)
            _copy(block.mlp.down, layer.mlp.fc2)
        else:
            upcycle(block.mlp, layer.mlp.fc1, layer.mlp.fc2)
    if model.decoder is None:
        for head in model.heads.values():
            _copy(head.norm, backbone.layernorm)


@torch.no_grad()
def upcycle(mlp: SparseMLP, up: nn.Linear, down: nn.Linear) -> None:
    """Fills a layer's experts with slices of a dense MLP, in place; see the top of the file.

    Raises:
        ValueError: the chosen experts cannot hold each hidden unit equally often.
    """
    experts, router = mlp.experts, mlp.router
    hidden, inner = experts.w_up.shape[1], up.out_features
    if inner % hidden or router.num_selected * hidden % inner:
        raise ValueError(
            f"backbone: expected expert_dim to divide the MLP's width of {inner}, and num_selected * expert_dim to be "
            f"a multiple of it, found {hidden} and {router.num_selected} * {hidden}"
        )
    slices = inner // hidden
    even = 1.0 if router.norm_topk_prob else router.num_experts / router.num_selected
    for stored, e in enumerate(router.kept or range(router.num_experts)):
        units = slice(e % slices * hidden, (e % slices + 1) * hidden)
        experts.w_up[stored].copy_(up.weight[units])
        experts.b_up[stored].copy_(up.bias[units])
        experts.w_down[stored].copy_(even * slices * down.weight[:, units])
        experts.b_down[stored].copy_(even * down.bias)


def _copy(new: Any, old: Any) -> None:
    new.weight.copy_(old.weight)
    new.bias.copy_(old.bias)


def _grid(config: PreTrainedConfig) -> tuple[int, int]:
    size: Any = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return height // config.patch_size, width // config.patch_size


def _resized(position_LD: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions of a grid of patches for another grid: bicubic, as transformers does for larger images."""
    if old == new:
        return position_LD
    maps = position_LD.t().unflatten(1, old).unsqueeze(0).float()
    return F.interpolate(maps, size=new, mode="bicubic", align_corners=False)[0].flatten(1).t()
