"""Bad inputs, for every model: an error that names the column or the task, before anything is computed."""

import math
from typing import Any

import pytest
import torch
import zoo

all_types = pytest.mark.parametrize("model_type", zoo.MODEL_TYPES)


@all_types
def test_bad_cells_name_the_column(model_type: str) -> None:
    model = zoo.model_of(model_type)

    def with_cell(name: str, place: tuple[int, ...], value: float) -> dict[str, Any]:
        inputs = zoo.inputs_of(model.config)
        inputs[name][place] = value
        return inputs

    cases = [
        (with_cell("numeric", (2, 1), math.nan), "column 'income', row 2: expected a finite number, found nan"),
        (with_cell("numeric", (0, 2), -math.inf), "column 'clicks', row 0: expected a finite number, found -inf"),
        (with_cell("categorical", (4, 1), 3), r"column 'device', row 4: expected an id in \[0, 2\], found 3"),
        (with_cell("categorical", (4, 0), -1), r"column 'city', row 4: expected an id in \[0, 6\], found -1"),
        (with_cell("sequences", (1, 1, 3), 9), r"column 'history', row 1: expected an id in \[-1, 8\], found 9"),
    ]
    inputs = zoo.inputs_of(model.config)
    inputs["numeric"] = inputs["numeric"].double().index_fill(1, torch.tensor(1), 1e300)
    with pytest.raises(ValueError, match=r"'income', row 0: expected a finite number in torch\.float32, found 1e"):
        model(**inputs)
    for train in (False, True):
        model.train(train)
        for inputs, message in cases:
            with pytest.raises(ValueError, match=message):
                model(**inputs)


@all_types
def test_missing_superfluous_and_misshapen_inputs(model_type: str) -> None:
    model = zoo.model_of(model_type)
    inputs = zoo.inputs_of(model.config)
    for name, columns in (("numeric", "age, income"), ("categorical", "city, device"), ("sequences", "tags_seen")):
        rest = {other: x for other, x in inputs.items() if other != name}
        with pytest.raises(ValueError, match=f"input `{name}`: expected columns {columns}.*; found nothing"):
            model(**rest)
        shape = rf"\[B, {inputs[name].shape[1]}{', L' if inputs[name].dim() == 3 else ''}\]"
        with pytest.raises(ValueError, match=f"input `{name}`: expected shape {shape}, found"):
            model(**{**inputs, name: inputs[name][:, :1]})
        with pytest.raises(ValueError, match=f"input `{name}`: expected a tensor, found list"):
            model(**{**inputs, name: inputs[name].tolist()})
    plain = zoo.model_of(model_type, features=[{"name": "x", "kind": "numeric"}])
    with pytest.raises(
        ValueError, match="input `categorical`: expected nothing: the model has no such column; found some"
    ):
        plain(numeric=torch.zeros(6, 1), categorical=inputs["categorical"])
    with pytest.raises(ValueError, match="expected 6 rows like the other inputs, found 5"):
        model(**{**inputs, "categorical": inputs["categorical"][:5]})
    with pytest.raises(TypeError, match="input_ids"):
        model(**inputs, input_ids=torch.zeros(6, 1))


@all_types
def test_batch_sizes(model_type: str) -> None:
    model = zoo.model_of(model_type)
    inputs = zoo.inputs_of(model.config)
    with pytest.raises(ValueError, match=r"the batch is empty \(0 rows\)"):
        model(**{name: x[:0] for name, x in inputs.items()})
    one = model(
        **{name: x[:1] for name, x in inputs.items()}, labels=zoo.labels_of(model.config, rows=1, missing=False)
    )
    assert all(logits.shape[0] == 1 for logits in one.logits.values())
    assert bool(torch.isfinite(one.loss))


@all_types
def test_bad_labels_name_the_task(model_type: str) -> None:
    model = zoo.model_of(model_type)
    inputs, labels = zoo.inputs_of(model.config), zoo.labels_of(model.config)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"view": torch.zeros(6, dtype=torch.int64)}, "labels of task 'view': expected torch.float32"),
        ({"colour": torch.zeros(6)}, "labels of task 'colour': expected torch.int64"),
        ({"colour": torch.full((6,), 3)}, "labels of task 'colour': expected class ids in"),
        ({"price": torch.zeros(5)}, r"labels of task 'price': expected shape \[6, 1\] or \[6\], found \[5\]"),
        ({"price": torch.full((6,), math.inf)}, "labels of task 'price': expected finite"),
        ({"badges": torch.zeros(6)}, "labels of task 'badges': expected shape"),
        ({"area": torch.zeros(6)}, "labels of task 'area': expected shape"),
        ({"view": [0.0] * 6}, "labels of task 'view': expected a tensor, found list"),
        ({"buy": labels["buy"], "view": [1.0] * 6}, "labels of task 'view': expected a tensor, found list"),
        ({"buy": labels["buy"], "view": labels["view"] + 6}, "labels of task 'view': expected "),
        ({"buy": labels["buy"]}, "labels of task 'buy' count where task 'view' is 1: expected its labels too"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**inputs, labels=wrong)
        if "buy" in wrong:  # also where only the task is asked for whose space the label is
            with pytest.raises(ValueError, match=message):
                model(**inputs, labels=wrong, tasks="buy")
    with pytest.raises(ValueError, match="labels: expected a mapping from task to tensor, found Tensor"):
        model(**inputs, labels=labels["view"])
    with pytest.raises(ValueError, match=r"sample_weights of task 'view': expected shape \[6\], found \[6, 1\]"):
        model(**inputs, labels=labels, sample_weights={"view": torch.ones(6, 1)})
