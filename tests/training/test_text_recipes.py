"""Recipes of text from file to folder, on a tiny base model and a few words."""

import importlib.util
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_mtl import extract_task, load_adapter
from moe_mtl.data import DataError, word_edits
from moe_mtl.data.text import TextSplits, encode
from moe_mtl.tasks import UnknownTaskError
from moe_mtl.training.recipe import RecipeError, list_recipes, load_recipe, parse_recipe, recipe_sha256
from moe_mtl.training.run import evaluate, run
from moe_mtl.training.text_trainer import evaluate_text, pack, pad_token
from moe_mtl.training.watch import TrainingDivergedError

EDITS = ["reverse", "rot13", "sort"]
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHORT = {"max_steps": 4, "batch_size": 8, "eval_batch_size": 64, "schedule": "linear"}
WORD_EDITS = [name for name in list_recipes() if name.startswith("word-edits/")]


@pytest.fixture(autouse=True, scope="module")
def few_words():
    """A few words of each part, so that measuring takes no time."""
    load = word_edits.load

    def short(options: word_edits.Options) -> TextSplits:
        splits = load(options)
        parts = {name: list(part)[: 12 * len(splits.tasks)] for name, part in splits.parts().items()}
        return TextSplits(**parts, tasks=splits.tasks, info=splits.info)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_edits, "load", short)
        yield


@pytest.fixture(scope="module")
def base(few_words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    run(recipe_of({"type": "llama", **TINY}), folder, progress=False)
    return folder


def recipe_of(model, train=None, data=None):
    return parse_recipe(
        {"data": {"name": "word-edits", "edits": EDITS} | (data or {}), "model": model, "train": SHORT | (train or {})}
    )


def adapter(base, method="mtl_lora", train=None, data=None, **fields):
    return recipe_of({"from": str(base), "adapter": {"method": method, "r": 2, **fields}}, train, data)


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_new_model_is_trained_saved_and_measured_again(base):
    record = read(base)
    assert record["model_type"] == "llama"
    assert record["steps"] == 4
    assert list(record["metrics"]["test"]) == EDITS
    assert set(record["metrics"]["test"]["sort"]) == {"exact_match", "log_loss"}
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.config.use_cache
    assert model.num_parameters() == record["parameters"]
    assert evaluate(base, "test").metrics == record["metrics"]["test"]
    assert len(AutoTokenizer.from_pretrained(base)("ab=").input_ids) == 4


def test_an_adapter_is_trained_saved_and_measured_again(base, tmp_path):
    result = run(adapter(base, train={"eval_steps": 2}), tmp_path / "run", progress=False)
    assert isinstance(result.model, PeftModel)
    record = read(tmp_path / "run")
    assert record["model_type"] == "mtl_lora"
    assert record["curve"]["step"] == [2, 4]
    assert len(record["curve"]["mean_exact_match"]) == 2
    trained = [p for p in result.model.parameters() if p.requires_grad]
    assert record["parameters"] == sum(p.numel() for p in trained) < result.model.num_parameters()
    assert evaluate(tmp_path / "run", "validation").metrics == record["metrics"]["validation"]
    again = load_adapter(tmp_path / "run")
    assert again.active_peft_config.tasks == EDITS
    assert again.active_peft_config.base_model_name_or_path == str(base)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["peft_type"] == "MTL_LORA"
    assert not (tmp_path / "run" / "README.md").exists()


def test_training_changes_the_adapter_and_not_the_base(base, tmp_path):
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    result = run(adapter(base), tmp_path / "run", progress=False)
    after = result.model.state_dict()
    for name, value in before.items():
        kept = [key for key in after if key.removeprefix("base_model.model.").replace(".base_layer", "") == name]
        assert len(kept) == 1
        assert torch.equal(after[kept[0]], value)
    moved = [name for name, p in result.model.named_parameters() if p.requires_grad and "b_OP" in name and p.any()]
    assert moved


@pytest.mark.parametrize("name", WORD_EDITS)
def test_every_recipe_of_word_edits_runs(base, tmp_path, name):
    overrides = [("train.max_steps", "2"), ("train.eval_steps", "2"), ("train.batch_size", "8")]
    as_it_is = name.endswith(("/base", "/lori-s"))  # the latter begins with an adapter
    recipe = load_recipe(name, overrides + ([] if as_it_is else [("model.from", str(base))]))
    record = run(recipe, tmp_path / "run", progress=False).record
    assert record["steps"] == 2
    assert record["metrics"]["test"]


def test_exact_match_is_what_greedy_decoding_gets_right(base):
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    splits = word_edits.load(word_edits.Options(("copy", "reverse")))
    (inputs,) = encode(splits.train[:4], tokenizer, splits.tasks).batches(4, 0)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):  # a few answers by heart, so that some are right
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    examples = splits.train[:8]
    found = evaluate_text(model, encode(examples, tokenizer, splits.tasks), 3, pad_token(tokenizer)).exact
    for example, exact in zip(examples, found.tolist(), strict=True):
        ids = torch.tensor([tokenizer(example.prompt).input_ids[:-1]])
        answer = model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :].tolist()
        right = [*tokenizer(example.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        assert exact == (answer[: len(right)] == right)
    assert found.any()


def test_log_loss_is_the_mean_over_the_answers_tokens(base):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    examples = word_edits.load(word_edits.Options(("reverse",))).test[:5]
    found = evaluate_text(model, encode(examples, tokenizer, ["reverse"]), 2, 0)
    nats, tokens = 0.0, 0
    for example in examples:
        prompt = tokenizer(example.prompt).input_ids[:-1]
        answer = tokenizer(example.completion).input_ids
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        nats -= sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        tokens += len(answer)
    assert found.metrics["reverse"]["log_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found.loss == found.metrics["reverse"]["log_loss"]


def test_training_is_the_same_again_and_from_a_checkpoint(base, tmp_path):
    recipe = adapter(base, "smora", num_selected=1, train={"save_steps": 2, "eval_steps": 2})
    whole = run(recipe, tmp_path / "whole", progress=False).model.state_dict()
    again = run(recipe, tmp_path / "again", progress=False).model.state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    from moe_mtl.training import text_run

    class Stop(Exception):  # noqa: N818
        pass

    trainer = text_run._trainer

    def stopping(*arguments):
        made = trainer(*arguments)

        from transformers import TrainerCallback

        class Stops(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                raise Stop

        made.add_callback(Stops())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_run, "_trainer", stopping)
        with pytest.raises(Stop):
            run(recipe, tmp_path / "cut", progress=False)
    with pytest.raises(FileExistsError, match="unfinished run"):
        run(recipe, tmp_path / "cut", progress=False)
    resumed = run(recipe, tmp_path / "cut", progress=False, resume=True).model.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole), "bias of the choice included"
    assert not list((tmp_path / "cut").glob("checkpoint-*"))


def test_an_adapter_is_trained_on(base, tmp_path):
    run(adapter(base), tmp_path / "first", progress=False)
    recipe = recipe_of({"from": str(tmp_path / "first")}, data={"edits": ["sort"]})
    result = run(recipe, tmp_path / "second", progress=False)
    assert list(result.metrics["test"]) == ["sort"]
    assert result.model.active_peft_config.tasks == EDITS
    with pytest.raises(RecipeError, match="has no task 'copy'"):
        run(recipe_of({"from": str(tmp_path / "first")}, data={"edits": ["copy"]}), tmp_path / "third", progress=False)
    with pytest.raises(RecipeError, match="is an adapter itself"):
        run(adapter(tmp_path / "first"), tmp_path / "third", progress=False)


def test_lori_s_after_lori_d(base, tmp_path):
    dense = run(adapter(base, "lori"), tmp_path / "dense", progress=False)
    recipe = recipe_of({"from": str(tmp_path / "dense"), "sparsity": 0.75}, {"weight_decay": 0.1})
    sparse = run(recipe, tmp_path / "sparse", progress=False)
    number = read(tmp_path / "dense")["parameters"]
    assert read(tmp_path / "sparse")["parameters"] == pytest.approx(number / 4, abs=1)
    before, after = dense.model.state_dict(), load_adapter(tmp_path / "sparse").state_dict()
    masks = {name: mask for name, mask in after.items() if name.endswith("mask_OR")}
    kept, left = [], []
    for name, mask in masks.items():
        a, b = name.replace("mask_OR", "a_RD"), name.replace("mask_OR", "b_OP")
        assert torch.equal(after[a], before[a])
        kept.append(before[b][mask].abs())
        left.append(before[b][~mask].abs())
        assert not after[b][~mask].any()
        assert after[b][mask].any() or not mask.any()
    assert torch.cat(kept).min() >= torch.cat(left).max()
    assert evaluate(tmp_path / "sparse", "test").metrics == sparse.metrics["test"]


def test_what_cannot_be_made_sparse(base, tmp_path):
    run(adapter(base), tmp_path / "other", progress=False)
    refused = {
        str(base): "expected model.from to be a LoRI adapter, found .*base",
        str(tmp_path / "other"): "expected a LoRI adapter",
    }
    for source, message in refused.items():
        with pytest.raises(RecipeError, match=rf"model\.sparsity: .*{message}"):
            run(recipe_of({"from": source, "sparsity": 0.9}), tmp_path / "run", progress=False)


def test_a_task_alone_from_a_run(base, tmp_path):
    run(adapter(base), tmp_path / "run", progress=False)
    model = load_adapter(tmp_path / "run")
    lora = extract_task(model, "rot13")
    ids = torch.tensor([[60, 61, 62]])
    torch.testing.assert_close(lora(ids).logits, model(ids, tasks=["rot13"]).logits)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_packing_changes_no_loss(base, tmp_path):
    model = run(adapter(base), tmp_path / "run", progress=False).model.eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    splits = word_edits.load(word_edits.Options(tuple(EDITS)))
    table = encode(splits.train, tokenizer, EDITS)
    packed = pack(table, 64)
    assert len(packed) < len(table)
    assert sum(len(row["input_ids"]) for row in packed) == sum(table.length(i) for i in range(len(table)))
    assert max(len(row["input_ids"]) for row in packed) <= 64
    from moe_mtl.data.text import collate

    with torch.no_grad():
        one = model(**collate(packed, 0), use_cache=False).loss
        two = model(**collate([table[i] for i in range(len(table))], 0), use_cache=False).loss
    torch.testing.assert_close(one, two)
    run(adapter(base, train={"packing": True, "max_length": 64}), tmp_path / "packed", progress=False)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_packing_is_refused_where_examples_would_see_each_other(tmp_path):
    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2}
    recipe = recipe_of({"type": "bloom", **sizes}, train={"packing": True, "max_length": 64})
    with pytest.raises(RecipeError, match=r"train\.packing: .* found bloom"):
        run(recipe, tmp_path / "run", progress=False)


def test_the_balance_of_mixlora_does_not_grow_with_accumulation(base, tmp_path, monkeypatch):
    from moe_mtl.tuners._losses import AddedLosses

    added = []
    leave = AddedLosses.leave

    def watched(self, model, args, output):
        if output.loss is None:
            return leave(self, model, args, output)
        before = float(output["loss"].detach())
        out = leave(self, model, args, output)
        added.append(float(out["loss"].detach()) - before)
        return out

    monkeypatch.setattr(AddedLosses, "leave", watched)
    fields = {"num_experts": 2, "balance_coef": 1.0, "target_modules": ["mlp"]}
    for batches in (1, 2):
        train = {"max_steps": 1, "batch_size": 8 // batches, "gradient_accumulation": batches, "eval_steps": 9}
        recipe = adapter(base, "mixlora", train=train, **fields)
        added.clear()
        run(recipe, tmp_path / f"run{batches}", progress=False)
        in_step = sum(added[:batches])
        assert 0.5 < in_step < 1.5, batches


def test_poly_remembers_its_tasks(base, tmp_path):
    from moe_mtl.training.text_predict import predict_text
    from moe_mtl.training.text_run import evaluate_examples

    run(adapter(base, "poly", n_skills=2), tmp_path / "run", progress=False)
    examples = word_edits.load(word_edits.Options(tuple(EDITS))).test
    alone = [example for example in examples if example.task == "sort"]
    whole = evaluate_examples(tmp_path / "run", examples, 64).metrics["sort"]
    assert evaluate_examples(tmp_path / "run", alone, 64).metrics["sort"] == pytest.approx(whole, rel=1e-5)
    only = evaluate(tmp_path / "run", "test", tasks="sort")
    assert only.metrics == {"sort": pytest.approx(whole, rel=1e-5)}
    with pytest.raises(UnknownTaskError, match="unknown task 'sirt'"):
        evaluate_examples(tmp_path / "run", examples, 64, measured=["sirt"])
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"task": "sort", "prompt": "S:ab="}\n')
    assert len(list(predict_text(tmp_path / "run", str(path), max_new_tokens=2))) == 1


def test_gradient_checkpointing_changes_nothing(base, tmp_path):
    plain = run(adapter(base), tmp_path / "plain", progress=False).model.state_dict()
    again = run(adapter(base, train={"gradient_checkpointing": True}), tmp_path / "again", progress=False).model
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, plain[name])


def test_early_stopping_restores_the_best_adapter(base, tmp_path):
    stopping = {"metric": "mean_exact_match", "patience": 1}
    recipe = adapter(base, train={"eval_steps": 1, "early_stopping": stopping, "max_steps": 6, "learning_rate": 1.0})
    record = run(recipe, tmp_path / "run", progress=False).record
    assert record["best_step"] == 1
    assert record["steps"] == 2


def test_only_some_tasks(base, tmp_path):
    recipe = recipe_of({"from": str(base), "tasks": ["sort"], "adapter": {"method": "lora", "r": 2}})
    assert list(run(recipe, tmp_path / "run", progress=False).metrics["test"]) == ["sort"]


def test_a_loss_that_is_not_finite_stops(base, tmp_path):
    with pytest.raises(TrainingDivergedError):
        run(adapter(base, train={"learning_rate": 1e30, "max_steps": 9}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({"type": "lama"}, {}, "model.type: expected a causal language model of transformers, found 'lama'.*llama"),
        ({"type": "llama", "hiden_size": 16}, {}, "unknown key 'hiden_size': llama has no such field.*hidden_size"),
        ({"from": "BASE", "hidden_size": 16}, {}, "unknown key 'hidden_size'"),
        ({"from": "BASE", "adapter": {"method": "mtl_lra"}}, {}, "unknown method 'mtl_lra'.*mtl_lora"),
        ({"from": "BASE", "adapter": {"method": "smora", "num_select": 1}}, {}, "unknown key 'num_select'.*num_sel"),
        (
            {"from": "BASE", "adapter": {"method": "mtl_lora", "tasks": ["a"]}},
            {},
            "unknown key 'tasks': .*from the data",
        ),
        ({"from": "BASE", "adapter": {"method": "mtl_lora", "r": 0}}, {}, "model.adapter: r: expected at least 1"),
        ({"from": "BASE", "tasks": ["srot"]}, {}, "model.tasks: expected some of"),
        ({"from": "BASE"}, {"loss_balancing": "UW"}, "train.loss_balancing: expected none, as word-edits is text"),
        ({"from": "BASE"}, {"task_weights": {"sort": 2.0}}, "train.task_weights: expected none"),
        ({"from": "BASE"}, {"save_dtype": "float16"}, "train.save_dtype: expected none, as word-edits is text"),
        ({"from": "BASE"}, {"max_length": 5}, "row .: expected at most 5 tokens"),
        ({"from": "BASE", "freeze": ["*nothing*"]}, {}, "no parameter is called"),
    ],
)
def test_what_cannot_be(base, tmp_path, model, train, message):
    model = {key: str(base) if value == "BASE" else value for key, value in model.items()}
    with pytest.raises((RecipeError, DataError), match=message):
        run(recipe_of(model, train), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"type": "llama", "adapter": {"method": "lora"}}}, "use model.from"),
        ({"model": {"type": "llama", "dtype": "bfloat16"}}, "use model.from"),
        ({"model": {"type": "llama", "sparsity": 0.9}}, "use model.from"),
        ({"model": {"from": "x", "sparsity": 1.0}}, "model.sparsity: expected a share above 0 and below 1, found 1.0"),
        ({"model": {"from": "x", "quantization": "4bit"}}, "model.quantization: expected a model.adapter"),
        ({"model": {"from": "x"}, "train": {"packing": True}}, "expected train.max_length"),
        ({"model": {"from": "x", "dtype": "int8"}}, "model.dtype: expected one of"),
    ],
)
def test_settings_that_cannot_go_together(content, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(content)


def test_a_table_takes_nothing_that_is_for_text(tmp_path):
    recipe = parse_recipe({"data": {"name": "digits"}, "model": {"from": "mmoe-digits", "adapter": {"method": "lora"}}})
    with pytest.raises(RecipeError, match=r"model\.adapter: expected none, as digits is a table"):
        run(recipe, tmp_path / "run", progress=False)


def test_what_was_added_later_changes_no_hash():
    old = parse_recipe({"model": {"type": "mmoe"}})
    assert recipe_sha256(old) == recipe_sha256(parse_recipe({"model": {"type": "mmoe"}, "train": {"packing": False}}))
    new = parse_recipe({"model": {"from": "x", "adapter": {"method": "lora", "r": 2}}})
    other = parse_recipe({"model": {"from": "x", "adapter": {"method": "lora", "r": 3}}})
    assert recipe_sha256(new) != recipe_sha256(other)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantisation_without_its_library(base, tmp_path):
    recipe = recipe_of({"from": str(base), "quantization": "4bit", "adapter": {"method": "lora"}})
    with pytest.raises(RecipeError, match="bitsandbytes is not installed"):
        run(recipe, tmp_path / "run", progress=False)
