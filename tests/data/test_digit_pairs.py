"""Digit pairs: every picture is two scans of its part, overlaid; nothing changes from run to run."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from moe_mtl.data import DataError, load
from moe_mtl.data.digits import stratified


def test_pictures_are_two_scans_overlaid():
    splits = load("digit-pairs", size=9)
    assert splits.info["rows"] == {"train": 6000, "validation": 1000, "test": 2000}
    scans, digit = load_digits(return_X_y=True)
    scans = np.round(scans * 255 / 16).reshape(-1, 8, 8)
    part = stratified(digit)
    for number, table in enumerate(splits.parts().values()):
        mine = part == number
        for row in range(0, len(table), 400):
            picture = table.pixels_N3HW[row]
            assert torch.equal(picture[0], picture[1])
            assert torch.equal(picture[0], picture[2])
            left, right = (int(table.labels[name][row]) for name in ("left", "right"))
            pairs = [
                (a, b)
                for a in np.flatnonzero(mine & (digit == left))
                # The first row and column show the left scan alone, so few can be it.
                if np.array_equal(picture[0, 0, :8], scans[a, 0]) and np.array_equal(picture[0, :8, 0], scans[a, :, 0])
                for b in np.flatnonzero(mine & (digit == right))
                if np.array_equal(
                    picture[0], np.maximum(np.pad(scans[a], ((0, 1), (0, 1))), np.pad(scans[b], ((1, 0), (1, 0))))
                )
            ]
            assert pairs, f"picture {row} of part {number} is no overlay of a {left} and a {right} of its part"


def test_labels_are_even_independent_and_fixed():
    splits = load("digit-pairs")
    assert splits.info["sha256"] == "9e4b07e7b28d64ecf78807b7c0a5a0ffba28c796fc11baa6e85e0404823a1ee7"
    labels = splits.train[:]["labels"]
    counts = torch.zeros(10, 10).index_put_((labels["left"], labels["right"]), torch.ones(6000), accumulate=True)
    assert float((counts / 60 - 1).abs().max()) < 0.6  # 60 a cell, standard deviation 8
    assert not (labels["left"][1:] == labels["right"][:-1]).all()


def test_the_overlap_leaves_something_to_learn():
    splits = load("digit-pairs")
    train, test = splits.train[:], splits.test[:]
    pixels, unseen = (batch["pixel_values"][:, 0].flatten(1).numpy() for batch in (train, test))
    for task in ("left", "right"):
        model = LogisticRegression(max_iter=200, C=0.1).fit(pixels, train["labels"][task])
        assert 0.8 < model.score(unseen, test["labels"][task]) < 0.9


@pytest.mark.parametrize(
    ("canvas", "size", "times", "before"), [(9, 12, 1, 1), (10, 10, 1, 0), (9, 64, 7, 0), (16, 50, 3, 1)]
)
def test_the_canvas_is_enlarged_by_whole_pixels_and_padded(canvas, size, times, before):
    small = load("digit-pairs", canvas=canvas, size=canvas).validation.pixels_N3HW
    large = load("digit-pairs", canvas=canvas, size=size).validation.pixels_N3HW
    assert large.shape == (1000, 3, size, size)
    inside = large[:, :, before : before + times * canvas, before : before + times * canvas]
    assert torch.equal(inside, small.repeat_interleave(times, 2).repeat_interleave(times, 3))
    assert int(large.sum()) == int(inside.sum())


def test_one_task():
    splits = load("digit-pairs", tasks=["right"])
    assert [task.name for task in splits.tasks] == ["right"]
    assert list(splits.test[:2]["labels"]) == ["right"]
    assert splits.processor.class_names("right") == tuple("0123456789")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["middle"]}, "digit-pairs: unknown task 'middle'; known tasks: left, right"),
        ({"canvas": 7}, r"digit-pairs: canvas: expected an integer in \[8, 16\], found 7"),
        ({"canvas": 10, "size": 9}, r"digit-pairs: size: expected an integer in \[10, 1024\], found 9"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(DataError, match=message):
        load("digit-pairs", **options)
