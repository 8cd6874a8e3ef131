"""Models of pictures: evaluation against all logits at once, batches, training, checkpoints, recipes.

Shapes: `B` pictures, `H`, `W` height and width.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from moe_mtl import AutoModelForMultiTask
from moe_mtl.data import DataError
from moe_mtl.data.augmentation import Augmentation
from moe_mtl.data.images import ImageSplits, TensorImages
from moe_mtl.data.tensors import ShuffledBatches
from moe_mtl.data.vision_processor import VisionProcessor
from moe_mtl.models import model_class
from moe_mtl.tasks import Task
from moe_mtl.training import run as run_module
from moe_mtl.training.callbacks import ExpertHealth, read_routing
from moe_mtl.training.dense_metrics import DenseMetrics
from moe_mtl.training.evaluation import evaluate_images, evaluate_table
from moe_mtl.training.recipe import EarlyStopping, RecipeError, TaskSampling, parse_recipe
from moe_mtl.training.run import evaluate, run
from moe_mtl.training.sampling import BatchLoader, TaskBatches, TaskRows, rows_by_task

SIZE = 12
TASKS = [
    Task("edges", "edges", weight=50.0),
    Task("segments", "segmentation", 3),
    Task("normals", "normals", 3),
    Task("depth", "depth"),
    Task("kind", "multiclass", 4, metrics=("accuracy", "log_loss")),
    Task("light", "regression"),
]
MODEL = {
    "patch_size": 4,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "num_selected": 2,
    "expert_dim": 8,
    "decoder_dim": 8,
    "decoder_stages": 2,
}


def images(n=20, seed=0, augmentation=None, tasks=TASKS, size=SIZE):
    """Bright squares on dark ground; depth is labelled in every third picture, at some pixels."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 80, (n, 3, size, size), generator=g, dtype=torch.uint8)
    corner = torch.randint(0, size - 6, (n, 2), generator=g)
    for b, (y, x) in enumerate(corner.tolist()):
        pixels[b, :, y : y + 6, x : x + 6] += 120
    light = pixels.float().mean(1) / 255
    depth = light.masked_fill(torch.rand(n, size, size, generator=g) < 0.5, math.nan)
    depth[torch.arange(n) % 3 > 0] = math.nan
    labels = {
        "edges": ((light > 0.4).float().diff(dim=2, prepend=torch.zeros(n, size, 1)).abs() > 0).float(),
        "segments": (light * 6).long().clamp(max=2),
        "normals": torch.nn.functional.normalize(torch.stack([light, light, 1 - light], 1), dim=1),
        "depth": depth,
        "kind": (corner[:, 0] > 2).long() + 2 * (corner[:, 1] > 2).long(),
        "light": light.mean((1, 2)),
    }
    labels["kind"][::5] = -100
    labels["segments"][1] = -100
    processor = VisionProcessor([size, size], tasks)
    return TensorImages(pixels, {task.name: labels[task.name] for task in tasks}, processor, augmentation)


def model_of(seed=0, tasks=TASKS, **fields):
    torch.manual_seed(seed)
    cls = model_class("m3vit")
    config = {"tasks": [task.to_dict() for task in tasks], "image_size": [SIZE, SIZE]} | MODEL | fields
    return cls(cls.config_class(**config))


def equal_weights(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().values(), strict=True)
    return all(torch.equal(left, right) for (_, left), right in pairs)


# --- evaluation ---


def test_evaluation_in_batches_is_that_of_all_pictures_at_once():
    table, model = images(), model_of(dropout=0.5).train()
    found = evaluate_images(model, table, 7, TASKS)
    assert model.training
    batch = table[:]
    model.eval()
    with torch.no_grad():
        logits = model(batch["pixel_values"]).logits
    losses = {}
    for task in TASKS:
        labels = batch["labels"][task.name]
        losses[task.name] = task.loss(logits[task.name].double(), labels).item()
        assert found.task_losses[task.name] == pytest.approx(losses[task.name], rel=1e-5)
        if task.dense:
            metrics = DenseMetrics(task)
            metrics.add(logits[task.name], labels)
            # A last bit that differs with the batch can decide between two neighbours on a ridge.
            assert found.metrics[task.name] == pytest.approx(
                metrics.values(), rel=1e-2 if task.kind == "edges" else 1e-5
            )
    assert found.loss == pytest.approx(sum(task.weight * losses[task.name] for task in TASKS), rel=1e-5)
    assert list(found.metrics) == [task.name for task in TASKS]
    known = batch["labels"]["kind"] >= 0
    right = (logits["kind"].argmax(1) == batch["labels"]["kind"])[known].double().mean().item()
    assert found.metrics["kind"]["accuracy"] == pytest.approx(right)
    assert set(found.logits) == set(found.labels) == {"kind", "light"}  # no map is kept
    assert found.flat()["mean_iou"] == found.metrics["segments"]["mean_iou"]


def test_evaluation_takes_pictures_without_augmentation_and_the_tasks_of_the_table():
    plain = images(tasks=TASKS[:2])
    changed = plain.with_augmentation(Augmentation(mirror=True, noise=0.3))
    model = model_of()
    found = [evaluate_images(model, table, 8, TASKS) for table in (plain, changed)]
    assert found[0].metrics == found[1].metrics
    assert list(found[0].metrics) == ["edges", "segments"]
    with pytest.raises(ValueError, match="pictures with labels, found 20 with those of edges, segments"):
        evaluate_images(model, plain, 8, TASKS[2:])


def test_evaluation_of_tables_tells_their_labels(make_model, make_table):
    table = make_table(9)
    found = evaluate_table(make_model(), table, 4, make_model().config.parsed_tasks)
    assert torch.equal(found.labels["a"], table.tensors["labels"]["a"])


# --- batches ---


def test_batches_of_one_task_hold_pictures_with_its_label_and_ask_for_it_alone():
    table = images(30)
    rows = rows_by_task(table, TASKS)
    assert {name: int(chosen.sum()) for name, chosen in rows.items()} == {
        "edges": 30,
        "segments": 29,
        "normals": 30,
        "depth": 10,
        "kind": 24,
        "light": 30,
    }
    loader = BatchLoader(TaskRows(table, TASKS), TaskBatches(rows, 4, 2.0, seed=0), pin_memory=False)
    seen = set()
    for epoch in range(3):
        loader.set_epoch(epoch)
        for batch in loader:
            (name,) = batch["tasks"]
            seen.add(name)
            assert list(batch["labels"]) == [name]
            task = next(task for task in TASKS if task.name == name)
            assert bool(task.labelled(batch["labels"][name]).all())
    assert seen == {task.name for task in TASKS}


def test_augmentation_changes_with_the_epoch_and_with_nothing_else():
    batches = ShuffledBatches(8, 8, shuffle=False)
    loader = BatchLoader(images(8, augmentation=Augmentation(noise=0.1)), batches, pin_memory=False)

    def pixels(epoch):
        loader.set_epoch(epoch)
        return next(iter(loader))["pixel_values"]

    assert torch.equal(pixels(0), pixels(0))
    assert not torch.equal(pixels(0), pixels(1))


# --- training ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"task_sampling": TaskSampling(2.0)},
        {"loss_balancing": "UW"},
        {"gradient_balancing": "PCGrad"},
        {"gradient_accumulation": 2},
    ],
    ids=lambda options: next(iter(options), "joint"),
)
def test_training_lowers_the_losses(make_trainer, options):
    table, model = images(24), model_of()
    before = evaluate_images(model, table, 24, TASKS).task_losses
    make_trainer(model, table, table, epochs=8, batch_size=8, learning_rate=3e-3, **options).train()
    after = evaluate_images(model, table, 24, TASKS).task_losses
    assert sum(after[name] < before[name] for name in before) >= 5, (before, after)


@pytest.mark.parametrize("options", [{}, {"task_sampling": TaskSampling(2.0)}], ids=["joint", "sampled"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(make_trainer, tmp_path, options):
    augmentation = Augmentation(mirror=True, flip=True, brightness=0.1, noise=0.1)

    def trainer(folder, seed=0):
        model = model_of(seed, dropout=0.2, noise_std=1.0)
        table = images(20, augmentation=augmentation)
        fields = {
            "max_steps": 7,
            "batch_size": 8,
            "seed": 3,
            "save_steps": 4,
            "early_stopping": EarlyStopping("mean_iou", 9),
        }
        return make_trainer(model, table, images(6, 1), tmp_path / folder, **fields, **options)

    whole = trainer("whole")
    whole.train()
    early = trainer("early", seed=7)
    assert not equal_weights(whole.model, early.model)
    early.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert whole.state.global_step == early.state.global_step == 7
    assert equal_weights(whole.model, early.model)
    assert whole.evaluate()["eval_loss"] == early.evaluate()["eval_loss"]


def test_predictions_of_pictures_are_logits_of_what_is_no_map(make_trainer):
    table = images(10)
    output = make_trainer(model_of(), table, eval_batch_size=4).predict(table)
    assert set(output.predictions) == set(output.label_ids) == {"kind", "light"}
    assert output.predictions["kind"].shape == (10, 4)
    assert {"test_loss", "test_edges/ods_f", "test_kind/accuracy"} <= set(output.metrics)


def test_health_reads_the_routing_of_a_few_pictures():
    table, numbers = images(50), {}
    health = ExpertHealth(table, numbers.update)
    assert len(health.batch["pixel_values"]) == 32
    model = model_of()
    (record,) = read_routing(model, health.batch)
    health.on_evaluate(None, SimpleNamespace(global_step=1), None, model=model)
    gate = record.experts["edges"]
    shares = [numbers[f"routing/{record.layer}/edges/{name}"] for name in gate]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(1)
    assert 0 < numbers[f"routing/{record.layer}/edges/entropy"] <= math.log(4)


# --- recipes ---


@pytest.fixture
def pictures(monkeypatch):
    """`photo-tiles` made of drawn squares."""

    def load(name, **options):
        tasks = TASKS if options.get("tasks") is None else [t for t in TASKS if t.name in options["tasks"]]
        size = options.get("size", SIZE)
        parts = {
            name: images(n, seed, None, tasks, size)
            for seed, (name, n) in enumerate({"train": 24, "validation": 9, "test": 9}.items())
        }
        processor = parts["train"].processor
        return ImageSplits(**parts, tasks=tasks, processor=processor, info={"name": "squares", "sha256": "0"})

    monkeypatch.setattr(run_module.data, "load", load)


def recipe_of(model=None, train=None, **sections):
    train = {"epochs": 1, "batch_size": 8, "eval_batch_size": 4, "save_steps": 0} | (train or {})
    model = {"type": "m3vit"} | MODEL if model is None else model
    return parse_recipe({"data": {"name": "photo-tiles"}, "model": model, "train": train} | sections)


def test_a_recipe_of_pictures_trains_saves_and_measures_again(pictures, tmp_path):
    result = run(recipe_of(), tmp_path / "run", progress=False)
    assert set(result.metrics) == {"validation", "test"}
    again = evaluate(tmp_path / "run", "test")
    assert again.metrics == result.metrics["test"]
    assert VisionProcessor.from_pretrained(tmp_path / "run") == result.processor
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"model.safetensors", "recipe.resolved.yaml"}


def test_gradient_checkpointing_changes_memory_and_no_number(pictures, tmp_path):
    plain = run(recipe_of(), tmp_path / "plain", progress=False)
    saving = run(recipe_of(train={"gradient_checkpointing": True}), tmp_path / "saving", progress=False)
    assert plain.metrics == saving.metrics


@pytest.mark.parametrize("save_dtype", ["float16", "bfloat16"])
def test_a_file_of_half_the_size_gives_the_numbers_that_were_measured(pictures, tmp_path, save_dtype):
    plain = run(recipe_of(), tmp_path / "plain", progress=False)
    half = run(recipe_of(train={"save_dtype": save_dtype}), tmp_path / "half", progress=False)
    assert evaluate(tmp_path / "half", "test").metrics == half.metrics["test"]
    assert half.metrics["test"] != plain.metrics["test"]
    held, file = half.model.state_dict(), load_file(tmp_path / "half" / "model.safetensors")
    parameters = dict(half.model.named_parameters())
    assert {name for name, tensor in file.items() if tensor.dtype == getattr(torch, save_dtype)} == parameters.keys()
    loaded = AutoModelForMultiTask.from_pretrained(tmp_path / "half")
    streamed = AutoModelForMultiTask.from_pretrained(tmp_path / "half", offload_experts=True)
    for name, tensor in plain.model.state_dict().items():
        expected = tensor.to(getattr(torch, save_dtype)).float() if name in parameters else tensor
        assert held[name].equal(expected)
        assert loaded.state_dict()[name].equal(expected)
    pixels = images(2, 0).with_processor(half.processor)[0:2]["pixel_values"]
    for task, logits in loaded(pixels).logits.items():
        torch.testing.assert_close(streamed(pixels).logits[task], logits)
        assert logits.dtype == torch.float32


def test_what_a_file_of_half_the_size_cannot_hold_is_an_error():
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(1e5)
    with pytest.raises(RuntimeError, match=r"train\.save_dtype: float16 cannot hold weight, which has 1e"):
        run_module.rounded(model, "float16")
    assert run_module.rounded(model, "bfloat16")["weight"].dtype == torch.bfloat16


def test_a_saved_model_learns_a_further_task(pictures, tmp_path):
    first = run(recipe_of({"type": "m3vit", "tasks": ["edges", "kind"]} | MODEL), tmp_path / "first", progress=False)
    assert first.model.tasks == ["edges", "kind"]
    section = {"from": str(tmp_path / "first"), "add_tasks": ["depth"], "drop_tasks": ["kind"], "freeze": ["*"]}
    second = run(recipe_of(section), tmp_path / "second", progress=False)
    assert second.model.tasks == ["edges", "depth"]
    assert second.metrics["test"]["edges"] == first.metrics["test"]["edges"]
    assert [task.name for task in second.processor.parsed_tasks] == ["edges", "depth"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "mmoe"}}, "model.type: mmoe: expected a model of pictures, as the data are, found one of"),
        ({"data": {"name": "digits"}}, "expected a model of rows of a table, as the data are, found one of pictures"),
        ({"model": {"type": "m3vit", "image_size": [8, 8]}}, "'image_size' comes from the data"),
        ({"model": {"type": "m3vit", "features": []}}, "unknown key 'features'"),
        ({"model": {"type": "m3vit", "tasks": ["edge"]}}, "unknown task 'edge'; did you mean 'edges'"),
        ({"model": {"type": "m3vit", "patch_size": 5}}, "multiples of the patch of 5, found 12"),
        ({"eval": {"bootstrap": 10}}, "the maps of task 'edges' are not kept"),
        ({"train": {"max_length": 7}}, "train.max_length: expected none, as photo-tiles is pictures"),
        ({"train": {"task_weights": {"edgs": 1.0}}}, "unknown task 'edgs'; did you mean 'edges'"),
        ({"train": {"early_stopping": {"metric": "mean_auc"}}}, "unknown metric 'mean_auc'"),
    ],
)
def test_what_cannot_be_is_told_before_training(pictures, monkeypatch, tmp_path, change, message):
    if change.get("data"):
        monkeypatch.undo()
    with pytest.raises(RecipeError, match=message):
        run(recipe_of(**change), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_data_of_another_size_or_kind_is_refused(pictures, monkeypatch, tmp_path):
    run(recipe_of(), tmp_path / "run", progress=False)
    with pytest.raises(DataError, match=r"pictures of \[12, 12\], as the model takes, found \[16, 16\]"):
        evaluate(tmp_path / "run", overrides=[("data.size", "16")])
    small = recipe_of({"from": str(tmp_path / "run")}, data={"name": "photo-tiles", "size": 16})
    with pytest.raises(RecipeError, match=r"expected pictures of \[12, 12\] as the saved model takes"):
        run(small, tmp_path / "other", progress=False)
    monkeypatch.undo()
    with pytest.raises(RecipeError, match="data: expected pictures, as the model takes, found rows of a table"):
        evaluate(tmp_path / "run", overrides=[("data.name", "digits")])
