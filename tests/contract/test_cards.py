"""Every shipped card: its checks, its weights, its answers, each task alone; and one record trained again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM

from moe_mtl import hub
from moe_mtl.cards import check, reproduce
from moe_mtl.cards.environment import made_as_here
from moe_mtl.cards.record import family, load_record, this_row
from moe_mtl.data import TabularProcessor, load
from moe_mtl.models import AutoModelForMultiTask, MultiTaskModel
from moe_mtl.training.run import evaluate
from moe_mtl.training.saved import recipe_of
from moe_mtl.training.text_run import encode_split, load_text
from moe_mtl.training.text_trainer import task_keyword
from moe_mtl.tuners import METHODS, extract_task

CARDS = sorted(hub.zoo())
TABLES = [name for name in CARDS if family(load_record(hub.zoo()[name])) == "table"]
TEXT = [name for name in CARDS if name not in TABLES]
ADAPTERS = [name for name in TEXT if (hub.zoo()[name] / hub.ADAPTER).is_file()]
SHIPPED = sorted({hub.read_config(hub.zoo()[name])["model_type"] for name in TABLES})

every_card = pytest.mark.parametrize("name", CARDS)
every_table = pytest.mark.parametrize("name", TABLES)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The last digits depend on it, and on busy cores more threads are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(folder: Path, model: MultiTaskModel) -> dict[str, torch.Tensor]:
    """Test rows where the data come with the library, else random ones of the right kinds."""
    record = load_record(folder)
    if record["data"]["name"] != "digits":
        return zoo.inputs_of(model.config, rows=257)
    return TabularProcessor.from_pretrained(folder)(load("digits").test, labels=False)


def test_there_are_cards() -> None:
    assert {"mmoe", "ple", "home", "dselect_k"} <= set(SHIPPED)
    assert set(SHIPPED) <= set(zoo.MODEL_TYPES)
    methods = {str(method).lower() for method in METHODS.values()}
    assert {load_record(hub.zoo()[name])["model_type"] for name in ADAPTERS} == methods, "a card for every method"


@every_card
def test_the_card_has_no_problem(name: str) -> None:
    assert check(name) == []


def test_the_tables_of_the_zoo_have_no_problem() -> None:
    assert [problem for problem in check() if not problem.startswith(tuple(CARDS))] == []


@every_table
def test_each_task_alone_answers_the_same_bits(name: str) -> None:
    folder = hub.zoo()[name]
    model = AutoModelForMultiTask.from_pretrained(name)
    inputs = rows_of(folder, model)
    with torch.inference_mode():
        whole = model(**inputs).logits
        assert list(whole) == model.tasks == list(this_row(load_record(folder))["metrics"])
        for task, logits in whole.items():
            assert torch.isfinite(logits).all()
            assert len(logits.unique()) > 1, "every row is answered alike"
            assert torch.equal(model.extract_task(task)(**inputs).logits[task], logits), task
            read = AutoModelForMultiTask.from_pretrained(name, tasks=[task])
            assert torch.equal(read(**inputs).logits[task], logits), task
            assert read.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("name", [name for name in CARDS if name.startswith("dselect-k")])
def test_each_task_keeps_at_most_k_experts(name: str) -> None:
    model = AutoModelForMultiTask.from_pretrained(name)
    for task in model.tasks:
        kept = model.extract_task(task).config.experts_kept
        assert 1 <= len(kept) <= model.config.num_selected


@pytest.mark.parametrize("name", [name for name in CARDS if name.endswith("-digits") or name in TEXT])
def test_the_weights_are_those_that_were_measured(name: str) -> None:
    record = load_record(hub.zoo()[name])
    shipped = record["seeds"].index(record["shipped_seed"])
    measured = evaluate(name).metrics
    for task, metrics in this_row(record)["metrics"].items():
        for metric, entry in metrics.items():
            assert measured[task][metric] == pytest.approx(entry["values"][shipped], abs=1e-4), (task, metric)


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_task_alone_is_a_plain_lora_or_the_refusal_says_why(name: str) -> None:
    model, tokenizer, tasks = load_text(hub.zoo()[name])
    model.double()  # so that what is exact is told from what is close
    splits = load("word-edits")
    if model.active_peft_config.adapter_class.depends_on_input:
        with pytest.raises(NotImplementedError, match=model.active_peft_config.adapter_class.depends_on_input):
            extract_task(model, splits.tasks[0] if tasks else None)
        return
    for task in splits.tasks:
        examples = [example for example in splits.test if example.task == task][:32]
        (batch,) = encode_split(recipe_of(hub.zoo()[name]), examples, tokenizer, splits.tasks).batches(32, 0)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        alone = extract_task(model, task if tasks else None)
        numbers = torch.full((len(examples),), splits.tasks.index(task))
        told = {"preference": torch.nn.functional.one_hot(numbers, len(splits.tasks)).double()}
        told = told if task_keyword(model) == "preference" else {"tasks": numbers}
        with torch.inference_mode():
            whole = model(**inputs, **told).logits
            torch.testing.assert_close(alone(**inputs).logits, whole, rtol=1e-8, atol=1e-8)
            merged = alone.merge_and_unload()
            torch.testing.assert_close(merged(**inputs).logits, whole, rtol=1e-8, atol=1e-8)
        base = AutoModelForCausalLM.from_pretrained(hub.resolve("llama-word-edits"))
        assert merged.num_parameters() == base.num_parameters()


def test_a_record_comes_again(one_thread: None) -> None:
    """Trained anew: every number where packages and processor are the record's, elsewhere each task's first."""
    record = load_record(hub.zoo()["mmoe-digits"])
    found = reproduce("mmoe-digits", progress=False, echo=lambda line: None)
    assert len(found) == sum(map(len, this_row(record)["metrics"].values()))
    firsts = {(task, next(iter(metrics))) for task, metrics in this_row(record)["metrics"].items()}
    counted = found if made_as_here(record) else [one for one in found if (one.task, one.metric) in firsts]
    assert [str(one) for one in counted if not one.agrees] == []
