"""Expert banks and mixtures against loops over experts and rows, in float64."""

import math

import pytest
import torch
from torch import Tensor

from moe_mtl.layers.experts import ACTIVATIONS, ExpertBank, dead_units, mix, mix_groups

PLAIN = {
    "relu": lambda v: max(v, 0.0),
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "silu": lambda v: v / (1 + math.exp(-v)),
    "tanh": math.tanh,
}


def bank_of(**options: object) -> ExpertBank:
    torch.manual_seed(0)
    bank = ExpertBank(**{"num_experts": 3, "input_dim": 4, "dims": [5, 2], **options}).double()
    for parameter in bank.parameters():  # biases too: they start at 0
        torch.nn.init.normal_(parameter)
    return bank


def expert_by_hand(bank: ExpertBank, expert: int, x: list[float], activation: str, last: bool = True) -> list[float]:
    """One expert, one row, one unit at a time; `last=False` stops before the last activation."""
    for layer in range(len(bank.dims)):
        weight, bias = bank.weights[layer][expert].tolist(), bank.biases[layer][expert].tolist()
        x = [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        if last or layer + 1 < len(bank.dims):
            x = [PLAIN[activation](v) for v in x]
    return x


@pytest.mark.parametrize("dims", [[2], [5, 2], [3, 4, 2]])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_bank_is_a_loop_over_experts(dims: list[int], activation: str) -> None:
    bank = bank_of(dims=dims, activation=activation)
    x = torch.randn(6, 4, dtype=torch.float64)
    out = bank(x)
    assert out.shape == (3, 6, 2)
    expected = [[expert_by_hand(bank, e, row.tolist(), activation) for row in x] for e in range(3)]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def normalised_by_hand(bank: ExpertBank, x: Tensor, mean: list[list[float]], var: list[list[float]]) -> Tensor:
    out = torch.empty(3, len(x), 2, dtype=torch.float64)
    for e in range(3):
        for b, row in enumerate(x):
            hidden = expert_by_hand(bank, e, row.tolist(), "silu", last=False)
            for h, value in enumerate(hidden):
                unit = e * 2 + h
                value = (value - mean[e][h]) / math.sqrt(var[e][h] + bank.norm.eps)
                value = value * bank.norm.weight[unit].item() + bank.norm.bias[unit].item()
                out[e, b, h] = PLAIN["silu"](value)
    return out


def test_batch_norm_normalises_each_experts_last_linear_output() -> None:
    """HoME: Swish(BN(MLP(x))), the MLP's last layer linear; statistics per expert and unit over the batch."""
    bank = bank_of(activation="silu", batch_norm=True).train()
    x = torch.randn(7, 4, dtype=torch.float64)
    raw = [[expert_by_hand(bank, e, row.tolist(), "silu", last=False) for row in x] for e in range(3)]
    mean = [[sum(row[h] for row in raw[e]) / 7 for h in range(2)] for e in range(3)]
    var = [[sum((row[h] - mean[e][h]) ** 2 for row in raw[e]) / 7 for h in range(2)] for e in range(3)]
    torch.testing.assert_close(bank(x), normalised_by_hand(bank, x, mean, var), rtol=1e-10, atol=1e-12)

    bank.eval()
    bank.norm.running_mean.normal_()
    bank.norm.running_var.uniform_(0.5, 2)
    before = bank.norm.running_mean.clone()
    mean, var = bank.norm.running_mean.view(3, 2).tolist(), bank.norm.running_var.view(3, 2).tolist()
    torch.testing.assert_close(bank(x), normalised_by_hand(bank, x, mean, var), rtol=1e-10, atol=1e-12)
    assert torch.equal(bank.norm.running_mean, before)  # evaluation leaves the statistics alone


def test_folded_batch_norm_gives_the_same_output() -> None:
    bank = bank_of(activation="silu", batch_norm=True).eval()
    bank.norm.running_mean.normal_()
    bank.norm.running_var.uniform_(0.1, 3)
    x = torch.randn(5, 4, dtype=torch.float64)
    before = bank(x)
    bank.fold_batch_norm()
    assert bank.norm is None
    assert not [name for name in bank.state_dict() if "norm" in name]
    torch.testing.assert_close(bank(x), before, rtol=1e-12, atol=1e-12)
    bank.fold_batch_norm()  # a second time does nothing
    torch.testing.assert_close(bank(x), before, rtol=1e-12, atol=1e-12)


def test_experts_differ_at_the_start_and_biases_are_zero() -> None:
    """PaddleRec's experts once all stayed alike, from constant initialisation."""
    bank = ExpertBank(4, 16, [8, 8])
    for weight in bank.weights:
        for i in range(4):
            for j in range(i):
                assert (weight[i] - weight[j]).abs().max() > 0.05
        assert weight.abs().max() <= math.sqrt(6 / weight.shape[-1])
    assert all(bool((bias == 0).all()) for bias in bank.biases)


def test_dropout_scales_what_it_keeps_in_training_only() -> None:
    bank = bank_of(dims=[400], dropout=0.25, activation="tanh")
    x = torch.randn(3, 4, dtype=torch.float64)
    whole = bank.eval()(x)
    assert torch.equal(whole, bank(x))
    dropped = bank.train()(x)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (whole / 0.75)[kept])
    assert 0.2 < 1 - kept.double().mean() < 0.3


@pytest.mark.parametrize(("rows", "width"), [(1, 3), (4, 3), (70, 3), (70, 80)])  # several ways to multiply
def test_mix_is_the_weighted_sum_over_all_groups(rows: int, width: int) -> None:
    torch.manual_seed(0)
    groups = [torch.randn(e, rows, width, dtype=torch.float64) for e in (2, 1, 3)]
    weights = torch.randn(rows, 6, dtype=torch.float64)
    everyone = [expert for group in groups for expert in group]
    expected = torch.zeros(rows, width, dtype=torch.float64)
    for b in range(rows):
        for e, expert in enumerate(everyone):
            expected[b] += weights[b, e].item() * expert[b]
    torch.testing.assert_close(mix(weights, groups), expected)
    torch.testing.assert_close(mix(weights[:, :2], groups[:1]), mix(weights[:, :2], [groups[0][:1], groups[0][1:]]))


@pytest.mark.parametrize("together", [False, True])
def test_mixtures_over_groups(together: bool) -> None:
    torch.manual_seed(0)
    hidden = {name: torch.randn(size, 4, 3, dtype=torch.float64) for name, size in (("a", 2), ("b", 1), ("s", 2))}
    sees = {"b": ("b", "s"), "all": ("s", "a", "b"), "a": ("a",)}  # in another order than the groups'
    sizes = {output: sum(len(hidden[group]) for group in groups) for output, groups in sees.items()}
    weights = {output: torch.randn(4, size, dtype=torch.float64) for output, size in sizes.items()}
    mixed = mix_groups(weights, sees, hidden, together)
    assert list(mixed) == list(sees)
    for output, groups in sees.items():
        experts = [expert for group in groups for expert in hidden[group]]
        for b in range(4):
            expected = sum(weights[output][b, e].item() * expert[b] for e, expert in enumerate(experts))
            torch.testing.assert_close(mixed[output][b], expected)


def test_gradients_of_bank_and_mixture() -> None:
    bank = bank_of(activation="tanh", batch_norm=True).train()
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    parameters = tuple(bank.parameters())

    def out(x: Tensor, weights: Tensor, *_: Tensor) -> Tensor:
        return mix(weights, [bank(x)])

    assert torch.autograd.gradcheck(out, (x, weights, *parameters))


def test_dead_units_are_those_that_are_zero_for_every_row() -> None:
    hidden = torch.tensor([[[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]], [[1.0] * 4, [0.0] * 4]])
    shares = dead_units(hidden, ["a", "b"])
    assert {name: share.item() for name, share in shares.items()} == {"a": 0.5, "b": 0.0}
