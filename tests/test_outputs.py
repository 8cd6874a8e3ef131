"""The routing record against its definitions."""

import math

import pytest
import torch

from moe_mtl.outputs import MultiTaskOutput, Routing

WEIGHTS = {"a": torch.tensor([[1.0, 0.0], [0.5, 0.5]]), "b": torch.tensor([[0.25] * 4])}
RECORD = Routing("levels.0", WEIGHTS, {"a": ("a.0", "s.0"), "b": ("a.0", "b.0", "s.0", "s.1")})


def test_entropy_is_the_mean_over_rows_in_nats() -> None:
    entropy = RECORD.entropy()
    assert entropy["a"].item() == pytest.approx(math.log(2) / 2)  # 0 ln 0 is 0
    assert entropy["b"].item() == pytest.approx(math.log(4))
    assert entropy["a"].shape == ()


def test_utilisation_is_the_mean_weight() -> None:
    assert RECORD.utilisation()["a"].tolist() == [0.75, 0.25]
    assert RECORD.utilisation()["b"].sum().item() == 1


def test_half_precision_weights_are_summed_in_float32() -> None:
    weights = torch.tensor([[1.0, 0.0], [1 - 2**-8, 2**-8]], dtype=torch.bfloat16)
    record = Routing("x", {"a": weights}, {"a": ("0", "1")})
    assert record.utilisation()["a"].tolist() == [1 - 2**-9, 2**-9]  # the first is no bfloat16
    entropy = -(1 - 2**-8) * math.log(1 - 2**-8) - 2**-8 * math.log(2**-8)
    assert record.entropy()["a"].item() == pytest.approx(entropy / 2, rel=1e-6)


def test_output_is_a_dict_and_a_tuple_of_what_is_there() -> None:
    hidden, logits = torch.zeros(2, 1, 3), {"a": torch.zeros(2, 1)}
    out = MultiTaskOutput(last_hidden_state=hidden, logits=logits)
    assert list(out) == ["last_hidden_state", "logits"]
    assert out[0] is hidden  # a tensor comes first: transformers looks there
    assert out["logits"] is logits
    assert out.loss is None
    assert out.to_tuple() == (hidden, logits)
