"""Costs of models for images, held to formulas written out, to torch's own counter, and to M³ViT's published counts."""

import itertools
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_mtl.layers import moe
from moe_mtl.models import REGISTRY
from moe_mtl.models._vision import VisionModel
from moe_mtl.models.m3vit import M3ViTConfig, M3ViTForMultiTask
from moe_mtl.models.mlore import MLoREConfig, MLoREForMultiTask
from moe_mtl.models.vit import MultiTaskViT, MultiTaskViTConfig
from moe_mtl.ops import expert_linear, expert_mlp, make_plan
from moe_mtl.pathway import cost
from moe_mtl.pathway._cost import ALONG

VISION = sorted(name for name, model in REGISTRY.items() if issubclass(model, VisionModel))
TASKS = [
    {"name": "parts", "kind": "segmentation", "num_outputs": 4},
    {"name": "normals", "kind": "normals", "num_outputs": 3},
    {"name": "scene", "kind": "multiclass", "num_outputs": 5},
]
OUTPUTS = {"parts": 4, "normals": 3, "scene": 5}
D, HEADS, BLOCKS, E, K, H, DECODER = 12, 3, 4, 6, 2, 10, 6
ROWS, COLUMNS, PATCH = 2, 3, 8
L = 1 + ROWS * COLUMNS
COMMON: dict[str, Any] = {
    "image_size": [ROWS * PATCH, COLUMNS * PATCH],
    "patch_size": PATCH,
    "hidden_size": D,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "decoder_dim": DECODER,
    "decoder_stages": 2,
    "initializer_range": 0.3,
    "tasks": TASKS,
}
SPARSE = {"num_experts": E, "num_selected": K, "expert_dim": H}


def build(**fields: Any) -> M3ViTForMultiTask:
    torch.manual_seed(0)
    return M3ViTForMultiTask(M3ViTConfig(**(COMMON | SPARSE | fields))).eval()


def on_meta(**fields: Any) -> M3ViTForMultiTask:
    with torch.device("meta"):
        return M3ViTForMultiTask(M3ViTConfig(**(COMMON | SPARSE | fields)))


def images(device: str = "cpu") -> dict[str, torch.Tensor]:
    """So many that every expert is somebody's choice."""
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(64, 3, *COMMON["image_size"], generator=generator).to(device)}


def head(task: str) -> tuple[int, int]:
    """Parameters and multiply-adds."""
    if task == "scene":
        return 2 * D + D * 5 + 5, D * 5
    convs = [D * DECODER * 9, DECODER * DECODER * 9]
    parameters = 2 * D + sum(convs) + 6 * DECODER + DECODER * OUTPUTS[task] + OUTPUTS[task]
    sizes = [ROWS * COLUMNS, 4 * ROWS * COLUMNS]  # up-sampled between the two, not before the last convolution
    return parameters, convs[0] * sizes[0] + convs[1] * sizes[1] + sizes[1] * DECODER * OUTPUTS[task]


@pytest.mark.parametrize("names", [["parts"], ["scene"], ["parts", "normals", "scene"]])
def test_m3vit_by_hand(names: list[str]) -> None:
    tasks = len(names)
    parts = cost(on_meta(), names).parts
    # Blocks 1 and 3 have experts: what stands before those of block 1 is the same for all tasks.
    projections, products = L * 4 * D * D, 2 * L * L * D
    assert parts["attention"].multiply_adds == (2 + 2 * tasks) * (projections + products)
    assert parts["mlp"].multiply_adds == (1 + tasks) * L * 8 * D * D
    assert parts["experts"].multiply_adds == 2 * tasks * L * K * 2 * D * H
    assert parts["gates"].multiply_adds == 2 * tasks * L * D * E
    assert parts["patches"].multiply_adds == ROWS * COLUMNS * 3 * PATCH * PATCH * D
    assert parts["heads"].multiply_adds == sum(head(name)[1] for name in names)
    assert parts["heads"].touched == parts["heads"].active == sum(head(name)[0] for name in names)
    assert parts["gates"].touched == parts["gates"].active == 2 * tasks * D * E
    expert = 2 * D * H + D + H
    assert parts["experts"].touched == 2 * E * expert
    assert parts["experts"].active == 2 * K * expert
    assert parts["attention"].touched == BLOCKS * (4 * D * D + 4 * D)
    assert parts["blocks"].touched == BLOCKS * 4 * D


@pytest.mark.parametrize("gate", ["multi_gate", "task_conditioned"])
@pytest.mark.parametrize("kept", [None, {"3": [0, 2, 5]}])
def test_shapes_alone_give_the_same_count_as_an_image(gate: str, kept: Any) -> None:
    real, meta = build(gate=gate, experts_kept=kept), on_meta(gate=gate, experts_kept=kept)
    for names in (None, "normals"):
        found, expected = cost(real, names, images()), cost(meta, names, images("meta"))
        assert (found.multiply_adds, found.active) == (expected.multiply_adds, expected.active)
        if gate == "multi_gate":  # the other leaves an expert unused, which shapes cannot tell
            assert found == expected


@pytest.mark.parametrize("ranks", [[3, 3, 3, 3], [1, 2, 4, 7]])
def test_experts_that_differ_count_by_an_average_choice(ranks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What shapes alone tell is the mean over all choices of what a model with values takes."""
    config = MLoREConfig(**COMMON, num_levels=2, expert_ranks=ranks, num_selected=2, task_rank=2)
    torch.manual_seed(0)
    real = MLoREForMultiTask(config).eval()
    with torch.device("meta"):
        meta = MLoREForMultiTask(config)
    for names in (["parts"], ["parts", "normals", "scene"]):
        found = cost(meta, names)
        of_choices = []
        for chosen in itertools.combinations(range(4), 2):
            with monkeypatch.context() as patch:
                patch.setattr(moe, "highest", lambda p_NE, k, c=chosen: torch.tensor(c).expand(*p_NE.shape[:-1], k))
                of_choices.append(cost(real, names))
        for field in ("multiply_adds", "active"):
            for part in found.parts:
                mean = sum(getattr(one.parts[part], field) for one in of_choices) / len(of_choices)
                assert getattr(found.parts[part], field) == mean, (field, part)
        kernels = 10 * DECODER * sum(ranks)  # 3 x 3 to R channels and 1 x 1 back
        assert found.parts["experts"].touched == 2 * kernels
        assert found.parts["experts"].active == kernels
        assert found.parts["experts"].multiply_adds == len(names) * kernels * ROWS * COLUMNS


def test_a_folded_model_of_experts_that_differ_cannot_be_counted_from_shapes() -> None:
    with torch.device("meta"):
        model = MLoREForMultiTask(MLoREConfig(**COMMON, folded=True))
    with pytest.raises(ValueError, match="expected a folded model with values, found one on the meta device"):
        cost(model)


def test_experts_that_no_token_chose_are_not_touched() -> None:
    model = build()
    every = cost(model, "parts", images())
    with torch.no_grad():
        for block in (1, 3):
            model.blocks[block].mlp.router.gates["parts"].zero_()  # equal probabilities: the first K experts
    few = cost(model, "parts", images())
    expert = 2 * D * H + D + H
    assert few.parts["experts"].touched == 2 * K * expert < every.parts["experts"].touched
    assert few.parts["experts"].active == every.parts["experts"].active == 2 * K * expert
    assert few.multiply_adds == every.multiply_adds
    assert few.stored == every.stored


@pytest.mark.parametrize("model_type", VISION)
def test_every_vision_model_agrees_with_torchs_counter(model_type: str) -> None:
    torch.manual_seed(0)
    cls = REGISTRY[model_type]
    model = cls(cls.config_class(**COMMON)).eval()
    for names in (None, *([task] for task in model.tasks)):
        found = cost(model, names)
        path = model if names is None else model.extract_task(names)
        for module in path.modules():
            if hasattr(module, "backend"):
                module.backend = "torch"
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            path(**path.example_inputs())
        assert counter.get_total_flops() == 2 * found.multiply_adds > 0
        assert found.active <= found.touched <= sum(parameter.numel() for parameter in path.parameters())
        assert list(found.parts) == [part for part in ALONG if part in found.parts]  # none is unknown
        for field in ("touched", "active", "multiply_adds"):
            assert sum(vars(part)[field] for part in found.parts.values()) == vars(found)[field]


def test_a_dense_model_reads_all_that_a_task_has() -> None:
    model = MultiTaskViT(MultiTaskViTConfig(**COMMON)).eval()
    found = cost(model, "parts")
    assert found.touched == found.active == model.extract_task("parts").num_parameters()
    assert "experts" not in found.parts
    assert found.parts["mlp"].multiply_adds == BLOCKS * L * 8 * D * D


def test_one_task_of_m3vit_small_and_base_as_published() -> None:
    """83.8 G on PASCAL-Context, of which 31.8 are blocks and patches and 52.0 one decoder; 191.8 G on NYUD-v2."""
    pascal = [{"name": "semseg", "kind": "segmentation", "num_outputs": 21}, {"name": "edges", "kind": "edges"}]
    nyud = [{"name": "semseg", "kind": "segmentation", "num_outputs": 40}, {"name": "depth", "kind": "depth"}]
    found = {}
    for size, image, tasks in (("small", [512, 512], pascal), ("base", [480, 640], nyud)):
        with torch.device("meta"):
            model = M3ViTForMultiTask(M3ViTConfig.of_size(size, image_size=image, tasks=tasks))
        found[size] = cost(model, "semseg")
    small = found["small"]
    assert round(small.multiply_adds / 1e9, 1) == 83.8
    assert round(small.parts["heads"].multiply_adds / 1e9, 1) == 52.0
    assert round((small.multiply_adds - small.parts["heads"].multiply_adds) / 1e9, 1) == 31.8
    assert round(found["base"].multiply_adds / 1e9, 1) == 191.8
    # What experts cost a token is what the dense MLPs cost it: the saving is not theirs.
    assert small.parts["experts"].multiply_adds == small.parts["mlp"].multiply_adds
    assert small.parts["experts"].active == 12 * 384**2 * 4 + 6 * 4 * 2 * 384 == small.parts["experts"].touched // 4


def test_the_vision_model_is_left_as_it_was() -> None:
    model = build().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost(model, "parts")
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.blocks[1].mlp.experts.backend is None


def test_torchs_counter_knows_the_operators() -> None:
    """The operators that graphs hold, and that models on the meta device call."""
    x_ND, indices_NK = torch.randn(7, D), torch.randint(E, (7, K))
    w_up_EHD, w_down_EDH = torch.randn(E, H, D), torch.randn(E, D, H)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        expert_linear(x_ND, w_up_EHD, make_plan(indices_NK, E), backend="grouped")
    assert counter.get_total_flops() == 2 * 7 * K * D * H
    meta = [tensor.to("meta") for tensor in (x_ND, w_up_EHD, w_down_EDH, indices_NK, torch.rand(7, K))]
    for gate, products in ((None, 2), (torch.empty(E, H, D, device="meta"), 3)):
        with FlopCounterMode(display=False) as counter:
            out_ND = expert_mlp(*meta, activation="gelu" if gate is None else "swiglu", w_gate_EHD=gate)
        assert out_ND.shape == (7, D)
        assert out_ND.is_meta
        assert counter.get_total_flops() == 2 * 7 * K * D * H * products
