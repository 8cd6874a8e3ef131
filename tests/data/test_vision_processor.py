"""The processor of pictures: what a model is given, what comes back, and errors that name a file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from moe_mtl.data import DataError, VisionProcessor
from moe_mtl.data.vision_processor import IMAGENET_MEAN, IMAGENET_STD, pixels_of
from moe_mtl.tasks import Task, UnknownTaskError

TASKS = [
    Task("parts", "segmentation", 3, weight=2.0),
    Task("salient", "saliency"),
    Task("edges", "edges"),
    Task("normals", "normals", 3),
    Task("depth", "depth"),
    Task("kind", "multiclass", 2),
    Task("tags", "multilabel", 2),
    Task("indoors", "binary"),
    Task("age", "regression"),
]


def processor(**changes) -> VisionProcessor:
    fields = {
        "image_size": [6, 8],
        "tasks": TASKS,
        "classes": {"parts": ["sky", "road", "other"], "kind": ["photo", "scan"]},
        "units": {"depth": "m"},
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    return VisionProcessor(**fields | changes)


def picture(height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# --- pictures -> tensors ---


def test_values_are_scaled_and_normalised():
    pixels = picture()
    out = processor()(pixels)["pixel_values"]
    assert out.dtype == torch.float32
    assert out.shape == (1, 3, 6, 8)
    assert out.is_contiguous()
    for channel in range(3):
        for y, x in [(0, 0), (2, 7), (5, 3)]:
            expected = (int(pixels[y, x, channel]) / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
            assert float(out[0, channel, y, x]) == pytest.approx(expected, abs=1e-6)


def test_arrays_pil_images_and_files_give_the_same(tmp_path):
    pixels = picture(20, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    sources = [pixels, Image.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png")]
    out = processor()(sources)["pixel_values"]
    assert out.shape == (4, 3, 6, 8)
    assert all(torch.equal(out[0], other) for other in out[1:])
    assert torch.equal(processor()(pixels)["pixel_values"][0], out[0])


def test_stretched_as_pil_does_it():
    pixels = picture(21, 33)
    expected = np.array(Image.fromarray(pixels).resize((8, 6), Image.Resampling.BILINEAR))
    assert np.array_equal(processor().place(pixels), expected)
    own = processor()(pixels, resize=False)["pixel_values"]
    assert own.shape == (1, 3, 21, 33)
    assert torch.equal(own, processor(image_size=[21, 33])(pixels)["pixel_values"])
    with pytest.raises(DataError, match=r"expected pictures of one size, found \[\(5, 5\), \(6, 8\)\]"):
        processor()([picture(5, 5), picture()], resize=False)


def test_padded_to_the_middle():
    small, wide = picture(4, 5), picture(10, 40)
    padding = processor(fit="pad")
    placed = padding.place(small)
    assert padding.placement(4, 5) == (1, 1, 4, 5)
    assert np.array_equal(placed[1:5, 1:6], small)
    assert placed.sum() == small.sum()  # black around it
    assert padding.placement(10, 40) == (2, 0, 2, 8)  # shrunk to fit
    shrunk = np.array(Image.fromarray(wide).resize((8, 2), Image.Resampling.BILINEAR))
    assert np.array_equal(padding.place(wide)[2:4], shrunk)


@pytest.mark.parametrize("size", [(6, 8), (4, 5), (13, 9), (3, 30)])
@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_a_label_map_takes_the_way_of_its_picture(size, fit):
    label = np.arange(size[0] * size[1]).reshape(size)
    placed = processor(fit=fit).place_map(label, -100)
    top, left, height, width = processor(fit=fit).placement(*size)
    expected = np.full((6, 8), -100)
    for y in range(height):
        for x in range(width):  # the pixel that the middle falls into
            expected[top + y, left + x] = label[int((y + 0.5) * size[0] / height), int((x + 0.5) * size[1] / width)]
    assert np.array_equal(placed, expected)
    both = processor(fit=fit).place_map(np.stack([label, label * 2.0, label * 3.0]), np.nan)
    assert np.array_equal(both[1], np.where(expected < 0, np.nan, expected * 2.0), equal_nan=True)


def test_modes_of_images():
    grey = picture()[:, :, 0]
    rgb = np.repeat(grey[:, :, None], 3, 2)
    assert np.array_equal(pixels_of(grey), rgb)
    assert np.array_equal(pixels_of(Image.fromarray(grey)), rgb)
    assert np.array_equal(
        pixels_of(Image.fromarray(rgb).convert("P", palette=Image.Palette.WEB)),
        pixels_of(Image.fromarray(rgb).convert("P", palette=Image.Palette.WEB).convert("RGB")),
    )
    # What can be seen through is white.
    see_through = np.dstack([rgb, np.where(np.arange(8) < 4, 255, 0)[None].repeat(6, 0).astype(np.uint8)])
    shown = pixels_of(Image.fromarray(see_through))
    assert np.array_equal(shown[:, :4], rgb[:, :4])
    assert (shown[:, 4:] == 255).all()


def test_a_picture_is_turned_as_its_file_says(tmp_path):
    pixels = picture(16, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # held so that it must be turned clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels_of(tmp_path / "turned.png"), np.rot90(pixels, -1))


def test_what_is_no_picture_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "notes.jpg").write_text("not an image")
    whole = tmp_path / "whole.jpg"
    Image.fromarray(picture(64, 64)).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:600])
    Image.fromarray(picture(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:6000])
    Image.fromarray(np.zeros((4, 4), np.int32)).save(tmp_path / "deep.tiff")
    Image.new("L", (1, 16_385)).save(tmp_path / "long.png")
    for name, message in {
        "none.png": "expected an image file, found none",
        "notes.jpg": "expected an image, found a file of another kind",
        "cut.jpg": "expected a whole image, found one that cannot be read",
        "cut.png": "expected a whole image, found one that cannot be read",
        "deep.tiff": "expected an image of 8 bits per colour, found mode 'I'",
        "long.png": "expected 1 to 16384 pixels a side, found 16385 x 1",
        ".": "expected a whole image, found one that cannot be read",
    }.items():
        with pytest.raises(DataError, match=message) as error:
            processor()([picture(), tmp_path / name])
        assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "expected at least one picture, found none"),
        (None, "expected a PIL image, an array or a path, found NoneType"),
        (np.zeros((4, 4, 3)), r"expected uint8 \[height, width, 3\] or \[height, width\], found float64 \[4, 4, 3\]"),
        (np.zeros((3, 4, 4), np.uint8), r"found uint8 \[3, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), "expected 1 to 16384 pixels a side, found 0 x 4"),
        (torch.zeros(3, 4, 4), "expected a PIL image, an array or a path, found Tensor"),
    ],
)
def test_what_is_no_picture_in_memory(source, message):
    with pytest.raises(DataError, match=message):
        processor()(source)


# --- logits -> predictions ---


def test_predictions_have_names_and_units():
    torch.manual_seed(0)
    logits = {
        "parts": torch.randn(2, 3, 6, 8),
        "salient": torch.randn(2, 1, 6, 8),
        "edges": torch.randn(2, 1, 6, 8).bfloat16(),
        "normals": torch.randn(2, 3, 6, 8, requires_grad=True),
        "depth": torch.randn(2, 1, 6, 8),
        "kind": torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
        "tags": torch.zeros(2, 2),
        "indoors": torch.zeros(2, 1),
        "age": torch.tensor([[3.0], [4.0]]),
    }
    out = processor().decode(logits)
    assert np.array_equal(out["parts"], logits["parts"].argmax(1))
    assert np.allclose(out["salient"], 1 / (1 + np.exp(-logits["salient"][:, 0].double())), atol=1e-6)
    assert out["edges"].shape == (2, 6, 8)
    assert out["edges"].dtype == np.float32
    assert np.allclose(np.linalg.norm(out["normals"], axis=1), 1, atol=1e-5)
    assert np.array_equal(out["depth"], logits["depth"][:, 0])
    assert out["kind"].tolist() == ["photo", "scan"]
    assert out["kind/photo"].tolist() == pytest.approx([1 / (1 + np.exp(-2)), 1 / (1 + np.exp(1))])
    assert out["tags/1"].tolist() == [0.5, 0.5]
    assert out["indoors"].tolist() == [0.5, 0.5]
    assert out["age"].tolist() == [3.0, 4.0]
    assert list(processor().decode({"depth": logits["depth"]})) == ["depth"]
    with pytest.raises(UnknownTaskError, match="unknown task 'depht'; known tasks: parts"):
        processor().decode({"depht": logits["depth"]})


def test_values_are_in_their_units_as_they_are():
    values = torch.tensor([1.0, 2.0])
    assert processor().unscale("depth", values) is values
    with pytest.raises(UnknownTaskError, match="unknown task 'depht'"):
        processor().unscale("depht", values)


def test_the_processor_of_some_tasks():
    small = processor(fit="pad").for_tasks(["depth", "kind"])
    assert [task["name"] for task in small.tasks] == ["depth", "kind"]
    assert small.classes == {"kind": ("photo", "scan")}
    assert small.units == {"depth": "m"}
    assert (small.image_size, small.fit, small.image_mean) == ((6, 8), "pad", IMAGENET_MEAN)
    with pytest.raises(UnknownTaskError, match="unknown task 'x'"):
        processor().for_tasks(["x"])


# --- files ---


def test_saved_and_loaded(tmp_path):
    for one in (processor(), processor(fit="pad", classes={}, units={}).for_tasks(["edges"])):
        assert one.save_pretrained(tmp_path) == [str(tmp_path / "preprocessor_config.json")]
        again = VisionProcessor.from_pretrained(tmp_path)
        assert again == one
        assert again.to_json() == one.to_json()
        assert torch.equal(again(picture())["pixel_values"], one(picture())["pixel_values"])
    assert processor() != processor(fit="pad")
    assert repr(one) == "VisionProcessor(6 x 8, pad; tasks: edges)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processor_class": "TabularProcessor"}, "processor_class: expected one of 'VisionProcessor', found 'Tab"),
        ({"version": 2}, "version: expected one of 1, found 2"),
        ({"image_sise": 1}, "unknown field 'image_sise'; did you mean 'image_size'"),
        ({"units": None}, "units: expected a mapping, found None"),
        ({"units": {"depth": 1}}, "unit of 'depth': expected a text, found 1"),
        ({"units": {"dept": "m"}}, "units: unknown task 'dept'"),
        ({"classes": {"kind": "ab"}}, "classes of 'kind': expected a list of texts, found 'ab'"),
        ({"classes": {"kind": ["a", "a"]}}, r"classes of task 'kind': expected 2 different names, found \['a', 'a'\]"),
        ({"classes": {"kind": ["a"]}}, "expected 2 different names"),
        ({"tasks": {}}, "tasks: expected a list of mappings"),
        ({"tasks": [{"name": "a", "kind": "deep"}], "units": {}, "classes": {}}, "kind must be one of"),
        ({"tasks": [], "units": {}, "classes": {}}, "tasks: expected at least one task, found none"),
        ({"image_size": 6}, r"image_size: expected \[height, width\], found 6"),
        ({"image_size": [6, 0]}, r"image_size: expected an integer in \[1, 16384\], found 0"),
        ({"image_size": [6, True]}, "image_size: expected an integer"),
        ({"image_mean": [1, 2]}, r"image_mean: expected three numbers, found \[1, 2\]"),
        ({"image_std": [1, 1, 0]}, r"image_std: expected numbers of at least 1e-06, found \[1, 1, 0\]"),
        ({"image_std": [1, 1, "1"]}, "image_std: expected three numbers"),
        ({"fit": "crop"}, "fit: expected one of 'stretch', 'pad', found 'crop'"),
    ],
)
def test_what_was_changed_in_the_file_is_named(tmp_path, change, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor().to_dict() | change))
    with pytest.raises(DataError, match=message):
        VisionProcessor.from_pretrained(tmp_path)
