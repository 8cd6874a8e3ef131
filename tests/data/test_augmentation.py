"""Changes to training pictures: labels stay true, what is missing stays missing, nothing else is touched."""

import math

import numpy as np
import pytest
import torch

from moe_mtl.data import DataError
from moe_mtl.data.augmentation import Augmentation
from moe_mtl.tasks import Task

TASKS = [
    Task("parts", "segmentation", 5),
    Task("edges", "edges"),
    Task("normals", "normals", 3),
    Task("depth", "depth"),
    Task("kind", "multiclass", 3),
]


def batch(size: int = 12, rows: int = 6) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pictures whose first two colours say where a pixel was."""
    generator = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.linspace(0.1, 0.9, size), torch.linspace(0.1, 0.9, size), indexing="ij")
    pixels = torch.stack([x, y, torch.rand(size, size, generator=generator)]).repeat(rows, 1, 1, 1)
    normals = torch.randn(rows, 3, size, size, generator=generator)
    labels = {
        "parts": torch.randint(0, 5, (rows, size, size), generator=generator),
        "edges": torch.rand(rows, size, size, generator=generator),
        "normals": normals / normals.norm(dim=1, keepdim=True),
        "depth": torch.rand(rows, size, size, generator=generator) + 1,
        "kind": torch.arange(rows) % 3,
    }
    labels["parts"][:, 2, 3] = -100
    labels["normals"][:, :, 5, 1] = torch.nan
    labels["depth"][:, :4] = torch.nan
    return pixels, labels


def turned(map_: np.ndarray, mirrored: bool, quarter_turns: int) -> np.ndarray:
    """The last two axes, mirrored, then turned counterclockwise."""
    map_ = map_[..., ::-1] if mirrored else map_
    return np.rot90(map_, quarter_turns, (-2, -1))


def same(a: torch.Tensor, b: np.ndarray) -> bool:
    return np.allclose(a.double().numpy(), b, atol=1e-5, rtol=0, equal_nan=True)


def test_maps_go_with_their_picture_and_normals_turn_as_vectors():
    pixels, labels = batch()
    out, moved = Augmentation(mirror=True, flip=True, turn=True)(pixels, labels, TASKS, seed=5)
    found = set()
    for row in range(len(pixels)):
        ways = [
            (mirrored, turns)
            for mirrored in (False, True)
            for turns in range(4)
            if same(out[row], turned(pixels[row].numpy(), mirrored, turns))
        ]
        assert len(ways) == 1
        mirrored, turns = ways[0]
        found.add(ways[0])
        for name in ("parts", "edges", "depth"):
            assert same(moved[name][row], turned(labels[name][row].numpy(), mirrored, turns)), name
        x, y, z = turned(labels["normals"][row].numpy(), mirrored, turns)
        x = -x if mirrored else x
        for _ in range(turns):  # counterclockwise: right becomes up, y points down
            x, y = y, -x
        assert same(moved["normals"][row], np.stack([x, y, z]))
    assert len(found) > 2
    assert torch.equal(moved["kind"], labels["kind"])
    for name, values in moved.items():
        assert (values.dtype, values.shape) == (labels[name].dtype, labels[name].shape)


def test_the_same_for_the_same_seed_and_nobody_elses_numbers():
    pixels, labels = batch()
    kept = {name: values.clone() for name, values in labels.items()}
    changes = Augmentation(mirror=True, turn=True, scale=(0.5, 2.0), brightness=0.1, contrast=0.1, noise=0.1)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = changes(pixels, labels, TASKS, 7), changes(pixels, labels, TASKS, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], changes(pixels, labels, TASKS, 8)[0])
    for name, values in labels.items():
        assert torch.equal(first[1][name].float().nan_to_num(-1), second[1][name].float().nan_to_num(-1))
        assert torch.equal(values.float().nan_to_num(-1), kept[name].float().nan_to_num(-1))  # not changed in place


def test_an_enlargement_brings_things_nearer():
    size = 40
    pixels, labels = batch(size)
    labels["depth"] = torch.full((6, size, size), 3.0)
    out, moved = Augmentation(scale=(0.5, 2.0))(pixels, labels, TASKS, seed=2)
    compared = 0
    for row in range(6):
        inside = ~moved["depth"][row].isnan()
        # How fast colours change tells the enlargement: they change by 0.8 over the old picture.
        ys, xs = (inside.nonzero().float().mean(0).long()).tolist()
        step = float(out[row, 0, ys, xs + 2] - out[row, 0, ys, xs - 2]) / 4
        enlargement = 0.8 / (size - 1) / step
        assert 0.49 < enlargement < 2.02
        assert moved["depth"][row][inside].numpy() == pytest.approx(3 / enlargement, rel=1e-2)
        # A pixel's label is that of where its colour says it was; at the border colours fade to black.
        outside = torch.nn.functional.pad((~inside).float(), (2, 2, 2, 2), value=1.0)
        inner = torch.nn.functional.max_pool2d(outside[None], 5, 1)[0] == 0
        for y, x in inner.nonzero()[::11].tolist():
            was_x, was_y = ((float(out[row, i, y, x]) - 0.1) / 0.8 * (size - 1) for i in (0, 1))
            near = round(was_y), round(was_x)
            if abs(was_y - near[0]) < 0.4 and abs(was_x - near[1]) < 0.4:  # not half way between two pixels
                compared += 1
                assert moved["parts"][row, y, x] == labels["parts"][row, near[0], near[1]]
                normal = labels["normals"][row, :, near[0], near[1]]
                assert torch.allclose(moved["normals"][row, :, y, x], normal, atol=1e-5, equal_nan=True)
        outside = ~inside
        assert (moved["parts"][row][outside] == -100).all()
        assert moved["normals"][row][:, outside].isnan().all()
        assert moved["edges"][row][outside].isnan().all()
    assert compared > 100
    assert moved["depth"].isnan().any()


def test_brightness_contrast_and_noise_change_the_picture_alone():
    pixels, labels = batch()
    for changes in (Augmentation(brightness=0.1), Augmentation(contrast=0.2), Augmentation(noise=0.05)):
        out, moved = changes(pixels, labels, TASKS, seed=1)
        assert float(out.min()) >= 0
        assert float(out.max()) <= 1
        for name, values in labels.items():
            assert torch.equal(moved[name].float().nan_to_num(-1), values.float().nan_to_num(-1))
    added = (Augmentation(brightness=0.1)(pixels, labels, TASKS, seed=1)[0] - pixels)[:, :2]  # nothing is cut off
    assert (added.flatten(1).max(1).values - added.flatten(1).min(1).values < 1e-5).all()  # one number per picture
    assert 0.01 < float(added.abs().max()) <= 0.1
    assert len({round(float(one.mean()), 6) for one in added}) == 6
    times = Augmentation(contrast=0.2)(pixels, labels, TASKS, seed=1)[0][:, :2] / pixels[:, :2]
    unclipped = times[:, :, :6, :6].flatten(1)
    assert (unclipped.max(1).values - unclipped.min(1).values < 1e-4).all()
    assert 0.8 <= float(unclipped.min()) < float(unclipped.max()) <= 1.2
    noise = Augmentation(noise=0.05)(*batch(40), TASKS, seed=1)[0] - batch(40)[0]
    assert float(noise[:, :2, 10:30, 10:30].std()) == pytest.approx(0.05, rel=0.03)


def test_nothing_to_do():
    pixels, labels = batch()
    out, moved = Augmentation()(pixels, labels, TASKS, seed=1)
    assert out is pixels
    assert moved == labels


def test_pictures_that_are_not_square_cannot_be_turned():
    with pytest.raises(DataError, match=r"expected square pictures to turn, found \[4, 6\]"):
        Augmentation(turn=True)(torch.zeros(1, 3, 4, 6), {}, [], seed=0)
    out, _ = Augmentation(mirror=True)(torch.rand(1, 3, 4, 6), {}, [], seed=0)
    assert out.shape == (1, 3, 4, 6)


def test_a_task_whose_labels_are_not_asked_for():
    pixels, labels = batch()
    out, moved = Augmentation(mirror=True)(pixels, {"edges": labels["edges"]}, TASKS, seed=5)
    assert list(moved) == ["edges"]
    assert math.isclose(float(out.mean()), float(pixels.mean()), rel_tol=1e-5)
