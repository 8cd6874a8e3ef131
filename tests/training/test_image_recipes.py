"""Every recipe of pictures trains, saves, evaluates again and answers; what can be said against one comes first."""

import json

import numpy as np
import pytest
import torch
import transformers
from picture_folders import nyud_mt, pascal_mt
from PIL import Image

from moe_mtl import AutoModelForMultiTask, data
from moe_mtl.data import digit_pairs, photo_tiles
from moe_mtl.data.images import ImageSplits, rows_of
from moe_mtl.training.crash_safe import CrashSafeTrainer
from moe_mtl.training.recipe import RecipeError, list_recipes, load_recipe
from moe_mtl.training.run import evaluate, run

NAMES = [name for name in list_recipes() if data.is_images(load_recipe(name).data.name)]
SHORT = [
    ("train.max_steps", "2"),
    ("train.epochs", "null"),
    ("train.batch_size", "4"),
    ("train.eval_batch_size", "6"),
    ("train.precision", "fp32"),
]
# Published ones are too large for a test: two blocks, narrow, small pictures, no backbone from the Hub.
SMALL = [
    ("data.image_size", "[32, 32]"),
    ("model.patch_size", "8"),
    ("model.hidden_size", "24"),
    ("model.num_hidden_layers", "4"),
    ("model.decoder_dim", "8"),
]


@pytest.fixture(scope="module", autouse=True)
def few_rows():
    with pytest.MonkeyPatch.context() as patch:
        for module in (digit_pairs, photo_tiles):
            whole = module.load(module.Options())
            parts = {
                name: part.select(torch.linspace(0, len(part) - 1, 12).long()) for name, part in whole.parts().items()
            }
            info = whole.info | {"rows": rows_of(parts)}
            few = ImageSplits(**parts, tasks=whole.tasks, processor=whole.processor, info=info)
            patch.setattr(module, "load", lambda options, few=few: few.only(options.tasks))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        "pascal-context": str(pascal_mt(tmp_path_factory.mktemp("pascal"))),
        "nyud-v2": str(nyud_mt(tmp_path_factory.mktemp("nyud"))),
    }


def shortened(name, folders, *further):
    where = name.partition("/")[0]
    own = [("data.path", folders[where]), *SMALL] if where in folders else []
    recipe = load_recipe(name, [*SHORT, *own, *further])
    if "model.backbone" not in dict(further):
        recipe.model.backbone = None  # which would come from the Hub
    return recipe


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_of_pictures(name, folders, tmp_path):
    result = run(shortened(name, folders), tmp_path / "out", progress=False)
    assert set(result.metrics) == {"validation", "test"}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result.record
    again = evaluate(tmp_path / "out", "test")
    for task, metrics in result.metrics["test"].items():
        for metric, value in metrics.items():
            assert value is None or again.metrics[task][metric] == pytest.approx(value, rel=1e-6), (task, metric)
    model = AutoModelForMultiTask.from_pretrained(tmp_path / "out")
    processor = model.processor_class.from_pretrained(tmp_path / "out")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    for task in model.tasks:
        alone = AutoModelForMultiTask.from_pretrained(tmp_path / "out", tasks=[task]).eval()
        with torch.no_grad():
            logits = alone(**processor(picture)).logits
        assert list(logits) == [task]
        assert processor.decode(logits)[task].shape[0] == 1


def test_the_published_recipe_is_sgd_along_a_polynomial(folders, tmp_path, monkeypatch):
    kept = {}
    step = CrashSafeTrainer.create_scheduler

    def spy(self, *arguments, **keywords):
        kept["schedule"] = step(self, *arguments, **keywords)
        kept["optimizer"] = self.optimizer
        return kept["schedule"]

    monkeypatch.setattr(CrashSafeTrainer, "create_scheduler", spy)
    run(shortened("pascal-context/m3vit", folders, ("train.max_steps", "4")), tmp_path / "out", progress=False)
    assert type(kept["optimizer"]) is torch.optim.SGD
    assert {group["momentum"] for group in kept["optimizer"].param_groups} == {0.9}
    assert {group["weight_decay"] for group in kept["optimizer"].param_groups} == {1e-4, 0.0}
    factors = [kept["schedule"].lr_lambdas[0](i) for i in range(5)]
    assert factors == pytest.approx([(1 - i / 4) ** 0.9 for i in range(5)])


def test_a_recipe_starts_from_a_backbone(folders, tmp_path):
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=4, num_attention_heads=12, intermediate_size=96
    )
    torch.manual_seed(0)
    vit = transformers.ViTModel(config)
    vit.save_pretrained(tmp_path / "vit")
    start = ("model.backbone", str(tmp_path / "vit"))
    still = ("train.learning_rate", "1e-9")
    recipe = shortened("pascal-context/m3vit", folders, start, ("model.expert_dim", "24"), still)
    model = run(recipe, tmp_path / "out", progress=False).model
    found = model.patches.projection.weight
    expected = vit.embeddings.patch_embeddings.projection.weight
    torch.testing.assert_close(found, expected.to(found.device))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("pascal-context/m3vit", {"model.backbone": "BERT"}, "model.backbone: .*expected .*bert"),
        ("pascal-context/m3vit", {"model.backbone": "no/such/backbone"}, "model.backbone: no/such/backbone: "),
        ("digit-pairs/m3vit", {"model.patch_size": "5"}, "multiples of the patch of 5, found 12"),
        ("digit-pairs/m3vit", {"model.image_size": "[9, 9]"}, "'image_size' comes from the data"),
        ("digits/mmoe", {"model.backbone": "nowhere"}, "model.backbone: expected none, as a mmoe reads a table"),
        ("word-edits/base", {"model.backbone": "nowhere"}, "model.backbone: expected none, as word-edits is text"),
        ("digits/mmoe", {"data.name": "digit-pairs"}, "mmoe"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(name, overrides, message, folders, tmp_path):
    if overrides.get("model.backbone") == "BERT":
        transformers.BertModel(
            transformers.BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        ).save_pretrained(tmp_path / "bert")
        overrides = {"model.backbone": str(tmp_path / "bert")}
    with pytest.raises((RecipeError, data.DataError), match=message):
        run(shortened(name, folders, *overrides.items()), tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "config.json").exists()
