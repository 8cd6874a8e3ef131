"""The digits: labels follow from the digit, parts are stratified and disjoint, nothing changes from run to run."""

import numpy as np
import pyarrow as pa

from moe_mtl.data import load


def test_labels_follow_from_the_digit():
    splits = load("digits")
    rows = pa.concat_tables(list(splits.parts().values()))
    holes = {0: 1, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 1, 7: 0, 8: 2, 9: 1}
    digits = rows["digit"].to_pylist()
    assert len(digits) == 1797
    assert rows["parity"].to_pylist() == [d % 2 for d in digits]
    assert rows["at_least_5"].to_pylist() == [int(d >= 5) for d in digits]
    assert rows["holes"].to_pylist() == [holes[d] for d in digits]


def test_parts_are_stratified_disjoint_and_fixed():
    splits = load("digits")
    assert splits.info["rows"] == {"train": 1083, "validation": 359, "test": 355}
    pixels = [f["name"] for f in splits.features]
    assert pixels == [f"p{r}{c}" for r in range(8) for c in range(8)]
    # No two of the 1,797 scans are equal, so equal rows in two parts would be one row dealt twice.
    seen = [tuple(row.values()) for part in splits.parts().values() for row in part.select(pixels).to_pylist()]
    assert len(set(seen)) == 1797
    shares = {name: np.bincount(part["digit"].to_numpy()) / len(part) for name, part in splits.parts().items()}
    assert abs(shares["train"] - shares["test"]).max() < 0.005
    assert splits.info["sha256"] == "f6d9e39f37dc45d327f6db33428ee58970ccceabb2535a5c179de35886b70443"


def test_a_processor_makes_64_scaled_pixels_without_bins():
    splits = load("digits", tasks=["digit", "holes"])
    processor = splits.fit_processor()
    assert all(feature["kind"] == "numeric" and feature["bins"] is None for feature in processor.features)
    out = processor(splits.train)
    assert out["numeric"].shape == (1083, 64)
    assert abs(out["numeric"].mean(0)).max() < 1e-5
    assert list(out["labels"]) == ["digit", "holes"]
