"""NYU Depth v2 from a folder of the field's layout: every map as its file says, every missing file by its path."""

import pickle

import numpy as np
import pytest
import torch
from picture_folders import NYUD_SIZE as SIZE
from picture_folders import nyud_mt
from PIL import Image

from moe_mtl.data import DataError, load


def test_maps_are_what_the_files_say(tmp_path):
    root = nyud_mt(tmp_path / "NYUD_MT")
    splits = load("nyud-v2", path=str(root), image_size=[20, 24])
    assert [(task.name, task.weight) for task in splits.tasks] == [
        ("segmentation", 1),
        ("depth", 1),
        ("normals", 10),
        ("edges", 50),
    ]
    assert splits.tasks[3].edge_tolerance == 0.011
    assert splits.info["rows"]["train"] + splits.info["rows"]["validation"] == 30
    assert splits.info["rows"]["test"] == 2
    names = [set(part.names) for part in splits.parts().values()]
    assert not names[0] & names[1]
    assert names[0] | names[1] == set((root / "gt_sets" / "train.txt").read_text().split())
    batch = splits.test[:]
    assert batch["pixel_values"].shape == (2, 3, 20, 24)
    inside = (slice(1, 18), slice(0, 23))  # 17 x 23 in the middle of 20 x 24
    for row, name in enumerate(splits.test.names):
        picture = np.array(Image.open(root / "images" / f"{name}.jpg")).astype(np.float64)
        seen = batch["pixel_values"][row].permute(1, 2, 0)[inside].double().numpy()
        assert np.allclose(seen * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406], picture / 255, atol=1e-5)
        labels = {task: values[row] for task, values in batch["labels"].items()}
        classes = np.array(Image.open(root / "segmentation" / f"{name}.png")).astype(int)
        expected = np.where(classes == 0, -100, classes - 1)
        assert np.array_equal(labels["segmentation"][inside], expected)
        assert int((labels["segmentation"] >= 0).sum()) == int((expected >= 0).sum())
        depth = np.load(root / "depth" / f"{name}.npy")
        assert np.array_equal(labels["depth"][inside], np.where(depth == 0, np.nan, depth), equal_nan=True)
        normals = np.load(root / "normals" / f"{name}.npy")
        length = np.linalg.norm(normals, axis=-1, keepdims=True)
        with np.errstate(invalid="ignore"):
            unit = (normals / length).transpose(2, 0, 1)
        assert np.allclose(labels["normals"][(slice(None), *inside)], unit, atol=1e-6, equal_nan=True)
        assert labels["normals"][:, 4, 4].isnan().all()
        assert np.array_equal(labels["edges"][inside], np.load(root / "edge" / f"{name}.npy"))
        for task in ("depth", "normals", "edges"):
            assert labels[task][..., 0, :].isnan().all(), task  # outside of the picture
    assert splits.processor.class_names("segmentation")[:3] == ("wall", "floor", "cabinet")
    assert len(splits.processor.class_names("segmentation")) == 40
    assert splits.processor.units == {"depth": "m"}


def test_training_pictures_are_changed_and_can_be_sent_to_workers(tmp_path):
    splits = load("nyud-v2", path=nyud_mt(tmp_path / "n"), image_size=[20, 24], tasks=["depth", "normals"])
    train = pickle.loads(pickle.dumps(splits.train))  # as a DataLoader does for its workers
    batch = train.__getitems__(torch.arange(8))
    assert batch["pixel_values"].shape == (8, 3, 20, 24)
    assert torch.equal(batch["pixel_values"], splits.train.__getitems__(torch.arange(8))["pixel_values"])
    assert not torch.equal(batch["pixel_values"], train[:8]["pixel_values"])
    known = ~batch["labels"]["normals"].isnan().any(1)
    assert torch.allclose(batch["labels"]["normals"].norm(dim=1)[known], torch.ones(int(known.sum())), atol=1e-5)
    plain = load("nyud-v2", path=str(tmp_path / "n"), image_size=[20, 24], tasks=["depth"], augment=False)
    assert plain.train.augmentation is None
    assert plain.info["sha256"] != splits.info["sha256"]  # fewer files
    assert set(plain.train.names) == set(splits.train.names)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "depth" / "nyu_0003.npy").unlink(), r"depth/nyu_0003\.npy: expected a file, found none"),
        (
            lambda root: (root / "images" / "nyu_0031.jpg").unlink(),
            r"images/nyu_0031\.jpg: expected a file, found none",
        ),
        (
            lambda root: (root / "gt_sets" / "val.txt").unlink(),
            r"gt_sets/val\.txt: expected a list of pictures, found no",
        ),
        (
            lambda root: (root / "gt_sets" / "val.txt").write_text("\n"),
            r"val\.txt: expected names of pictures, found no",
        ),
        (
            lambda root: (root / "gt_sets" / "val.txt").write_text("a\n../b\n"),
            r"val\.txt, line 2: expected the name of",
        ),
        (
            lambda root: (root / "gt_sets" / "val.txt").write_text("a\nb\na\n"),
            r"val\.txt, line 3: expected each picture",
        ),
        (lambda root: (root / "edge").rename(root / "edges"), r"nyud-v2: path: expected a folder .*edge, found none"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_read(tmp_path, spoil, message):
    root = nyud_mt(tmp_path / "NYUD_MT")
    spoil(root)
    with pytest.raises(DataError, match=message):
        load("nyud-v2", path=str(root))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "depth/nyu_0030.npy",
            np.zeros((4, 5)),
            r"task 'depth': expected a label map \[17, 23\], as large as the pict",
        ),
        ("depth/nyu_0030.npy", np.zeros(4), r"nyu_0030\.npy: expected a map \[height, width\], found \[4\]"),
        (
            "depth/nyu_0030.npy",
            np.array([{}], object),
            r"nyu_0030\.npy: expected an array of numbers, found a file that",
        ),
        ("depth/nyu_0030.npy", np.array(["a"]), r"nyu_0030\.npy: expected an array of numbers"),
        ("normals/nyu_0030.npy", np.zeros(SIZE), r"nyu_0030\.npy: expected vectors \[height, width, 3\], found"),
        ("edge/nyu_0030.npy", np.full(SIZE, 7.0), r"nyu_0030\.npy: expected edges from 0 to 1, found 7\.0 to 7\.0"),
        ("segmentation/nyu_0030.png", np.full(SIZE, 41, np.uint8), r"nyu_0030\.png: expected classes from 0 to 40, fo"),
        (
            "segmentation/nyu_0030.png",
            b"\x89PNG",
            r"nyu_0030\.png: expected an image, found a file that cannot be read",
        ),
        (
            "depth/nyu_0030.npy",
            b"\x93NUMPY",
            r"nyu_0030\.npy: expected an array of numbers, found a file that cannot be",
        ),
        ("images/nyu_0030.jpg", b"", r"nyu_0030\.jpg: expected an image, found a file of another kind"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_when_it_is_read(tmp_path, file, content, message):
    root = nyud_mt(tmp_path / "NYUD_MT")
    if isinstance(content, bytes):
        (root / file).write_bytes(content)
    elif file.endswith(".png"):
        Image.fromarray(content).save(root / file)
    else:
        np.save(root / file, content, allow_pickle=True)
    splits = load("nyud-v2", path=str(root))
    with pytest.raises(DataError, match=message):
        splits.test[:]


def test_wrong_options(tmp_path):
    with pytest.raises(DataError, match="expected the option 'path', found none"):
        load("nyud-v2")
    with pytest.raises(DataError, match=r"nyud-v2: path: expected a folder .*none, found none"):
        load("nyud-v2", path=str(tmp_path / "none"))
    root = str(nyud_mt(tmp_path / "NYUD_MT", train=3))
    with pytest.raises(DataError, match="nyud-v2: unknown task 'edge'; known tasks: segmentation"):
        load("nyud-v2", path=root, tasks=["edge"])
    with pytest.raises(DataError, match=r"validation: expected a share that leaves pictures .* leaves 3 and 0"):
        load("nyud-v2", path=root, validation=0.0)
    with pytest.raises(DataError, match=r"image_size: expected \[height, width\], found"):
        load("nyud-v2", path=root, image_size=[448], validation=0.5)
    for option in ("edge_weight", "edge_tolerance"):
        with pytest.raises(DataError, match=f"task 'edges': {option} must be a number between 0 and 1, found 1.5"):
            load("nyud-v2", path=root, validation=0.5, **{option: 1.5})
