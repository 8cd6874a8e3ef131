"""Cards of vision models, made from the first line to the last on a few tiles."""

import base64
import io
import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from moe_mtl import AutoModelForMultiTask, cli, hub
from moe_mtl.cards import check, image_variants, making, repeating
from moe_mtl.cards.page import ZOO
from moe_mtl.cards.record import load_record
from moe_mtl.cards.routing import ROUTING, draw
from moe_mtl.data import photo_tiles
from moe_mtl.data.images import ImageSplits, rows_of
from moe_mtl.training.evaluation import evaluate_images
from moe_mtl.training.recipe import RecipeError
from moe_mtl.training.run import evaluate

DATA = "data: {name: photo-tiles, tasks: [edges, segments]}\n"
SIZES = (
    "patch_size: 16, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, decoder_dim: 4, decoder_stages: 2"
)
TRAIN = "train: {epochs: 1, batch_size: 8, eval_batch_size: 5}\n"
EXPERTS = "num_experts: 6, num_selected: 2, expert_dim: 32"
RECIPES = {
    "multi_task_vit": DATA + f"model: {{type: multi_task_vit, {SIZES}}}\n" + TRAIN,
    "m3vit": DATA + f"model: {{type: m3vit, {SIZES}, {EXPERTS}}}\n" + TRAIN + "card: {name: m3vit-tiles}\n",
    "costly": DATA
    + f"model: {{type: m3vit, {SIZES}, num_experts: 6, num_selected: 6, expert_dim: 512}}\n"
    + TRAIN
    + "card: {name: costly-tiles}\n",
}
TILES = 14


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    load = photo_tiles.load
    whole = {}

    def few(options):
        if tuple(options.tasks) not in whole:
            whole[tuple(options.tasks)] = load(options)
        splits = whole[tuple(options.tasks)]
        # Every tenth: of all photographs.
        parts = {name: part.select(torch.arange(TILES) * 10) for name, part in splits.parts().items()}
        info = splits.info | {"rows": rows_of(parts)}
        return ImageSplits(**parts, tasks=splits.tasks, processor=splits.processor, info=info)

    (folder / "recipes" / "tiles").mkdir(parents=True)
    for name, text in RECIPES.items():
        (folder / "recipes" / "tiles" / f"{name}.yaml").write_text(text)
    (folder / "model_cards").mkdir()
    text = (hub.zoo_folder() / "TEMPLATE-vision.md").read_text().replace("<!-- write:", "<!-- wrote:")
    (folder / "model_cards" / "TEMPLATE-vision.md").write_text(text)
    (folder / "model_cards" / "README.md").write_text("\n".join(ZOO))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photo_tiles, "load", few)
        patch.setattr(making, "RESAMPLES", 20)
        patch.setattr(hub, "data_folder", lambda name: folder / name)
        making.make("tiles/m3vit", runs=folder / "runs", budget="ci", echo=lambda line: None)
        yield folder / "model_cards"


def test_a_made_card_has_no_problem(zoo):
    assert check() == []
    files = {p.name for p in (zoo / "m3vit-tiles").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", ROUTING} <= files
    assert AutoModelForMultiTask.from_pretrained("m3vit-tiles", tasks=["edges"]).tasks == ["edges"]


def test_baselines_are_dense_for_all_tasks_and_for_each(zoo):
    record = load_record(zoo / "m3vit-tiles")
    rows = {row["model"]: row for row in record["rows"]}
    assert list(rows) == ["m3vit", "single_task", "multi_task_vit"]
    assert rows["multi_task_vit"]["multiply_adds"] < rows["single_task"]["multiply_adds"]
    assert rows["m3vit"]["parameters"] == AutoModelForMultiTask.from_pretrained("m3vit-tiles").num_parameters()
    alone = AutoModelForMultiTask.from_pretrained("m3vit-tiles", tasks=["edges"]).num_parameters()
    assert record["single_task_cost"]["edges"]["parameters"] == alone
    assert len(record["comparison"]) == 2 * 2
    for entry in record["comparison"]:
        means = [rows[m]["metrics"][entry["task"]][entry["metric"]]["mean"] for m in ("m3vit", entry["baseline"])]
        assert entry["mean"] == pytest.approx(means[0] - means[1], abs=1e-6)  # from totals by picture, and from the run
    assert record["bootstrap"]["groups"] == 3  # which the few tiles are from
    assert (
        "resamples of the 3 photographs that the rows were cut from" in (zoo / "m3vit-tiles" / "README.md").read_text()
    )
    gains = []
    for task, metric in (("edges", "ods_f"), ("segments", "mean_iou")):
        base = rows["single_task"]["metrics"][task][metric]["mean"]
        gains.append([(value - base) / base for value in rows["m3vit"]["metrics"][task][metric]["values"]])
    delta = np.mean(gains)
    assert f"m3vit {delta:+.2%} ±" in (zoo / "m3vit-tiles" / "README.md").read_text()


def test_the_shipped_weights_are_those_that_were_measured_and_come_again(zoo):
    record = load_record(zoo / "m3vit-tiles")
    shipped = record["seeds"].index(record["shipped_seed"])
    for task, metrics in evaluate("m3vit-tiles").metrics.items():
        for metric, value in metrics.items():
            assert value == pytest.approx(record["rows"][0]["metrics"][task][metric]["values"][shipped], abs=1e-5)
    again = repeating.reproduce("m3vit-tiles", echo=lambda line: None)
    assert len(again) == 2
    assert all(one.agrees for one in again)


def test_routing_is_what_the_model_chooses(zoo):
    record = load_record(zoo / "m3vit-tiles")
    model = AutoModelForMultiTask.from_pretrained("m3vit-tiles").eval()
    table = photo_tiles.load(photo_tiles.Options(tasks=("edges", "segments"))).test
    with torch.no_grad():
        (routing,) = model(table[:]["pixel_values"], output_routing=True).routing
    entry = record["routing"]["layers"]["blocks.1"]
    shares = []
    for task, indices_NK in routing.indices.items():
        counts = np.bincount(indices_NK.flatten().numpy(), minlength=6)
        shares.append(counts / counts.sum())
        np.testing.assert_allclose(entry["shares"][task], shares[-1], atol=1e-4)
    information = 0.0
    mean = np.mean(shares, axis=0)
    for share in shares:
        information += sum(p / 2 * math.log(p / mean[e]) for e, p in enumerate(share) if p)
    shipped = record["seeds"].index(record["shipped_seed"])
    assert entry["information"][shipped] == pytest.approx(information, abs=1e-5)
    assert 0 < entry["at_random"] < 0.05
    assert record["routing"]["shown"] == "blocks.1"
    tiles = [2, 7, 11]  # in the middle of each third
    for number, picture in zip(tiles, record["routing"]["pictures"], strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["image"]))))
        assert np.array_equal(shown.transpose(2, 0, 1), table.pixels_N3HW[number].numpy())
        first = routing.indices["edges"][:, 0].reshape(TILES, -1)[number, 1:]  # behind the class token
        assert np.array_equal(np.array(picture["experts"]["edges"]).flatten(), first.numpy())


def test_the_picture_of_the_routing_is_drawn_from_the_record(zoo):
    record = load_record(zoo / "m3vit-tiles")
    drawing = draw(record)
    root = ElementTree.fromstring(drawing)
    kind = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{kind}image")) == 3
    assert (
        len(root.findall(f"{kind}rect")) == 1 + 2 * 6 + 3 * 2 * 16
    )  # ground; tasks x experts; tiles x tasks x patches
    assert draw({}) is None
    page = zoo / "m3vit-tiles" / ROUTING
    page.write_text(drawing.replace("blocks.1", "blocks.9"))
    assert any(f"{ROUTING} is not what" in problem for problem in check("m3vit-tiles"))
    page.write_text(drawing)


def test_another_cost_per_task_is_no_baseline(zoo):
    with pytest.raises(RecipeError, match="expected about as many multiply-adds for one task as tiles/costly"):
        making.make("tiles/costly", runs=zoo.parent / "runs", echo=lambda line: None)
    assert not (zoo / "costly-tiles").exists()
    assert len(list((zoo.parent / "runs").iterdir())) == 3 * (1 + 2 + 1)  # none was trained for it


def test_statistics_are_the_metrics_of_resampled_pictures(zoo):
    splits = photo_tiles.load(photo_tiles.Options(tasks=("edges", "segments")))
    run = zoo / "m3vit-tiles"
    trained = image_variants.Trained({"all": run}, {}, 0.0)
    answers = image_variants.answer(trained, splits.test, 4)
    counts = np.bincount([0, 0, 3, 5, 5, 5, 9, 13], minlength=TILES)
    chosen = splits.test.select([0, 0, 3, 5, 5, 5, 9, 13])
    model = AutoModelForMultiTask.from_pretrained(run).eval()
    found = evaluate_images(model, chosen, 8, model.config.parsed_tasks).metrics
    for task in splits.tasks:
        statistic, rows = image_variants.statistics(task, [answers, answers])
        assert rows == TILES
        expected = found[task.name][task.reported_metrics[0]]
        np.testing.assert_allclose(statistic(counts.astype(float)), [expected, expected], atol=1e-5)


def test_what_is_labelled_in_one_photograph_alone_is_not_compared(zoo):
    """Resamples of it are all alike: the interval would be a point."""
    splits = photo_tiles.load(photo_tiles.Options(tasks=("edges", "segments")))
    metrics = {task.name: {task.reported_metrics[0]: 0.0} for task in splits.tasks}
    trained = image_variants.Trained({"all": zoo / "m3vit-tiles"}, {"test": metrics}, 0.0)
    rows = splits.test.select(torch.arange(TILES))
    rows.labels["edges"] = rows.labels["edges"].clone()
    rows.labels["edges"][rows.groups_N > 0] = torch.nan
    found = making._comparison(image_variants, splits.tasks, {"a": [trained], "b": [trained]}, rows, 8)
    assert [entry["task"] for entry in found] == ["segments"]


def test_pruning_by_command(zoo, tmp_path, capsys):
    output = tmp_path / "edges"
    assert cli.main(["prune", "m3vit-tiles", "edges", "--keep", "0.6", "--output", str(output), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tasks"] == ["edges"]
    assert 2 <= len(told["report"]["kept"]["blocks.1"]) < 6
    assert told["report"]["rows"] == TILES
    assert 0 < told["report"]["choices_lost"]["blocks.1"]["edges"] <= 0.4
    small = AutoModelForMultiTask.from_pretrained(output)
    assert small.num_parameters() == told["parameters"] < told["parameters_of_all"]
    assert small.config.experts_kept == {"1": told["report"]["kept"]["blocks.1"]}
    assert cli.main(["prune", "m3vit-tiles", "edges", "--theta", "3", "--output", str(tmp_path / "b")]) == 0
    assert "mod_squad theta=3, counted on 14 rows of validation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m3vit-tiles", "depth"], "unknown task 'depth'"),
        (["m3vit-tiles", "edges", "--keep", "1.5"], "keep: expected a share in (0, 1], found 1.5"),
        (["m3vit-tiles", "edges", "--keep", "0.9", "--theta", "3"], "choose one of them"),
    ],
)
def test_pruning_that_cannot_be(zoo, tmp_path, capsys, arguments, message):
    assert cli.main(["prune", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_overwritten_by_what_is_taken_from_it(zoo, capsys):
    for command in ("extract", "prune"):
        assert cli.main([command, str(zoo / "m3vit-tiles"), "edges", "--output", str(zoo / "m3vit-tiles")]) == 2
        assert "expected another folder than the model's own" in capsys.readouterr().err
    assert AutoModelForMultiTask.from_pretrained("m3vit-tiles").tasks == ["edges", "segments"]
