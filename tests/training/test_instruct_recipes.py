"""The user's own base model and JSON lines, by the command line, from training to one task in a folder of its own."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from moe_mtl.cli import main
from moe_mtl.training.recipe import list_recipes

RECIPES = [name for name in list_recipes() if name.startswith("instruct/")]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHORT = ["--train.batch_size", "4", "--train.logging_steps", "1", "--train.max_length", "64"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random Llama of bytes, with a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=259, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "tasks.jsonl"
    rows = [{"task": "upper", "prompt": f"w{i}", "completion": f"W{i}"} for i in range(30)]
    for i in range(30):
        turns = [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": f"yo {i}"}]
        rows.append({"task": "chat", "messages": turns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(name, base, lines, output, *further):
    return main(
        ["train", name, "--model.from", base, "--data.path", lines, "--output", str(output), "--json", *SHORT, *further]
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs(name, base, lines, tmp_path, capsys):
    if name.endswith("/lori-s"):  # begins where LoRI-D ends
        further = ("--train.epochs", "null", "--train.max_steps", "2")
        assert train("instruct/lori", base, lines, tmp_path / "dense", *further) == 0
        capsys.readouterr()
        base = str(tmp_path / "dense")
    assert train(name, base, lines, tmp_path / "run", "--train.epochs", "null", "--train.max_steps", "1") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["steps"] == 1
    assert set(record["metrics"]["validation"]) == {"chat", "upper"}


def test_from_training_to_one_task_alone(base, lines, tmp_path, capsys):
    run = tmp_path / "run"
    assert train("recipes/instruct/mtl-lora.yaml", base, lines, run, "--train.epochs", "1") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model_type"] == "mtl_lora"
    assert main(["evaluate", str(run), "--split", "validation", "--data.path", lines, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == record["metrics"]["validation"]
    assert main(["evaluate", str(run), "--data", lines, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["metrics"]) == {"chat", "upper"}

    prompts = tmp_path / "prompts.jsonl"
    asked = [
        {"task": "upper", "prompt": "w1", "id": 7},
        {"task": "chat", "messages": [{"role": "user", "content": "h"}]},
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked))
    assert main(["predict", str(run), str(prompts), "--max-new-tokens", "4"]) == 0
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{k: v for k, v in row.items() if k != "completion"} for row in together] == asked

    assert main(["extract", str(run), "upper", "--output", str(tmp_path / "lora")]) == 0
    assert main(["extract", str(run), "upper", "--output", str(tmp_path / "merged"), "--merge"]) == 0
    ids = torch.tensor([[60, 61, 62]])
    with torch.no_grad():
        lora = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(ids).logits, lora, rtol=1e-4, atol=1e-4)
    assert merged.num_parameters() == AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 259
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "merged"), str(prompts), "--max-new-tokens", "4"]) == 0
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert alone[0]["completion"] == together[0]["completion"]


def test_one_task_alone_needs_nothing_of_ours(base, lines, tmp_path):
    assert train("instruct/mtl-lora", base, lines, tmp_path / "run", "--train.epochs", "1") == 0
    assert main(["extract", str(tmp_path / "run"), "chat", "--output", str(tmp_path / "lora")]) == 0
    code = f"""
import sys
sys.modules["moe_mtl"] = None
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "lora")!r})
print(type(model.active_peft_config).__name__)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "LoraConfig"


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_packed_and_checkpointed(base, lines, tmp_path, capsys):
    further = ["--train.packing", "true", "--train.gradient_checkpointing", "true", "--train.epochs", "1"]
    assert train("instruct/mtl-lora", base, lines, tmp_path / "run", *further) == 0
    assert json.loads(capsys.readouterr().out)["steps"] < 12


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_on_quantised_weights(base, lines, tmp_path, capsys, bits):
    further = ["--model.quantization", bits, "--train.epochs", "null", "--train.max_steps", "2"]
    assert train("instruct/mtl-lora", base, lines, tmp_path / "run", *further) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_weights_of_another_dtype(base, lines, tmp_path, capsys, dtype):
    further = ["--model.dtype", dtype, "--train.epochs", "null", "--train.max_steps", "2"]
    assert train("instruct/mtl-lora", base, lines, tmp_path / "run", *further) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_prompts_in_plain_text_of_a_model_trained_in_chats(base, lines, tmp_path, capsys):
    further = ["--data.chat", "true", "--train.epochs", "null", "--train.max_steps", "1"]
    assert train("instruct/mtl-lora", base, lines, tmp_path / "run", *further) == 0
    capsys.readouterr()
    files = [tmp_path / "plain.jsonl", tmp_path / "chat.jsonl"]
    files[0].write_text('{"task": "upper", "prompt": "w1", "completion": "W1"}\n')
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "W1"}]
    files[1].write_text(json.dumps({"task": "upper", "messages": turns}) + "\n")
    losses = []
    for path in files:
        assert main(["evaluate", str(tmp_path / "run"), "--data", str(path), "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1]
    assert main(["predict", str(tmp_path / "run"), str(files[1])]) == 2
    assert "line 1: expected a line without its answer" in capsys.readouterr().err


def test_cost_of_an_adapter(base, lines, tmp_path, capsys):
    own = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    for name in ("mtl-lora", "lori", "lora"):
        further = ["--train.epochs", "null", "--train.max_steps", "1"]
        assert train(f"instruct/{name}", base, lines, tmp_path / name, *further) == 0
        trained = json.loads(capsys.readouterr().out)["parameters"]
        assert main(["cost", str(tmp_path / name), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["base"] == own
        assert told["adapter"].get("trained", told["adapter"]["stored"]) == trained


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task": "upper", "prompt": "x"', "tasks.jsonl, line 61: expected a JSON object, found no JSON"),
        ('{"task": "upper", "prompt": "x"}', "tasks.jsonl, line 61: completion: expected a text, found None"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number_before_any_work(base, lines, tmp_path, capsys, line, message):
    path = tmp_path / "tasks.jsonl"
    with open(lines) as file:
        path.write_text(file.read() + line + "\n")
    assert train("instruct/mtl-lora", "no/such-model", str(path), tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "RUN", "PROMPTS", "--task", "uper"], "prompts.jsonl, line 1: task: expected one of chat, upper"),
        (["predict", "RUN", "PROMPTS", "--keep", "id", "--output", "x.jsonl"], "--keep and --delimiter are for tables"),
        (["predict", "RUN", "PROMPTS", "--delimiter", ";"], "--keep and --delimiter are for tables"),
        (["evaluate", "RUN", "--data", "PROMPTS", "--delimiter", ";"], "--delimiter is for CSV files"),
        (["predict", "RUN", "PROMPTS", "--output", "x.csv"], "ends in .jsonl"),
        (["extract", "RUN", "uper", "--output", "OUT"], "found 'uper'; did you mean 'upper'"),
        (["extract", "RUN", "upper", "chat", "--output", "OUT"], "expected one task"),
        (["extract", "BASE", "upper", "--output", "OUT"], "expected an adapter, found a language model"),
        (["extract", "lori-word-edits", "upper", "--output", "OUT"], "does not tell tasks apart"),
    ],
)
def test_what_cannot_be_asked(base, lines, tmp_path, capsys, arguments, message):
    run, prompts = tmp_path / "run", tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w1"}\n')
    assert train("instruct/mtl-lora", base, lines, run, "--train.epochs", "null", "--train.max_steps", "1") == 0
    capsys.readouterr()
    places = {"RUN": run, "PROMPTS": prompts, "OUT": tmp_path / "out", "BASE": base}
    assert main([str(places.get(one, one)) for one in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
