"""Census-Income: the counts of its documentation, both protocols, and files that are not it."""

import gzip
import hashlib
import io
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moe_mtl.data import DataError, census_income, load
from moe_mtl.data.census_income import COLUMNS, NUMERIC

NAME = "census-income.test.gz"
ROOT = Path(__file__).parents[2]
# Where the library keeps what it has fetched, or a folder `data` in the repository or beside it.
PLACES = [
    *Path(census_income.Options.cache).expanduser().glob(NAME),
    *ROOT.glob(f"data/{NAME}"),
    *sorted(ROOT.parent.glob(f"*/data/{NAME}")),
]
HALF = next(iter(PLACES), Path(NAME))
needs_half = pytest.mark.skipif(not PLACES, reason=f"there is no UCI file {NAME}")


@pytest.fixture(scope="module")
def half():
    return load("census-income", path=str(HALF), tasks=["income", "never_married", "education"])


def lines(rows, **changes):
    """A file in the UCI format."""
    out = []
    for i in range(rows):
        row = dict.fromkeys(COLUMNS, "Not in universe") | {name: str(i % 7) for name in NUMERIC}
        row |= {
            "instance_weight": "1234.56",
            "mig_same": "?",
            "education": census_income.COLLEGE[i % 6] if i % 2 else "Children",
        }
        row |= {
            "marital_stat": "Never married" if i % 3 else "Divorced",
            "income_50k": "50000+." if i % 5 == 0 else "- 50000.",
        }
        out.append(", ".join((row | changes).values()) + "\n")
    return "".join(out).encode()


@needs_half
def test_the_half_has_the_documented_parts_and_labels(half):
    assert half.info["name"] == "census-income-half"
    assert half.info["rows"] == {"train": 59_871, "validation": 19_857, "test": 20_034}
    assert half.info["sha256"] == census_income.TEST_SHA256
    processor = half.fit_processor()
    labels = [processor(part)["labels"] for part in half.parts().values()]
    totals = {name: sum(int(part[name].sum()) for part in labels) for name in labels[0]}
    assert totals == {"income": 6_186, "never_married": 43_143, "education": 19_456}
    assert not any(np.isnan(part[name].numpy()).any() for part in labels for name in part)
    income, married = (np.concatenate([part[name] for part in labels]) for name in ("income", "never_married"))
    assert np.corrcoef(income, married)[0, 1] == pytest.approx(-0.1787, abs=5e-5)


@needs_half
def test_the_half_is_cut_by_the_sha256_of_the_row_number(half):
    rows = [line.split(b", ") for line in gzip.decompress(HALF.read_bytes()).splitlines()]
    place = dict.fromkeys(half.parts(), 0)
    for i in range(300):
        tenth = int(hashlib.sha256(str(i).encode()).hexdigest()[:8], 16) % 10
        name = "train" if tenth < 6 else "validation" if tenth < 8 else "test"
        found = half.parts()[name].slice(place[name], 1).to_pylist()[0]
        place[name] += 1
        expected = [None if field.strip() == b"?" else field.decode().strip() for field in rows[i]]
        assert [None if v is None else str(v) for v in found.values()][:24] == expected[:24]
        assert (
            list(found.values())[25:]
            == [int(v) if n in NUMERIC else v for n, v in zip(COLUMNS, expected, strict=True)][25:]
        )
    missing = pa.concat_tables(list(half.parts().values())).select(
        ["mig_same", "mig_chg_msa", "country_father", "state_prev_res"]
    )
    assert [missing[name].null_count for name in missing.column_names[1:]] == [49_946, 3_429, 330]


@needs_half
def test_the_inputs_are_7_numbers_and_32_categories_with_bins_for_the_tails():
    splits = load("census-income", path=str(HALF))
    processor = splits.fit_processor()
    kinds = [feature["kind"] for feature in processor.features]
    assert (kinds.count("numeric"), kinds.count("categorical")) == (7, 32)
    names = {feature["name"] for feature in processor.features}
    assert not names & {"income_50k", "marital_stat", "instance_weight"}
    assert "education" in names
    for feature in processor.features:
        if feature["kind"] == "numeric":
            assert 6 <= len(feature["bins"]) - 1 <= 128, feature["name"]


def test_label_columns_of_the_tasks_in_use_are_removed_and_more_on_request(tmp_path):
    (tmp_path / "some.test").write_bytes(lines(40))

    def inputs(**options):
        return {
            feature["name"] for feature in load("census-income", path=str(tmp_path / "some.test"), **options).features
        }

    assert set(COLUMNS) - inputs() == {"income_50k", "marital_stat", "instance_weight"}
    assert set(COLUMNS) - inputs(exclude=["education"]) == {
        "income_50k",
        "marital_stat",
        "instance_weight",
        "education",
    }
    assert set(COLUMNS) - inputs(tasks=["education"]) == {"income_50k", "instance_weight", "education"}
    # A task added later finds the inputs it had: excluded before, a label now.
    assert inputs(exclude=["education"]) == inputs(tasks=["income", "never_married", "education"])


def test_the_published_protocol_trains_on_one_file_and_halves_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(census_income, "TRAIN_ROWS", 50)
    monkeypatch.setattr(census_income, "TEST_ROWS", 40)
    (tmp_path / "census-income.data").write_bytes(lines(50))
    (tmp_path / "census-income.test.gz").write_bytes(gzip.compress(lines(40)))
    splits = load("census-income", path=str(tmp_path))
    assert splits.info["name"] == "census-income"
    assert splits.train.num_rows == 50
    assert splits.validation.num_rows + splits.test.num_rows == 40
    assert 12 <= splits.validation.num_rows <= 28
    (tmp_path / "census-income.data").write_bytes(lines(49))
    with pytest.raises(DataError, match=r"expected 50 rows, found 49"):
        load("census-income", path=str(tmp_path))
    (tmp_path / "census-income.data").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected census-income.data or census-income.data.gz"):
        load("census-income", path=str(tmp_path))


def test_another_file_does_not_bear_the_name(tmp_path):
    for name, content in (("plain", lines(40)), ("packed.gz", gzip.compress(lines(40)))):
        (tmp_path / name).write_bytes(content)
        splits = load("census-income", path=str(tmp_path / name))
        assert splits.info["name"] == f"census-income-other-{hashlib.sha256(lines(40)).hexdigest()[:8]}"
    table = splits.train
    assert table["instance_weight"].type == pa.float64()
    assert table["mig_same"].null_count == table.num_rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"1, 2, 3\n", "not the UCI file of 42 columns"),
        (lines(9, age="old"), "not the UCI file"),
        (gzip.compress(lines(40))[:-20], "broken gzip file"),
        (lines(1), "expected rows for train, validation and test"),
    ],
)
def test_what_is_not_the_uci_file_is_refused(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load("census-income", path=str(tmp_path / "file"))


def _written(path, content):
    path.write_bytes(content)
    return path


def test_an_unknown_income_label_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(lines(39) + lines(1, income_50k="50000+"))
    splits = load("census-income", path=str(tmp_path / "file"))
    processor = load("census-income", path=str(_written(tmp_path / "good", lines(40)))).fit_processor()
    wrong = next(part for part in splits.parts().values() if "50000+" in part["income_50k"].to_pylist())
    with pytest.raises(DataError, match=r"column 'income_50k', row \d+: .* found '50000\+'"):
        processor(wrong)


def test_the_training_file_alone_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(census_income, "TRAIN_ROWS", 40)
    (tmp_path / "file").write_bytes(lines(40))
    with pytest.raises(DataError, match="give the folder with both files"):
        load("census-income", path=str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tasks": ["incom"]}, "did you mean 'income'"), ({"exclude": ["agee"]}, "did you mean 'age'")],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        load("census-income", **options)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load("census-income", path="/nowhere/at/all")


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match=r"cannot fetch https://archive.ics.uci.edu.* give its 'path'"):
        load("census-income", cache=str(tmp_path))


def test_a_fetched_file_is_checked_and_kept(tmp_path, monkeypatch):
    packed, calls = gzip.compress(lines(40)), []

    def serve(url, timeout):
        calls.append(url)
        return io.BytesIO(packed)

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    with pytest.raises(DataError, match="expected content of sha256"):
        load("census-income", cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(census_income, "TEST_SHA256", hashlib.sha256(lines(40)).hexdigest())
    for _ in range(2):
        assert load("census-income", cache=str(tmp_path / "cache")).info["name"] == "census-income-half"
    assert len(calls) == 2, "one refused, one kept; the third came from the cache"
