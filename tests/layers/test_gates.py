"""Softmax gates and DSelect-k against loops in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_mtl.layers.gates import DSelectKGate, SoftmaxGate, smooth_step


def softmax_by_hand(logits: list[float]) -> list[float]:
    top = max(logits)
    exp = [math.exp(v - top) for v in logits]
    return [v / sum(exp) for v in exp]


def step_by_hand(t: float, gamma: float) -> float:
    if t <= -gamma / 2:
        return 0.0
    if t >= gamma / 2:
        return 1.0
    return -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5


# --- softmax ----------------------------------------------------------------------------------------------------------


def test_softmax_gate_has_no_bias_and_no_norm() -> None:
    gate = SoftmaxGate(3, 4)
    assert {name: tuple(p.shape) for name, p in gate.state_dict().items()} == {"linear.weight": (4, 3)}


def test_softmax_gate_row_by_row() -> None:
    torch.manual_seed(0)
    gate = SoftmaxGate(3, 4).double()
    x = torch.randn(5, 3, dtype=torch.float64) * 3
    weights, auxiliary = gate(x)
    assert auxiliary is None
    expected = [
        softmax_by_hand([sum(w * v for w, v in zip(row, x_row, strict=True)) for row in gate.linear.weight.tolist()])
        for x_row in x.tolist()
    ]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights.sum(1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_gate_survives_the_largest_half_precision_logits(dtype: torch.dtype) -> None:
    gate = SoftmaxGate(1, 3).to(dtype)
    gate.linear.weight.data = torch.tensor([[6e4], [-6e4], [0.0]], dtype=dtype)
    weights, _ = gate(torch.tensor([[1.0], [-1.0]], dtype=dtype))
    assert weights.dtype == dtype
    assert weights.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_gate_dropout_renormalises_and_never_drops_all() -> None:
    torch.manual_seed(0)
    gate = SoftmaxGate(3, 4, dropout=0.4).double()
    x = torch.randn(2000, 3, dtype=torch.float64)
    whole, _ = gate.eval()(x)
    assert bool((whole > 0).all())
    dropped, _ = gate.train()(x)
    kept = dropped > 0
    torch.testing.assert_close(dropped.sum(1), torch.ones(2000, dtype=torch.float64))
    torch.testing.assert_close(dropped, whole * kept / (whole * kept).sum(1, keepdim=True))
    # An expert goes with 0.4, unless all four would: 0.4 - 0.4^4 = 0.374.
    torch.testing.assert_close(
        1 - kept.double().mean(0), torch.full((4,), 0.374, dtype=torch.float64), rtol=0, atol=0.04
    )

    strict = SoftmaxGate(3, 2, dropout=0.99).train()
    weights, _ = strict(torch.randn(500, 3))
    torch.testing.assert_close(weights.sum(1), torch.ones(500))


# --- smooth step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.5])
def test_smooth_step_at_its_corners(gamma: float) -> None:
    half = gamma / 2
    points = [-10 * gamma, -half, -half / 2, 0.0, half / 3, half, 10 * gamma]
    t = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    step = smooth_step(t, gamma)
    assert step.tolist() == pytest.approx([step_by_hand(v, gamma) for v in points], abs=1e-14)
    assert step[1].item() == 0
    assert step[3].item() == 0.5
    assert step[5].item() == 1
    (slope,) = torch.autograd.grad(step.sum(), t)
    assert slope[[0, 1, 5, 6]].tolist() == [0, 0, 0, 0]  # exactly: a saturated bit is frozen
    assert slope[3].item() == pytest.approx(1.5 / gamma)
    # Continuous with matching slopes: no jump just inside of the corners.
    inside = torch.tensor([-half + 1e-6 * gamma, half - 1e-6 * gamma], dtype=torch.float64, requires_grad=True)
    values = smooth_step(inside, gamma)
    assert values.tolist() == pytest.approx([0, 1], abs=1e-10)
    (slope,) = torch.autograd.grad(values.sum(), inside)
    assert slope.abs().max().item() < 1e-4 / gamma


@settings(deadline=None, max_examples=60)
@given(st.floats(0.01, 100), st.floats(-200, 200), st.floats(-200, 200))
def test_smooth_step_is_monotone_symmetric_and_bounded(gamma: float, a: float, b: float) -> None:
    low, high = smooth_step(torch.tensor([min(a, b), max(a, b)], dtype=torch.float64), gamma).tolist()
    assert 0 <= low <= high + 1e-12 <= 1 + 2e-12
    mirrored = smooth_step(torch.tensor(-a, dtype=torch.float64), gamma).item()
    assert mirrored == pytest.approx(1 - smooth_step(torch.tensor(a, dtype=torch.float64), gamma).item(), abs=1e-12)


# --- DSelect-k --------------------------------------------------------------------------------------------------------


def dselect_of(experts: int, k: int, static: bool, gamma: float = 1.0, **options: object) -> DSelectKGate:
    torch.manual_seed(experts * 10 + k)
    gate = DSelectKGate(3, experts, k, gamma=gamma, static=static, **options).double()
    for parameter in gate.parameters():  # off the start, some bits saturated
        torch.nn.init.normal_(parameter, std=0.4 * gamma)
    return gate


def selectors_by_hand(gate: DSelectKGate, x: list[float]) -> tuple[list[list[float]], list[float]]:
    """Distribution over experts of each selector, and the mixture of selectors, for one row."""
    k, bits = gate.num_selected, max(1, math.ceil(math.log2(gate.num_experts)))
    if gate.static:
        z, w = gate.bits.flatten().tolist(), gate.mixture.tolist()
    else:
        z, w = (
            [sum(a * v for a, v in zip(row, x, strict=True)) for row in linear.weight.tolist()]
            for linear in (gate.bits, gate.mixture)
        )
        z = [a + b for a, b in zip(z, gate.bits.bias.tolist(), strict=True)]
        w = [a + b for a, b in zip(w, gate.mixture.bias.tolist(), strict=True)]
    rows = []
    for j in range(k):
        row = []
        for expert in range(gate.num_experts):
            probability = 1.0
            for bit in range(bits):
                on = step_by_hand(z[j * bits + bit], gate.gamma)
                probability *= on if (expert // 2**bit) % 2 else 1 - on
            row.append(probability)
        rows.append(row)
    return rows, softmax_by_hand(w)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("gamma", [1.0, 0.4])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (2, 1), (4, 2), (6, 2), (8, 3), (5, 5)])
def test_dselect_k_row_by_row(experts: int, k: int, gamma: float, static: bool) -> None:
    gate = dselect_of(experts, k, static, gamma)
    x = torch.randn(4, 3, dtype=torch.float64)
    weights, auxiliary = gate.eval()(x)
    assert auxiliary is None  # the regulariser is training's
    expected = []
    for row in x.tolist():
        selectors, mixture = selectors_by_hand(gate, row)
        expected.append([sum(a * r[i] for a, r in zip(mixture, selectors, strict=True)) for i in range(experts)])
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    if experts in (2, 4, 8):
        torch.testing.assert_close(weights.sum(1), torch.ones(4, dtype=torch.float64))
    if not static:
        assert (weights[0] - weights[1]).abs().max() > 1e-6


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("experts", [1, 4, 6])
def test_dselect_k_regulariser_is_a_sum_over_rows_selectors_and_experts(experts: int, static: bool) -> None:
    """lambda * sum -r log(r + 1e-6), plus, where E is no power of two, the sum of 1 / (mass on codes of experts)."""
    gate = dselect_of(experts, min(2, experts), static, entropy_weight=0.03).train()
    torch.nn.init.uniform_(gate.bits if static else gate.bits.bias, -0.3, 0.3)
    x = torch.randn(5, 3, dtype=torch.float64) * (0 if static else 0.1)
    _, loss = gate(x)
    expected = 0.0
    for row in x.tolist()[: 1 if static else 5]:  # a static gate has one row for all
        for selector in selectors_by_hand(gate, row)[0]:
            expected -= 0.03 * sum(r * math.log(r + 1e-6) for r in selector)
            if experts != 4:
                expected += 1 / sum(selector)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert (loss.item() > 1) == (experts != 4)


def test_dselect_k_reach_term_becomes_a_constant_once_all_mass_is_on_experts() -> None:
    gate = dselect_of(6, 2, True, entropy_weight=0.5).train()
    gate.bits.data = torch.tensor([[5.0, -5, -5], [5, -5, 5]], dtype=torch.float64)  # experts 1 and 5
    weights, loss = gate(torch.zeros(3, 3, dtype=torch.float64))
    assert weights[0].nonzero().flatten().tolist() == [1, 5]
    assert loss.item() == pytest.approx(2.0, abs=1e-5)  # 1 per selector, and no entropy left
    loss.backward()
    assert bool((gate.bits.grad == 0).all())


@pytest.mark.parametrize("static", [True, False])
def test_dselect_k_stuck_on_a_code_without_an_expert_harms_no_other_row(static: bool) -> None:
    """1 / 0 would turn the gradient of everything into NaN."""
    gate = dselect_of(6, 1, static, entropy_weight=0.1).train()
    x = torch.zeros(2, 3, dtype=torch.float64)
    if static:
        gate.bits.data.fill_(5.0)  # code 7 of experts 0 to 5
    else:
        torch.nn.init.constant_(gate.bits.weight, 5.0)
        torch.nn.init.zeros_(gate.bits.bias)
        x[0] = 1.0
    weights, loss = gate(x)
    assert weights[0].sum() == 0
    (loss + weights.sum()).backward()
    assert loss.item() > 1e5
    assert all(bool(torch.isfinite(p.grad).all()) for p in gate.parameters())
    if not static:
        assert gate.bits.bias.grad.abs().max() > 1e-3  # from the other row


def test_dselect_k_codes_name_each_expert_once() -> None:
    gate = DSelectKGate(1, 8, 1).double()
    seen = []
    for bits in itertools.product([-5.0, 5.0], repeat=3):
        gate.bits.data = torch.tensor([bits], dtype=torch.float64)
        weights, _ = gate.eval()(torch.zeros(1, 1, dtype=torch.float64))
        assert sorted(weights[0].tolist()) == [0.0] * 7 + [1.0]
        seen.append(weights[0].argmax().item())
    assert sorted(seen) == list(range(8))


@pytest.mark.parametrize("static", [True, False])
def test_dselect_k_has_at_most_k_weights_once_saturated(static: bool) -> None:
    gate = dselect_of(8, 3, static)
    x = torch.randn(20, 3, dtype=torch.float64)
    assert gate.saturated(x).item() < 1
    with torch.no_grad():
        for parameter in (gate.bits,) if static else (gate.bits.weight, gate.bits.bias):
            parameter.mul_(1e9)
    assert gate.saturated(x).item() == 1
    weights, _ = gate(x)
    assert bool(((weights > 0).sum(1) <= 3).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(20, dtype=torch.float64))


def test_dselect_k_entropy_weight_warms_up_linearly() -> None:
    gate = dselect_of(4, 2, True, entropy_weight=0.8, entropy_warmup_steps=10).train()
    losses = []
    for step in (0, 1, 5, 10, 50):
        gate.training_step = step
        losses.append(gate(torch.zeros(1, 3, dtype=torch.float64))[1].item())
    full = losses[-1]
    assert full > 0.01
    assert losses == pytest.approx([0, full / 10, full / 2, full, full])


def test_dselect_k_starts_where_the_paper_starts() -> None:
    for static in (True, False):
        gate = DSelectKGate(50, 8, 4, gamma=2.0, static=static)
        bits = [gate.bits] if static else [gate.bits.weight, gate.bits.bias]
        assert all(0.01 < p.abs().max() <= 0.02 for p in bits)  # gamma / 100
        mixture = gate.mixture if static else gate.mixture.weight
        assert 0.02 < mixture.abs().max() <= 0.05


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("experts", [4, 6])
def test_dselect_k_gradients(static: bool, experts: int) -> None:
    gate = dselect_of(experts, 2, static, entropy_weight=0.1).train()
    with torch.no_grad():  # away from the corners, where the third derivative jumps
        for parameter in gate.parameters():
            parameter.uniform_(-0.1, 0.1)
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=not static)

    def out(*_: Tensor) -> tuple[Tensor, Tensor]:
        weights, loss = gate(x)
        return weights, loss

    inputs = tuple(gate.parameters()) + (() if static else (x,))
    assert torch.autograd.gradcheck(out, inputs)
