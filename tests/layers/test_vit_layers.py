"""Blocks, heads, routers and sparse MLPs held to their equations, in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.layers.balance import smooth_load
from moe_mtl.layers.heads import ClassHead, UpHead
from moe_mtl.layers.moe import SparseExperts, SparseMLP, TaskConditions, TaskRouter, highest
from moe_mtl.layers.vit import MLP, Block, PatchEmbedding, SelfAttention

T, B, L, D = 2, 3, 5, 8
TASKS = ["edges", "depth"]


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn, in float64."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- dense parts ---


def attention_reference(x_LD: Tensor, layer: SelfAttention) -> Tensor:
    heads, width = layer.num_heads, D // layer.num_heads
    w, b = layer.qkv.weight, layer.qkv.bias
    q, k, v = ((w[i * D : (i + 1) * D] @ x_LD.T).T + b[i * D : (i + 1) * D] for i in range(3))
    out = torch.zeros(L, D, dtype=torch.float64)
    for a in range(heads):
        part = slice(a * width, (a + 1) * width)
        for i in range(L):
            scores = torch.stack([q[i, part] @ k[j, part] / math.sqrt(width) for j in range(L)])
            p = scores.exp() / scores.exp().sum()
            out[i, part] = sum(p[j] * v[j, part] for j in range(L))
    return out @ layer.out.weight.T + layer.out.bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def norm(x_D: Tensor, layer: nn.LayerNorm) -> Tensor:
    return (x_D - x_D.mean()) / torch.sqrt(x_D.var(unbiased=False) + layer.eps) * layer.weight + layer.bias


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_a_block_is_the_papers_equations(layer_scale: float | None) -> None:
    block = Block(SelfAttention(D, 2), MLP(D, 12), D, layer_scale=layer_scale)
    filled(block).eval()
    x_TBLD = tokens(T, B, L, D)
    found = block(x_TBLD, TASKS).hidden
    for t in range(T):
        for b in range(B):
            x = x_TBLD[t, b]
            normed = torch.stack([norm(x[i], block.norm1) for i in range(L)])
            y = attention_reference(normed, block.attention)
            x = x + (y if block.scales is None else y * block.scales[0])
            normed = torch.stack([norm(x[i], block.norm2) for i in range(L)])
            up = gelu(normed @ block.mlp.up.weight.T + block.mlp.up.bias)
            y = up @ block.mlp.down.weight.T + block.mlp.down.bias
            x = x + (y if block.scales is None else y * block.scales[1])
            torch.testing.assert_close(found[t, b], x, rtol=1e-10, atol=1e-10)


def test_drop_path_leaves_a_branch_out_of_whole_images_for_all_tasks() -> None:
    block = filled(Block(SelfAttention(D, 2), MLP(D, 12), D, drop_path=0.5))
    x_TBLD = tokens(T, 64, L, D)
    torch.manual_seed(0)
    found = block.train()(x_TBLD, TASKS).hidden
    same_TB = (found == x_TBLD).all(-1).all(-1)
    assert torch.equal(same_TB[0], same_TB[1])
    assert 4 < int(same_TB[0].sum()) < 32  # both branches left out: a quarter of the images
    block.eval()
    assert not torch.equal(block(x_TBLD, TASKS).hidden, x_TBLD)


def test_patches_are_rows_of_the_picture_behind_a_class_token() -> None:
    layer = filled(PatchEmbedding([4, 6], 2, 3, D))
    x_BCHW = tokens(B, 3, 4, 6)
    found = layer(x_BCHW)
    assert found.shape == (B, 1 + 6, D)
    torch.testing.assert_close(found[:, 0], (layer.cls_token[0] + layer.position[0, :1]).expand(B, -1))
    for i in range(2):
        for j in range(3):
            patch = x_BCHW[1, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten()
            expected = layer.projection.weight.flatten(1) @ patch + layer.projection.bias
            torch.testing.assert_close(found[1, 1 + 3 * i + j], expected + layer.position[0, 1 + 3 * i + j])


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 4, 4), r"expected shape \[B, 3, 4, 6\], found \[1, 3, 4, 4\]"),
        (torch.zeros(1, 1, 4, 6), r"expected shape \[B, 3, 4, 6\], found \[1, 1, 4, 6\]"),
        (torch.zeros(3, 4, 6), r"found \[3, 4, 6\]"),
        (torch.zeros(1, 3, 4, 6, dtype=torch.uint8), "expected floats .* found torch.uint8"),
        (torch.full((1, 3, 4, 6), math.nan), "expected finite numbers"),
        ([1, 2], "found list"),
    ],
)
def test_pixels_that_do_not_fit(pixels: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchEmbedding([4, 6], 2, 3, D).check(pixels)  # type: ignore[arg-type]


# --- heads ---


def test_the_map_of_a_head() -> None:
    head = filled(UpHead(D, 4, 2, 3, (2, 3), (16, 24))).eval()
    for i, layer in enumerate(head.norms):
        layer.running_mean.copy_(tokens(4, seed=i))
        layer.running_var.copy_(tokens(4, seed=i + 5).exp())
    x_BLD = tokens(B, 1 + 6, D)
    maps = torch.stack([torch.stack([norm(x, head.norm) for x in one[1:]]) for one in x_BLD])
    maps = maps.reshape(B, 2, 3, D).permute(0, 3, 1, 2)
    for i, (conv, batch) in enumerate(zip(head.convs, head.norms, strict=True)):
        maps = F.conv2d(maps, conv.weight, conv.bias, padding=1)
        shape = (1, -1, 1, 1)
        scale = (batch.weight / (batch.running_var + batch.eps).sqrt()).reshape(shape)
        maps = ((maps - batch.running_mean.reshape(shape)) * scale + batch.bias.reshape(shape)).clamp_min(0)
        if i == 0:
            maps = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)
    maps = F.conv2d(maps, head.out.weight, head.out.bias)
    expected = F.interpolate(maps, size=(16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(head(x_BLD), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cls_token", [True, False])
def test_the_answer_of_a_class_head(cls_token: bool) -> None:
    head = filled(ClassHead(D, 3, cls_token))
    x_BLD = tokens(B, L, D)
    for b in range(B):
        pooled = x_BLD[b, 0] if cls_token else sum(x_BLD[b]) / L
        expected = head.out.weight @ norm(pooled, head.norm) + head.out.bias
        torch.testing.assert_close(head(x_BLD)[b], expected)


# --- sparse parts ---

E, K, H = 6, 2, 7


def expert_reference(x_D: Tensor, experts: SparseExperts, e: int) -> Tensor:
    return experts.w_down[e] @ gelu(experts.w_up[e] @ x_D + experts.b_up[e]) + experts.b_down[e]


def layer_of(gate: str = "multi_gate", kept: list[int] | None = None, **weights: Any) -> SparseMLP:
    router = TaskRouter(D, E, K, TASKS, gate=gate, condition_dim=4, kept=kept, **weights)
    stored = E if kept is None else len(kept)
    return filled(SparseMLP("blocks.1", router, SparseExperts(stored, D, H), (1, L - 1)))


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("gate", ["multi_gate", "task_conditioned"])
def test_sparse_mlp_is_the_papers_equation(gate: str, shared: bool, norm_topk_prob: bool) -> None:
    """Softmax over all experts, the K highest, renormalised only if asked; each task by its own gate or condition."""
    layer = layer_of(gate, norm_topk_prob=norm_topk_prob).eval()
    conditions = filled(TaskConditions(TASKS, 4), seed=3)
    x_TBLD = tokens(1 if shared else T, B, L, D)
    condition_TP = conditions(TASKS) if gate == "task_conditioned" else None
    x_TBLD.requires_grad_()
    found = layer(x_TBLD, TASKS, condition_TP, True)
    assert found.hidden.shape == (T, B, L, D)
    expected = torch.zeros(T, B, L, D, dtype=torch.float64)
    for t, task in enumerate(TASKS):
        if gate == "task_conditioned":
            z = conditions.linear.weight @ gelu(conditions.embeddings[task]) + conditions.linear.bias
            z_P = norm(z, conditions.norm)
        for b in range(B):
            for i in range(L):
                x_D = x_TBLD[0 if shared else t, b, i]
                logits = (
                    layer.router.gates[task] @ x_D
                    if gate == "multi_gate"
                    else layer.router.gate @ torch.cat([x_D, z_P])
                )
                s = logits.exp() / logits.exp().sum()
                chosen = sorted(range(E), key=lambda e: -s[e].item())[:K]
                total = sum(s[e] for e in chosen) if norm_topk_prob else 1.0
                expected[t, b, i] = sum(s[e] / total * expert_reference(x_D, layer.experts, e) for e in chosen)
                record = found.routing[0]
                assert record.indices[task][b * L + i].tolist() == chosen
                torch.testing.assert_close(record.weights[task][b * L + i], s.detach())
    torch.testing.assert_close(found.hidden, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(found.hidden.square().sum(), [x_TBLD, *layer.parameters()], retain_graph=True)
    theirs = torch.autograd.grad(expected.square().sum(), [x_TBLD, *layer.parameters()], allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-9, atol=1e-9)


def test_one_task_is_the_row_of_all() -> None:
    layer = layer_of().eval()
    x_TBLD = tokens(1, B, L, D)
    whole = layer(x_TBLD, TASKS, None, False).hidden
    for t, task in enumerate(TASKS):
        torch.testing.assert_close(layer(x_TBLD, [task], None, False).hidden[0], whole[t])


def test_experts_that_are_left_out_stay_in_the_softmax() -> None:
    """Mod-Squad's extraction drops rows of the gate, which renormalises the rest: what was never chosen then counts."""
    layer = layer_of().eval()
    x_TBLD = tokens(1, B, L, D)
    x_TBLD[..., 0] = 1.0
    with torch.no_grad():
        layer.router.gates["depth"][[0, 3], 0] -= 4.0  # unlikely enough never to be chosen, likely enough to count
    whole = layer(x_TBLD, ["depth"], None, True)
    used = [1, 2, 4, 5]
    assert set(whole.routing[0].indices["depth"].flatten().tolist()) <= set(used)
    assert whole.routing[0].weights["depth"][:, [0, 3]].max() > 1e-3
    small = layer_of(kept=used).eval()
    small.router.load_state_dict(layer.router.state_dict())
    for name, value in layer.experts.state_dict().items():
        small.experts.state_dict()[name].copy_(value[used])
    found = small(x_TBLD, ["depth"], None, True)
    torch.testing.assert_close(found.hidden, whole.hidden, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.routing[0].indices["depth"], whole.routing[0].indices["depth"])
    torch.testing.assert_close(found.routing[0].utilisation()["depth"], whole.routing[0].utilisation()["depth"])


def test_fewer_stored_experts_are_chosen_among_themselves() -> None:
    layer = layer_of(kept=[1, 4, 5]).eval()
    x_TBLD = tokens(1, B, L, D)
    record = layer(x_TBLD, TASKS, None, True).routing[0]
    for task in TASKS:
        assert set(record.indices[task].flatten().tolist()) <= {1, 4, 5}
        order = record.weights[task][:, [1, 4, 5]].argsort(dim=-1, descending=True)[:, :K]
        assert torch.equal(record.indices[task], torch.tensor([1, 4, 5])[order])


def test_mod_squad_noise_is_off_in_evaluation() -> None:
    """The official code has the check for training commented out."""
    router = TaskRouter(D, E, K, TASKS, noise_std=5.0)
    filled(router)
    x_TND = tokens(1, 40, D)
    router.eval()
    assert torch.equal(router(x_TND, TASKS).probabilities_TNE, router(x_TND, TASKS).probabilities_TNE)
    router.train()
    torch.manual_seed(0)
    found = torch.stack([router(x_TND, TASKS).probabilities_TNE.log() for _ in range(400)])
    spread = (found[..., 0] - found[..., 1]).std(0).mean().item()
    assert spread == pytest.approx(math.sqrt(2) * 5.0 / E, rel=0.05)  # sigma / E on each of two logits


def test_losses_come_in_training_alone_and_once_per_task() -> None:
    router = TaskRouter(D, E, K, TASKS, balance_weight=0.5, z_weight=0.25, information_weight=0.125)
    filled(router)
    x_TND = tokens(1, 40, D)
    assert router.eval()(x_TND, TASKS).auxiliary == ()
    assert len(router.train()(x_TND, TASKS).auxiliary) == 2 + 1 + 1
    balance = router(x_TND, ["edges"]).auxiliary[0]
    torch.testing.assert_close(balance, router(x_TND, TASKS).auxiliary[0])


def cv_squared(values: Tensor) -> Tensor:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1) / mean**2


@pytest.mark.parametrize("noise_std", [0.0, 3.0])
@pytest.mark.parametrize("kept", [None, [0, 2, 3, 5]])
def test_balance_with_costs_is_shiftaddvits(kept: list[int] | None, noise_std: float) -> None:
    """`CV^2(a_e sum p_e) + CV^2(a_e tokens_e)` with `a_e = cost_e / sum cost`; expected tokens where there is noise."""
    costs = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    router = TaskRouter(D, E, K, TASKS, balance_weight=0.5, costs=costs, kept=kept, noise_std=noise_std)
    filled(router).train()
    x_TND = tokens(1, 40, D)
    torch.manual_seed(0)
    choice = router(x_TND, TASKS)
    torch.manual_seed(0)
    logits_TNE = torch.stack([x_TND[0] @ router.gates[task].t() for task in TASKS])
    std = noise_std / E
    noisy_TNE = logits_TNE + std * (torch.randn_like(logits_TNE) if std else 0.0)
    stored = kept or list(range(E))
    for t in range(T):
        importance_E, load_E = torch.zeros(len(stored)).double(), torch.zeros(len(stored)).double()
        for n in range(40):
            p_E = (noisy_TNE[t, n].exp() / noisy_TNE[t, n].exp().sum())[stored]
            for e in sorted(range(len(stored)), key=lambda e, p_E=p_E: -p_E[e].item())[:K]:
                importance_E[e] += p_E[e].item()
                load_E[e] += 1
        if std and kept is None:
            load_E = smooth_load(logits_TNE[t], noisy_TNE[t], std, K)
        share_E = torch.tensor([costs[e] for e in stored]).double()
        share_E = share_E / sum(share_E)
        expected = 0.5 * (cv_squared(share_E * importance_E) + cv_squared(share_E * load_E))
        torch.testing.assert_close(choice.auxiliary[t], expected)


@pytest.mark.parametrize("selected", [K, E])
def test_the_balance_with_costs_pushes_tokens_to_cheaper_experts(selected: int) -> None:
    """From gates that choose evenly; to weights that are as 1 / cost where all experts compute."""
    costs = [4.0, 1.0, 2.0, 8.0, 16.0, 2.0]
    router = TaskRouter(D, E, selected, TASKS[:1], balance_weight=1.0, costs=costs).double().train()
    x_TND = tokens(1, 200, D)
    x_TND[..., 0] = 1.0
    with torch.no_grad():
        router.gates["edges"].copy_(tokens(E, D, seed=3)).mul_(0.3)[:, 0] = 0.0
    before_E = router(x_TND, TASKS[:1]).probabilities_TNE[0].mean(0)
    optimiser = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(400):
        optimiser.zero_grad()
        (loss,) = router(x_TND, TASKS[:1]).auxiliary
        loss.backward()
        optimiser.step()
    found_E = router(x_TND, TASKS[:1]).probabilities_TNE[0].mean(0)
    inverse_E = 1 / torch.tensor(costs, dtype=torch.float64)
    if selected == E:
        torch.testing.assert_close(found_E, inverse_E / inverse_E.sum(), rtol=1e-3, atol=1e-3)
    assert found_E[1] > before_E[1] + 0.1
    assert found_E[4] < before_E[4] - 0.05


@pytest.mark.parametrize("costs", [[1.0] * 5, [1.0] * 5 + [0.0], [1.0] * 5 + [math.nan], [1.0] * 5 + [math.inf]])
def test_costs_that_cannot_be(costs: list[float]) -> None:
    with pytest.raises(ValueError, match="costs: expected 6 positive numbers, found"):
        TaskRouter(D, E, K, TASKS, costs=costs)


def test_ties_go_to_the_lower_number() -> None:
    router = TaskRouter(D, E, K, TASKS, zero_start=True)
    router.initialise(0.0)
    choice = router.eval()(tokens(1, 9, D).float(), TASKS)
    assert choice.indices_TNK.tolist() == [[[0, 1]] * 9] * 2


@pytest.mark.parametrize("selected", range(1, 8))
def test_the_highest_of_equals_are_the_first(selected: int) -> None:
    """By Python's sort, on probabilities of which many are equal, some 0."""
    probabilities_NE = torch.randint(4, (50, 7), generator=torch.Generator().manual_seed(0)) / 3
    expected = [sorted(range(7), key=lambda e, row=row: (-row[e], e))[:selected] for row in probabilities_NE.tolist()]
    assert highest(probabilities_NE, selected).tolist() == expected
    assert highest(probabilities_NE.unflatten(0, (5, 10)), selected).flatten(0, 1).tolist() == expected
