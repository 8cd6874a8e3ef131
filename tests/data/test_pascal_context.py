"""PASCAL-Context from a folder of the field's layout: five maps as their files say, every missing file by its path."""

import json

import numpy as np
import pytest
import torch
from picture_folders import CAT, PERSON, SIZE, part, pascal_mt, structs, thing
from PIL import Image
from scipy.io import savemat

from moe_mtl.data import DataError, load


def test_maps_are_what_the_files_say(tmp_path):
    root = pascal_mt(tmp_path / "PASCAL_MT")
    splits = load("pascal-context", path=str(root), image_size=[20, 24])
    assert {task.name: task.weight for task in splits.tasks} == {
        "segmentation": 1,
        "human_parts": 2,
        "saliency": 5,
        "normals": 10,
        "edges": 50,
    }
    assert (splits.tasks[4].edge_weight, splits.tasks[4].edge_tolerance) == (0.95, 0.0075)
    as_mlore = load("pascal-context", path=str(root), image_size=[20, 24], edge_weight=0.925, edge_tolerance=0.01)
    assert (as_mlore.tasks[4].edge_weight, as_mlore.tasks[4].edge_tolerance) == (0.925, 0.01)
    assert as_mlore.processor.task("edges").weight == 50
    assert splits.info["rows"]["test"] == 3
    assert not set(splits.train.names) & set(splits.validation.names)
    batch = splits.test[:]
    inside = (slice(2, 18), slice(0, 24))
    for row, name in enumerate(splits.test.names):
        labels = {task: values[row] for task, values in batch["labels"].items()}
        folder = "VOC12" if (root / f"semseg/VOC12/{name}.png").exists() else "pascal-context"
        classes = np.array(Image.open(root / f"semseg/{folder}/{name}.png")).astype(int)
        assert np.array_equal(labels["segmentation"][inside], np.where(classes == 255, -100, classes))
        assert (labels["segmentation"][:3] == -100).all()  # two rows of padding, one ignored
        salient = np.array(Image.open(root / f"sal_distill/{name}.png")) / 255 > 0.5
        assert np.array_equal(labels["saliency"][inside], salient.astype(np.float32))
        colours = np.array(Image.open(root / f"normals_distill/{name}.png")).astype(float) * 2 / 255 - 1
        unit = (colours / np.linalg.norm(colours, axis=-1, keepdims=True)).transpose(2, 0, 1)
        assert np.allclose(labels["normals"][:, 2:18, :10], unit[:, :, :10], atol=1e-6)
        assert labels["normals"][:, :, 10:].isnan().all()
        edges = labels["edges"][inside]
        assert edges[2:-2].sum(1).tolist() == [1.0] * 12  # a line of one pixel between person and sky
        assert set(edges[2:-2].argmax(1).tolist()) <= {9, 10}
        for task in ("saliency", "normals", "edges"):
            assert labels[task][..., :2, :].isnan().all()


def test_parts_of_people_are_grouped(tmp_path):
    splits = load("pascal-context", path=str(pascal_mt(tmp_path / "p")), image_size=[16, 24])
    people, cat, without = splits.test[:]["labels"]["human_parts"]
    expected = torch.zeros(16, 24, dtype=torch.int64)
    expected[0:4, 0:4], expected[4:8, 0:4] = 1, 2
    expected[0:2, 10:12], expected[2:4, 10:12] = 4, 6
    assert torch.equal(people, expected)  # the cat's head is none
    assert (cat == -100).all()
    assert (without == -100).all()
    names = splits.processor.class_names("human_parts")
    assert [names[i] for i in (1, 2, 4, 6)] == ["head", "torso", "lower_arm", "lower_leg"]


def test_lists_of_objects_tell_where_people_are(tmp_path):
    root = pascal_mt(tmp_path / "p")
    assert load("pascal-context", path=str(root), image_size=[16, 24]).test.present("human_parts").all()
    (root / "ImageSets/Parts").mkdir()
    names = (root / "ImageSets/Context/val.txt").read_text().split()
    (root / "ImageSets/Parts/val.txt").write_text(json.dumps({names[0]: [CAT, PERSON], names[1]: [CAT]}))
    splits = load("pascal-context", path=str(root), image_size=[16, 24])
    assert splits.test.present("human_parts").tolist() == [True, False, True]
    assert splits.test.present("edges").all()
    (root / f"human_parts/{names[1]}.mat").write_bytes(b"never read")
    assert (splits.test[1]["labels"]["human_parts"] == -100).all()
    (root / "ImageSets/Parts/val.txt").write_text("{")
    with pytest.raises(DataError, match=r"Parts/val\.txt: expected JSON"):
        load("pascal-context", path=str(root))
    (root / "ImageSets/Parts/val.txt").write_text("[1]")
    with pytest.raises(DataError, match=r"Parts/val\.txt: expected names and lists of object numbers, found \[1\]"):
        load("pascal-context", path=str(root))


def test_a_task_needs_its_own_files_alone(tmp_path):
    root = pascal_mt(tmp_path / "p")
    for path in (root / "human_parts").iterdir():
        path.unlink()
    splits = load("pascal-context", path=str(root), tasks=["edges", "saliency"], image_size=[16, 24])
    assert list(splits.validation[:1]["labels"]) == ["saliency", "edges"]
    changed = splits.train.__getitems__([0, 1])["labels"]["edges"]
    assert set(changed[~changed.isnan()].unique().tolist()) == {0.0, 1.0}
    with pytest.raises(DataError, match=r"human_parts/2008_000000\.mat: expected a file, found none"):
        load("pascal-context", path=str(root))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("human_parts/{}.mat", b"MATLAB 5.0 MAT-file", "expected a MATLAB file, found one that cannot be read"),
        ("human_parts/{}.mat", {"other": 1}, "expected the variable 'anno', found none"),
        ("human_parts/{}.mat", {"anno": 1}, "expected anno with objects, found none"),
        (
            "human_parts/{}.mat",
            {"anno": {"objects": structs([thing(PERSON, [part("wing", slice(0, 1), slice(0, 1))])])}},
            "expected a part of PASCAL-Part, found 'wing'",
        ),
        (
            "pascal-context/trainval/{}.mat",
            {"LabelMap": np.zeros((2, 2, 2))},
            r"expected LabelMap \[height, width\], fou",
        ),
        (
            "pascal-context/trainval/{}.mat",
            {"LabelMap": np.zeros((4, 4))},
            r"expected \[4, 4\] pixels as LabelMap has, f",
        ),
        ("semseg/pascal-context/{}.png", np.full(SIZE, 21, np.uint8), "expected classes below 21 or 255, found 21"),
        (
            "semseg/pascal-context/{}.png",
            np.zeros((*SIZE, 3), np.uint8),
            r"expected a map \[height, width\], found \[16",
        ),
        (
            "sal_distill/{}.png",
            np.zeros((*SIZE, 3), np.uint8),
            r"expected a map \[height, width\], found \[16, 24, 3\]",
        ),
        (
            "normals_distill/{}.png",
            np.zeros(SIZE, np.uint8),
            r"expected vectors \[height, width, 3\], found \[16, 24\]",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, file, content, message):
    root = pascal_mt(tmp_path / "p")
    path = root / file.format("2008_000030")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        savemat(path, content)
    else:
        Image.fromarray(content).save(path)
    splits = load("pascal-context", path=str(root), image_size=[16, 24])
    with pytest.raises(DataError, match=message) as error:
        splits.test[:1]
    assert "2008_000030" in str(error.value)
