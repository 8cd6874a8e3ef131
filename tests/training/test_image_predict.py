"""Maps of photographs of any size, window by window, against windows blended by loops; files in, files out.

Shapes: `H`, `W` height and width of a photograph.
"""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from moe_mtl import cli
from moe_mtl.data import DataError
from moe_mtl.data.vision_processor import VisionProcessor
from moe_mtl.kinds import KINDS
from moe_mtl.models import model_class
from moe_mtl.tasks import Task, UnknownTaskError
from moe_mtl.training.image_predict import count_windows, pictures_in, predict_files, predict_picture

SIZE = (8, 12)
TASKS = [
    Task("edges", "edges"),
    Task("segments", "segmentation", 3),
    Task("normals", "normals", 3),
    Task("depth", "depth"),
    Task("kind", "multiclass", 2),
]
DENSE = [task.name for task in TASKS if task.dense]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cls = model_class("m3vit")
    sizes = {"patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "decoder_dim": 8}
    experts = {"num_experts": 2, "num_selected": 1, "expert_dim": 8, "decoder_stages": 2, "initializer_range": 0.3}
    return cls(cls.config_class(tasks=[t.to_dict() for t in TASKS], image_size=list(SIZE), **sizes, **experts)).eval()


@pytest.fixture(scope="module")
def processor():
    return VisionProcessor(SIZE, TASKS, {"kind": ["cat", "dog"]}, {"depth": "m"})


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m3vit"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def photograph(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_a_picture_of_the_models_size_is_answered_as_it_is(model, processor):
    pixels = photograph(*SIZE)
    assert count_windows(processor, *SIZE) == 1
    with torch.no_grad():
        expected = processor.decode(model(processor(pixels)["pixel_values"]).logits)
    found = predict_picture(model, processor, pixels)
    assert list(found) == [*DENSE, "kind", "kind/cat", "kind/dog"]
    for name, values in found.items():
        if name == "kind":
            assert values == expected[name][0]
        else:
            np.testing.assert_allclose(values, expected[name][0], atol=1e-5)
            assert values.dtype == expected[name].dtype


def starts_by_hand(side, window):
    """From border to border in equal steps, to whole pixels, none longer than half a window."""
    count = 1
    while side - window > (count - 1) * (window // 2):
        count += 1
    return [round(i * (side - window) / max(1, count - 1)) for i in range(count)]


@pytest.mark.parametrize("size", [(8, 31), (21, 12), (19, 27), (9, 13)])
def test_windows_are_blended_by_their_weights(model, processor, size):
    pixels = photograph(*size)
    ys, xs = starts_by_hand(size[0], SIZE[0]), starts_by_hand(size[1], SIZE[1])
    assert count_windows(processor, *size) == len(ys) * len(xs)
    rise = [[math.sin(math.pi * (i + 0.5) / n) ** 2 for i in range(n)] for n in SIZE]
    sums = dict.fromkeys(DENSE, 0.0)
    total = np.zeros(size)
    for y in ys:
        for x in xs:
            with torch.no_grad():
                logits = model(processor(pixels[y : y + SIZE[0], x : x + SIZE[1]])["pixel_values"], tasks=DENSE).logits
            weight = np.zeros(size)
            weight[y : y + SIZE[0], x : x + SIZE[1]] = np.maximum(np.outer(*rise), 0)
            total += weight
            for name in DENSE:
                one = processor.task(name).predict(logits[name])[0].numpy()
                placed = np.zeros((*one.shape[:-2], *size))
                placed[..., y : y + SIZE[0], x : x + SIZE[1]] = one
                sums[name] = sums[name] + weight * placed
    told = []
    found = predict_picture(model, processor, pixels, DENSE, batch_size=3, advance=told.append)
    assert sum(told) == len(ys) * len(xs)
    blended = {name: values / total for name, values in sums.items()}
    blended["normals"] = blended["normals"] / np.linalg.norm(blended["normals"], axis=0)
    for name in ("edges", "normals", "depth"):
        np.testing.assert_allclose(found[name], blended[name], atol=1e-4)
    assert (found["segments"] == blended["segments"].argmax(0)).mean() > 0.99


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (3, 7), (8, 6)])
def test_a_small_picture_is_enlarged_and_answered_at_its_own_size(model, processor, size):
    found = predict_picture(model, processor, photograph(*size), DENSE)
    assert found["edges"].shape == found["segments"].shape == found["depth"].shape == size
    assert found["normals"].shape == (3, *size)
    np.testing.assert_allclose(np.linalg.norm(found["normals"], axis=0), 1, atol=1e-5)
    assert all(np.isfinite(values).all() for values in found.values())


def test_one_task_runs_one_task_and_the_mode_is_put_back(model, processor, monkeypatch):
    asked = []
    plain = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, **k: asked.append(k["tasks"]) or plain(self, **k))
    model.train()
    assert list(predict_picture(model, processor, photograph(20, 20), "edges")) == ["edges"]
    assert model.training
    model.eval()
    assert set(map(tuple, asked)) == {("edges",)}
    with pytest.raises(UnknownTaskError, match="edge"):
        predict_picture(model, processor, photograph(20, 20), "edge")


@pytest.fixture
def photos(tmp_path):
    for name, size in (("b.png", (20, 30)), ("a.jpg", (10, 12))):
        Image.fromarray(photograph(*size)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_pictures_of_folders_and_files(photos):
    assert [path.name for path in pictures_in([photos, photos / "a.jpg"])] == ["a.jpg", "b.png", "a.jpg"]
    (photos / "empty").mkdir()
    for path in (photos / "none.jpg", photos / "empty"):
        with pytest.raises(DataError, match=f"{path.name}: expected"):
            pictures_in([path])


def test_the_command_draws_pictures(folder, photos, capsys):
    out = photos / "drawn"
    assert cli.main(["predict", str(folder), str(photos), "--output", str(out), "--task", "edges", "depth"]) == 0
    names = {"a-edges.png", "a-depth.png", "b-edges.png", "b-depth.png"}
    assert {path.name for path in out.iterdir()} == names
    with Image.open(out / "b-edges.png") as drawn:
        assert drawn.size == (30, 20)
    single = ["predict", str(photos / "a.jpg"), "--model", str(folder), "--task", "depth", "--output"]
    assert cli.main([*single, str(photos / "depth.npy")]) == 0
    found = np.load(photos / "depth.npy")
    assert found.shape == (10, 12)
    assert cli.main([*single, str(photos / "depth.jpg")]) == 0
    assert f"wrote {photos / 'depth.jpg'}" in capsys.readouterr().err


@pytest.fixture(scope="module", params=["stretch", "pad"])
def every_kind(request, tmp_path_factory):
    """A model with a task of every kind, several with more than one output."""
    outputs = {"multiclass": 3, "multilabel": 3, "regression": 2, "segmentation": 3, "normals": 3}
    tasks = [Task(f"its_{kind}", kind, outputs.get(kind, 1)) for kind in KINDS]
    tasks += [Task("one_label", "multilabel"), Task("value", "regression")]
    processor = VisionProcessor(SIZE, tasks, {"its_multilabel": ["cat", "dog", "tree"]}, fit=request.param)
    cls = model_class("multi_task_vit")
    sizes = {"patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "decoder_dim": 4}
    torch.manual_seed(0)
    model = cls(cls.config_class(tasks=processor.tasks, image_size=list(SIZE), decoder_stages=1, **sizes)).eval()
    path = tmp_path_factory.mktemp("every") / request.param
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path, model, processor


def test_tasks_of_every_kind_are_answered(every_kind, photos):
    path, model, processor = every_kind
    dense = [task.name for task in processor.parsed_tasks if task.dense]
    told = [task.name for task in processor.parsed_tasks if not task.dense]
    pictures = [photos / "a.jpg", photos / "b.png"]
    expected = [{"picture": str(picture)} for picture in pictures]
    for line, picture in zip(expected, pictures, strict=True):
        line |= {key: np.asarray(of).tolist() for key, of in predict_picture(model, processor, picture, told).items()}
    assert {"its_multilabel/dog", "one_label/0", "its_multiclass", "its_multiclass/2"} < set(expected[0])
    assert len(expected[0]["its_regression"]) == 2
    written = predict_files(path, pictures, photos / "all", progress=False)
    assert [file.name for file in written[:-1]] == [f"{p}-{name}.png" for p in "ab" for name in dense]
    assert written[-1] == photos / "all" / "answers.jsonl"
    assert set(written) == set((photos / "all").iterdir())
    predict_files(path, pictures, photos / "told.jsonl", told, progress=False)
    for file in (written[-1], photos / "told.jsonl"):
        found = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        assert [list(line) for line in found] == [list(line) for line in expected]
        for line, other in zip(found, expected, strict=True):
            for key, value in line.items():
                assert value == (other[key] if isinstance(value, str) else pytest.approx(other[key], abs=1e-6)), key
    for task in processor.parsed_tasks:
        for name in (f"{task.name}.png", f"{task.name}.npy"):
            predict_files(path, pictures[:1], photos / name, task.name, progress=False)
        array = np.load(photos / f"{task.name}.npy")
        shape = (10, 12) if task.dense else (task.num_outputs,)
        if task.kind in ("binary", "multiclass") or task.name == "value":
            shape = ()
        assert array.shape == ((3, *shape) if task.kind == "normals" else shape), task
    with pytest.raises(
        DataError, match=r"output: expected a folder or a picture for maps, of its_edges, found x\.jsonl"
    ):
        predict_files(path, pictures, photos / "x.jsonl", ["value", "its_edges"], progress=False)
    assert not (photos / "x.jsonl").exists()


@pytest.mark.parametrize(
    ("inputs", "output", "task", "message"),
    [
        (["notes.txt"], "out", None, "expected an image, found a file of another kind"),
        (["cut.jpg"], "out", None, "cut.jpg: expected a whole image"),
        (["a.jpg"], "out", "edge", "unknown task 'edge'"),
        (["a.jpg"], "out.png", None, "expected a folder for 1 picture and the tasks edges, segments"),
        (["a.jpg", "b.png"], "out.png", "edges", "expected a folder for 2 pictures"),
        (["a.jpg", "a.png"], "out", "edges", r"differ by more than their ending, found .*a\.jpg, .*a\.png"),
        (["a.jpg"], "there/out", "edges", "there is no folder"),
        (["a.jpg"], "b.png/x", "edges", "there is no folder"),
        (["a.jpg"], "notes.txt", "edges", "expected a folder, found otherwise"),
    ],
)
def test_errors_come_before_anything_is_written(folder, photos, inputs, output, task, message):
    whole = (photos / "a.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "a.png").write_bytes((photos / "b.png").read_bytes())
    before = {path.name for path in photos.iterdir()}
    with pytest.raises((DataError, UnknownTaskError, FileNotFoundError), match=message):
        predict_files(folder, [photos / name for name in inputs], photos / output, task, progress=False)
    assert {path.name for path in photos.iterdir()} == before


def test_the_command_refuses_what_is_for_other_models(folder, photos, capsys):
    for arguments, message in (
        ([folder, photos / "a.jpg"], "--output: expected a picture, a .npy or .jsonl file or a folder"),
        ([folder], "the following arguments are required: ROWS"),
        ([folder, photos / "a.jpg", "--output", "x", "--keep", "id"], "--keep and --delimiter are for rows of a table"),
        ([folder, photos / "a.jpg", "--output", "x", "--delimiter", ";"], "--keep and --delimiter are for rows"),
        (["mmoe-digits", photos / "a.jpg", photos / "b.png"], "unexpected argument"),
    ):
        assert cli.main(["predict", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["evaluate", str(folder), "--data", str(photos / "a.jpg")]) == 2
    assert "--data measures rows of tables" in capsys.readouterr().err


def test_extract_keeps_the_processor_of_one_task(folder, photos, capsys):
    small = photos / "small"
    assert cli.main(["extract", str(folder), "edges", "--output", str(small)]) == 0
    assert [task.name for task in VisionProcessor.from_pretrained(small).parsed_tasks] == ["edges"]
    for path, name in ((folder, "all"), (small, "one")):
        output = str(photos / f"{name}.npy")
        assert cli.main(["predict", str(path), str(photos / "b.png"), "--task", "edges", "--output", output]) == 0
    np.testing.assert_array_equal(np.load(photos / "all.npy"), np.load(photos / "one.npy"))


def test_a_model_that_pads_sees_a_picture_as_evaluation_does():
    """Small pictures stay at their scale on black, larger ones are shrunk; the answer is cut out and has their size."""
    tasks = [Task("depth", "depth"), Task("normals", "normals", 3)]
    processor = VisionProcessor([24, 32], tasks, fit="pad")
    cls = model_class("multi_task_vit")
    fields = {"image_size": [24, 32], "tasks": processor.tasks, "hidden_size": 12, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = cls(cls.config_class(**fields, num_attention_heads=2, decoder_dim=4, decoder_stages=1)).eval()
    small = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    found = predict_picture(model, processor, small)
    with torch.no_grad():
        whole = processor.decode(model(**processor(small)).logits)
    at = processor.placement(12, 20)
    assert at[2:] == (12, 20)
    for task, answer in found.items():
        expected = whole[task][0][..., at.top : at.top + 12, at.left : at.left + 20]
        np.testing.assert_allclose(answer, expected, atol=1e-5)
    large = np.random.default_rng(0).integers(0, 256, (60, 64, 3), np.uint8)
    assert predict_picture(model, processor, large)["depth"].shape == (60, 64)
