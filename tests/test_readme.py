"""The README's commands and Python as they stand, in a folder with tiny files of the names that they use."""

import contextlib
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from moe_mtl.cli import COMMANDS, main
from moe_mtl.models import REGISTRY
from moe_mtl.tuners import METHODS

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "BENCHMARKS.md", "model_cards/README.md"]
# Fenced commands that are not run here, and why.
SKIPPED = {
    "make": "tests/test_demo.py runs the demo; this is the test",
    "moe-mtl bench tabular": "needs the census file and the peers; tests/bench/test_tabular.py reads its options",
    "moe-mtl bench compiled": "takes minutes; tests/ops/test_compiled.py runs it",
    "moe-mtl train instruct/mtl-lora": "needs a model of the Hub; tests/training/test_instruct_recipes.py has one",
    "moe-mtl bench vision --parts memory": "starts two processes; tests/bench/test_bench_vision.py runs it",
    "moe-mtl bench kernels --device cpu --parts full --dtypes bfloat16": "as the line before it, in another dtype",
    "moe-mtl bench trees": "needs the census file and LightGBM; tests/cards/test_external.py runs it on digits",
}
# What is added to a command so that it takes seconds.
SMALLER = {
    "moe-mtl train word-edits/mtl-lora": "--train.max_steps 2 --train.eval_steps 2 --eval.splits [test]",
    "moe-mtl train word-edits/lora": "--train.max_steps 2 --train.eval_steps 2 --eval.splits [test]",
    "moe-mtl train photo-tiles/m3vit": "--train.max_steps 2 --train.epochs null --data.max_tiles 2 --data.stride 64",
    "moe-mtl train": "--train.epochs 1 --model.num_experts 2 --model.expert_dims [4]",
    "moe-mtl bench synthetic": "--draws 2 --rows 256 --learning-rates 1e-3",
    "moe-mtl bench tuners": "--width 16 --layers 1 --batch 2 --rounds 1 --slice-seconds 0 --parts step --methods LORI",
    "moe-mtl bench kernels": "--shapes 0 --rounds 1 --slice-seconds 0 --dtypes float32",
    "moe-mtl bench vision": "--models tiny-64x64 --batches 1 --tokens 64 --width 16 --hidden 16 --rounds 1 "
    "--slice-seconds 0",
    "moe-mtl bench ranks": "--shapes 0 --rounds 1 --slice-seconds 0 --kinds lora",
}


def prose(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fenced(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", prose(page), re.M | re.S)


def commands() -> list[list[str]]:
    """Every line of a shell block, in order, without its comment."""
    lines = (line for page in PAGES for block in fenced(page, "sh") for line in block.splitlines())
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def begins(words: list[str], prefix: str) -> bool:
    return words[: len(prefix.split())] == prefix.split()


def skipped(words: list[str]) -> bool:
    return any(begins(words, prefix) for prefix in SKIPPED)


def write_tables(folder: Path) -> None:
    """clicks.parquet and new_rows.csv: three columns, two labels."""
    draw = np.random.default_rng(0)
    rows = pd.DataFrame({"age": draw.normal(40, 10, 400), "city": draw.choice(["Rome", "Oslo", "Lima"], 400)})
    rows["hour"] = draw.integers(24, size=400)
    labels = {"click": draw.integers(2, size=400), "price": draw.gamma(2.0, 10.0, size=400)}
    rows.assign(**labels).to_parquet(folder / "clicks.parquet")
    rows.head(20).to_csv(folder / "new_rows.csv", index=False)
    picture = Image.fromarray(draw.integers(0, 256, (80, 96, 3), np.uint8))
    picture.save(folder / "photo.jpg")
    (folder / "prompts.jsonl").write_text('{"task": "reverse", "prompt": "R:apple="}\n')


def test_the_commands_work_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tables(tmp_path)
    run = [words for words in commands() if not skipped(words)]
    assert {words[0] for words in run} == {"moe-mtl"}
    assert {"train", "predict", "extract", "cost"} <= {words[1] for words in run}
    for words in run:
        more = next((extra for prefix, extra in SMALLER.items() if begins(words, prefix)), "")
        assert main([*words[1:], *more.split()]) == 0, shlex.join(words)
    answers = pd.read_csv("answers.csv")
    assert len(answers) == 20
    assert {"click", "price"} <= set(answers)
    assert os.path.isfile("runs/click/model.safetensors")


def test_every_skip_is_needed() -> None:
    for prefix in (*SKIPPED, *SMALLER):
        assert any(begins(words, prefix) for words in commands()), prefix


def test_every_model_type_has_its_row() -> None:
    section = prose("README.md").partition("## What one task costs")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(name for cell in rows for name in re.findall(r"`(\w+)`", cell)) == sorted(REGISTRY)


def test_every_tuner_has_its_row() -> None:
    section = prose("README.md").partition("## Many tasks, one language model")[2].partition("\n## ")[0]
    rows = [line.split("|")[1].strip(" `") for line in section.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(config.__name__ for config in METHODS)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page: str, capsys: pytest.CaptureFixture) -> None:
    for text in re.findall(r"`moe-mtl\s([^`]+)`", prose(page)):
        name, *rest = text.split()
        assert name == "COMMAND" or name in COMMANDS, text
        if name in COMMANDS:
            assert main([name, "--help"]) == 0
            told = capsys.readouterr().out
            options = [word for word in rest if word.startswith("--") and "." not in word]
            assert all(option in told for option in options), text


@pytest.mark.parametrize(
    ("page", "code"), [(page, code) for page in PAGES for code in fenced(page, "python")], ids=lambda value: value[:12]
)
def test_the_python_works(page: str, code: str) -> None:
    names: dict = {}
    with contextlib.chdir(ROOT):
        exec(compile(code, page, "exec"), names)
    if "sql" in names:
        assert names["loss"].isfinite()
        assert str(names["sql"].peft_config["default"].peft_type) == "PeftType.LORA"
    elif "streamed" in names:
        assert names["edges"].shape == (2, 1, 64, 64)
        torch.testing.assert_close(names["again"], names["edges"], rtol=1e-4, atol=1e-4)
    elif page == "README.md":
        assert set(names["model"].tasks) <= set(names["answers"])
        assert {len(answers) for answers in names["answers"].values()} == {len(names["rows"])}
        assert names["parity"].tasks == ["parity"]
        assert type(names["parity"]) is type(names["model"])
