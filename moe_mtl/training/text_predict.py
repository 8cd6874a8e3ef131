"""Prompts in, answers out: greedy decoding in batches, the same for a language model, an adapter and one task of it.

Shapes: `B` prompts of a batch, `L` tokens of the longest.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from ..data import DataError
from ..data.instruct import Prompt, read_prompts
from ..data.text import prompt_tokens
from ..naming import nearest
from .text_run import chat_of, load_text
from .text_trainer import named, pad_token, task_keyword


def predict_text(
    folder: Path,
    path: str,
    task: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Answers of a saved language model or adapter, in the order of the lines.

    Args:
        folder: of the model.
        path: JSON lines with `prompt` or `messages`, and `task` unless `task` is given.
        task: of all prompts; those that say one say the same.
        batch_size: prompts at a time.
        max_new_tokens: of the longest answer.
        progress: show a bar, if the error stream is a terminal.

    Yields:
        the line's own fields, with `completion`.

    Raises:
        DataError: a malformed line, one of another task than asked for, with its number; a task that the adapter does
            not know; before anything is answered.
    """
    prompts = read_prompts(path, task, chat_of(folder))
    model, tokenizer, known = load_text(folder)
    for prompt in prompts:
        if known is not None and prompt.task not in known:
            near = nearest(str(prompt.task), known)
            raise DataError(f"{prompt.where}: task: expected one of {', '.join(known)}, found {prompt.task!r}{near}")
    show = progress and sys.stderr.isatty()
    with tqdm(total=len(prompts), unit="prompt", disable=not show) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            for prompt, answer in zip(batch, _answers(model, tokenizer, known, batch, max_new_tokens), strict=True):
                yield prompt.fields | {"completion": answer}
            bar.update(len(batch))


@torch.inference_mode()
def _answers(
    model: Any, tokenizer: Any, known: list[str] | None, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[str]:
    ids = [prompt_tokens(prompt.text, tokenizer) for prompt in prompts]
    longest, pad = max(map(len, ids)), pad_token(tokenizer)
    inputs = {
        "input_ids": torch.tensor([[pad] * (longest - len(one)) + one for one in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids]),
    }
    if known is not None:
        inputs["tasks"] = torch.tensor([known.index(str(prompt.task)) for prompt in prompts])
        inputs = named(inputs, task_keyword(model), len(known))
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    # The likeliest token each time, as evaluation has it: nothing of what the base model's own settings would change.
    eos = model.generation_config.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id if eos is None else eos,
    )
    found = model.generate(**inputs, generation_config=settings)
    return tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
