"""Photo tiles: labels as they are defined, on the whole photograph; parts that share no photograph; noise that is fixed
where it must be."""

import math
import sys
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage import color
from sklearn.cluster import KMeans

from moe_mtl.data import DataError, ImageSplits, load, photo_tiles
from moe_mtl.data.augmentation import Augmentation
from moe_mtl.data.photo_tiles import COLOURS, FURTHEST, MOTORCYCLE, PHOTOGRAPHS, SLOPE, SMOOTH, TASKS, UNIT


@cache
def tiles() -> ImageSplits:
    return load("photo-tiles")


def test_parts_hold_different_photographs():
    names = [name for part in PHOTOGRAPHS.values() for name in part]
    assert len(set(names)) == len(names)
    regions = sorted(MOTORCYCLE.values())
    for (_, end), (start, _) in pairwise(regions):
        assert start - end >= FURTHEST  # as far as a label looks


def test_every_tile_knows_its_photograph():
    splits = load("photo-tiles", max_tiles=3)
    for part in PHOTOGRAPHS:
        table = getattr(splits, part)
        assert torch.equal(table.groups_N.unique(), torch.arange(len(PHOTOGRAPHS[part]) + 1))
        assert table.groups_N.bincount().max() <= 3
        # The motorcycle comes last, and only it is measured.
        assert torch.equal(table.present("disparity"), table.groups_N == len(PHOTOGRAPHS[part]))
    chosen = splits.test.select(splits.test.groups_N >= 2)
    assert torch.equal(chosen.groups_N.unique(), torch.arange(len(PHOTOGRAPHS["test"]) - 1))


def test_sizes_and_shares():
    splits = tiles()
    assert splits.info["rows"] == {"train": 864, "validation": 202, "test": 244}
    assert [(task.name, task.weight) for task in splits.tasks] == [
        ("edges", 50),
        ("segments", 1),
        ("normals", 10),
        ("distance", 1),
        ("disparity", 1),
    ]
    for name, part in splits.parts().items():
        labels = part[:]["labels"]
        assert labels["edges"].shape == (len(part), 64, 64)
        assert 0.04 < float(labels["edges"].mean()) < 0.1, name
        assert set(labels["edges"].unique().tolist()) == {0.0, 1.0}
        shares = torch.bincount(labels["segments"].flatten(), minlength=4) / labels["segments"].numel()
        assert float(shares.min()) > 0.04, (name, shares)
        assert labels["normals"].shape == (len(part), 3, 64, 64)
        assert torch.allclose(labels["normals"].norm(dim=1), torch.ones(len(part), 64, 64), atol=1e-5)
        angle = torch.rad2deg(torch.acos(labels["normals"][:, 2].clamp(-1, 1))).mean()
        assert 8 < float(angle) < 20, name  # what a model that always answers "flat" is wrong by
        assert 0 <= float(labels["distance"].min()) <= float(labels["distance"].max()) <= FURTHEST / UNIT
        # The measurement: of the motorcycle alone, the last photograph, and not of all its pixels.
        present = part.present("disparity")
        measured = labels["disparity"][present]
        assert present.tolist() == [False] * (len(part) - len(measured)) + [True] * len(measured)
        assert len(measured) == {"train": 96, "validation": 14, "test": 14}[name]
        assert 0.85 < float((~measured.isnan()).float().mean()) < 0.99
        assert 0.7 < float(measured[~measured.isnan()].min()) < float(measured[~measured.isnan()].max()) < 6.0


def test_the_same_in_every_run():
    splits = tiles()
    again = load("photo-tiles")
    assert again.info == splits.info
    for name, part in splits.parts().items():
        other = again.parts()[name]
        assert torch.equal(part.pixels_N3HW, other.pixels_N3HW)
        for task in TASKS:
            assert torch.equal(part.labels[task].nan_to_num(-1), other.labels[task].nan_to_num(-1))


def test_labels_of_a_tile_are_cut_from_those_of_the_photograph():
    whole = photo_tiles._photograph("chelsea")
    cut = {name: v[:, 64:128, 64:128] if name == "normals" else v[64:128, 64:128] for name, v in whole.items()}
    part = tiles().test
    # Chelsea comes first, and all 4 x 7 tiles of it are taken: the tile of row 1, column 1.
    for task in TASKS:
        assert np.array_equal(part.labels[task][8].numpy(), cut[task], equal_nan=True), task
    alone = photo_tiles.labels_of(cut["pixels"])
    assert not np.array_equal(alone["distance"], cut["distance"])  # a tile alone does not know the edges around it


def test_labels_against_their_definitions():
    pixels = photo_tiles._photograph("coins")["pixels"][20:60, 20:68]
    labels = photo_tiles.labels_of(pixels)
    rgb = pixels.astype(np.float64) / 255
    light = rgb @ [0.2125, 0.7154, 0.0721]

    def smoothed(plane: np.ndarray) -> np.ndarray:
        """A Gaussian as wide as four standard deviations, mirrored at the border, in two passes."""
        reach = int(4 * SMOOTH + 0.5)
        kernel = [math.exp(-0.5 * (i / SMOOTH) ** 2) for i in range(-reach, reach + 1)]
        for axis in (0, 1):
            padded = np.pad(plane, [(reach, reach) if i == axis else (0, 0) for i in (0, 1)], mode="symmetric")
            size = plane.shape[axis]
            shifted = [np.take(padded, range(i, i + size), axis) * w for i, w in enumerate(kernel)]
            plane = sum(shifted) / sum(kernel)
        return plane

    height = SLOPE * smoothed(light)
    lab = np.stack([smoothed(plane) for plane in np.moveaxis(color.rgb2lab(rgb), -1, 0)])
    edges = np.argwhere(labels["edges"] > 0)
    assert 20 < len(edges) < 400
    for y in range(9, 31):
        for x in range(9, 39):
            slope = (height[y, x + 1] - height[y, x - 1]) / 2, (height[y + 1, x] - height[y - 1, x]) / 2
            normal = np.array([-slope[0], -slope[1], 1])
            # Central differences and the derivative of a Gaussian agree but for the curvature.
            assert np.abs(labels["normals"][:, y, x] - normal / np.linalg.norm(normal)).max() < 0.06
            nearest = min(math.dist((y, x), edge) for edge in edges)
            assert labels["distance"][y, x] == pytest.approx(min(nearest, FURTHEST) / UNIT, abs=1e-6)
            apart = [math.dist(lab[:, y, x], centre) for centre in COLOURS.values()]
            assert apart[labels["segments"][y, x]] == pytest.approx(min(apart), abs=1e-6)


def test_edges_are_lines_where_luminance_steps():
    pixels = np.full((64, 64, 3), 40, np.uint8)
    pixels[:, 30:] = 200
    pixels[:, 30] = 120
    edges = photo_tiles.labels_of(pixels)["edges"]
    assert edges[5:-5].sum(1).tolist() == [1.0] * 54
    assert set(edges[5:-5].argmax(1).tolist()) == {30}
    flat = photo_tiles.labels_of(np.full((64, 64, 3), 40, np.uint8))
    assert flat["edges"].sum() == 0
    assert (flat["distance"] == FURTHEST / UNIT).all()


def test_colours_are_the_centres_of_k_means_on_the_training_photographs():
    pixels = tiles().train.clean_N3HW.permute(0, 2, 3, 1).numpy()  # blurred by 1 pixel already
    lab = ndimage.gaussian_filter(color.rgb2lab(pixels / 255.0), (0, 1.7, 1.7, 0))[:, 2::4, 2::4].reshape(-1, 3)
    found = KMeans(4, random_state=0, n_init=4).fit(lab).cluster_centers_
    for centre in COLOURS.values():
        assert np.abs(found - centre).max(1).min() < 1.5, (centre, found)


def test_turning_the_photograph_first_gives_the_same_labels():
    photograph = photo_tiles._photograph("astronaut")["pixels"][128:224, 160:256]
    tasks = [TASKS[name] for name in ("normals", "segments")]
    labels = {name: torch.from_numpy(photo_tiles.labels_of(photograph)[name])[None] for name in ("normals", "segments")}
    pixels = torch.from_numpy(photograph).permute(2, 0, 1)[None] / 255
    seen = set()
    for seed in range(30):
        turned, moved = Augmentation(mirror=True, flip=True, turn=True)(pixels, labels, tasks, seed)
        again = (turned[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        seen.add(again.tobytes())
        expected = photo_tiles.labels_of(again)
        assert np.abs(moved["normals"][0].numpy() - expected["normals"]).max() < 1e-5
        assert np.array_equal(moved["segments"][0].numpy(), expected["segments"])
    assert len(seen) == 8  # all turns, each mirrored and not


def test_noise_is_fixed_but_for_training_batches():
    splits = tiles()
    rows = torch.arange(200, 264)
    for part in splits.parts().values():
        assert torch.equal(part[rows % len(part)]["pixel_values"], part[rows % len(part)]["pixel_values"])
    validation = splits.validation
    assert torch.equal(validation.__getitems__(rows[:2])["pixel_values"], validation[rows[:2]]["pixel_values"])
    train = splits.train.with_augmentation(Augmentation(noise=0.1))
    clean = train.clean_N3HW[rows].float() / 255
    inner = (clean > 0.35) & (clean < 0.65)  # where little is cut off
    fixed = train[rows]["pixel_values"] / 2 + 0.5
    fresh = []
    for epoch in (0, 1, 0):
        train.set_epoch(epoch)
        fresh.append(train.__getitems__(rows)["pixel_values"] / 2 + 0.5)
    assert torch.equal(fresh[0], fresh[2])
    for noisy in (fixed, fresh[0], fresh[1]):
        assert float((noisy - clean)[inner].std()) == pytest.approx(0.1, rel=0.02)
        assert abs(float((noisy - clean)[inner].mean())) < 0.001
    apart = [(a - b)[inner].std() for a, b in ((fixed, fresh[0]), (fresh[0], fresh[1]))]
    assert float(min(apart)) == pytest.approx(0.1 * 2**0.5, rel=0.02)


def test_few_tiles_without_noise_and_augmentation():
    splits = load("photo-tiles", noise=0, augment=False, tasks=["segments"], max_tiles=5)
    assert splits.info["rows"] == {"train": 45, "validation": 20, "test": 30}  # 9, 4 and 6 photographs
    assert splits.info["sha256"] != tiles().info["sha256"]
    train = splits.train
    assert train.augmentation is None
    assert list(train[:2]["labels"]) == ["segments"]
    assert torch.equal(train.__getitems__([0, 3])["pixel_values"], train[torch.tensor([0, 3])]["pixel_values"])
    # The blur does not stop at a tile's border.
    astronaut = photo_tiles._photograph("astronaut")["pixels"].astype(np.float64)
    blurred = np.round(ndimage.gaussian_filter(astronaut, (1, 1, 0))).astype(np.uint8)
    corners = [(y, x) for y in range(0, 449, 32) for x in range(0, 449, 32)]
    tile = train.pixels_N3HW[0].permute(1, 2, 0).numpy()
    assert any(np.array_equal(tile, blurred[y : y + 64, x : x + 64]) for y, x in corners)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["edge"]}, "photo-tiles: unknown task 'edge'; known tasks: edges, segments"),
        ({"tasks": []}, "photo-tiles: tasks: expected at least one of edges"),
        ({"size": 8}, r"photo-tiles: size: expected an integer in \[16, 128\], found 8"),
        ({"stride": 65}, r"photo-tiles: stride: expected an integer in \[1, 64\], found 65"),
        ({"max_tiles": 0}, "photo-tiles: max_tiles: expected an integer"),
        ({"noise": 1.5}, "photo-tiles: noise: expected 0 to 1, found 1.5"),
        ({"blur": -1.0}, "photo-tiles: blur: expected 0 to 10, found -1.0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(DataError, match=message):
        load("photo-tiles", **options)


def test_without_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(DataError, match=r"photo-tiles needs scikit-image: pip install 'moe_mtl\[vision\]'"):
        load("photo-tiles")
