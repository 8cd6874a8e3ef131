"""Labels of every kind: values, missing ones, wrong ones, and the way back to the user's units."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from moe_mtl.data import DataError, TabularProcessor
from moe_mtl.data.labels import Label
from moe_mtl.tasks import Task, UnknownTaskError

NAN = math.nan


def fit(table, tasks, labels=None):
    table = {"x": list(range(len(next(iter(table.values()))))), **table}
    return TabularProcessor.fit(table, tasks, [{"name": "x", "kind": "numeric", "bins": None}], labels=labels)


def encoded(processor, table):
    table = {"x": [0] * len(next(iter(table.values()))), **table}
    return processor(table)["labels"]


def same(tensor, expected):
    np.testing.assert_array_equal(tensor.numpy(), np.array(expected, tensor.numpy().dtype))


@pytest.mark.parametrize(
    "values", [[1, 0, None], [True, False, None], ["1", "0", ""], ["True", "False", None], [1.0, 0.0, NAN]]
)
def test_binary_from_any_spelling(values):
    processor = fit({"y": values}, [Task("y", "binary")])
    same(encoded(processor, {"y": values})["y"], [1, 0, NAN])
    assert encoded(processor, {"y": values})["y"].dtype == torch.float32


def test_positive_values():
    task, column = Task("rich", "binary"), {"income": ["50000+.", "- 50000.", None, "?"]}
    processor = fit(column, [task], {"rich": {"column": "income", "positive": "50000+."}})
    same(encoded(processor, column)["rich"], [1, 0, NAN, 0])
    several = fit(column, [task], {"rich": {"column": "income", "positive": ["50000+.", "?"]}})
    same(encoded(several, column)["rich"], [1, 0, NAN, 1])
    integers = fit({"stars": [1, 4, 5]}, [task], {"rich": {"column": "stars", "positive": [4, 5]}})
    same(encoded(integers, {"stars": ["5.0", "3", "4"]})["rich"], [1, 0, 1])


def test_negative_values_make_any_other_an_error():
    declared = {"y": {"positive": "yes", "negative": "no"}}
    processor = fit({"y": ["yes", "no"]}, [Task("y", "binary")], declared)
    with pytest.raises(
        DataError, match=r"column 'y', row 1: label of task 'y': expected one of 'yes', 'no', found 'Yes'"
    ):
        encoded(processor, {"y": ["no", "Yes"]})


def test_a_positive_value_that_never_occurs_is_an_error():
    with pytest.raises(DataError, match=r"no row has a positive value; expected \['50000\+'\], found \['50000\+\.'\]"):
        fit({"y": ["50000+."]}, [Task("y", "binary")], {"y": {"positive": "50000+"}})


def test_a_label_of_two_is_not_binary():
    with pytest.raises(
        DataError, match=r"column 'y', row 2: label of task 'y': expected 0 or 1, .* found '2'; declare"
    ):
        encoded(fit({"y": [0, 1]}, [Task("y", "binary")]), {"y": [0, 1, 2]})


TRIO = [Task("click", "binary"), Task("buy", "binary"), Task("both", "binary", product_of=("click", "buy"))]


@pytest.mark.parametrize("labels", [None, {"both": {"all_of": ["click", "buy"]}}])
def test_the_label_of_a_product_joins_its_factors(labels):
    table = {"click": [1, 1, 0, 0, None, 1, None], "buy": [1, 0, 0, None, 0, None, None]}
    same(encoded(fit(table, TRIO, labels), table)["both"], [1, 0, 0, 0, 0, NAN, NAN])


def test_a_product_can_have_a_column_of_its_own():
    table = {"click": [1, 1], "buy": [1, 0], "both": [0, 1]}
    same(encoded(fit(table, TRIO), table)["both"], [0, 1])


def test_classes_are_learned_and_sorted():
    values = ["b", "a", None, "c"]
    processor = fit({"y": values}, [{"name": "y", "kind": "multiclass"}])
    assert processor.parsed_tasks == [Task("y", "multiclass", 3)]
    same(encoded(processor, {"y": values})["y"], [1, 0, -100, 2])
    numbers = fit({"y": [10, 9, 100]}, [{"name": "y", "kind": "multiclass"}])
    same(encoded(numbers, {"y": ["9", "100", "10.0"]})["y"], [0, 2, 1])


def test_class_ids_need_not_all_occur():
    processor = fit({"y": [0, 3]}, [Task("y", "multiclass", 5)])
    same(encoded(processor, {"y": [4, 2, None]})["y"], [4, 2, -100])
    with pytest.raises(DataError, match=r"column 'y', row 1: expected a value seen in training .* found '5'"):
        encoded(processor, {"y": [4, 5]})


def test_declared_classes_keep_their_order():
    declared = {"y": {"classes": ["low", "mid", "high"]}}
    processor = fit({"y": ["low"]}, [{"name": "y", "kind": "multiclass"}], declared)
    same(encoded(processor, {"y": ["high", "low", "mid"]})["y"], [2, 0, 1])


def test_the_number_of_classes_must_be_that_of_the_task():
    with pytest.raises(DataError, match=r"expected 4 classes \(num_outputs\), found 3"):
        fit({"y": list("abc")}, [Task("y", "multiclass", 4)])


def test_regression_is_standardised_and_comes_back():
    values = np.array([1.0, 5.0, -3.0, 100.0])
    processor = fit({"y": values}, [Task("y", "regression")])
    labels = encoded(processor, {"y": [*values, None]})["y"]
    np.testing.assert_allclose(labels[:4], (values - values.mean()) / values.std(), rtol=1e-6)
    assert torch.isnan(labels[4])
    np.testing.assert_allclose(processor.unscale("y", labels[:4]), values, rtol=1e-6)
    np.testing.assert_allclose(processor.decode({"y": labels[:4, None]})["y"], values, rtol=1e-6)
    raw = fit({"y": values}, [Task("y", "regression")], {"y": {"standardise": False}})
    same(encoded(raw, {"y": values})["y"], values)


def test_regression_of_several_columns():
    table = {"u": [0.0, 2.0, 4.0], "v": [10.0, 10.0, 40.0]}
    processor = fit(table, [Task("place", "regression", 2)], {"place": {"column": ["u", "v"]}})
    labels = encoded(processor, table)["place"]
    assert labels.shape == (3, 2)
    np.testing.assert_allclose(labels.mean(0), 0, atol=1e-6)
    decoded = processor.decode({"place": labels})
    np.testing.assert_allclose(decoded["place/u"], table["u"], atol=1e-5)
    np.testing.assert_allclose(decoded["place/v"], table["v"], atol=1e-5)


@pytest.mark.parametrize("values", [[["a", "b"], ["c"], [], None], ["a|b", "c", None, None]])
def test_multilabel_of_tags(values):
    processor = fit({"y": values}, [Task("y", "multilabel", 3)])
    rows = [[1, 1, 0], [0, 0, 1], [0, 0, 0] if values[2] == [] else [NAN] * 3, [NAN] * 3]
    same(encoded(processor, {"y": values})["y"], rows)
    assert list(processor.decode({"y": torch.zeros(2, 3)})) == ["y/a", "y/b", "y/c"]
    with pytest.raises(DataError, match=r"column 'y', row 1: .* found 'd'"):
        encoded(processor, {"y": [["a"], ["d"]]})


def test_multilabel_of_columns():
    table = {"u": [1, 0, None], "v": [0, 0, 1]}
    processor = fit(table, [Task("y", "multilabel", 2)], {"y": {"column": ["u", "v"]}})
    same(encoded(processor, table)["y"], [[1, 0], [0, 0], [NAN, 1]])
    assert list(processor.decode({"y": torch.zeros(2, 2)})) == ["y/u", "y/v"]


def test_decode_gives_the_users_values():
    table = {"click": [1, 0], "size": ["S", "L"], "stars": [5, 3]}
    tasks = [Task("click", "binary"), {"name": "size", "kind": "multiclass"}, {"name": "stars", "kind": "multiclass"}]
    processor = fit(table, tasks)
    logits = {"click": torch.tensor([[0.0], [2.0]]), "size": torch.tensor([[3.0, 1], [0, 1]]), "stars": torch.eye(2)}
    out = processor.decode(logits)
    np.testing.assert_allclose(out["click"], [0.5, 1 / (1 + math.exp(-2))], rtol=1e-6)
    assert out["size"].tolist() == ["L", "S"]
    assert out["stars"].tolist() == [3, 5]
    np.testing.assert_allclose(out["size/L"], [1 / (1 + math.exp(-2)), 1 / (1 + math.e)], rtol=1e-6)
    assert list(out) == ["click", "size", "size/L", "size/S", "stars", "stars/3", "stars/5"]
    with pytest.raises(UnknownTaskError, match="unknown task 'clck'"):
        processor.decode({"clck": torch.zeros(1, 1)})


def test_weights_per_task():
    table = {"a": [1, 0], "b": [0, 1], "w": [0.5, 2]}
    processor = fit(table, [Task("a", "binary"), Task("b", "binary")], {"b": {"weight_column": "w"}})
    out = processor({"x": [0, 1], **table})
    assert list(out["sample_weights"]) == ["b"]
    assert out["sample_weights"]["b"].tolist() == [0.5, 2]
    for wrong, found in ((-1, "-1.0"), (None, "none")):
        with pytest.raises(DataError, match=rf"column 'w', row 1: weight of task 'b': expected .* found {found}"):
            processor({"x": [0, 1], **table, "w": [1, wrong]})


@pytest.mark.parametrize(
    ("task", "declared", "message"),
    [
        ({"name": "y", "kind": "binary"}, {"classes": [1]}, "unknown field 'classes'"),
        ({"name": "y", "kind": "binary"}, {"positve": 1}, "did you mean 'positive'"),
        ({"name": "y", "kind": "binary"}, {"negative": 0}, "'negative' needs 'positive'"),
        ({"name": "y", "kind": "binary"}, {"column": ["y", "z"]}, "expected one column"),
        ({"name": "y", "kind": "binary"}, {"all_of": ["y"]}, "all_of: expected binary tasks with a column, found 'y'"),
        ({"name": "y", "kind": "binary"}, {"all_of": ["z"], "column": "y"}, "takes neither a column"),
        ({"name": "y", "kind": "binary"}, {"column": "none"}, "missing column 'none'"),
        ({"name": "y", "kind": "multiclass"}, {"classes": ["a", "a"]}, "distinct"),
        ({"name": "y", "kind": "multiclass", "nm": 1}, {}, "unknown field 'nm'"),
        ({"kind": "binary"}, {}, "a task needs a 'name'"),
        (3, {}, "found 3|not iterable"),
    ],
)
def test_a_wrong_declaration_is_refused(task, declared, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fit({"y": [0, 1]}, [task], {"y": declared})


def test_a_column_without_labels_is_refused_where_something_is_learned():
    for kind in ("regression", "multiclass"):
        with pytest.raises(DataError, match="expected at least one"):
            fit({"y": [None, None]}, [{"name": "y", "kind": kind}])


def test_text_is_no_regression_label():
    with pytest.raises(DataError, match=r"column 'y', row 1: expected a number, found the text 'high'"):
        fit({"y": ["1", "high"]}, [Task("y", "regression")])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("regression", {"mean": [NAN]}), ("regression", {"std": [0.0]}), ("regression", {"std": None})),
        *(("regression", {"mean": [0, 1]}), ("regression", {"columns": []}), ("regression", {"more": 1})),
        *(("multiclass", {"classes": []}), ("multiclass", {"classes": ["a", "a"]}), ("multiclass", {"columns": "y"})),
        *(("multiclass", {"task": 1}), ("multiclass", {"all_of": ["y"]})),
    ],
)
def test_a_tampered_label_is_refused(kind, change):
    values = [0, 1]
    fields = fit({"y": values}, [{"name": "y", "kind": kind}]).labels["y"].to_dict()
    assert Label.from_dict(fields).to_dict() == fields
    with pytest.raises(DataError):
        Label.from_dict(fields | change)


def test_arrow_tables_with_several_chunks_are_read_whole():
    processor = fit({"y": [0, 1]}, [Task("y", "binary")])
    table = pa.table({"x": pa.chunked_array([[1], [2, 3]]), "y": pa.chunked_array([[0, 1], [1]])})
    same(processor(table)["labels"]["y"], [0, 1, 1])


@pytest.mark.parametrize(
    ("column", "classes"),
    [
        (["007", "7", "12"], ["007", "12", "7"]),  # one class each, as they stood in the table
        (["10000000000000000000", "7"], ["10000000000000000000", "7"]),  # no int64
        (["9223372036854775807", "-9223372036854775808"], [-(2**63), 2**63 - 1]),
        ([12, 7, -3], [-3, 7, 12]),
        (["10", "9"], [9, 10]),
        ([True, False], [False, True]),
        (["false", "maybe", "true"], ["false", "maybe", "true"]),
    ],
)
def test_classes_come_back_as_they_stood_in_the_table(column, classes):
    processor = fit({"y": column}, [{"name": "y", "kind": "multiclass"}])
    decoded = processor.decode({"y": torch.eye(len(classes))})
    assert decoded["y"].tolist() == classes
    assert list(decoded)[1:] == [f"y/{str(name).lower()}" for name in classes]
    ids = encoded(processor, {"y": column})["y"]
    assert decoded["y"].tolist() == classes
    assert [type(c) for c in decoded["y"].tolist()] == [type(c) for c in classes]
    assert [str(classes[i]) for i in ids] == [str(value) for value in column]


SPACED = [
    Task("click", "binary"),
    Task("buy", "binary", space="click"),
    Task("stars", "multiclass", 3, space="click"),
    Task("sum", "regression", 2, space="both"),
    Task("both", "binary", product_of=("click", "buy")),
]
SPACED_TABLE = {
    "click": ["y", "n", "", "y"],
    "buy": [1, 1, 0, 0],
    "stars": [0, 1, 2, 1],
    "a": [1.0, 2.0, 3.0, 4.0],
    "b": [2.0, 3.0, 4.0, 5.0],
}


def test_a_task_keeps_its_sample_space_when_the_space_is_left_behind():
    declared = {
        "click": {"positive": "y", "weight_column": "b"},
        "both": {"all_of": ["click", "buy"]},
        "sum": {"column": ["a", "c"]},
    }
    table = SPACED_TABLE | {"c": [0.0, 1.0, 2.0, 3.0]}
    full = fit(table, SPACED, declared)
    same(encoded(full, table)["buy"], [1, 1, 0, 0])
    for tasks in (["buy"], ["stars", "buy"], ["sum"]):
        narrow = TabularProcessor.from_dict(full.for_tasks(tasks).to_dict())
        assert set(narrow.labels) == set(tasks)
        assert all(task.space is None for task in narrow.parsed_tasks)
        labels = encoded(narrow, {key: values for key, values in table.items() if key != "b"})
        if "buy" in tasks:
            same(labels["buy"], [1, NAN, NAN, 0])
        if "stars" in tasks:
            same(labels["stars"], [0, -100, -100, 1])
        if "sum" in tasks:  # the space is itself a product: clicked and bought
            same(torch.isnan(labels["sum"]).all(1), [False, True, True, True])
    assert full.for_tasks([task.name for task in SPACED]) == full
    assert full.for_tasks(["click", "buy"]).parsed_tasks[1].space == "click"
    with pytest.raises(DataError, match="label of task 'both' is made of that of 'buy': extract both"):
        full.for_tasks(["both", "click"])
    with pytest.raises(UnknownTaskError, match="bye"):
        full.for_tasks(["bye"])
    inner = Task("stars", "multiclass", 3, space="buy")
    nested = fit(table, [*SPACED[:2], inner], {"click": declared["click"]})
    with pytest.raises(DataError, match="'stars' counts where 'buy' is 1: extract 'click' too"):
        nested.for_tasks(["buy", "stars"])


def test_only_the_labels_that_some_tasks_are_measured_with_are_read():
    declared = {
        "click": {"positive": "y", "weight_column": "b"},
        "buy": {"weight_column": "c"},
        "both": {"all_of": ["click", "buy"]},
        "sum": {"column": ["a", "c"]},
    }
    table = SPACED_TABLE | {"c": [0.0, 1.0, 2.0, 3.0], "x": [0] * 4}
    processor = fit(table, SPACED, declared)
    whole = processor(table)
    for tasks, labels, columns, weights in (
        (["click"], ["click"], ["click", "b"], ["click"]),
        (["buy"], ["click", "buy"], ["click", "buy", "c"], ["buy"]),
        (["stars"], ["click", "stars"], ["click", "stars"], []),
        (["both"], ["click", "buy", "both"], ["click", "buy"], []),
        (["sum"], ["click", "buy", "sum", "both"], ["click", "buy", "a", "c"], []),
    ):
        found = processor({key: table[key] for key in ("x", *columns)}, labels=tasks)
        assert list(found["labels"]) == labels
        for name in labels:
            same(found["labels"][name], whole["labels"][name])
        assert list(found.get("sample_weights", {})) == weights
    with pytest.raises(UnknownTaskError, match="bye"):
        processor(table, labels=["bye"])
    with pytest.raises(DataError, match="missing column 'click'"):
        processor({"x": [1.0], "buy": [1], "c": [1]}, labels=["buy"])


@pytest.mark.parametrize(
    "within", [[], "click", [{"task": "c", "kind": "regression", "columns": ["c"], "mean": [0], "std": [1]}]]
)
def test_a_space_that_is_no_binary_label_is_refused(within):
    processor = fit({"y": [0, 1]}, [Task("y", "binary")])
    fields = processor.to_dict()
    fields["labels"][0]["within"] = within
    with pytest.raises(DataError, match="within: expected"):
        TabularProcessor.from_dict(fields)
