"""Weights of a plain ViT, DeiT or DINOv2: the same tokens in a dense model, and the dense MLP again from its slices."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BeitConfig,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from moe_mtl.layers.moe import SparseExperts, SparseMLP, TaskRouter
from moe_mtl.models._upcycle import upcycle
from moe_mtl.models.m3vit import M3ViTConfig, M3ViTForMultiTask
from moe_mtl.models.mlore import MLoREConfig, MLoREForMultiTask
from moe_mtl.models.mod_squad import ModSquadConfig, ModSquadForMultiTask
from moe_mtl.models.vit import MultiTaskViT, MultiTaskViTConfig

TASKS = [{"name": "depth", "kind": "depth"}, {"name": "scene", "kind": "multiclass", "num_outputs": 3}]
BOTH = {"hidden_size": 12, "num_hidden_layers": 4, "num_attention_heads": 3, "patch_size": 8, "mlp_ratio": 2}
OURS: dict[str, Any] = BOTH | {
    "image_size": [32, 32],
    "layer_norm_eps": 1e-12,
    "decoder_dim": 6,
    "decoder_stages": 2,
    "tasks": TASKS,
}
EXPERTS = {"num_experts": 6, "num_selected": 2, "expert_dim": 12}
HEADS = {"attention_experts": 6, "attention_selected": 3, "attention_head_dim": 4}


def backbone(kind: str, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    shared = BOTH | {"image_size": 32, "initializer_range": 0.3, "layer_norm_eps": 1e-12} | fields
    if kind == "dinov2":
        model: PreTrainedModel = Dinov2Model(Dinov2Config(**shared))
    else:
        del shared["mlp_ratio"]
        config = {"vit": ViTConfig, "deit": DeiTConfig}[kind](**({"intermediate_size": 24} | shared))
        model = (ViTModel if kind == "vit" else DeiTModel)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def pixels(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def scale_of(kind: str) -> dict[str, Any]:
    return {"layer_scale": 1.0} if kind == "dinov2" else {}


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_dense_model_gives_the_backbones_tokens(kind: str, size: tuple[int, int]) -> None:
    """Also for another grid of patches, for which positions are interpolated as transformers does it."""
    old = backbone(kind)
    config = MultiTaskViTConfig(**(OURS | scale_of(kind) | {"image_size": list(size)}))
    model = MultiTaskViT.from_backbone(old, config)
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    expected = old(pixels(*size), **options).last_hidden_state
    tokens = model(pixels(*size)).last_hidden_state[:, 0]
    torch.testing.assert_close(model.heads["scene"].norm(tokens), expected, rtol=1e-4, atol=1e-5)


def test_deits_distillation_token_is_dropped() -> None:
    """What is left is a ViT of the same weights."""
    old = backbone("deit")
    plain = backbone("vit")
    state = {name: tensor for name, tensor in old.state_dict().items() if "distillation" not in name}
    position = state["embeddings.position_embeddings"]
    state["embeddings.position_embeddings"] = torch.cat([position[:, :1], position[:, 2:]], dim=1)
    plain.load_state_dict(state)
    model = MultiTaskViT.from_backbone(old, MultiTaskViTConfig(**OURS))
    tokens = model(pixels(32, 32)).last_hidden_state[:, 0]
    expected = plain(pixels(32, 32)).last_hidden_state
    torch.testing.assert_close(model.heads["scene"].norm(tokens), expected, rtol=1e-4, atol=1e-5)


def test_a_folder_and_a_model_with_a_head_give_the_same(tmp_path: Path) -> None:
    old = backbone("vit")
    classifier = ViTForImageClassification(old.config)
    classifier.vit.load_state_dict({n: t for n, t in old.state_dict().items() if not n.startswith("pooler")})
    old.save_pretrained(tmp_path)
    config = MLoREConfig(**(OURS | {"expert_ranks": [1, 2], "num_selected": 1, "task_rank": 1, "num_levels": 2}))
    found = [MLoREForMultiTask.from_backbone(one, config).state_dict() for one in (old, tmp_path, classifier)]
    copied = [name for name in found[0] if name.startswith(("patches.", "blocks."))]
    assert len(copied) == 4 + 4 * 12
    for name in copied:
        assert torch.equal(found[1][name], found[0][name]), name
        assert torch.equal(found[2][name], found[0][name]), name


def dense(x_ND: Tensor, up: torch.nn.Linear, down: torch.nn.Linear) -> Tensor:
    return down(F.gelu(up(x_ND)))


def layer_of(
    experts: int, selected: int, hidden: int, kept: list[int] | None = None, norm_topk_prob: bool = False
) -> SparseMLP:
    router = TaskRouter(12, experts, selected, ["depth"], kept=kept, zero_start=True, norm_topk_prob=norm_topk_prob)
    layer = SparseMLP("blocks.1", router, SparseExperts(len(kept or range(experts)), 12, hidden)).double().eval()
    router.initialise(0.0)
    return layer


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize(
    ("experts", "selected", "hidden", "kept"),
    [(6, 2, 12, None), (8, 4, 6, None), (5, 4, 12, None), (4, 1, 24, None), (6, 3, 24, None), (6, 2, 12, [2, 3, 5])],
)
def test_even_gates_give_the_dense_mlp_again(
    experts: int, selected: int, hidden: int, kept: list[int] | None, norm_topk_prob: bool
) -> None:
    torch.manual_seed(0)
    up, down = torch.nn.Linear(12, 24).double(), torch.nn.Linear(24, 12).double()
    layer = layer_of(experts, selected, hidden, kept, norm_topk_prob)
    upcycle(layer, up, down)
    x_TBLD = torch.randn(1, 2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x_TBLD, ["depth"], None, False).hidden, dense(x_TBLD, up, down))


def test_whole_copies_give_the_dense_mlp_times_what_the_gates_sum_to() -> None:
    torch.manual_seed(0)
    up, down = torch.nn.Linear(12, 24).double(), torch.nn.Linear(24, 12).double()
    layer = layer_of(6, 2, 24)
    upcycle(layer, up, down)
    torch.nn.init.normal_(layer.router.gates["depth"])
    x_TBLD = torch.randn(1, 2, 5, 12, dtype=torch.float64)
    found = layer(x_TBLD, ["depth"], None, True)
    record = found.routing[0]
    total = record.weights["depth"].gather(1, record.indices["depth"]).sum(1).reshape(1, 2, 5, 1)
    assert total.min() > 2 / 6
    torch.testing.assert_close(found.hidden, 6 / 2 * total * dense(x_TBLD, up, down))


def test_m3vit_with_even_gates_starts_as_its_backbone() -> None:
    old = backbone("vit")
    model = M3ViTForMultiTask.from_backbone(old, M3ViTConfig(**(OURS | EXPERTS)))
    for name, parameter in model.named_parameters():
        if ".gates." in name:
            torch.nn.init.zeros_(parameter)
    expected = old(pixels(32, 32)).last_hidden_state
    for t in range(2):
        tokens = model(pixels(32, 32)).last_hidden_state[:, t]
        torch.testing.assert_close(model.heads["scene"].norm(tokens), expected, rtol=1e-4, atol=1e-5)


def test_attention_of_experts_starts_anew_and_the_rest_is_taken() -> None:
    old = backbone("vit")
    model = ModSquadForMultiTask.from_backbone(old, ModSquadConfig(**(OURS | EXPERTS | HEADS)))
    assert torch.equal(model.blocks[0].mlp.up.weight, old.layers[0].mlp.fc1.weight)
    assert torch.equal(model.blocks[1].attention.out.weight, old.layers[1].attention.o_proj.weight)
    assert torch.equal(model.blocks[1].mlp.experts.w_up[3], old.layers[1].mlp.fc1.weight[12:])
    assert model.blocks[0].attention.experts.w_query.abs().max() < 0.1
    assert bool(model(pixels(32, 32)).logits["depth"].isfinite().all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 24}, "expected hidden_size to be 24, as the model has it, found 12"),
        ({"patch_size": 4}, "expected patch_size to be 4, as the model has it, found 8"),
        ({"num_hidden_layers": 3}, "expected num_hidden_layers to be 3, as the model has it, found 4"),
        ({"mlp_ratio": 4}, "expected mlp_ratio .* to be 48, as the model has it, found 24"),
        ({"num_attention_heads": 2}, "expected num_attention_heads to be 2"),
        ({"num_channels": 1}, "expected num_channels to be 1"),
        ({"qkv_bias": False}, "expected qkv_bias to be False"),
        ({"layer_scale": 0.1}, "expected a layer_scale to be True, as the model has it, found False"),
        ({"expert_dim": 7}, "expected expert_dim to divide the MLP's width of 24"),
        ({"num_selected": 3}, r"found 12 and 3 \* 12"),
    ],
)
def test_backbones_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    config = M3ViTConfig(**(OURS | EXPERTS | fields))
    with pytest.raises(ValueError, match=message):
        M3ViTForMultiTask.from_backbone(backbone("vit"), config)


def test_a_backbone_of_another_type_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    BeitConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a model of type vit, deit, dinov2, found 'beit'"):
        MultiTaskViT.from_backbone(tmp_path, MultiTaskViTConfig(**OURS))
    gated = backbone("dinov2", use_swiglu_ffn=True)
    with pytest.raises(ValueError, match="expected a gated MLP to be False"):
        MultiTaskViT.from_backbone(gated, MultiTaskViTConfig(**(OURS | {"layer_scale": 1.0})))
