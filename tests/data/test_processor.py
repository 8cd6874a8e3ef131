"""The processor as a whole: the same tensors whatever the rows come from and however they are cut; a strict file."""

import json
import math
import os

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig

from moe_mtl.data import DataError, TabularProcessor, sources
from moe_mtl.files import CheckpointError, UnsafeFileError
from moe_mtl.hub import write_manifest
from moe_mtl.tasks import Task

TASKS = [Task("click", "binary"), Task("price", "regression"), {"name": "size", "kind": "multiclass"}]
FEATURES = [
    {"name": "age", "kind": "numeric"},
    {"name": "city", "kind": "categorical"},
    {"name": "tags", "kind": "multi_hot", "separator": ";"},
    {"name": "user", "kind": "categorical", "min_count": 2},
    {"name": "seen", "kind": "sequence", "separator": ";", "max_length": 3, "pooling": "sum"},
    {"name": "gain", "kind": "numeric", "bins": None},
]


def frame(rows=40, seed=0):
    random = np.random.default_rng(seed)
    lists = [";".join(random.choice(list("abcde"), random.integers(0, 6))) or None for _ in range(rows)]
    return pd.DataFrame(
        {
            "age": np.where(random.random(rows) < 0.1, np.nan, random.integers(0, 90, rows)),
            "city": random.choice(["Bonn", "Köln", "", "Ulm "], rows),
            "user": pd.array(random.integers(2**53, 2**53 + 9, rows), dtype="Int64"),
            "tags": lists,
            "seen": lists[::-1],
            "gain": np.where(random.random(rows) < 0.9, 0.0, random.lognormal(7, 1, rows)),
            "click": random.integers(0, 2, rows),
            "price": random.normal(50, 9, rows),
            "size": random.choice(list("SML"), rows),
            "weight": random.random(rows),
            "session": random.integers(0, 5, rows),
        }
    )


def fit(rows, **options):
    options = {"labels": {"click": {"weight_column": "weight"}}, "group_column": "session", **options}
    return TabularProcessor.fit(rows, TASKS, FEATURES, **options)


def flat(encoded, prefix=""):
    for name, value in encoded.items():
        yield from flat(value, f"{name}.") if isinstance(value, dict) else [(prefix + name, value)]


def assert_same(left, right):
    left, right = dict(flat(left)), dict(flat(right))
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_shapes_dtypes_and_order():
    processor = fit(frame())
    out = processor(frame())
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in flat(out)}
    assert shapes == {
        "numeric": ((40, 2), torch.float32),
        "categorical": ((40, 2), torch.int64),
        "sequences": ((40, 2, 5), torch.int64),
        "labels.click": ((40,), torch.float32),
        "labels.price": ((40,), torch.float32),
        "labels.size": ((40,), torch.int64),
        "sample_weights.click": ((40,), torch.float32),
        "groups": ((40,), torch.int64),
    }
    assert (out["sequences"][:, 1, 3:] == -1).all(), "the shorter sequence is padded to the longer one"
    assert [feature["name"] for feature in processor.features] == [feature["name"] for feature in FEATURES]
    assert processor.features[4]["pooling"] == "sum"
    by_name = {feature["name"]: feature for feature in processor.features}
    for i, name in enumerate(["city", "user"]):
        assert out["categorical"][:, i].max() < by_name[name]["num_categories"]
    assert list(processor(frame(), labels=False)) == ["numeric", "categorical", "sequences"]


def write(kind, table, folder):
    path = folder / f"rows.{kind}"
    if kind == "csv":
        table.to_csv(path, index=False)
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "jsonl":
        table.to_json(path, orient="records", lines=True, double_precision=15)
    elif kind == "table":
        return pa.Table.from_pandas(table)
    elif kind == "dataset":
        return datasets.Dataset.from_pandas(table)
    elif kind == "rows":
        return table.to_dict("records")
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "table", "dataset", "rows"])
def test_every_source_teaches_and_encodes_the_same(kind, tmp_path):
    table = frame()
    table["price"] = table["price"].round(6)  # a text form that every format keeps
    table["gain"] = table["gain"].round(3)
    table["weight"] = table["weight"].round(6)
    source = write(kind, table, tmp_path)
    processor, other = fit(table), fit(source)
    assert other == processor
    assert_same(processor(source), processor(table))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 120), batch=st.integers(1, 130))
def test_cutting_the_rows_changes_nothing(seed, rows, batch):
    processor = fit(frame())
    table = frame(rows, seed)[["age", "city", "user", "tags", "seen", "gain"]]
    whole = processor(table, labels=False)
    parts = [encoded for _, encoded in processor.stream(table, labels=False, batch_rows=batch)]
    assert_same({name: torch.cat([part[name] for part in parts]) for name in whole}, whole)


def test_learning_in_many_batches_is_learning_at_once(tmp_path, monkeypatch):
    table = frame(3_000)
    table.to_csv(tmp_path / "rows.csv", index=False)
    at_once = fit(tmp_path / "rows.csv")
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1 << 12)
    assert fit(tmp_path / "rows.csv") == at_once


def test_the_order_of_columns_and_of_declarations_of_other_kinds_is_irrelevant():
    table = frame()
    processor = fit(table)
    shuffled = table[table.columns[::-1]]
    assert fit(shuffled) == processor
    assert_same(processor(shuffled), processor(table))


def test_one_row_alone_equals_that_row_among_others():
    processor, table = fit(frame()), frame(seed=3)
    table["size"] = "S"
    whole = processor(table)
    for i in (0, 7, 39):
        alone = processor(table.iloc[i : i + 1].to_dict("records"))
        for name, tensor in flat(alone):
            torch.testing.assert_close(tensor[0], dict(flat(whole))[name][i], rtol=0, atol=0, equal_nan=True)


def test_saving_and_loading_gives_an_equal_processor(tmp_path):
    processor = fit(frame(), extra_columns="error", missing_values=["", "?"])
    assert processor.save_pretrained(tmp_path / "model") == [str(tmp_path / "model" / "preprocessor_config.json")]
    loaded = TabularProcessor.from_pretrained(tmp_path / "model")
    assert loaded == processor
    assert_same(loaded(frame()), processor(frame()))
    assert loaded.features == processor.features
    assert loaded.parsed_tasks == processor.parsed_tasks
    assert os.listdir(tmp_path / "model") == ["preprocessor_config.json"]


def test_transformers_finds_it_once_registered(tmp_path):
    class Config(PreTrainedConfig):
        model_type = "config_of_the_processor_test"

    AutoConfig.register(Config.model_type, Config)
    AutoProcessor.register(Config, TabularProcessor)
    processor = fit(frame())
    processor.save_pretrained(tmp_path)
    Config().save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path) == processor


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    fit(frame()).save_pretrained(tmp_path)
    before = (tmp_path / "preprocessor_config.json").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        fit(frame(seed=1)).save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_bytes() == before
    assert len(os.listdir(tmp_path)) == 1


def test_groups_of_different_files_can_be_compared():
    processor = fit(frame())
    table = frame()
    groups = processor(table)["groups"]
    for i in range(40):
        for j in range(40):
            assert (groups[i] == groups[j]) == (table.session[i] == table.session[j])
    assert processor(table[20:])["groups"].tolist() == groups[20:].tolist()
    with pytest.raises(DataError, match=r"column 'session', row 0: expected a group, found none"):
        processor(table.assign(session=None))


def test_missing_and_unseen_values():
    processor = fit(frame())
    rows = {
        "age": [None, math.nan],
        "city": ["Rome", "ulm"],
        "user": [1, 2],
        "tags": [None, "z"],
        "seen": ["", "a;z"],
        "gain": [0, 1],
    }
    out = processor(rows, labels=False)
    median = (frame().age.median() - processor.columns[0].mean) / processor.columns[0].std
    np.testing.assert_allclose(out["numeric"][:, 0], median, rtol=1e-6)
    assert out["categorical"].tolist() == [[0, 0], [0, 0]]
    assert out["sequences"][0].tolist() == [[-1] * 5, [-1] * 5]
    assert out["sequences"][1, 0].tolist() == [0, -1, -1, -1, -1]
    assert out["sequences"][1, 1, 1] == 0


def test_large_ids_do_not_collide():
    table = {"id": [2**53, 2**53 + 1, 2**53, 2**53 + 1], "y": [0, 1, 0, 1]}
    processor = TabularProcessor.fit(table, [Task("y", "binary")], [{"name": "id", "kind": "categorical"}])
    assert processor(table)["categorical"].squeeze(1).tolist() == [1, 2, 1, 2]
    # A nullable column in pandas without its extension types turns 1 into 1.0; both are the same id.
    small = TabularProcessor.fit(
        {"id": [1, 2, 2], "y": [0, 1, 1]}, [Task("y", "binary")], [{"name": "id", "kind": "categorical"}]
    )
    assert small(pd.DataFrame({"id": [1.0, 2.0, None]}), labels=False)["categorical"].squeeze(1).tolist() == [2, 1, 0]


def change(table, **columns):
    return table.assign(**columns)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (frame().drop(columns=["age", "size"]), "rows: missing columns 'age', 'size'"),
        (frame().iloc[:0], "expected at least one row, found none"),
        ([], "expected at least one row, found none"),
        (change(frame(), age="old"), "column 'age', row 0: expected a number, found the text 'old'"),
        (change(frame(), gain=[0.0] * 39 + [math.inf]), "column 'gain', row 39: expected a finite number, found inf"),
        (change(frame(), age=[[1]] * 40), "column 'age': expected numbers, found list"),
        (change(frame(), city=[["a"]] * 40), "column 'city': expected text, numbers or booleans, found list"),
        (change(frame(), tags=3), "column 'tags': expected lists, or text cut by ';', found int64"),
        (change(frame(), click=2), "column 'click', row 0: label of task 'click': expected 0 or 1"),
        (change(frame(), size="XL"), "column 'size', row 0: expected a value seen in training"),
        (change(frame(), price="dear"), "column 'price', row 0: expected a number, found the text 'dear'"),
    ],
)
def test_bad_rows_are_refused_with_column_and_row(rows, message):
    processor = fit(frame())
    with pytest.raises(DataError) as error:
        processor(rows)
    assert str(error.value).startswith(message)


def test_row_numbers_count_from_the_start_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1 << 12)
    table = frame(2_000)
    table["age"] = table["age"].astype(object)
    table.loc[1_700, "age"] = "old"
    table.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(DataError, match=r"column 'age', row 1700"):
        fit(frame())(tmp_path / "rows.csv")


def test_unknown_columns_are_ignored_or_refused():
    extra = frame().assign(ag=1)
    assert_same(fit(frame())(extra), fit(frame())(frame()))
    with pytest.raises(DataError, match=r"rows: unknown columns 'ag'; did you mean 'age'\?"):
        fit(frame(), extra_columns="error")(extra)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": [{"name": "age", "kind": "numric"}]}, "feature 'age': kind: expected one of"),
        ({"features": [{"name": "age", "kind": "numeric", "bin": 3}]}, "unknown field 'bin'; did you mean 'bins'"),
        ({"features": [{"kind": "numeric"}]}, "expected a feature with a name"),
        ({"features": [{"name": "age", "kind": "numeric"}] * 2}, "'age' is declared twice"),
        ({"features": [{"name": "click", "kind": "numeric"}]}, r"columns \['click'\] are labels"),
        (
            {"features": [{"name": "a", "kind": "numeric"}, {"name": "b", "kind": "numeric"}]},
            "missing columns 'a', 'b'",
        ),
        ({"features": []}, "at least one feature"),
        ({"tasks": []}, "at least one feature and one task"),
        ({"labels": {"clic": {}}}, "unknown task 'clic'; did you mean 'click'"),
        ({"group_column": "grp"}, "missing column 'grp'"),
        ({"extra_columns": "drop"}, "extra_columns: expected one of"),
    ],
)
def test_a_wrong_declaration_is_refused(options, message):
    arguments = {"tasks": TASKS, "features": FEATURES, **options}
    with pytest.raises(DataError, match=message):
        TabularProcessor.fit(frame(), **arguments)


def test_no_rows_teach_nothing(tmp_path):
    with pytest.raises(DataError, match="expected rows to learn from, found none"):
        fit(frame().iloc[:0])
    frame().iloc[:0].to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(DataError, match="expected rows to learn from, found none"):
        fit(tmp_path / "rows.csv")


CHANGES = {
    "version": 2,
    "processor_class": "Other",
    "processor_type": "image",
    "features": [],
    "tasks": [],
    "labels": [],
    "group_column": 3,
    "known_columns": "all",
    "missing_values": "none",
    "surprise": 1,
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_tampered_file_is_refused(key, tmp_path):
    fields = fit(frame()).to_dict() | {key: CHANGES[key]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(DataError):
        TabularProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["version", "features", "labels", "known_columns"])
def test_an_incomplete_file_is_refused(key, tmp_path):
    fields = fit(frame()).to_dict()
    del fields[key]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=f"expected the fields '{key}'"):
        TabularProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": NaN}', "\xff", "[" * 100_000])
def test_a_broken_file_is_refused(text, tmp_path):
    (tmp_path / "preprocessor_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        TabularProcessor.from_pretrained(tmp_path)


def test_a_file_is_read_without_trust(tmp_path):
    fit(frame()).save_pretrained(tmp_path / "good")
    text = (tmp_path / "good" / "preprocessor_config.json").read_text()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "preprocessor_config.json").symlink_to(tmp_path / "good" / "preprocessor_config.json")
    with pytest.raises(UnsafeFileError, match="found a link to"):
        TabularProcessor.from_pretrained(bad)
    (bad / "preprocessor_config.json").unlink()
    (bad / "preprocessor_config.json").write_text(text.replace("{", '{"version": 1,', 1))
    with pytest.raises(CheckpointError, match="'version' stands twice"):
        TabularProcessor.from_pretrained(bad)
    (bad / "preprocessor_config.json").write_text(text)
    write_manifest(bad)
    assert TabularProcessor.from_pretrained(bad) == TabularProcessor.from_pretrained(tmp_path / "good")
    (bad / "preprocessor_config.json").write_text(text.replace('"age"', '"agf"'))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json of .* is damaged or was changed"):
        TabularProcessor.from_pretrained(bad)


def test_vocabularies_too_large_to_be_read_again_are_not_saved(tmp_path, monkeypatch):
    processor = fit(frame())
    size = len(processor.to_json())
    monkeypatch.setattr("moe_mtl.data.saved.MAX_JSON_BYTES", size)
    processor.save_pretrained(tmp_path / "fits")
    monkeypatch.setattr("moe_mtl.data.saved.MAX_JSON_BYTES", size - 1)
    with pytest.raises(DataError, match=f"found {size:,}: set min_count or max_categories"):
        processor.save_pretrained(tmp_path / "not")
    assert not (tmp_path / "not").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        TabularProcessor.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="trust_remote_code"):
        TabularProcessor.from_pretrained(tmp_path, trust_remote_code=True)


def test_features_are_inferred_where_none_are_declared():
    processor = TabularProcessor.fit(
        frame(200), TASKS, labels={"click": {"weight_column": "weight"}}, group_column="session"
    )
    kinds = {feature["name"]: feature["kind"] for feature in processor.features}
    expected = {"age": "numeric", "city": "categorical", "user": "categorical", "gain": "numeric"}
    assert expected.items() <= kinds.items()
    assert not {"click", "price", "size", "weight", "session"} & set(kinds)
