"""Balance losses held to their equations, written as loops in float64."""

import math

import pytest
import torch
from torch import Tensor

from moe_mtl.layers import balance

N, E, K = 13, 5, 2


def routed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and the choice of the K highest with their softmax over all."""
    logits_NE = torch.randn(N, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weights_NK, indices_NK = logits_NE.softmax(-1).topk(K)
    return logits_NE, indices_NK, weights_NK


def cv_squared_reference(values: list[float]) -> float:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return variance / (mean * mean + 1e-10)


def test_importance_and_load_are_sums_over_tokens() -> None:
    _, indices_NK, weights_NK = routed()
    importance, load = [0.0] * E, [0] * E
    for n in range(N):
        for k in range(K):
            importance[indices_NK[n, k]] += weights_NK[n, k].item()
            load[indices_NK[n, k]] += 1
    torch.testing.assert_close(
        balance.importance(weights_NK, indices_NK, E), torch.tensor(importance, dtype=torch.float64)
    )
    assert balance.load(indices_NK, E).tolist() == load


def test_balance_of_one_gate() -> None:
    _, indices_NK, weights_NK = routed()
    importance_E, load_E = balance.importance(weights_NK, indices_NK, E), balance.load(indices_NK, E, torch.float64)
    expected = cv_squared_reference(importance_E.tolist()) + cv_squared_reference(load_E.tolist())
    assert balance.load_balance(importance_E, load_E).item() == pytest.approx(expected, rel=1e-12)


def test_m3vit_balance_of_one_expert_stays_on_its_device() -> None:
    """The official code returns a fresh CPU tensor for one expert, without a graph."""
    x_E = torch.ones(1, dtype=torch.float64, requires_grad=True, device="cpu")
    loss = balance.cv_squared(x_E)
    assert loss.item() == 0
    assert loss.requires_grad
    assert balance.cv_squared(torch.ones(1, device="meta")).device.type == "meta"


def test_shiftaddvit_gives_the_faster_expert_more_tokens() -> None:
    cost_E = torch.tensor([1.0, 4.0], dtype=torch.float64)
    even, by_cost = torch.tensor([50.0, 50.0]).double(), torch.tensor([80.0, 20.0]).double()
    assert balance.load_balance(by_cost, by_cost, cost_E).item() == pytest.approx(0, abs=1e-12)
    share = [0.2 * 50, 0.8 * 50]
    assert balance.load_balance(even, even, cost_E).item() == pytest.approx(2 * cv_squared_reference(share), rel=1e-12)


def test_m3vit_smooth_load_compares_logits_with_logits() -> None:
    """The official code compares logits with thresholds taken after the softmax."""
    std = 0.7
    clean_NE, _, _ = routed()
    noisy_NE = clean_NE + std * torch.randn(N, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = []
    for e in range(E):
        total = 0.0
        for n in range(N):
            others = sorted((noisy_NE[n, j].item() for j in range(E) if j != e), reverse=True)
            z = (clean_NE[n, e].item() - others[K - 1]) / std
            total += 0.5 * (1 + math.erf(z / math.sqrt(2)))
        expected.append(total)
    found_E = balance.smooth_load(clean_NE, noisy_NE, std, K)
    torch.testing.assert_close(found_E, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    clean_NE.requires_grad_()
    balance.smooth_load(clean_NE, noisy_NE, std, K).square().sum().backward()
    assert clean_NE.grad is not None
    assert clean_NE.grad.abs().sum() > 0
    assert balance.smooth_load(clean_NE, noisy_NE, std, E).tolist() == [N] * E


def test_z_loss() -> None:
    logits_NE = routed()[0].float()
    expected = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits_NE.tolist()) / N
    assert balance.z_loss(logits_NE).item() == pytest.approx(expected, rel=1e-5)


def mutual_information_reference(joint: list[list[float]]) -> float:
    tasks = [sum(row) for row in joint]
    experts = [sum(row[e] for row in joint) for e in range(len(joint[0]))]
    total = 0.0
    for t, row in enumerate(joint):
        for e, p in enumerate(row):
            if p > 0:
                total += p * math.log(p / (tasks[t] * experts[e]))
    return total


def test_mutual_information() -> None:
    joint_TE = torch.stack([routed(0)[0].softmax(-1).mean(0), (3 * routed(1)[0]).softmax(-1).mean(0)]) / 2
    found = balance.mutual_information(joint_TE).item()
    assert found == pytest.approx(mutual_information_reference(joint_TE.tolist()), rel=1e-10)
    apart = torch.eye(3, dtype=torch.float64) / 3
    assert balance.mutual_information(apart).item() == pytest.approx(math.log(3))
    alike = torch.full((3, 4), 1 / 12, dtype=torch.float64)
    assert balance.mutual_information(alike).item() == pytest.approx(0, abs=1e-12)


def test_running_statistics_stand_in_for_tasks_that_a_step_lacks() -> None:
    a_NE, b_NE, c_NE = (routed(seed)[0].softmax(-1) for seed in range(3))
    b_NE = b_NE[:7]  # fewer tokens, as much weight
    statistics = balance.TaskExpertStatistics(["a", "b"], E, decay=0.9).double()
    whole = statistics({"a": a_NE, "b": b_NE})
    expected = mutual_information_reference((torch.stack([a_NE.mean(0), b_NE.mean(0)]) / 2).tolist())
    assert whole.item() == pytest.approx(-expected, rel=1e-10)
    c_NE.requires_grad_()
    statistics.update()
    one = statistics({"a": c_NE})
    joint = torch.stack([c_NE.mean(0), b_NE.mean(0)]) / 2
    assert one.item() == pytest.approx(-mutual_information_reference(joint.tolist()), rel=1e-10)
    one.backward()
    assert c_NE.grad is not None
    assert c_NE.grad.abs().sum() > 0
    statistics({"a": c_NE})  # again, as gradient checkpointing runs a layer
    statistics.update()
    statistics.update()
    torch.testing.assert_close(statistics.seen["a"], 0.9 * a_NE.mean(0) + 0.1 * c_NE.detach().mean(0))
    torch.testing.assert_close(statistics.seen["b"], b_NE.mean(0))


def test_a_task_that_was_never_seen_has_no_experts_yet() -> None:
    statistics = balance.TaskExpertStatistics(["a", "b", "c"], E).double()
    a_NE = routed()[0].softmax(-1)
    assert statistics({"a": a_NE}).item() == pytest.approx(0, abs=1e-12)  # of one task there is nothing to tell
