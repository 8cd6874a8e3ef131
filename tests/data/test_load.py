"""Loading by name: the registry finds the files, and wrong names and options are errors that name the nearest."""

import subprocess
import sys

import pytest

import moe_mtl.data
from moe_mtl.data import DataError, data_sets, is_images, is_text, load, options_of
from moe_mtl.data.splits import row_hash, sha256_tenth


def test_every_data_set_is_found_with_documented_options():
    assert data_sets() == [
        "census-income",
        "digit-pairs",
        "digits",
        "instruct",
        "mixed",
        "mmoe-synthetic",
        "multitab-bench",
        "nyud-v2",
        "pascal-context",
        "photo-tiles",
        "table",
        "word-edits",
    ]
    for name in data_sets():
        cls = options_of(name)
        for field in cls.__dataclass_fields__:
            assert field in (cls.__doc__ or ""), f"{name}: {field} is not documented"


def test_what_load_returns_is_known_without_loading():
    assert [name for name in data_sets() if is_text(name)] == ["instruct", "word-edits"]
    pictures = ["digit-pairs", "mixed", "nyud-v2", "pascal-context", "photo-tiles"]
    assert [name for name in data_sets() if is_images(name)] == pictures
    for ask in (is_text, is_images):
        with pytest.raises(DataError, match="unknown data set 'photo-tile'; did you mean 'photo-tiles'"):
            ask("photo-tile")


def test_names_are_listed_without_torch_or_arrow():
    code = "import sys, moe_mtl.data as d; d.data_sets(); sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_can_be_had():
    for name in moe_mtl.data.__all__:
        assert getattr(moe_mtl.data, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        moe_mtl.data.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, "unknown data set 'digit'; did you mean 'digits'"),
        ("xyz", {}, "known: census-income, digit-pairs, digits"),
        ("digits", {"task": ["digit"]}, "unknown option 'task'; did you mean 'tasks'"),
        ("digits", {"tasks": "digit"}, "digits': tasks: expected a list of texts, found 'digit'"),
        ("digits", {"tasks": ["digt"]}, "unknown task 'digt'"),
        ("table", {}, "expected the option 'path', 'tasks', found none"),
        ("mmoe-synthetic", {"seed": "1"}, "seed: expected an integer, found '1'"),
        ("mmoe-synthetic", {"noise": "much"}, "noise: expected a number, found 'much'"),
        ("mmoe-synthetic", {"seed": True}, "seed: expected an integer, found True"),
        ("multitab-bench", {"degrees": [1, "2"]}, r"degrees: expected a list of integers, found \[1, '2'\]"),
        # Without a default, or with the default None.
        ("table", {"path": "x.csv", "tasks": "click"}, "tasks: expected a list of mappings, found 'click'"),
        ("table", {"path": "x.csv", "tasks": ["click"]}, r"tasks: expected a list of mappings, found \['click'\]"),
        ("table", {"path": 7, "tasks": []}, "path: expected a text or a list of texts, found 7"),
        (
            "table",
            {"path": "x.csv", "tasks": [], "features": {"age": "numeric"}},
            "features: expected a list of mappings, found {'age': 'numeric'}",
        ),
        ("table", {"path": "x.csv", "tasks": [], "group_column": ["a"]}, "group_column: expected a text, found"),
        ("mmoe-synthetic", {"seed": 1.5}, "seed: expected an integer, found 1.5"),
    ],
)
def test_wrong_names_and_options(name, options, message):
    with pytest.raises(DataError, match=message):
        load(name, **options)


def test_the_tenth_of_a_row_is_a_fixed_function():
    # sha256("0") begins with 5feceb66, sha256("1") with 6b86b273 (FIPS 180-4, checked with another tool).
    assert sha256_tenth(2).tolist() == [0x5FECEB66 % 10, 0x6B86B273 % 10]


def test_the_row_hash_is_even_and_depends_on_the_seed():
    import numpy as np

    rows = np.arange(100_000)
    for seed in (0, 1):
        shares = np.bincount((row_hash(rows, seed) % 10).astype(int)) / len(rows)
        assert abs(shares - 0.1).max() < 0.005  # 5 standard errors
    assert (row_hash(rows, 0) != row_hash(rows, 1)).all()
    # Another seed must not be the same order shifted by a row.
    assert not (row_hash(rows, 0)[1:] == row_hash(rows, 1)[:-1]).any()
