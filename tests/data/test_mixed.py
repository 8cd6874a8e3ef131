"""Several data sets of pictures in one: whose picture stands where, whose label is missing, one of them per batch."""

import math

import pytest
import torch

from moe_mtl.data import DataError, load
from moe_mtl.data.augmentation import Augmentation
from moe_mtl.data.images import TensorImages
from moe_mtl.data.mixed import JoinedImages, _joined
from moe_mtl.data.vision_processor import VisionProcessor
from moe_mtl.models import model_class
from moe_mtl.tasks import Task, UnknownTaskError
from moe_mtl.training.recipe import RecipeError, TaskSampling, TrainSection
from moe_mtl.training.run import training_arguments
from moe_mtl.training.trainer import MultiTaskTrainer

SIZE = 8
EDGES, DEPTH, KIND = Task("edges", "edges", weight=50.0), Task("depth", "depth"), Task("kind", "multiclass", 3)
NORMALS, SPOTS = Task("normals", "normals", 3), Task("spots", "multilabel", 2)


def table_of(tasks, n, seed, augmentation=None, **options):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, SIZE, SIZE), generator=g, dtype=torch.uint8)
    maps = torch.rand(n, SIZE, SIZE, generator=g)
    made = {
        "edges": (maps > 0.7).float(),
        "depth": maps.masked_fill(torch.arange(n).view(-1, 1, 1) % 2 == 0, math.nan),
        "kind": torch.randint(3, (n,), generator=g),
        "normals": torch.nn.functional.normalize(torch.rand(n, 3, SIZE, SIZE, generator=g), dim=1),
        "spots": torch.randint(2, (n, 2), generator=g).float(),
    }
    processor = VisionProcessor([SIZE, SIZE], tasks, **options)
    return TensorImages(pixels, {task.name: made[task.name] for task in tasks}, processor, augmentation)


def joined(augmentation=None):
    first = table_of([EDGES, DEPTH, NORMALS], 6, 0, augmentation)
    second = table_of([KIND, EDGES, SPOTS], 4, 1)
    return (
        first,
        second,
        JoinedImages({"a": first, "b": second}, _joined({"a": first.processor, "b": second.processor})),
    )


def equal(found, expected):
    return torch.equal(torch.nan_to_num(found.float(), nan=-7.0), torch.nan_to_num(expected.float(), nan=-7.0))


def test_pictures_and_labels_stand_in_their_places():
    first, second, both = joined()
    assert len(both) == 10
    assert [task.name for task in both.tasks] == ["edges", "depth", "normals", "kind", "spots"]
    batch = both[torch.tensor([9, 0, 6, 5])]
    a, b = first[torch.tensor([0, 5])], second[torch.tensor([3, 0])]
    torch.testing.assert_close(batch["pixel_values"][[1, 3]], a["pixel_values"])
    torch.testing.assert_close(batch["pixel_values"][[0, 2]], b["pixel_values"])
    for name in ("edges", "depth", "normals"):
        assert equal(batch["labels"][name][[1, 3]], a["labels"][name]), name
    for name in ("edges", "kind", "spots"):
        assert equal(batch["labels"][name][[0, 2]], b["labels"][name]), name
    assert bool(batch["labels"]["depth"][[0, 2]].isnan().all())
    assert bool(batch["labels"]["normals"][[0, 2]].isnan().all())
    assert bool(batch["labels"]["spots"][[1, 3]].isnan().all())
    assert batch["labels"]["kind"].dtype == torch.int64
    assert batch["labels"]["kind"][[1, 3]].tolist() == [-100, -100]
    alone = both[:2]  # no picture of the second
    assert alone["labels"]["kind"].tolist() == [-100, -100]
    assert alone["labels"]["spots"].shape == (2, 2)


def test_present_counts_the_pictures_of_the_parts_that_have_the_task():
    _, second, both = joined()
    assert both.present("edges").tolist() == [True] * 10
    assert both.present("depth").tolist() == [False, True] * 3 + [False] * 4
    assert both.present("kind").tolist() == [False] * 6 + [True] * 4
    with pytest.raises(UnknownTaskError):
        both.present("other")
    picked = both.select(torch.tensor([7, 1]))
    assert picked.present("kind").tolist() == [True, False]
    torch.testing.assert_close(picked[:1]["pixel_values"], second[1:2]["pixel_values"])


def test_training_augments_each_part_in_its_own_way_and_by_the_epoch():
    _, _, both = joined(Augmentation(noise=0.2))
    index = torch.tensor([8, 0, 1])
    plain, first = both[index]["pixel_values"], both.__getitems__(index)["pixel_values"]
    torch.testing.assert_close(first[0], plain[0])  # of the part without
    assert not torch.allclose(first[1:], plain[1:])
    assert torch.equal(first, both.__getitems__(index)["pixel_values"])
    both.set_epoch(1)
    assert not torch.equal(first, both.__getitems__(index)["pixel_values"])


def test_fewer_tasks_leave_out_the_parts_that_have_none():
    _, second, both = joined()
    kind = both.with_processor(both.processor.for_tasks(["kind"]))
    assert len(kind) == 4
    assert kind.sources["b"][0].tolist() == [True] * 4
    assert torch.equal(kind[:]["labels"]["kind"], second[:]["labels"]["kind"])
    assert len(both) == 10
    with pytest.raises(UnknownTaskError):
        kind.with_processor(both.processor.for_tasks(["depth"]))


def test_a_task_of_two_parts_must_be_the_same_and_pictures_of_one_size():
    first = VisionProcessor([8, 8], [EDGES])
    for other in (
        VisionProcessor([8, 8], [Task("edges", "edges")]),
        VisionProcessor([8, 8], [EDGES], None, {"edges": "m"}),
    ):
        with pytest.raises(DataError, match="task 'edges': expected the same in all parts, found another in b"):
            _joined({"a": first, "b": other})
    with pytest.raises(DataError, match=r"expected pictures of \[8, 8\] as in a, found \[8, 9\] in b"):
        _joined({"a": first, "b": VisionProcessor([8, 9], [KIND])})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"name": "digit-pairs"}], "expected two data sets or more, each once"),
        ([{"name": "digit-pairs"}, {"name": "digit-pairs"}], "each once"),
        ([{"name": "digit-pairs"}, {"name": "digits"}], "expected data sets of pictures, found 'digits'"),
        ([{"name": "digit-pairs"}, {"name": "mixed"}], "expected data sets of pictures, found 'mixed'"),
        (
            [{"name": "digit-pairs"}, {"name": "photo-tile"}],
            "unknown data set 'photo-tile'; did you mean 'photo-tiles'",
        ),
        ([{"name": "digit-pairs"}, {}], "expected data sets of pictures, found None"),
        ([{"name": "digit-pairs"}, {"name": "photo-tiles", "max_tiles": 1}], r"expected pictures of \[12, 12\]"),
    ],
)
def test_parts_that_cannot_be_mixed(parts, message):
    with pytest.raises(DataError, match=message):
        load("mixed", parts=parts)


def test_two_data_sets_that_ship():
    tiles = {"name": "photo-tiles", "size": 16, "stride": 16, "max_tiles": 2, "tasks": ["edges", "disparity"]}
    splits = load("mixed", parts=[tiles, {"name": "digit-pairs", "size": 16, "canvas": 9}])
    assert [task.name for task in splits.tasks] == ["edges", "disparity", "left", "right"]
    rows = {name: info["rows"] for name, info in splits.info["parts"].items()}
    for name, part in splits.parts().items():
        assert len(part) == rows["photo-tiles"][name] + rows["digit-pairs"][name] == splits.info["rows"][name]
        assert int(part.present("left").sum()) == rows["digit-pairs"][name]
    left = splits.only(["left"])
    assert len(left.train) == rows["digit-pairs"]["train"]
    assert left.info["rows"] == {part: len(table) for part, table in left.parts().items()} == rows["digit-pairs"]
    assert left.info["parts"] == {"digit-pairs": splits.info["parts"]["digit-pairs"]}
    assert left.info["licence"] == f"digit-pairs: {splits.info['parts']['digit-pairs']['licence']}"
    assert left.info["sha256"] != splits.info["sha256"]
    assert splits.only([task.name for task in splits.tasks]).info == splits.info
    assert splits.info["sha256"] != splits.info["parts"]["digit-pairs"]["sha256"]


@pytest.fixture
def trainer(tmp_path):
    def make(table, **sampling):
        torch.manual_seed(0)
        cls = model_class("m3vit")
        tasks = [task.to_dict() for task in table.tasks]
        sizes = {"patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "expert_dim": 4}
        model = cls(cls.config_class(tasks=tasks, image_size=[SIZE, SIZE], decoder_dim=4, decoder_stages=1, **sizes))
        section = TrainSection(batch_size=3, max_steps=12, save_steps=0, schedule="constant", logging_steps=4)
        args = training_arguments(section, tmp_path / "run")
        args.eval_strategy = "no"
        return MultiTaskTrainer(model, args, table, task_sampling=TaskSampling(**sampling))

    return make


def test_a_batch_is_of_one_data_set_and_trains_all_its_tasks(trainer):
    _, _, both = joined()
    loader = trainer(both, temperature=1e6, by="data_set").get_train_dataloader()
    seen = {"depth": 0, "kind": 0}
    for epoch in range(8):
        loader.set_epoch(epoch)
        for batch in loader:
            names = {"edges", "depth", "normals"} if "depth" in batch["tasks"] else {"edges", "kind", "spots"}
            assert set(batch["tasks"]) == set(batch["labels"]) == names
            assert not batch["labels"]["edges"].isnan().any()
            seen["depth" if "depth" in names else "kind"] += 1
    assert seen["depth"] + seen["kind"] == 8 * 4
    assert min(seen.values()) > 8  # equally often, though one has more pictures


def test_training_by_data_set_and_by_task_and_jointly(trainer):
    for sampling in ({"by": "data_set"}, {"by": "task"}):
        _, _, both = joined(Augmentation(mirror=True))
        run = trainer(both, **sampling)
        run.train()
        assert run.state.global_step == 12
        logged = {key for entry in run.state.log_history for key in entry}
        assert {"loss/edges", "loss/kind", "loss/spots"} <= logged
    with pytest.raises(RecipeError, match=r"data_set needs several of them \(data.name: mixed\), found one"):
        trainer(joined()[0], by="data_set").train()
