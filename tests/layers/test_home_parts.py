"""HoME's feature gates, self-gates and layers, row by row in float64."""

import math

import pytest
import torch
from torch import Tensor

from moe_mtl.layers.home import FeatureGate, HoMELayer, SelfGate


def softmax(logits: list[float]) -> list[float]:
    exp = [math.exp(v) for v in logits]
    return [v / sum(exp) for v in exp]


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def randomised(module: torch.nn.Module, std: float = 0.7) -> torch.nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    for sub in module.modules():
        if isinstance(sub, torch.nn.BatchNorm1d):
            sub.running_mean.normal_()
            sub.running_var.uniform_(0.5, 2)
    return module


def feature_gate_by_hand(gate: FeatureGate, v: Tensor) -> Tensor:
    """v * sum_l softmax(W v)_l * 2 sigmoid(v B_l A_l), one feature at a time."""
    mixture = softmax((gate.mixer.weight @ v).tolist())
    out = []
    for d in range(len(v)):
        scale = 0.0
        for share, down, up in zip(mixture, gate.down_LDR, gate.up_LRD, strict=True):
            rank = [sum(v[i].item() * down[i, r].item() for i in range(len(v))) for r in range(down.shape[1])]
            scale += share * 2 * sigmoid(sum(value * up[r, d].item() for r, value in enumerate(rank)))
        out.append(v[d].item() * scale)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize(("rank", "num_gates"), [(1, 1), (2, 3)])
def test_feature_gate_row_by_row(rank: int, num_gates: int) -> None:
    torch.manual_seed(0)
    gate = randomised(FeatureGate(4, rank, num_gates).double())
    v = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.stack([feature_gate_by_hand(gate, row) for row in v])
    torch.testing.assert_close(gate(v), expected, rtol=1e-10, atol=1e-12)
    inputs = (v.requires_grad_(), *gate.parameters())
    assert torch.autograd.gradcheck(lambda v, *_: gate(v), inputs)


def test_feature_gate_starts_at_one_and_can_leave_it() -> None:
    torch.manual_seed(0)
    gate = FeatureGate(6, 2, 2).double()
    v = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(gate(v), v, rtol=1e-15, atol=0)
    torch.testing.assert_close(FeatureGate(6, 2, 1)(v.float()), v.float(), rtol=0, atol=0)  # exactly
    gate(v).square().sum().backward()
    assert gate.down_LDR.grad.abs().max() > 1e-3


@pytest.mark.parametrize("experts", [1, 3])
def test_self_gate_is_a_sigmoid_for_one_expert_and_a_softmax_for_more(experts: int) -> None:
    torch.manual_seed(0)
    gate = SelfGate(3, experts).double()
    assert list(gate.state_dict()) == ["linear.weight"]
    x = torch.randn(4, 3, dtype=torch.float64)
    for row, weights in zip(x, gate(x), strict=True):
        logits = (gate.linear.weight @ row).tolist()
        assert weights.tolist() == pytest.approx([sigmoid(logits[0])] if experts == 1 else softmax(logits))


def expert_by_hand(layer: HoMELayer, group: str, index: int, x: Tensor) -> Tensor:
    """Swish(BN(MLP(gated x))) with running statistics; the MLP's last layer is linear."""
    bank = layer.experts[group]
    x = feature_gate_by_hand(layer.feature_gates[group], x)
    for number, (weight, bias) in enumerate(zip(bank.weights, bank.biases, strict=True)):
        x = weight[index] @ x + bias[index]
        if number + 1 < len(bank.weights):
            x = x * torch.sigmoid(x)
    units = slice(index * len(x), (index + 1) * len(x))
    norm = bank.norm
    x = (x - norm.running_mean[units]) / torch.sqrt(norm.running_var[units] + norm.eps)
    x = x * norm.weight[units] + norm.bias[units]
    return x * torch.sigmoid(x)


@pytest.mark.parametrize("own", [1, 2])
def test_layer_row_by_row(own: int) -> None:
    """out = sum Gate(g) {every seen expert} + sum SelfGate(s) {own experts}, own being the first group that is seen."""
    torch.manual_seed(0)
    sizes = {"p": own, "q": 2, "shared": 3}
    sees = {"p": ("p", "shared"), "all": ("shared", "p", "q")}
    options = {"dims": [4, 3], "rank": 2, "num_gates": 2, "dropout": 0.0, "gate_dropout": 0.0, "batch_norm": True}
    layer = HoMELayer("meta", {"p": 5, "q": 6, "shared": 5}, sizes, sees, 4, 2, **options).double()
    randomised(layer).eval()
    inputs = {name: torch.randn(3, width, dtype=torch.float64) for name, width in [("p", 5), ("q", 6), ("shared", 5)]}
    gate_inputs = {name: torch.randn(3, 4, dtype=torch.float64) for name in sees}
    self_inputs = {name: torch.randn(3, 2, dtype=torch.float64) for name in sees}
    got, routing = layer(inputs, gate_inputs, self_inputs, ["p", "all"], record=True)
    for output, groups in sees.items():
        for b in range(3):
            hidden = {g: [expert_by_hand(layer, g, i, inputs[g][b]) for i in range(sizes[g])] for g in groups}
            weights = softmax((layer.gates[output].linear.weight @ gate_inputs[output][b]).tolist())
            expected = sum(w * h for w, h in zip(weights, [h for g in groups for h in hidden[g]], strict=True))
            logits = (layer.self_gates[output].linear.weight @ self_inputs[output][b]).tolist()
            own_weights = [sigmoid(logits[0])] if len(logits) == 1 else softmax(logits)
            expected = expected + sum(w * h for w, h in zip(own_weights, hidden[groups[0]], strict=True))
            torch.testing.assert_close(got[output][b], expected, rtol=1e-9, atol=1e-11)
            assert routing.weights[output][b].tolist() == pytest.approx(weights)
    assert routing.experts["all"][0] == "shared.0"

    only, _ = layer({k: v for k, v in inputs.items() if k != "q"}, gate_inputs, self_inputs, ["p"], record=False)
    assert torch.equal(only["p"], got["p"])  # q's experts were not even looked at
