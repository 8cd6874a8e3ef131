import gzip
import json

import pytest
from transformers import ByT5Tokenizer

from moe_mtl.data import DataError, load
from moe_mtl.data.text import Example, encode

SQL = {"task": "sql", "prompt": "List all.", "completion": "SELECT 1;"}
CHAT = {"task": "chat", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def many(task, number):
    return [{"task": task, "prompt": f"{task} {i}", "completion": str(i)} for i in range(number)]


def test_lines_become_examples(tmp_path):
    path = write(tmp_path / "a.jsonl", *many("sql", 60), "", *many("chat", 40))
    splits = load("instruct", path=path)
    assert splits.tasks == ["chat", "sql"]
    sizes = {name: len(part) for name, part in splits.parts().items()}
    assert sum(sizes.values()) == 100
    assert all(sizes.values())
    assert sizes["train"] > 60
    assert splits.info["rows"] == sizes
    assert len(splits.info["sha256"]) == 64


def test_the_same_prompt_is_on_one_side_only(tmp_path):
    lines = [{"task": task, "prompt": f"p{i}", "completion": task} for i in range(50) for task in ("a", "b")]
    splits = load("instruct", path=write(tmp_path / "a.jsonl", *lines))
    prompts = [{e.prompt for e in part} for part in splits.parts().values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 50


def test_files_of_their_own_for_validation_and_test(tmp_path):
    train = write(tmp_path / "a.jsonl", *many("sql", 50))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps(SQL) + "\n")
    splits = load("instruct", path=train, validation=str(tmp_path / "b.jsonl.gz"), test=str(tmp_path / "b.jsonl.gz"))
    assert len(splits.train) == 50
    assert splits.validation == splits.test == [Example("sql", "List all.", "SELECT 1;", "b.jsonl.gz, line 1")]


def test_messages_and_chat(tmp_path):
    path = write(tmp_path / "a.jsonl", *[CHAT] * 3, *[SQL] * 3)
    held = write(tmp_path / "b.jsonl", CHAT)
    splits = load("instruct", path=path, validation=held, test=held)
    examples = {e.task: e for e in splits.train}
    assert examples["chat"] == Example("chat", CHAT["messages"][:1], CHAT["messages"][1:], "a.jsonl, line 3")
    assert examples["sql"].prompt == "List all."
    examples = {e.task: e for e in load("instruct", path=path, validation=held, test=held, chat=True).train}
    assert examples["sql"].prompt == [{"role": "user", "content": "List all."}]
    assert examples["sql"].completion == [{"role": "assistant", "content": "SELECT 1;"}]


def test_a_line_that_a_tokeniser_refuses_is_named(tmp_path):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    rows = [{"task": "sql", "prompt": f"{n}", "completion": "x" * (40 if n == 17 else 2)} for n in range(30)]
    path, held = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", SQL)
    splits = load("instruct", path=path, validation=held, test=held)
    with pytest.raises(DataError, match=r"^a.jsonl, line 18: expected at most 9 tokens \(max_length\), found 43"):
        encode(splits.train, tokenizer, splits.tasks, max_length=9)
    path = write(tmp_path / "a.jsonl", *rows[:5], CHAT, SQL)
    splits = load("instruct", path=path, validation=held, test=held)
    with pytest.raises(DataError, match=r"^a.jsonl, line 6: expected a tokenizer with a chat template"):
        encode(splits.train, tokenizer, splits.tasks)


def test_a_choice_of_tasks(tmp_path):
    path = write(tmp_path / "a.jsonl", *many("a", 30), *many("b", 30), *many("c", 30))
    splits = load("instruct", path=path, tasks=["c", "a"])
    assert splits.tasks == ["c", "a"]
    assert {e.task for e in splits.train} == {"a", "c"}
    with pytest.raises(DataError, match="found 'd'"):
        load("instruct", path=path, tasks=["d"])
    with pytest.raises(DataError, match="at least one, found"):
        load("instruct", path=path, tasks=[])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: expected a JSON object, found no JSON"),
        ("[1]", r"line 3: expected a JSON object, found \[1\]"),
        ({**SQL, "promt": 1}, "line 3: unknown field 'promt'.*prompt"),
        ({"prompt": "a", "completion": "b"}, "line 3: task: expected a name, found None"),
        ({**SQL, "task": 3}, "line 3: task: expected a name, found 3"),
        ({"task": "sql", "prompt": "a"}, "line 3: completion: expected a text, found None"),
        ({**SQL, "completion": ""}, "line 3: completion: expected a text"),
        ({**SQL, "messages": []}, "line 3: expected prompt and completion, or messages"),
        ({"task": "sql"}, "line 3: expected prompt and completion, or messages, found task"),
        ({"task": "c", "messages": [{"role": "user", "content": "a"}]}, "line 3: messages: expected a list"),
        ({"task": "c", "messages": CHAT["messages"][::-1]}, "line 3: messages: expected the last one"),
        ({"task": "c", "messages": [{"role": "robot", "content": ""}] * 2}, r"line 3: messages\[0\]: role"),
        ({"task": "c", "messages": [{"role": "user"}] * 2}, r"line 3: messages\[0\]: expected an object"),
        ('{"task": "sql", "prompt": "\\ud83d", "completion": "b"}', "line 3: .*surrogates not allowed"),
        ("[" * 100_000, "line 3: expected a JSON object, found no JSON"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number(tmp_path, line, message):
    path = write(tmp_path / "rows.jsonl", SQL, "", line, SQL)
    with pytest.raises(DataError, match=f"rows.jsonl, {message}"):
        load("instruct", path=path)


def test_no_file_and_no_training_example(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        load("instruct", path=str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="expected the option 'path'"):
        load("instruct")
    train, held = write(tmp_path / "a.jsonl", *many("a", 30)), write(tmp_path / "b.jsonl", SQL)
    with pytest.raises(DataError, match="at least one training example of task 'sql'"):
        load("instruct", path=train, validation=held)
