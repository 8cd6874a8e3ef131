import subprocess
import sys

import pytest
import yaml

from moe_mtl.training.recipe import (
    EarlyStopping,
    Recipe,
    RecipeError,
    find_recipe,
    list_recipes,
    load_recipe,
    parse_recipe,
    recipe_sha256,
)
from moe_mtl.training.strict import read_yaml

PLAIN = {"model": {"type": "mmoe"}}


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_short_opens_with_its_command_and_survives_writing(name):
    text = list_recipes()[name].read_text()
    recipe = load_recipe(name)
    assert text.startswith(f"# moe-mtl train recipes/{name}.yaml")
    assert len(text.splitlines()) <= 40
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_types_and_the_number_that_yaml_reads_as_text():
    text = "{learning_rate: 1e-3, weight_decay: 1, early_stopping: {}, betas: [9e-1, 1.E-1]}"
    recipe = parse_recipe({**PLAIN, "train": read_yaml(text, "")})
    assert recipe.train.learning_rate == 1e-3
    assert isinstance(recipe.train.weight_decay, float)
    assert recipe.train.early_stopping == EarlyStopping()
    assert recipe.train.betas == [0.9, 0.1]
    text = "{model: {type: mmoe, dropout: 2e-1}, data: {name: x, scale: 1e-1, positive: '5E10', also: 1e5x}}"
    recipe = parse_recipe(read_yaml(text, ""))
    assert recipe.model.config == {"dropout": 0.2}
    assert recipe.data.options == {"scale": 0.1, "positive": "5E10", "also": "1e5x"}
    assert parse_recipe(read_yaml(recipe.to_yaml(), "")) == recipe, "what was quoted stays text"
    with pytest.raises(RecipeError, match=r"train\.learning_rate: expected a number, found '1e-3'"):
        parse_recipe({**PLAIN, "train": {"learning_rate": "1e-3"}})


def test_keys_that_are_no_fields_go_to_the_data_set_and_the_model():
    recipe = parse_recipe(
        {"data": {"name": "table", "path": "x.csv", "seed": 3}, "model": {"from": "zoo", "dropout": 0.1}}
    )
    assert (recipe.data.path, recipe.data.options) == ("x.csv", {"seed": 3})
    assert (recipe.model.source, recipe.model.config) == ("zoo", {"dropout": 0.1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trian": {}}, "recipe: unknown key 'trian'; did you mean 'train'?"),
        ({"train": {"learning_rte": 1}}, "section 'train': unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        ({"train": {"early_stopping": {"patienc": 1}}}, "section 'train.early_stopping': unknown key 'patienc'"),
        ({"train": {"epochs": 1.5}}, "train.epochs: expected an integer, found 1.5"),
        ({"train": {"epochs": True}}, "train.epochs: expected an integer, found True"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate: expected a number, found 'fast'"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: expected a finite number"),
        ({"train": {"precision": "fp16"}}, "train.precision: expected one of 'fp32', 'bf16', found 'fp16'"),
        ({"train": {"epochs": 1, "max_steps": 2}}, "expected 'epochs' or 'max_steps', found both"),
        ({"train": {"betas": [0.9]}}, "train.betas: expected two numbers"),
        ({"train": {"task_weights": {"a": -1}}}, "train.task_weights.a: expected a number in"),
        ({"train": {"loss_balancing": "uncertainty", "gradient_balancing": "PCGrad"}}, "would weigh the tasks twice"),
        ({"train": {"loss_balancing": {"name": "uniform", "x": 1}}}, "'uniform' has no options, found x"),
        ({"train": {"loss_balancing": {"x": 1}}}, "expected a name or a mapping with a 'name'"),
        ({"train": {"task_sampling": {}, "gradient_balancing": "PCGrad"}}, "leave nothing to balance"),
        ({"eval": {"splits": ["tests"]}}, "eval.splits: expected of validation, test, train, found 'tests'"),
        ({"model": {"type": "mmoe", "from": "zoo"}}, "found both"),
        ({"model": {}}, "found neither"),
        ({"model": {"type": "mmoe", "add_tasks": ["x"]}}, "they need model.from"),
        ({"model": {"type": "mmoe", "config": {"type": "ple"}}}, "write the keys of 'config' into the section itself"),
        ({"model": "mmoe"}, "model: expected a mapping of keys, found 'mmoe'"),
        (["model"], "recipe: expected a mapping of sections"),
    ],
)
def test_errors_name_the_key(content, message):
    with pytest.raises(RecipeError) as error:
        parse_recipe(content if isinstance(content, list) else {**PLAIN, **content})
    assert message in str(error.value)


def test_overrides():
    overrides = [
        ("train.learning_rate", "1e-3"),
        ("data.path", "007"),
        ("model.num_experts", "4"),
        ("model.expert_dims", "[8, 4]"),
        ("train.early_stopping.patience", "2"),
        ("train.early_stopping.metric", "a/auc"),
        ("train.gradient_balancing", "CAGrad"),
        ("train.gradient_balancing.c", "0.5"),
    ]
    recipe = parse_recipe(PLAIN, overrides)
    assert recipe.train.learning_rate == 1e-3
    assert recipe.data.path == "007"  # text, not the number 7
    assert recipe.model.config == {"num_experts": 4, "expert_dims": [8, 4]}
    assert recipe.train.early_stopping == EarlyStopping("a/auc", 2)
    assert recipe.gradient_method == ("CAGrad", {"c": 0.5})
    assert parse_recipe(PLAIN, [("train.early_stopping", "null")]).train.early_stopping is None
    assert parse_recipe(PLAIN, [("data.path", "[a.csv, b.csv]")]).data.path == ["a.csv", "b.csv"]
    assert parse_recipe(PLAIN, [("data.path", "1e3")]).data.path == "1e3"
    with pytest.raises(RecipeError, match=r"model\.type: expected text"):
        parse_recipe(PLAIN, [("model.type", "[mmoe]")])
    assert "train" not in PLAIN, "overrides must not reach the caller's content"
    for key in ("epochs", "train.", "trian.epochs"):
        with pytest.raises(RecipeError, match="override"):
            parse_recipe(PLAIN, [(key, "1")])


def test_files_that_are_no_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    for text, message in [("a: [", "this is no YAML"), ("train: {epochs: 1, epochs: 2}", "'epochs' stands twice")]:
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)
    with pytest.raises(RecipeError, match="did you mean 'digits/mmoe'"):
        find_recipe("digits/mmeo")
    assert find_recipe("recipes/digits/mmoe.yaml").samefile(find_recipe("digits/mmoe"))


def test_names_of_balancing_methods():
    assert parse_recipe(PLAIN).loss_method is None
    assert parse_recipe(PLAIN).gradient_method is None
    for alias, name in {"uncertainty": "UW", "dwa": "DWA", "random": "Random", "STCH": "STCH"}.items():
        assert parse_recipe({**PLAIN, "train": {"loss_balancing": alias}}).loss_method == (name, {})


def test_the_hash_covers_what_is_asked_for_and_nothing_else():
    def hashed(**sections):
        return recipe_sha256(parse_recipe({**PLAIN, **sections}))

    plain = hashed()
    assert plain == hashed(train={"batch_size": 512}), "a default written out is no difference"
    assert plain == hashed(train={"seed": 5}, card={"name": "x"}, data={"path": "somewhere"})
    others = [
        hashed(train={"learning_rate": 2e-3}),
        hashed(data={"name": "table"}),
        hashed(model={"type": "mmoe", "dropout": 0.1}),
    ]
    assert len({plain, *others}) == 4


def test_importing_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from moe_mtl.training.recipe import load_recipe; load_recipe('digits/mmoe');"
        "print({'torch', 'transformers', 'pyarrow'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_defaults_are_valid():
    recipe = Recipe()
    recipe.model.type = "mmoe"
    recipe.validate()
