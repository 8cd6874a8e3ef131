"""MLoRE's mixture of low-rank convolutions held to its equation, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mtl.layers.low_rank_experts import LowRankConv, LowRankMixture, kernel_of

T, B, C, K = 2, 3, 4, 2
RANKS = [1, 2, 3, 5]
GRID = (3, 2)
TASKS = ["edges", "depth"]


def level_of(**fields: float) -> LowRankMixture:
    level = LowRankMixture("decoder.levels.0", C, RANKS, K, 2, TASKS, **fields).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in level.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    for norm in level.norms.values():
        norm.running_mean.copy_(torch.randn(C, generator=generator))
        norm.running_var.copy_(torch.rand(C, generator=generator) + 0.5)
    return level


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def low_rank(x_CHW: Tensor, conv: LowRankConv) -> Tensor:
    down = F.conv2d(x_CHW[None], conv.down.weight, padding=1)[0]
    return torch.einsum("cr,rhw->chw", conv.up.weight[:, :, 0, 0], down)


def chosen(x_CHW: Tensor, task: str, level: LowRankMixture) -> tuple[Tensor, list[int]]:
    g = (level.router.gates[task] @ x_CHW.mean((1, 2))).exp()
    g = g / g.sum()
    return g, sorted(range(len(RANKS)), key=lambda e: -g[e].item())[:K]


def reference(x_CHW: Tensor, task: str, level: LowRankMixture) -> Tensor:
    y = F.conv2d(x_CHW[None], level.shared.weight, padding=1)[0] + low_rank(x_CHW, level.own[task])
    g, experts = chosen(x_CHW, task, level)
    for e in experts:
        y = y + g[e] * low_rank(x_CHW, level.experts[e])
    norm = level.norms[task]
    y = (y - norm.running_mean[:, None, None]) / (norm.running_var + norm.eps).sqrt()[:, None, None]
    y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    return y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))


@pytest.mark.parametrize("shared", [True, False])
def test_a_level_is_the_papers_equation(shared: bool) -> None:
    level = level_of()
    x = drawn(1 if shared else T, B, C, *GRID).requires_grad_()
    found = level(x, TASKS, True)
    expected = torch.stack(
        [
            torch.stack([reference(x[0 if shared else t, b], task, level) for b in range(B)])
            for t, task in enumerate(TASKS)
        ]
    )
    torch.testing.assert_close(found.hidden, expected, rtol=1e-10, atol=1e-10)
    leaves = [x, *level.parameters()]
    ours = torch.autograd.grad(found.hidden.square().sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True)
    for a, b, leaf in zip(ours, theirs, leaves, strict=True):
        nothing = torch.zeros_like(leaf)
        torch.testing.assert_close(nothing if a is None else a, nothing if b is None else b, rtol=1e-9, atol=1e-9)
    record = found.routing[0]
    for t, task in enumerate(TASKS):
        g, experts = chosen(x[0 if shared else t, 1], task, level)
        assert record.indices[task][1].tolist() == experts
        torch.testing.assert_close(record.weights[task][1], g.detach())


def test_mlore_computes_the_chosen_experts_alone() -> None:
    """The official code computes all 15 experts and multiplies what was not chosen by 0."""
    level = level_of()
    maps: dict[int, int] = {}
    for e, expert in enumerate(level.experts):
        expert.register_forward_hook(lambda m, x, y, e=e: maps.update({e: len(y)}))
    record = level(drawn(1, 1, C, *GRID), ["depth"], True).routing[0]
    assert maps == dict.fromkeys(record.indices["depth"][0].tolist(), 1)
    maps.clear()
    record = level(drawn(1, B, C, *GRID), TASKS, True).routing[0]
    counts = torch.bincount(torch.cat([record.indices[task].flatten() for task in TASKS]), minlength=len(RANKS))
    assert maps == {e: int(n) for e, n in enumerate(counts) if n}
    assert sum(maps.values()) == T * B * K


def test_an_expert_that_nobody_chose_has_a_gradient_of_zero_in_training() -> None:
    level = level_of().train()
    out = level(drawn(1, 2, C, *GRID), ["depth"], True)
    out.hidden.sum().backward()
    unused = set(range(len(RANKS))) - set(out.routing[0].indices["depth"].flatten().tolist())
    assert unused
    assert all(not level.experts[e].down.weight.grad.any() for e in unused)


def test_a_sum_of_low_rank_convolutions_is_one_kernel() -> None:
    level, x = level_of(), drawn(C, *GRID)
    weights = drawn(3, seed=4)
    convs = [level.experts[e] for e in (0, 2, 3)]
    expected = sum(w * low_rank(x, conv) for w, conv in zip(weights, convs, strict=True))
    torch.testing.assert_close(F.conv2d(x[None], kernel_of(convs, weights), padding=1)[0], expected)


@pytest.mark.parametrize("grid", [GRID, (1, 1)])  # by one kernel per image, or expert by expert: a map of one patch
@pytest.mark.parametrize("shared", [True, False])
def test_folding_changes_no_answer(shared: bool, grid: tuple[int, int]) -> None:
    level = level_of()
    x = drawn(1 if shared else T, B, C, *grid)
    whole = level(x, TASKS, False).hidden
    level.fold()
    assert {name.split(".")[0] for name, _ in level.named_parameters()} == {"router", "experts", "merged", "scales"}
    torch.testing.assert_close(level(x, TASKS, False).hidden, whole, rtol=1e-10, atol=1e-10)
    one = level(x[:, 1:2], ["edges"], False) if shared else level(x[:1, 1:2], ["edges"], False)
    torch.testing.assert_close(one.hidden[0, 0], whole[0, 1], rtol=1e-10, atol=1e-10)
    before = {name: p.clone() for name, p in level.named_parameters()}
    level.fold()
    assert all(torch.equal(p, before[name]) for name, p in level.named_parameters())


@pytest.mark.parametrize("latency_aware", [False, True])
def test_the_balance_loss_counts_images(latency_aware: bool) -> None:
    """Or what they cost: an expert of rank R takes 10 C R multiply-adds per patch."""
    level = level_of(balance_weight=0.5, latency_aware=latency_aware).train()
    out = level(drawn(1, B, C, *GRID), ["depth"], True)
    record = out.routing[0]
    importance, load = [0.0] * len(RANKS), [0.0] * len(RANKS)
    for b in range(B):
        for e in record.indices["depth"][b].tolist():
            importance[e] += record.weights["depth"][b, e].item()
            load[e] += 1

    def cv2(x: list[float]) -> float:
        mean = sum(x) / len(x)
        return sum((v - mean) ** 2 for v in x) / (len(x) - 1) / mean**2

    if latency_aware:
        costs = [10 * C * rank for rank in RANKS]
        importance, load = ([v * c / sum(costs) for v, c in zip(x, costs, strict=True)] for x in (importance, load))
    assert out.auxiliary[0].item() == pytest.approx(0.5 * (cv2(importance) + cv2(load)), rel=1e-6)
