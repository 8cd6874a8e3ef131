"""The feature encoder, cell by cell in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_mtl.layers.features import FeatureEncoder

# Widths are powers of two: the library keeps 1 / width in float32.
BINS = [[-1.0, 0.0, 0.5, 2.5], None, [0.0, 1.0], [-2.0, -1.0, 3.0]]
NUMERIC = [{"name": f"n{i}", "kind": "numeric", "bins": bins} for i, bins in enumerate(BINS)]
CATEGORICAL = [{"name": f"c{i}", "kind": "categorical", "num_categories": n} for i, n in enumerate([4, 1, 6])]
BAGS = [
    {"name": f"s{i}", "kind": kind, "num_categories": n, "pooling": pooling, "max_length": 5}
    for i, (kind, n, pooling) in enumerate([("multi_hot", 3, "mean"), ("sequence", 5, "sum"), ("sequence", 2, "max")])
]
# Kinds interleaved: within a kind, the order of the list is the order of the columns.
FEATURES = [NUMERIC[0], BAGS[0], CATEGORICAL[0], NUMERIC[1], BAGS[1], CATEGORICAL[1], *NUMERIC[2:], *CATEGORICAL[2:]]
FEATURES.append(BAGS[2])


def encoder_of(features: list[dict[str, Any]], kind: str = "piecewise_linear") -> FeatureEncoder:
    torch.manual_seed(0)
    encoder = FeatureEncoder(features, 3, kind, 2).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter)
    return encoder


def rows(count: int = 6) -> dict[str, Tensor]:
    torch.manual_seed(1)
    cells = [torch.randint(-1, bag["num_categories"], (count, 5)) for bag in BAGS]
    sequences = torch.stack(cells, dim=1)
    sequences[0] = -1  # all cells of the first row are empty
    sequences[1] = torch.tensor([-1, 0, -1, -1, -1])  # one item
    return {
        "numeric_BF": torch.randn(count, 4, dtype=torch.float64) * 3,
        "categorical_BF": torch.stack([torch.randint(c["num_categories"], (count,)) for c in CATEGORICAL], dim=1),
        "sequences_BFL": sequences,
    }


def test_one_table_row_by_row() -> None:
    encoder = encoder_of(FEATURES)
    assert [name for name, _ in encoder.named_parameters() if "embedding" in name] == ["embedding.weight"]
    table = encoder.embedding.weight
    assert table.shape == (4 + 1 + 6 + 3 + 5 + 2, 3)
    inputs = rows()
    out = encoder(**inputs)
    assert out.shape == (6, encoder.output_dim)
    assert encoder.output_dim == 3 * 3 + 3 * 3 + 3 * 2 + 1  # categorical, bags, numeric with bins, plain numeric
    for b in range(6):
        parts = [
            table[offset + inputs["categorical_BF"][b, column]]
            for column, offset in enumerate([0, 4, 5])  # sizes 4, 1, 6
        ]
        for column, (offset, bag) in enumerate(zip([11, 14, 19], BAGS, strict=True)):
            items = [table[offset + i] for i in inputs["sequences_BFL"][b, column].tolist() if i >= 0]
            if not items:
                pooled = torch.zeros(3, dtype=torch.float64)
            elif bag["pooling"] == "max":
                pooled = torch.tensor([max(item[d].item() for item in items) for d in range(3)], dtype=torch.float64)
            else:
                pooled = sum(items) / (len(items) if bag["pooling"] == "mean" else 1)
            parts.append(pooled)
        embedded = [piecewise_linear_by_hand(encoder, slot, inputs["numeric_BF"][b, i].item()) for slot, i in SLOTS]
        parts += [*embedded, inputs["numeric_BF"][b, 1:2]]
        torch.testing.assert_close(out[b], torch.cat(parts), rtol=1e-10, atol=1e-12)


SLOTS = [(0, 0), (1, 2), (2, 3)]  # the columns with bins


def encoding_by_hand(x: float, bins: list[float]) -> list[float]:
    """Gorishniy et al. 2022, equation 1: 0 below the bin (but for the first), 1 above (but for the last)."""
    count = len(bins) - 1
    out = []
    for t in range(1, count + 1):
        low, high = bins[t - 1], bins[t]
        if x < low and t > 1:
            out.append(0.0)
        elif x >= high and t < count:
            out.append(1.0)
        else:
            out.append((x - low) / (high - low))
    return out


def piecewise_linear_by_hand(encoder: FeatureEncoder, slot: int, x: float) -> Tensor:
    """Version B: a linear embedding plus a linear map of the encoding."""
    bins = [BINS[i] for i in (0, 2, 3)][slot]
    encoding = encoding_by_hand(x, bins)
    # The library keeps the last component in the last place and leaves the unused ones between at 0.
    width = 3
    padded = encoding[:-1] + [0.0] * (width - len(encoding)) + encoding[-1:]
    numeric = encoder.numeric
    linear = numeric.linear0.bias[slot] + numeric.linear0.weight[slot] * x
    return linear + sum(value * numeric.linear.weight[slot, t] for t, value in enumerate(padded))


@pytest.mark.parametrize("x", [-7.0, -1.0, -0.3, 0.0, 0.2, 0.5, 1.0, 2.5, 9.0])
def test_piecewise_linear_is_the_papers_formula_at_and_beyond_its_edges(x: float) -> None:
    encoder = encoder_of([NUMERIC[0], NUMERIC[2], NUMERIC[3]])
    out = encoder(torch.full((1, 3), x, dtype=torch.float64))
    expected = torch.cat([piecewise_linear_by_hand(encoder, slot, x) for slot in range(3)])
    torch.testing.assert_close(out[0], expected, rtol=1e-10, atol=1e-12)


def test_piecewise_linear_starts_linear() -> None:
    torch.manual_seed(0)
    encoder = FeatureEncoder([NUMERIC[0]], 3, "piecewise_linear", 2)
    x = torch.tensor([[-3.0], [0.1], [0.2], [0.3], [5.0]])
    out = encoder(x)
    slope = (out[1:] - out[:-1]) / (x[1:] - x[:-1])
    torch.testing.assert_close(slope, slope[:1].expand_as(slope), rtol=1e-3, atol=1e-5)


def test_periodic_is_cos_and_sin_of_learnt_frequencies_then_linear_and_relu() -> None:
    encoder = encoder_of(NUMERIC, "periodic")
    assert encoder.output_dim == 8  # bins play no part
    x = torch.randn(3, 4, dtype=torch.float64)
    out = encoder(x)
    frequencies, linear = encoder.numeric.periodic.weight, encoder.numeric.linear
    for b in range(3):
        for column in range(4):
            angles = [2 * math.pi * c.item() * x[b, column].item() for c in frequencies[column]]
            waves = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
            value = linear.bias[column] + sum(w * linear.weight[column, i] for i, w in enumerate(waves))
            torch.testing.assert_close(out[b, 2 * column : 2 * column + 2], value.clamp_min(0), rtol=1e-9, atol=1e-10)


def test_scaled_is_the_number_itself() -> None:
    encoder = FeatureEncoder(NUMERIC, 3, "scaled", 2)
    x = torch.randn(3, 4)
    assert torch.equal(encoder(x), x)
    assert not list(encoder.parameters())
    assert encoder.bfloat16()(x).dtype == torch.bfloat16  # though there is no parameter to tell


def test_position_of_padding_and_length_do_not_matter() -> None:
    encoder = encoder_of(BAGS)
    ids = torch.tensor([[[-1, 1, -1, 0, -1]] * 3, [[0, 1, -1, -1, -1]] * 3])
    out = encoder(sequences_BFL=ids)
    torch.testing.assert_close(out[0], out[1])
    torch.testing.assert_close(encoder(sequences_BFL=ids[1:, :, :2])[0], out[1])
    assert torch.equal(encoder(sequences_BFL=ids[:, :, :0])[0], torch.zeros(9, dtype=torch.float64))


def test_gradients() -> None:
    encoder = encoder_of(FEATURES)
    inputs = rows(3)
    numeric = inputs.pop("numeric_BF").requires_grad_()
    assert torch.autograd.gradcheck(lambda n, *_: encoder(n, **inputs), (numeric, *encoder.parameters()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numeric_BF": None}, "input `numeric`: expected columns n0, n1, n2, n3; found nothing"),
        ({"categorical_BF": None}, "input `categorical`: expected columns c0"),
        ({"sequences_BFL": None}, "input `sequences`: expected columns s0"),
        ({"numeric_BF": torch.zeros(6, 3)}, r"input `numeric`: expected shape \[B, 4\], found \[6, 3\]"),
        ({"numeric_BF": torch.zeros(6)}, "input `numeric`: expected shape"),
        ({"numeric_BF": torch.zeros(6, 4, dtype=torch.int64)}, "input `numeric`: expected torch.float32"),
        ({"categorical_BF": torch.zeros(6, 3)}, "input `categorical`: expected torch.int64 or torch.int32, found"),
        ({"categorical_BF": torch.zeros(6, 3, dtype=torch.bool)}, "input `categorical`: expected torch.int64"),
        ({"categorical_BF": torch.zeros(5, 3, dtype=torch.int64)}, "expected 6 rows like the other inputs, found 5"),
        ({"sequences_BFL": torch.zeros(6, 3, dtype=torch.int64)}, r"input `sequences`: expected shape \[B, 3, L\]"),
        ({key: value[:0] for key, value in rows().items()}, "the batch is empty"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder_of(FEATURES)(**{**rows(), **change})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_numbers_name_column_and_row(value: float) -> None:
    inputs = rows()
    inputs["numeric_BF"][4, 2] = value
    with pytest.raises(ValueError, match=f"column 'n2', row 4: expected a finite number, found {value}"):
        encoder_of(FEATURES)(**inputs)


def test_opposite_infinities_and_overflowing_sums() -> None:
    encoder = encoder_of([NUMERIC[0]]).float()
    with pytest.raises(ValueError, match="column 'n0', row 0"):
        encoder(torch.tensor([[float("inf")], [-float("inf")]]))
    assert encoder(torch.tensor([[3e38], [3e38]])).shape == (2, 2)  # finite, though their sum is not


@pytest.mark.parametrize("value", [-1, 6, 2**40])
def test_ids_out_of_range_name_column_and_row(value: int) -> None:
    inputs = rows()
    inputs["categorical_BF"][3, 2] = value
    with pytest.raises(ValueError, match=rf"column 'c2', row 3: expected an id in \[0, 5\], found {value}"):
        encoder_of(FEATURES)(**inputs)


@pytest.mark.parametrize("value", [-2, 5])
def test_items_out_of_range_name_column_and_row(value: int) -> None:
    inputs = rows()
    inputs["sequences_BFL"][3, 1, 4] = value
    with pytest.raises(ValueError, match=rf"column 's1', row 3: expected an id in \[-1, 4\], found {value}"):
        encoder_of(FEATURES)(**inputs)


def test_a_superfluous_input_is_an_error() -> None:
    with pytest.raises(ValueError, match="input `categorical`: expected nothing: the model has no such column"):
        encoder_of([NUMERIC[0]])(torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="features: expected at least one column"):
        FeatureEncoder([], 3, "scaled", 2)


def test_int32_ids_are_as_good() -> None:
    encoder, inputs = encoder_of(FEATURES), rows()
    smaller = {name: value.to(torch.int32) if "numeric" not in name else value for name, value in inputs.items()}
    assert torch.equal(encoder(**smaller), encoder(**inputs))
