"""Instruct: the user's own tasks for a language model, as JSON lines.

Every line is an object with a `task`, and either `prompt` and `completion`, or `messages` that end with the
assistant's answer:

    {"task": "sql", "prompt": "List all customers.", "completion": "SELECT * FROM customers;"}
    {"task": "chat", "messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]}

All lines are checked before anything else happens; a malformed one is refused with its number.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..naming import nearest
from .errors import DataError
from .text import Example, Messages, TextSplits

FIELDS = ("task", "prompt", "completion", "messages")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Options:
    """Options of instruct.

    Attributes:
        path: file of JSON lines (also `.gz`), or several.
        validation, test: likewise; by default a tenth each of `path`, dealt by a hash of the prompt, so that the same
            prompt is never on both sides.
        tasks: which of the tasks in the files to take, in this order; by default all, in alphabetical order.
        chat: put a prompt that is plain text into a message of the user, and its completion into the assistant's
            answer, for models with a chat template.
    """

    path: str | Sequence[str]
    validation: str | Sequence[str] | None = None
    test: str | Sequence[str] | None = None
    tasks: Sequence[str] | None = None
    chat: bool = False


def load(options: Options) -> TextSplits:
    """Reads and checks every line.

    Raises:
        DataError: no such file, a malformed line (with its number), an unknown task, a task without training examples.
    """
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    digest = hashlib.sha256()
    for name in parts:
        where = {"train": options.path}.get(name, getattr(options, name, None))
        for example in () if where is None else read_examples(where, options.chat, digest):
            parts[name].append(example)
    given = list(parts["train"])
    held = {0: "test", 1: "validation"}
    parts["train"] = []
    for example in given:
        name = held.get(_tenth(example), "train")
        parts[name if name == "train" or getattr(options, name) is None else "train"].append(example)
    found = sorted({example.task for part in parts.values() for example in part})
    tasks = found if options.tasks is None else list(options.tasks)
    for task in tasks:
        if task not in found:
            raise DataError(f"instruct: expected tasks that the lines have, found {task!r}{nearest(task, found)}")
    if not tasks or len(set(tasks)) < len(tasks):
        lines = "" if found else f": no lines in {options.path}"
        raise DataError(f"instruct: expected different tasks, at least one, found {tasks}{lines}")
    for task in tasks:
        if not any(example.task == task for example in parts["train"]):
            raise DataError(f"instruct: expected at least one training example of task {task!r}, found none")
    info = {"name": "instruct", "licence": "the user's own", "sha256": digest.hexdigest()}
    return TextSplits(**parts, tasks=found, info=info).only(tasks)


@dataclass(frozen=True)
class Prompt:
    """A line without its answer.

    Attributes:
        task: its name, None where neither the line nor the caller says it.
        text: what is asked.
        fields: the line as it stands.
        where: file and number of the line.
    """

    task: str | None
    text: str | Messages
    fields: dict[str, Any]
    where: str


def read_prompts(path: str, task: str | None = None, chat: bool = False) -> list[Prompt]:
    """Lines to be answered: `prompt`, or `messages` that end with what is asked; `task`; other fields stay.

    Args:
        path: file of JSON lines (also `.gz`).
        task: of all lines; those that say one say the same.
        chat: as for `Options`.

    Raises:
        DataError: no such file, an empty one, a malformed line, one of another task than asked for, with its number.
    """
    found = []
    for content, where in _lines(path):
        if ("messages" in content) == ("prompt" in content):
            raise DataError(f"{where}: expected prompt or messages, found {', '.join(content)}")
        text = content.get("prompt")
        if "messages" in content:
            text = _messages(content["messages"], where, answered=False)
        elif not isinstance(text, str):
            raise DataError(f"{where}: prompt: expected a text, found {text!r:.80}")
        if "completion" in content or (isinstance(text, list) and text[-1]["role"] == "assistant"):
            raise DataError(
                f"{where}: expected a line without its answer, found one; moe-mtl evaluate --data measures those"
            )
        if chat and isinstance(text, str):
            text = [{"role": "user", "content": text}]
        own = content.get("task")
        if own is not None and not isinstance(own, str):
            raise DataError(f"{where}: task: expected a name, found {own!r:.80}")
        if own is not None and task is not None and own != task:
            raise DataError(f"{where}: task: expected {task!r}, which was asked for, or none, found {own!r:.80}")
        found.append(Prompt(task if own is None else own, text, content, where))
    if not found:
        raise DataError(f"instruct: {path}: expected at least one line, found none")
    return found


def read_examples(paths: str | Sequence[str], chat: bool = False, digest: Any = None) -> Iterator[Example]:
    """Lines with their answers; raises DataError as `load` does."""
    for path in [paths] if isinstance(paths, str) else paths:
        for content, where in _lines(path, digest):
            yield _example(content, chat, where)


def _lines(path: str, digest: Any = None) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if digest is not None:
                    digest.update(line)
                if line.strip():
                    where = f"{Path(path).name}, line {number}"
                    yield _object(line, where), where
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"instruct: {path}: {getattr(error, 'strerror', None) or error}") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
        if rb"\ud" in line.lower():
            json.dumps(content, ensure_ascii=False).encode()  # half a pair of surrogates could not be written again
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected a JSON object, found no JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{where}: expected a JSON object, found {content!r:.80}")
    return content


def _example(content: dict[str, Any], chat: bool, where: str) -> Example:
    for key in content:
        if key not in FIELDS:
            raise DataError(f"{where}: unknown field {key!r}{nearest(key, FIELDS)}")
    task = content.get("task")
    if not isinstance(task, str) or not task:
        raise DataError(f"{where}: task: expected a name, found {task!r:.80}")
    if ("messages" in content) == ("prompt" in content or "completion" in content):
        raise DataError(f"{where}: expected prompt and completion, or messages, found {', '.join(content)}")
    if "messages" in content:
        messages = _messages(content["messages"], where)
        return Example(task, messages[:-1], messages[-1:], where)
    for key in ("prompt", "completion"):
        if not isinstance(content.get(key), str) or not content[key]:
            raise DataError(f"{where}: {key}: expected a text, found {content.get(key)!r:.80}")
    if chat:
        user, assistant = {"role": "user", "content": content["prompt"]}, {"role": "assistant"}
        return Example(task, [user], [assistant | {"content": content["completion"]}], where)
    return Example(task, content["prompt"], content["completion"], where)


def _messages(messages: Any, where: str, answered: bool = True) -> Messages:
    if not isinstance(messages, list) or len(messages) < 1 + answered:
        number = "two" if answered else "one"
        raise DataError(f"{where}: messages: expected a list of at least {number}, found {messages!r:.80}")
    for i, message in enumerate(messages):
        fields = message if isinstance(message, dict) else {}
        if set(fields) != {"role", "content"} or not isinstance(fields["content"], str):
            raise DataError(f"{where}: messages[{i}]: expected an object with role and content, found {message!r:.80}")
        if fields["role"] not in ROLES:
            expected = ", ".join(ROLES)
            raise DataError(f"{where}: messages[{i}]: role: expected one of {expected}, found {fields['role']!r}")
    if answered and messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: messages: expected the last one from the assistant, found {messages[-1]['role']}")
    return messages


def _tenth(example: Example) -> int:
    prompt = json.dumps(example.prompt, sort_keys=True)
    return int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) % 10
