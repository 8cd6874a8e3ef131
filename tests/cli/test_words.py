"""`predict` with a language model's adapter: JSON lines in, JSON lines out."""

import json
from pathlib import Path

import pytest

from moe_mtl.cli import main

MODEL = "mtl-lora-word-edits"


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture, *arguments: str | Path) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    return capsys.readouterr().err


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [
        {"prompt": "R:apple=", "id": 7},
        {"task": "reverse", "prompt": "R:house="},
        {"task": None, "prompt": "R:plum="},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "prompts.jsonl"


def test_a_file_holds_what_the_screen_shows(prompts: Path, capsys: pytest.CaptureFixture) -> None:
    asked = ("predict", MODEL, prompts, "--task", "reverse", "--batch-size", "2")
    capsys.readouterr()
    assert run(*asked) == 0
    shown = capsys.readouterr().out
    answers = [json.loads(line) for line in shown.splitlines()]
    assert answers[0] == {"prompt": "R:apple=", "id": 7, "completion": "elppa"}
    assert [answer["prompt"] for answer in answers] == ["R:apple=", "R:house=", "R:plum="]
    output = prompts.with_name("answers.jsonl")
    output.write_text("old")
    assert run(*asked, "--output", output) == 0
    assert "3 answers" in capsys.readouterr().err
    assert output.read_text() == shown


def test_a_line_of_another_task_than_asked_for(prompts: Path, capsys: pytest.CaptureFixture) -> None:
    error = fails(capsys, "predict", MODEL, prompts, "--task", "sort")
    assert "prompts.jsonl, line 2: task: expected 'sort', which was asked for, or none, found 'reverse'" in error
    assert "found None" in fails(capsys, "predict", MODEL, prompts)  # line 1 says no task


def test_where_nothing_can_be_written_nothing_is_answered(
    prompts: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_mtl.training.text_predict.load_text", lambda folder: pytest.fail("the model was loaded"))
    output = prompts.parent / "missing" / "answers.jsonl"
    assert "there is no folder" in fails(capsys, "predict", MODEL, prompts, "--task", "reverse", "--output", output)


def test_files_without_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    assert "none.jsonl: expected at least one line" in fails(capsys, "predict", MODEL, tmp_path / "none.jsonl")
    train = ("train", "instruct/mtl-lora", "--model.from", "llama-word-edits", "--output", tmp_path / "run")
    assert "no lines in" in fails(capsys, *train, "--data.path", tmp_path / "none.jsonl")
    assert not (tmp_path / "run").exists()
