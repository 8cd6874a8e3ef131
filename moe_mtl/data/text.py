"""Text with several tasks: examples, and how a tokeniser and a batch see them.

An example is a prompt, the completion that answers it, and the name of its task. Prompt and completion are plain text,
or messages of a conversation for the tokeniser's chat template.

Shapes: `B` samples of a batch, `L` tokens of the longest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import DataError

IGNORED = -100
Messages = list[dict[str, str]]


class Example(NamedTuple):
    """One sample: a task's name, what is asked, the answer, and file and line where the data set knows them."""

    task: str
    prompt: str | Messages
    completion: str | Messages
    where: str | None = None

    def error(self, message: str, row: int) -> DataError:
        """A refusal that says which example it is about: by file and line, or else by its row."""
        return DataError(message, row=row) if self.where is None else DataError(f"{self.where}: {message}")


@dataclass(frozen=True)
class TextSplits:
    """A data set of text, cut into three.

    Attributes:
        train, validation, test: the examples.
        tasks: their names, in the order of their numbers.
        info: name, licence, sha256 of the content, rows per part.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    tasks: list[str]
    info: dict[str, Any] = field(default_factory=dict)

    def parts(self) -> dict[str, Sequence[Example]]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def only(self, tasks: Sequence[str]) -> "TextSplits":
        """The examples of some tasks, which are then numbered in the order given."""
        parts = {name: [e for e in part if e.task in tasks] for name, part in self.parts().items()}
        rows = {name: len(part) for name, part in parts.items()}
        return TextSplits(**parts, tasks=list(tasks), info=self.info | {"rows": rows})


class TokenTable:
    """Encoded examples, ragged, in flat arrays.

    Attributes:
        tasks: names, in the order of their numbers.
        task: int64 `[N]`, of each example.
    """

    def __init__(self, ids: Sequence[Sequence[int]], prompt_lengths: Sequence[int], task: Any, tasks: Sequence[str]):
        self.tasks = list(tasks)
        self.task = torch.as_tensor(task, dtype=torch.int64)
        self._ids = np.concatenate([np.asarray(one, np.int32) for one in ids]) if len(ids) else np.zeros(0, np.int32)
        self._end = np.cumsum([len(one) for one in ids], dtype=np.int64)
        self._prompt = np.asarray(prompt_lengths, np.int64)

    def __len__(self) -> int:
        return len(self._end)

    def ids(self, index: int) -> np.ndarray:
        """Prompt and completion of one example, int32."""
        return self._ids[self._start(index) : self._end[index]]

    def prompt_length(self, index: int) -> int:
        """How many of an example's tokens are given, not asked for."""
        return int(self._prompt[index])

    def length(self, index: int) -> int:
        """Tokens of an example."""
        return int(self._end[index] - self._start(index))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example as lists, `tasks` once per token, so that packing keeps them apart."""
        ids = self.ids(index).tolist()
        given = max(1, self.prompt_length(index))  # nothing comes before the first token to foretell it from
        return {
            "input_ids": ids,
            "labels": [IGNORED] * given + ids[given:],
            "tasks": [int(self.task[index])] * len(ids),
        }

    def batches(self, size: int, pad: int) -> Iterator[dict[str, Tensor]]:
        """All examples, the longest first, `size` at a time, with their places as `rows`."""
        order = np.argsort([-self.length(i) for i in range(len(self))], kind="stable")
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield collate([self[int(row)] for row in rows], pad) | {"rows": torch.as_tensor(rows)}

    def _start(self, index: int) -> int:
        return int(self._end[index - 1]) if index else 0


def collate(samples: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
    """A padded batch: `input_ids`, `attention_mask` and `labels` `[B, L]`, `tasks` `[B]`.

    Of packed samples, which have `seq_lengths`, `tasks` is `[B, L]`, and `position_ids` that begin anew with every
    example take the place of the mask: by them attention keeps examples apart.
    """
    longest = max(len(sample["input_ids"]) for sample in samples)
    packed = "seq_lengths" in samples[0]

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([[*sample[name], *[value] * (longest - len(sample[name]))] for sample in samples])

    batch = {"input_ids": padded("input_ids", pad), "labels": padded("labels", IGNORED)}
    if not packed:
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        batch["tasks"] = torch.tensor([sample["tasks"][0] for sample in samples])
        return batch
    rows = []
    for sample in samples:
        rest = longest - sum(sample["seq_lengths"])
        rows.append(np.concatenate([np.arange(n) for n in [*sample["seq_lengths"], *[rest] * (rest > 0)]]))
    batch["position_ids"] = torch.from_numpy(np.stack(rows))
    batch["tasks"] = padded("tasks", 0)
    return batch


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    tasks: Sequence[str],
    max_length: int | None = None,
    truncate: bool = False,
) -> TokenTable:
    """Token ids of prompt and completion, which ends with the end-of-sequence token or as the chat template has it.

    Args:
        examples: of tasks in `tasks`.
        tokenizer: of transformers.
        tasks: names, in the order of their numbers.
        max_length: tokens of the longest example.
        truncate: cut longer ones at the end, instead of refusing them; an example of whose answer nothing is left is
            refused in any case.

    Raises:
        DataError: an example that is too long, or messages for a tokeniser without a chat template; with its file and
            line, or else its number.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("tokenizer: expected an end-of-sequence token, found none")
    prompts, wholes = _tokens(examples, tokenizer)
    for row, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
        if max_length is not None and len(whole) > max_length:
            if not truncate or len(prompt) >= max_length:
                found = f"{len(whole)} tokens, {len(prompt)} of them prompt"
                raise examples[row].error(f"expected at most {max_length} tokens (max_length), found {found}", row)
            del whole[max_length:]
    numbers = {task: number for number, task in enumerate(tasks)}
    return TokenTable(wholes, [len(p) for p in prompts], [numbers[example.task] for example in examples], tasks)


def prompt_tokens(prompt: str | Messages, tokenizer: Any) -> list[int]:
    """What a model is given to answer."""
    return _prompts([prompt], tokenizer)[0] if isinstance(prompt, str) else _conversation(prompt, tokenizer, True)


def _tokens(examples: Sequence[Example], tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Of each example the prompt's tokens, and all."""
    plain = [row for row, example in enumerate(examples) if isinstance(example.prompt, str)]
    prompts: list[list[int]] = [[]] * len(examples)
    wholes: list[list[int]] = [[]] * len(examples)
    if plain:  # at once, which tokenisers do faster
        given = _prompts([str(examples[row].prompt) for row in plain], tokenizer)
        answers = tokenizer([examples[row].completion for row in plain], add_special_tokens=False)["input_ids"]
        for row, prompt, answer in zip(plain, given, answers, strict=True):
            prompts[row], wholes[row] = prompt, [*prompt, *answer, tokenizer.eos_token_id]
    for row, example in enumerate(examples):
        if isinstance(example.prompt, str) or isinstance(example.completion, str):
            continue
        if tokenizer.chat_template is None:
            raise example.error("expected a tokenizer with a chat template for messages, found one without", row)
        prompt = _conversation(example.prompt, tokenizer, True)
        whole = _conversation([*example.prompt, *example.completion], tokenizer, False)
        if whole[: len(prompt)] != prompt:
            raise example.error(
                "expected a chat template under which a conversation begins with its prompt, found one that changes "
                "earlier messages when an answer is added",
                row,
            )
        prompts[row], wholes[row] = prompt, whole
    return prompts, wholes


def _prompts(prompts: list[str], tokenizer: Any) -> list[list[int]]:
    """With what the tokeniser puts before a text, without the end that some put after it."""
    encoded = tokenizer(prompts)["input_ids"]
    return [list(ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids) for ids in encoded]


def _conversation(messages: Messages, tokenizer: Any, prompt: bool) -> list[int]:
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False))
    except Exception as error:  # templates raise what they like
        raise DataError(f"the tokenizer's chat template refuses a conversation: {error}") from error
