"""Tables of pictures: batches by index, changes that depend on seed, epoch and rows alone, errors that name a file."""

import numpy as np
import pytest
import torch
from PIL import Image

from moe_mtl.data import DataError, ImageSplits, ShuffledBatches, VisionProcessor
from moe_mtl.data.augmentation import Augmentation
from moe_mtl.data.images import FileImages, LabelFiles, TensorImages
from moe_mtl.tasks import Task, UnknownTaskError
from moe_mtl.training.sampling import BatchLoader

TASKS = [Task("parts", "segmentation", 3), Task("depth", "depth"), Task("kind", "multiclass", 4)]


def table(rows: int = 10, **options) -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    labels = {
        "parts": torch.randint(0, 3, (rows, 4, 4), generator=generator),
        "depth": torch.rand(rows, 4, 4, generator=generator),
        "kind": torch.arange(rows) % 4,
    }
    labels["depth"][::2] = torch.nan
    labels["depth"][1, 0] = torch.nan  # missing in part
    labels["parts"][0] = -100
    labels["kind"][3] = -100
    pixels = torch.randint(0, 256, (rows, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return TensorImages(pixels, labels, VisionProcessor([4, 4], TASKS), **options)


def test_batches_are_the_rows_asked_for():
    images = table()
    whole = images[:]
    assert len(images) == 10
    assert images.tasks == TASKS
    assert torch.allclose(whole["pixel_values"], images.pixels_N3HW.float() / 127.5 - 1, atol=1e-6)
    for index, rows in [(slice(2, 9, 3), [2, 5, 8]), (torch.tensor([7, 7, 0]), [7, 7, 0]), ([-1, 3], [9, 3])]:
        batch = images[index]
        assert torch.equal(batch["pixel_values"], whole["pixel_values"][rows])
        assert list(batch["labels"]) == ["parts", "depth", "kind"]
        for name, values in batch["labels"].items():
            assert torch.equal(values.float().nan_to_num(-1), whole["labels"][name][rows].float().nan_to_num(-1))
    one = images[4]
    assert torch.equal(one["pixel_values"], whole["pixel_values"][4])
    assert one["labels"]["kind"].shape == ()
    for wrong in ([10], torch.tensor([-11]), 10):
        with pytest.raises(IndexError, match=r"expected pictures in \[0, 9\], found"):
            images[wrong]


def test_which_pictures_carry_a_label():
    images = table()
    assert images.present("depth").tolist() == [False, True] * 5
    assert images.present("parts").tolist() == [False] + [True] * 9
    assert images.present("kind").tolist() == [i != 3 for i in range(10)]
    with pytest.raises(UnknownTaskError, match="unknown task 'dept'"):
        images.present("dept")


def test_a_choice_of_pictures():
    images = table(clean_N3HW=torch.arange(480, dtype=torch.int64).reshape(10, 3, 4, 4).remainder(256).to(torch.uint8))
    odd = images.select(images.present("depth"))
    assert len(odd) == 5
    assert torch.equal(odd[:]["pixel_values"], images[1::2]["pixel_values"])
    assert torch.equal(odd.clean_N3HW, images.clean_N3HW[1::2])
    assert odd.present("depth").all()
    assert images.select([3, 1])[:]["labels"]["kind"].tolist() == [-100, 1]
    with pytest.raises(ValueError, match="expected a mask of 10 pictures"):
        images.select(torch.ones(3, dtype=torch.bool))


def test_changes_depend_on_seed_epoch_and_rows_alone():
    changes = Augmentation(mirror=True, turn=True, brightness=0.2, noise=0.1)
    images = table().with_augmentation(changes)
    assert table().augmentation is None
    rows = torch.tensor([3, 1, 4, 8])
    first = images.__getitems__(rows)
    torch.rand(100)  # what else is drawn does not count
    images.__getitems__(torch.tensor([5, 6]))
    assert torch.equal(images.__getitems__(rows)["pixel_values"], first["pixel_values"])
    state = torch.get_rng_state()
    images.__getitems__(rows)
    assert torch.equal(torch.get_rng_state(), state)  # dropout draws what it would have drawn
    images.set_epoch(1)
    assert not torch.equal(images.__getitems__(rows)["pixel_values"], first["pixel_values"])
    other = table(augmentation=changes, seed=1)
    assert not torch.equal(other.__getitems__(rows)["pixel_values"], first["pixel_values"])
    assert torch.equal(images[rows]["pixel_values"], table()[rows]["pixel_values"])
    assert torch.equal(first["labels"]["kind"], table()[rows]["labels"]["kind"])


def test_changes_begin_with_the_clean_picture():
    clean = torch.zeros(10, 3, 4, 4, dtype=torch.uint8)
    images = table(clean_N3HW=clean, augmentation=Augmentation(mirror=True))
    assert (images.__getitems__([1, 2])["pixel_values"] == -1).all()
    assert not (images[torch.tensor([1, 2])]["pixel_values"] == -1).any()


def test_a_loader_gives_whole_batches():
    images = table(augmentation=Augmentation(noise=0.1))
    loader = BatchLoader(images, ShuffledBatches(len(images), 4, seed=3), pin_memory=False)
    batches = list(loader)
    assert [len(batch["pixel_values"]) for batch in batches] == [4, 4, 2]
    kinds = torch.cat([batch["labels"]["kind"] for batch in batches])
    assert sorted(kinds.tolist()) == sorted(images.labels["kind"].tolist())


def test_a_batch_of_one_task_drops_the_others_labels():
    images = table().with_processor(table().processor.for_tasks(["depth"]))
    assert list(images[:2]["labels"]) == ["depth"]
    with pytest.raises(UnknownTaskError, match="unknown task 'edges'"):
        table().with_processor(VisionProcessor([4, 4], [Task("edges", "edges")]))


def test_tensors_that_do_not_fit_are_named():
    labels = table().labels
    processor = VisionProcessor([4, 4], TASKS)
    with pytest.raises(ValueError, match=r"pixels: expected uint8 \[10, 3, 4, 4\], found torch.float32"):
        TensorImages(torch.zeros(10, 3, 4, 4), labels, processor)
    with pytest.raises(ValueError, match=r"clean: expected uint8 \[10, 3, 4, 4\], found torch.uint8 \[9"):
        table(clean_N3HW=torch.zeros(9, 3, 4, 4, dtype=torch.uint8))
    pixels = table().pixels_N3HW
    with pytest.raises(ValueError, match="labels: expected those of task 'kind', found parts, depth"):
        TensorImages(pixels, {name: labels[name] for name in ("parts", "depth")}, processor)
    with pytest.raises(ValueError, match="labels of task 'kind': expected 10, found 3"):
        TensorImages(pixels, labels | {"kind": torch.zeros(3)}, processor)


# --- splits ---


def splits(**parts) -> ImageSplits:
    fields = {name: table() for name in ("train", "validation", "test")} | parts
    return ImageSplits(**fields, tasks=TASKS, processor=table().processor, info={"name": "tiny"})


def test_some_tasks_of_a_data_set():
    few = splits().only(["kind", "parts"])
    assert [task.name for task in few.tasks] == ["parts", "kind"]
    assert [task["name"] for task in few.processor.tasks] == ["parts", "kind"]
    for part in few.parts().values():
        assert list(part[:2]["labels"]) == ["parts", "kind"]
    with pytest.raises(UnknownTaskError, match="unknown task 'kinds'"):
        splits().only(["kinds"])


def test_a_task_without_a_training_label_is_an_error():
    empty = table()
    empty.labels["depth"][:] = torch.nan
    assert splits(test=empty).tasks == TASKS  # it need not be tested
    with pytest.raises(DataError, match="task 'depth': expected a training picture with a label, found none in 10"):
        splits(train=empty)


# --- files ---


def in_files(folder, **options) -> FileImages:
    """Three pictures of other sizes than the model's input; the second has no depth."""
    for number, (height, width) in enumerate([(4, 4), (8, 4), (3, 5)]):
        pixels = np.full((height, width, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        np.save(folder / f"{number}-parts.npy", np.full((height, width), number, np.uint8))
        if number != 1:
            np.save(folder / f"{number}-depth.npy", np.arange(height * width, dtype=np.float64).reshape(height, width))
    labels = {
        task: LabelFiles(
            lambda name, task=task: np.load(folder / f"{name}-{task}.npy"),
            lambda name, task=task: (folder / f"{name}-{task}.npy").is_file(),
        )
        for task in ("parts", "depth")
    }
    processor = VisionProcessor([4, 6], TASKS[:2], fit="pad")
    return FileImages(["0", "1", "2"], lambda name: folder / f"{name}.png", labels, processor, **options)


def test_pictures_in_files_are_fitted_with_their_labels(tmp_path):
    images = in_files(tmp_path)
    assert images.present("depth").tolist() == [True, False, True]
    assert images.present("parts").all()
    batch = images[:]
    assert batch["pixel_values"].shape == (3, 3, 4, 6)
    assert batch["labels"]["parts"].dtype == torch.int64
    assert batch["labels"]["depth"].dtype == torch.float32
    assert batch["labels"]["parts"][0].tolist() == [[-100, 0, 0, 0, 0, -100]] * 4
    assert batch["labels"]["parts"][1].tolist() == [[-100, -100, 1, 1, -100, -100]] * 4  # 8 x 4, shrunk to 4 x 2
    assert batch["labels"]["depth"][1].isnan().all()
    depth = batch["labels"]["depth"][2]  # 3 x 5 at the top left of 4 x 6
    assert depth[:3, :5].tolist() == np.arange(15).reshape(3, 5).tolist()
    assert depth.isnan().sum() == 9
    assert torch.allclose(batch["pixel_values"][2, 0, :3, :5], torch.full((3, 5), 80 / 127.5 - 1), atol=1e-6)
    assert (batch["pixel_values"][2, :, 3] == -1).all()  # black
    few = images.select([2, 0])
    assert torch.equal(few[:]["pixel_values"], batch["pixel_values"][[2, 0]])
    assert few.names == ["2", "0"]


def test_pictures_in_files_are_changed_as_those_in_memory(tmp_path):
    images = in_files(tmp_path, augmentation=Augmentation(mirror=True))
    seen = set()
    for epoch in range(20):
        images.set_epoch(epoch)
        depth = images.__getitems__([0])["labels"]["depth"][0, :, 1:5]
        seen.add(depth[0, 0].item())
        assert depth.tolist() in (np.arange(16).reshape(4, 4).tolist(), np.arange(16).reshape(4, 4)[:, ::-1].tolist())
    assert seen == {0.0, 3.0}


def test_what_is_wrong_with_a_file_is_named(tmp_path):
    images = in_files(tmp_path)
    np.save(tmp_path / "2-parts.npy", np.zeros((3, 4), np.uint8))
    with pytest.raises(DataError, match=r"picture '2', task 'parts': expected a label map \[3, 5\], as large as the"):
        images[torch.tensor([2])]
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1\.png: expected an image, found a file of another kind"):
        images[torch.tensor([0, 1])]
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataError, match=r"0\.png: expected an image file, found none"):
        images.__getitems__([0])
    with pytest.raises(ValueError, match="labels: expected those of task 'depth', found none"):
        FileImages([], str, {}, VisionProcessor([4, 6], TASKS[1:2]))


def test_a_task_of_the_same_name_with_other_classes_is_another_task():
    size, names = [8, 8], ["a", "b", "c"]
    own = VisionProcessor(size, [Task("parts", "segmentation", 3)], {"parts": names})
    table = TensorImages(
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {"parts": torch.zeros(2, 8, 8, dtype=torch.int64)}, own
    )
    for other in (
        VisionProcessor(size, [Task("parts", "segmentation", 3)], {"parts": ["a", "b", "d"]}),
        VisionProcessor(size, [Task("parts", "segmentation", 4)]),
        VisionProcessor(size, [Task("parts", "depth")]),
    ):
        with pytest.raises(DataError, match="task 'parts': expected kind, outputs, classes and units"):
            table.with_processor(other)
    assert table.with_processor(own).tasks == table.tasks
