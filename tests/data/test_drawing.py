"""Predictions as pictures: the colours are those of the classes and values, at the place they belong to."""

import numpy as np
import pytest
from PIL import Image

from moe_mtl.data import DataError, VisionProcessor, drawing
from moe_mtl.data.drawing import EDGE, SALIENT, class_colour, viridis
from moe_mtl.tasks import Task, UnknownTaskError

TASKS = [
    Task("parts", "segmentation", 3),
    Task("salient", "saliency"),
    Task("edges", "edges"),
    Task("normals", "normals", 3),
    Task("depth", "depth"),
    Task("kind", "multiclass", 2),
    Task("age", "regression"),
]


def processor(fit: str = "stretch") -> VisionProcessor:
    return VisionProcessor([8, 8], TASKS, {"parts": ["sky", "road", "other"]}, {"depth": "m", "age": "years"}, fit=fit)


def picture(height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def drawn(task: str, prediction, pixels: np.ndarray, fit: str = "stretch") -> np.ndarray:
    """What stands where the picture was."""
    out = processor(fit).draw(pixels, task, prediction)
    assert out.mode == "RGB"
    assert out.width >= pixels.shape[1]
    assert out.height >= pixels.shape[0]
    return np.array(out)[: pixels.shape[0], : pixels.shape[1]].astype(int)


def test_classes_are_laid_over_the_photograph():
    pixels = picture()
    classes = np.zeros((60, 90), np.int64)
    classes[20:, :40], classes[:, 70:], classes[0, 0] = 1, 2, -100
    out = drawn("parts", classes, pixels)
    for y, x in [(5, 5), (30, 10), (40, 80), (59, 89), (20, 39)]:
        expected = 0.4 * pixels[y, x] + 0.6 * np.array(class_colour(classes[y, x]))
        assert np.abs(out[y, x] - expected).max() <= 1
    assert out[0, 0].tolist() == pixels[0, 0].tolist()  # no class, the photograph
    legend = np.array(processor().draw(pixels, "parts", classes))[60:]
    colours = {tuple(colour) for row in legend.tolist() for colour in row}
    assert {class_colour(i) for i in range(3)} <= colours
    only = np.array(processor().draw(pixels, "parts", np.ones_like(classes)))[60:]
    assert class_colour(0) not in {tuple(colour) for row in only.tolist() for colour in row}


def test_colours_of_classes_are_apart():
    colours = np.array([class_colour(i) for i in range(40)])
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(40)
    assert apart.min() >= 30
    assert np.array([apart[i, i + 1] for i in range(39)]).min() >= 190  # neighbours in number


def test_edges_are_thin_dark_lines_over_pale_grey():
    pixels = picture()
    x = np.arange(90)
    share = np.tile(np.exp(-((x - 20) ** 2) / 8) + 0.8 * np.exp(-((x - 60) ** 2) / 8), (60, 1)).astype(np.float32)
    share[:, 40], share[:, 80] = 0.4, np.nan  # less likely than not; unknown
    out = drawn("edges", share, pixels)
    pale = np.repeat(255 - 0.2 * (255 - pixels.mean(-1, keepdims=True)), 3, -1)
    expected = pale.copy()
    expected[:, 20] = EDGE  # sure
    expected[:, 60] = 0.4 * pale[:, 60] + 0.6 * np.array(EDGE)  # 2 x 0.8 - 1
    assert np.abs(out - expected).max() <= 1
    assert pale.min() - max(EDGE) > 180
    # A texture that is likely everywhere is no plain of ink.
    grain = 0.7 + 0.1 * np.random.default_rng(0).random((60, 90), np.float32)
    assert (drawn("edges", grain, pixels) > pale - 2).all(-1).mean() > 0.6


def test_saliency_tints_the_photograph():
    pixels = picture()
    share = np.full((60, 90), 0.5, np.float32)
    share[0, 0] = np.nan
    out = drawn("salient", share, pixels)
    assert np.abs(out[9, 9] - (0.7 * pixels[9, 9] + 0.3 * np.array(SALIENT))).max() <= 1
    assert out[0, 0].tolist() == pixels[0, 0].tolist()


def test_normals_are_colours():
    pixels = picture()
    normals = np.zeros((3, 60, 90), np.float32)
    normals[2] = 1
    normals[:, 1, 1] = [1, 0, 0]
    normals[:, 2, 2] = np.nan
    out = drawn("normals", normals, pixels)
    assert out[0, 0].tolist() == [128, 128, 255]
    assert out[1, 1].tolist() == [255, 128, 128]
    assert out[2, 2].tolist() == pixels[2, 2].tolist()


def test_depth_from_dark_to_light():
    values = np.linspace(2, 5, 60 * 90).reshape(60, 90).astype(np.float32)
    out = drawn("depth", values, picture())
    assert out[0, 0].tolist() == [68, 1, 84]  # both ends of viridis
    assert out[-1, -1].tolist() == [253, 231, 37]
    light = out.reshape(-1, 3) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light[::60]) > 0).all()
    strip = np.array(processor().draw(picture(), "depth", values))[60:]
    assert (strip.min(-1) < 50).any()  # numbers and the scale
    flat = drawn("depth", np.full((60, 90), 3.0, np.float32), picture())
    assert len({tuple(colour) for colour in flat.reshape(-1, 3).tolist()}) == 1
    nothing = drawn("depth", np.full((60, 90), np.nan, np.float32), picture())
    assert np.array_equal(nothing, picture())
    assert (viridis(np.array([np.nan])) == 0).all()


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_a_map_of_the_models_input_is_fitted_to_the_picture(fit):
    pixels = picture(40, 80)
    classes = np.zeros((8, 8), np.int64)
    classes[:, 4:] = 1
    if fit == "pad":  # a picture twice as wide as high fills the middle four rows
        classes[:2] = classes[6:] = 2
    out = drawn("parts", classes, pixels, fit)
    for x, number in [(0, 0), (39, 0), (40, 1), (79, 1)]:
        for y in (0, 20, 39):
            expected = 0.4 * pixels[y, x] + 0.6 * np.array(class_colour(number))
            assert np.abs(out[y, x] - expected).max() <= 1, (y, x)
    values = np.tile(np.arange(8, dtype=np.float32), (8, 1))
    smooth = drawn("depth", values, pixels, fit)[20].reshape(-1, 3)
    assert len({tuple(colour) for colour in smooth.tolist()}) > 40  # between eight values, no steps


def test_what_is_one_per_picture_is_written_below():
    pixels = picture()
    for task, prediction in [("kind", "photo"), ("kind", np.str_("photo")), ("age", np.float32(41.5))]:
        out = np.array(processor().draw(Image.fromarray(pixels), task, prediction))
        assert np.array_equal(out[:60, :90], pixels)
        assert (out[60:] < 100).any()
    with pytest.raises(DataError, match="prediction of task 'kind': expected one class or value, found"):
        processor().draw(pixels, "kind", ["a", "b"])


def test_several_values_and_labels_are_written_below(monkeypatch):
    written = []
    plain = drawing._with_text
    monkeypatch.setattr(drawing, "_with_text", lambda picture, lines: written.append(lines) or plain(picture, lines))
    tasks = [
        Task("size", "regression", 2),
        Task("has", "multilabel", 3),
        Task("one", "multilabel"),
        Task("many", "multilabel", 20),
    ]
    several = VisionProcessor([8, 8], tasks, {"has": ["cat", "dog", "tree"]}, {"size": "cm"})
    pixels = picture()
    for task, values in (
        ("size", [1.5, 20]),
        ("has", [0.25, 0.5, 0.125]),
        ("one", [0.75]),
        ("many", np.arange(20) / 20),
    ):
        out = np.array(several.draw(pixels, task, np.array(values, np.float32)))
        assert np.array_equal(out[:60, :90], pixels)
        assert (out[60:] < 100).any()
    assert written[:3] == [["size: 1.5, 20 cm"], ["has/dog: 0.5", "has/cat: 0.25", "has/tree: 0.125"], ["one/0: 0.75"]]
    assert written[3][0] == "many/19: 0.95"
    assert written[3][15:] == ["many/4: 0.2", "and 4 more"]
    for task in ("size", "has"):
        with pytest.raises(DataError, match=f"prediction of task '{task}': expected [23] values, found"):
            several.draw(pixels, task, np.zeros(4, np.float32))


def test_many_classes_on_a_small_picture():
    many = VisionProcessor([8, 8], [Task("parts", "segmentation", 40)])
    out = many.draw(picture(8, 8), "parts", np.arange(64).reshape(8, 8) % 40)
    assert out.width < 400
    assert np.array_equal(np.array(out)[0, 8], [255, 255, 255])


@pytest.mark.parametrize(
    ("task", "prediction", "message"),
    [
        ("parts", np.zeros((5, 5), np.int64), r"'parts': expected the shape \[60, 90\] or \[8, 8\], found \[5, 5\]"),
        ("parts", np.zeros((8, 8)), "'parts': expected class numbers below 3, found float64"),
        ("parts", np.full((8, 8), 3), "'parts': expected class numbers below 3, found int64 to 3"),
        ("normals", np.zeros((8, 8)), r"'normals': expected the shape \[3, 60, 90\] or \[3, 8, 8\], found \[8, 8\]"),
        ("depth", np.zeros((8, 8), int), "'depth': expected numbers with a fraction, found int64"),
    ],
)
def test_predictions_of_another_task_are_errors(task, prediction, message):
    with pytest.raises(DataError, match=message):
        processor().draw(picture(), task, prediction)


def test_unknown_task_and_no_picture():
    with pytest.raises(UnknownTaskError, match="unknown task 'dpeth'"):
        processor().draw(picture(), "dpeth", np.zeros((8, 8)))
    with pytest.raises(DataError, match="expected an image file, found none"):
        processor().draw("nowhere.png", "depth", np.zeros((8, 8)))
