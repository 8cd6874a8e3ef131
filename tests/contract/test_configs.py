"""Every config: strict, and every field survives its file."""

import json
from pathlib import Path
from typing import Any

import pytest
import zoo
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from moe_mtl.models import REGISTRY

all_types = pytest.mark.parametrize("model_type", zoo.MODEL_TYPES)
REFUSED = (ValueError, StrictDataclassError)


@all_types
def test_every_field_survives_its_file(model_type: str, tmp_path: Path) -> None:
    config = zoo.config_of(model_type, numeric_embedding="periodic")
    default = type(config)()
    at_default = {f.name for f in zoo.own_fields(type(config)) if getattr(config, f.name) == getattr(default, f.name)}
    assert at_default <= {"gate", "num_levels", *zoo.WRITTEN_BY_THE_LIBRARY}  # fixed for DSelect-k and CGC
    config.save_pretrained(tmp_path)
    for again in (type(config).from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is type(config)
        for field in zoo.own_fields(type(config)):
            assert getattr(again, field.name) == getattr(config, field.name), field.name
        assert again.task_names == zoo.TASK_NAMES
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == model_type


@all_types
def test_fields_that_extraction_writes_survive_too(model_type: str, tmp_path: Path) -> None:
    small = zoo.model_of(model_type).extract_task(["view", "price"]).config
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path)
    for field in zoo.own_fields(type(small)):
        assert getattr(again, field.name) == getattr(small, field.name), field.name


@all_types
def test_unknown_fields_name_the_nearest(model_type: str) -> None:
    config_class = REGISTRY[model_type].config_class
    for field in zoo.own_fields(config_class):
        with pytest.raises(ValueError, match=f"unknown field '{field.name}_'; did you mean '{field.name}'"):
            config_class(**{f"{field.name}_": 1})
    with pytest.raises(ValueError, match="unknown field 'xyzzy'"):
        config_class(xyzzy=1)
    for feature, message in (
        ({"name": "a", "kind": "numerical"}, "feature 'a': kind must be one of numeric, categorical"),
        ({"name": "a", "kind": "numeric", "num_categories": 3}, "feature 'a': unknown field 'num_categories'"),
        ({"name": "a", "kind": "categorical"}, "feature 'a': num_categories must be an integer"),
        ({"name": "a", "kind": "sequence", "num_categories": 2, "max_length": 3, "pooling": "min"}, "pooling must be"),
        ({"kind": "numeric"}, "each needs its own name"),
        ({"name": "a", "kind": "numeric", "bins": [0.0]}, "feature 'a': bins must be a list of 2"),
        ({"name": "a", "kind": "numeric", "bins": [1.0, 0.0]}, "feature 'a': bins must increase"),
        ({"name": "a", "kind": "numeric", "bins": [1.0, 1.0 + 1e-12]}, "must increase .as float32"),
    ):
        with pytest.raises(REFUSED, match=message):
            config_class(features=[feature])
    with pytest.raises(REFUSED, match="each needs its own name, found 'a'"):
        config_class(features=[{"name": "a", "kind": "numeric"}] * 2)
    with pytest.raises(REFUSED, match="tasks must hold at least one task"):
        config_class(tasks=[])


@all_types
def test_wrong_types_and_absurd_sizes_name_the_field(model_type: str) -> None:
    config_class = REGISTRY[model_type].config_class
    default = config_class()
    for field in zoo.own_fields(config_class):
        value = getattr(default, field.name)
        wrong: list[Any] = [object(), {"a": 1}]
        if isinstance(value, bool):
            wrong += [1, "true"]
        elif isinstance(value, int):
            wrong += ["3", 3.5, True, -1, 2**62]
        elif isinstance(value, float):
            wrong += ["0.1", -1.0, float("nan"), float("inf")]
        elif isinstance(value, list) and isinstance(value[0], int):
            wrong += [3, ["3"], [0], [-1], [2**40], [3.0], [4] * 1000]
        elif isinstance(value, str):
            wrong += ["no such thing", 3]
        for bad in wrong:
            with pytest.raises(REFUSED, match=field.name):
                config_class(**{field.name: bad})


@all_types
def test_a_config_that_was_changed_is_checked_again_when_saved(model_type: str, tmp_path: Path) -> None:
    config = zoo.config_of(model_type)
    with pytest.raises(REFUSED, match="embedding_dim"):
        config.embedding_dim = "8"
    config.embedding_dim = 10**9
    with pytest.raises(REFUSED, match="embedding_dim"):
        config.save_pretrained(tmp_path)


def test_a_size_that_is_legal_by_field_but_absurd_in_all_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    features = [{"name": "a", "kind": "categorical", "num_categories": 2**30}]
    config = zoo.config_of("mmoe", features=features, embedding_dim=65_536)
    small = zoo.model_of("mmoe")
    small.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config declares .* parameters; at most"):
        type(small).from_pretrained(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "kind", "bins"]), inner),
    max_leaves=5,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(zoo.MODEL_TYPES), st.data())
def test_any_json_is_a_config_or_a_clear_refusal(model_type: str, data: st.DataObject) -> None:
    config_class = REGISTRY[model_type].config_class
    names = [field.name for field in zoo.own_fields(config_class)]
    fields = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=3))
    try:
        config = config_class.from_dict(fields)
    except REFUSED:
        return
    assert config_class.from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()


@pytest.mark.parametrize(("model_type", "field"), [("ple", "expert_groups"), ("home", "meta_groups")])
@pytest.mark.parametrize("extra", ["values", "shared", "a b", "", 3])
def test_groups_that_the_library_writes_are_checked_like_names(model_type: str, field: str, extra: object) -> None:
    config = zoo.config_of(model_type)
    needed = config.tower_tasks if model_type == "ple" else config.groups
    REGISTRY[model_type](zoo.config_of(model_type, **{field: [*needed, "more"]}))
    for groups in ([*needed, extra], [*needed, needed[0]], needed[1:]):
        with pytest.raises(REFUSED, match=field):
            zoo.config_of(model_type, **{field: groups})


def test_a_task_without_a_group_is_not_put_into_a_group_of_its_name() -> None:
    tasks = [{"name": "act", "kind": "binary"}, {"name": "like", "kind": "binary", "group": "act"}]
    with pytest.raises(REFUSED, match="task 'act' has no group"):
        zoo.config_of("home", tasks=tasks)


def test_an_unknown_field_is_answered_with_the_fields_of_this_library() -> None:
    config_class = REGISTRY["mmoe"].config_class
    with pytest.raises(REFUSED, match="did you mean 'num_experts'"):
        config_class(num_expert=3)
    with pytest.raises(REFUSED) as error:
        config_class(zzzzzz=3)
    assert "tower_dims" in str(error.value)
    assert "architectures" not in str(error.value)
